"""Renders a chat template, as a program of its own: a template of a stranger may compute for ever or fill the memory.

Reads JSON from standard input, ``{"template", "variables", "conversations", "most", "seconds"}``, and writes
``{"texts"}`` or ``{"error"}``. Imports nothing of this package, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from typing import Any

MEMORY = 1 << 30


def _environment(most: int) -> Any:
    """The environment in which transformers renders chat templates, with a limit on products."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    class Limited(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
            if operator == "**" or sizes[0] * sizes[1] > most:
                raise jinja2.TemplateError(f"{operator} makes too much")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = Limited(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _limit(seconds: int) -> None:
    try:
        import resource
    except ImportError:
        return
    # Not every system has both; the parent watches the clock in any case.
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, seconds)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))


def main() -> None:
    """Render what standard input asks for."""
    asked = json.load(sys.stdin)
    _limit(asked["seconds"])
    try:
        environment = _environment(asked["most"])
        template = environment.from_string(asked["template"])
        texts = []
        for messages in asked["conversations"]:
            parts, size = [], 0
            for part in template.generate(messages=messages, **asked["variables"]):
                parts.append(part)
                size += len(part)
                if size > asked["most"]:
                    raise ValueError(f"it makes more than {asked['most']} characters")
            texts.append("".join(parts))
        answer: dict[str, Any] = {"texts": texts}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except ImportError as error:
        answer = {"missing": str(error)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
