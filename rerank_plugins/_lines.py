"""Files of lines: plain or gzip, read line by line with a limit on each."""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rerank_plugins._printable import parse_json
from rerank_plugins.errors import InputError

__all__ = ["LONGEST_LINE", "columns_of_csv", "found_keys", "read_lines", "read_objects"]

LONGEST_LINE = 1 << 24
"""Bytes of a line. Longer ones are no text that a model could read, and a few of them fill the memory."""


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank; ``.gz`` is unpacked, a byte order mark left out.

    Bytes that are no UTF-8 become U+FFFD.

    Raises:
        InputError: The file cannot be read, is no text, or has a line of more than `LONGEST_LINE` bytes.
    """
    path = Path(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
            number = 0
            while line := raw.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise InputError(
                        f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MiB. Expected one record a line; "
                        "is this one large JSON array, or not a text file?"
                    )
                if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise InputError(f"{path} is UTF-16. Expected UTF-8: save it as that.")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
                if text.strip():
                    yield number, text.rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {_why(error)}") from error


def _why(error: Exception) -> str:
    return "permission denied." if isinstance(error, PermissionError) else str(error)


def read_objects(path: str | os.PathLike[str], expected: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The JSON object of each line, and where it stands, as ``FILE, line 3``.

    Args:
        path: The file.
        expected: What a line should be, for messages, such as ``{"_id", "text"}``.

    Raises:
        InputError: A line is no JSON object; see also `read_lines`.
    """
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{where}: not valid JSON ({error}). {_advice(number, line, expected)}") from error
        if not isinstance(row, dict):
            kind = "a JSON array" if isinstance(row, list) else type(row).__name__
            raise InputError(f"{where}: expected an object {expected} on each line, got {kind}.")
        yield row, where


def _advice(number: int, line: str, expected: str) -> str:
    if number == 1 and (columns := columns_of_csv(line)):
        return (
            f"This looks like CSV, with the columns {', '.join(columns)}. Expected JSON lines: an object {expected} "
            "on each line."
        )
    if (number == 1 and line.strip() in ("[", "{")) or line.strip().startswith("[{"):
        return f"This looks like JSON over several lines. Expected JSON lines: an object {expected} on each line."
    return f"Expected an object {expected} on each line."


def columns_of_csv(line: str) -> list[str]:
    """The names in the first line of a file that looks like CSV or tab-separated values; empty for other lines."""
    for delimiter in ("\t", ",", ";"):
        cells = next(csv.reader(io.StringIO(line.strip()), delimiter=delimiter), [])
        if len(cells) > 1 and all(cell.replace("-", "_").isidentifier() for cell in cells):
            return cells
    return []


def found_keys(row: dict[str, Any], needed: Sequence[str]) -> str:
    """What to say of an object that lacks keys: those needed, and those found; empty where it lacks none."""
    lacking = [key for key in needed if key not in row]
    if not lacking:
        return ""
    found = ", ".join(str(key)[:40] for key in list(row)[:20]) or "none"
    return f"lacks {' and '.join(map(repr, lacking))}; keys found: {found}"
