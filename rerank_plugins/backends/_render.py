"""Renders a chat template, as a program of its own: a template of a stranger may compute for ever or fill the memory.

Reads JSON from standard input, ``{"template", "variables", "conversations", "most", "seconds"}``, and writes
``{"texts", "plain"}`` or ``{"error"}``. Imports nothing of this package, so that it starts quickly.
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


_TAKES_PARTS = {"first", "last", "list", "map", "rejectattr", "selectattr"}
"""Filters that take messages or their contents, and change none."""
_STRIPS = {"trim", "string", "safe", "default", "d"}
_KINDS = {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence"}
"""Tests whose outcome is the same for all texts."""


class _Contents:
    """Whether a template only puts the contents of messages somewhere, whatever stands in them.

    Args:
        tree: The parsed template.
    """

    def __init__(self, tree: Any) -> None:
        import jinja2.nodes as nodes

        self.nodes = nodes
        self.names: set[str] = set()
        for _ in range(3):
            for node in tree.find_all(nodes.Assign):
                if self.has(node.node):
                    self.names |= {target.name for target in _with_self(node.target, (nodes.Name, nodes.NSRef))}
        conditions = [node.test for node in tree.find_all((nodes.If, nodes.CondExpr))]
        conditions += [node.test for node in tree.find_all(nodes.For) if node.test is not None]
        values = [part for node in tree.find_all(nodes.Output) for part in node.nodes]
        values += [node.node for node in tree.find_all(nodes.Assign)]
        called = list(tree.find_all((nodes.Macro, nodes.CallBlock, nodes.FilterBlock)))
        self.plain = (
            all(self.is_alike(test) for test in conditions)
            and all(self.is_kept(value) for value in values)
            and not any(self.has(node.iter) and not self.is_kept(node.iter) for node in tree.find_all(nodes.For))
            and not any(self.has(node) for node in called)
        )

    def has(self, node: Any) -> bool:
        """Whether the content of a message is part of an expression."""
        n = self.nodes
        for part in _with_self(node, (n.Getattr, n.Getitem, n.Name, n.NSRef, n.Filter)):
            if isinstance(part, n.Getattr) and part.attr in ("content", "text"):
                return True
            if isinstance(part, n.Getitem) and isinstance(part.arg, n.Const) and part.arg.value in ("content", "text"):
                return True
            if isinstance(part, n.Name | n.NSRef) and part.name in self.names:
                return True
            if isinstance(part, n.Filter) and any(
                isinstance(pair.value, n.Const) and pair.value.value == "content" for pair in part.kwargs
            ):
                return True
        return False

    def is_alike(self, node: Any) -> bool:
        """Whether a condition has the same outcome for all texts that are not empty."""
        n = self.nodes
        if not self.has(node) or isinstance(node, n.Name | n.Getattr):
            return True
        if isinstance(node, n.Getitem):
            return not isinstance(node.arg, n.Slice)
        if isinstance(node, n.Not | n.And | n.Or):
            return all(self.is_alike(part) for part in node.iter_child_nodes())
        if isinstance(node, n.Test):
            return node.name in _KINDS
        return isinstance(node, n.Filter) and node.name in _TAKES_PARTS | _STRIPS and self.is_alike(node.node)

    def is_kept(self, node: Any) -> bool:
        """Whether an expression has contents as they are, or stripped."""
        n = self.nodes
        if not self.has(node) or isinstance(node, n.Name | n.NSRef):
            return True
        if isinstance(node, n.Getattr):
            return self.is_kept(node.node)
        if isinstance(node, n.Getitem):
            return not isinstance(node.arg, n.Slice) and self.is_kept(node.node)
        if isinstance(node, n.Filter):
            return node.name in _TAKES_PARTS | _STRIPS and self.is_kept(node.node)
        if isinstance(node, n.Call):
            return isinstance(node.node, n.Getattr) and node.node.attr == "strip" and not node.args
        if isinstance(node, n.CondExpr):
            return all(self.is_kept(part) for part in (node.expr1, node.expr2) if part is not None)
        return isinstance(node, n.Concat | n.Add) and all(self.is_kept(part) for part in node.iter_child_nodes())


def _with_self(node: Any, kinds: Any) -> list[Any]:
    return [*([node] if isinstance(node, kinds) else []), *node.find_all(kinds)]


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
        plain = _Contents(environment.parse(asked["template"])).plain
        texts = []
        for messages in asked["conversations"]:
            parts, size = [], 0
            for part in template.generate(messages=messages, **asked["variables"]):
                parts.append(part)
                size += len(part)
                if size > asked["most"]:
                    raise ValueError(f"it makes more than {asked['most']} characters")
            texts.append("".join(parts))
        answer: dict[str, Any] = {"texts": texts, "plain": plain}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except ImportError as error:
        answer = {"missing": str(error)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
