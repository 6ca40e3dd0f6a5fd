"""The JSON files of a model directory, read against bounds: whoever wrote them may be anybody."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rerank_plugins.errors import ModelLoadError

__all__ = ["JsonFile", "shortened"]

MAX_BYTES = 64 << 20
"""Size of a configuration file; those of real models have some kilobytes, with a chat template some ten."""
MAX_DEPTH = 64
"""Levels of lists and objects in each other; real ones have at most ten."""
MAX_LABELS = 4096
MAX_PROMPT = 20_000
"""Characters of a prompt, more than any model takes tokens for it."""
MAX_TEMPLATE = 200_000
"""Characters of a chat template; long ones of real models have 20,000."""

_COUNT = re.compile(r"(num|n)_.*|.*_(layers|heads|groups|experts)|depth|layers")
_MAX_COUNT = 100_000
"""Layers, heads and the like: a model is built one after the other of them before its weights are looked at."""
_MAX_SIZE = 2**31 - 1


def shortened(value: object, most: int = 80) -> str:
    """A value as a message shows it, in one line."""
    if isinstance(value, dict | list) and len(value) > 20:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


class JsonFile:
    """An object in a JSON file of a model; empty where there is no such file.

    Args:
        path: The file.
        model: The model's name, for messages.
        listed: Whether the file holds a list, which is then `items`.

    Raises:
        ModelLoadError: It cannot be read, or is no JSON of a bearable size and depth.
    """

    def __init__(self, path: Path, model: str, *, listed: bool = False) -> None:
        self.path = path
        self.model = model
        self.values: dict[str, Any] = {}
        self.items: list[Any] = []
        content = self._content()
        if content is None:
            return
        value = self._parsed(content)
        if not isinstance(value, list if listed else dict):
            raise self.wrong(None, "a JSON array" if listed else "a JSON object", value)
        if isinstance(value, dict):
            self.values = value
        else:
            self.items = value

    def _content(self) -> bytes | None:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise ModelLoadError(f"{self.path} of {self.model!r} has more than {MAX_BYTES >> 20} MiB.")
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ModelLoadError(f"{self.path} of {self.model!r} cannot be read: {error}") from error

    def _parsed(self, content: bytes) -> Any:
        if content.startswith(b"version https://git-lfs"):
            raise ModelLoadError(
                f"{self.path} of {self.model!r} is a Git LFS pointer, not the file itself. Fetch the files with: "
                "git lfs pull"
            )
        try:
            value = json.loads(content)
        except RecursionError:
            raise ModelLoadError(f"{self.path} of {self.model!r} is nested too deeply.") from None
        except ValueError as error:
            raise ModelLoadError(
                f"{self.path} of {self.model!r} cannot be read: it is not valid JSON: {error}"
            ) from error
        if _depth(value) > MAX_DEPTH:
            raise ModelLoadError(f"{self.path} of {self.model!r} is nested too deeply: more than {MAX_DEPTH} levels.")
        return value

    def wrong(self, key: str | None, expected: str, value: object) -> ModelLoadError:
        """The error for a value that is not what it should be."""
        where = f"{key!r} of {self.path}" if key is not None else str(self.path)
        return ModelLoadError(f"{where} of {self.model!r} must be {expected}; got {shortened(value)}.")

    def get(self, key: str) -> Any:
        """The raw value; None where there is none."""
        return self.values.get(key)

    def integer(self, key: str, least: int = 0, most: int = _MAX_SIZE) -> int | None:
        """A whole number; None where there is none. A float without a fraction counts."""
        value = self.get(key)
        if value is None:
            return None
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}", value)
        return int(value)

    def text(self, key: str, most: int = 4096) -> str | None:
        """A string; None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(key, "a string", value)
        if len(value) > most:
            raise self.wrong(key, f"a string of at most {most} characters", value)
        return value

    def flag(self, key: str) -> bool:
        """A truth value; False where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return bool(value)

    def texts(self, key: str, most: int = 64) -> list[str]:
        """A list of strings; empty where there is none."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > most or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, f"a list of at most {most} strings", value)
        return list(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; empty where there is none."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object", value)
        return value

    def nested(self, *keys: str) -> dict[str, Any]:
        """An object in objects; empty where there is none."""
        value: Any = self.values
        for depth, key in enumerate(keys):
            value = value.get(key)
            if value is None:
                return {}
            if not isinstance(value, dict):
                raise self.wrong(".".join(keys[: depth + 1]), "an object", value)
        return dict(value)

    def labels(self) -> tuple[str, ...] | None:
        """Class names by column, of ``id2label``, or made of ``num_labels``; None where neither is there."""
        count = self.integer("num_labels", 1, MAX_LABELS)
        names = self.get("id2label")
        if names is None:
            return None if count is None else tuple(f"LABEL_{i}" for i in range(count))
        if not isinstance(names, dict) or not 1 <= len(names) <= MAX_LABELS:
            raise self.wrong("id2label", f"an object of 1 to {MAX_LABELS} class names", names)
        columns = {str(key): name for key, name in names.items()}
        if set(columns) != {str(i) for i in range(len(columns))}:
            raise self.wrong("id2label", f"class names by column, '0' to '{len(columns) - 1}'", names)
        if not all(isinstance(name, str | int) and len(str(name)) <= 1000 for name in columns.values()):
            raise self.wrong("id2label", "class names of at most 1000 characters", names)
        return tuple(str(columns[str(i)]) for i in range(len(columns)))

    def check_numbers(self) -> None:
        """Refuse numbers that no model has: one is built by them before its weights are looked at.

        Raises:
            ModelLoadError: A count or size is negative or absurd.
        """
        for key, value in _leaves(self.values):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            name = key.rpartition(".")[2]
            if _COUNT.fullmatch(name) and not -1 <= value <= _MAX_COUNT:
                raise self.wrong(key, f"a number from 0 to {_MAX_COUNT}", value)
            if name.endswith(("_size", "_dim", "_positions", "_token_id")) and not -1 <= value <= _MAX_SIZE:
                raise self.wrong(key, f"a number from 0 to {_MAX_SIZE}", value)


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        depth += 1
        if depth > MAX_DEPTH:
            break
    return depth
