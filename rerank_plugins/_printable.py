"""The one place that makes foreign text safe to show: on a terminal, in a report, in a line of JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

__all__ = ["json_text", "parse_json", "printable"]

_HIDDEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff"
"""Controls (C0, DEL, C1), bidirectional controls, line and paragraph separators, lone surrogates."""
_IN_TEXT = re.compile(f"[\\t{_HIDDEN}]")
_IN_LINE = re.compile(f"[\\t\\n{_HIDDEN}]")
_IN_JSON = re.compile(f"[{_HIDDEN}]")
_NAMED = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def printable(text: str, *, one_line: bool = False) -> str:
    """A text without characters that act on a terminal or change the order in which others are read.

    They are shown as Python writes them, such as ``\\x1b`` and ``\\u202e``; line ends stay unless `one_line` is set.
    """
    return (_IN_LINE if one_line else _IN_TEXT).sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    return _NAMED.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON in which all that `printable` would change is escaped, so that it reads back the same.

    Raises:
        ValueError: A number in it is not finite, which JSON cannot hold.
    """
    # Outside of strings, JSON has none of these characters but line ends.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def parse_json(text: str | bytes) -> Any:
    """Read JSON as its standard has it: without ``NaN``, ``Infinity`` and numbers beyond float64.

    Raises:
        ValueError: It is no such JSON, is not UTF-8, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value; write null, or leave the field out")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value
