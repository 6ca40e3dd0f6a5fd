"""`rerank-plugins rank`: candidates in, the same candidates out, best first, with their scores."""

from __future__ import annotations

import csv
import io
import re
from typing import Annotated, Any

import typer

from rerank_plugins._lines import columns_of_csv, found_keys
from rerank_plugins._printable import json_text, parse_json
from rerank_plugins.cli._options import takes_settings
from rerank_plugins.cli._screen import echo, write_json
from rerank_plugins.errors import InputError

__all__ = ["rank", "read_rows"]

_ARRAY = re.compile(r"\[\s*(?:[\[\]{\"]|$)")
"""The beginning of a JSON array, which a line of text such as "[1] Introduction" is not."""


@takes_settings(
    "model",
    "backend",
    "scale",
    "label",
    "max_length",
    "precision",
    "instruction",
    "passage_length",
    "spans",
    "revision",
    "trust_remote_code",
)
def rank(
    query: Annotated[str, typer.Argument(help="What the candidates are ranked for.")],
    file: Annotated[
        typer.FileBinaryRead,
        typer.Argument(
            help='JSON lines {"text": ..., "id"?: ..., ...}, a JSON array of such objects, CSV with a column "text", '
            "or plain lines of text, in UTF-8; - for stdin."
        ),
    ],
    top_n: Annotated[int | None, typer.Option(min=1, help="Keep the best this many.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Keep those that score at least this.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Keep the best ones until their tokens exceed this.")
    ] = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="Leave of each text its relevant sentences or windows alone.")
    ] = False,
    **chosen: Any,
) -> None:
    """Rank the candidates in a file for a query.

    Writes one JSON line for each candidate, best first: all its own fields, and "score", "rank" and
    "first_stage_rank" (its place among the candidates of the file). With --spans, --passage-length or --compress also
    "spans", a list of [start, end, score] in characters, best first; with --compress "excerpt", what is left of the
    text.

    A candidate that cannot be read is named by its place on standard error; all others are ranked and written, and the
    exit code is 2.
    """
    rows, problems = read_rows(file.read(), str(getattr(file, "name", "")))
    for where, problem in problems:
        echo(f"Error: {where}: {problem}", err=True)

    from rerank_plugins import Candidate, Reranker

    candidates = [Candidate(row["text"]) for row in rows]
    ranking = Reranker(**chosen).rank(query, candidates, top_n, min_score, max_tokens=max_tokens, compress=compress)
    with_spans = compress or chosen["spans"] is not None or chosen["passage_length"] is not None
    for item in ranking:
        scored = {
            **rows[item.index],
            "score": item.score,
            "rank": item.rank,
            "first_stage_rank": item.first_stage_rank,
            **({"spans": [list(span) for span in item.spans]} if with_spans else {}),
            **({"excerpt": item.excerpt} if compress else {}),
        }
        write_json(json_text(scored))
    if problems:
        raise typer.Exit(2)


def read_rows(data: bytes, name: str = "") -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Read candidates: JSON lines, a JSON array, CSV with a header, or lines of text.

    Among lines, one that starts with ``{`` is a JSON object with a string ``"text"``. Any other line is a text, unless
    the first line or most lines of the file start with ``{``: among JSON lines it can only be a broken one. Blank lines
    are left out. In a JSON array a string is a text too. CSV, also with semicolons or tabs, is known by a first line of
    names, one of which is ``text``, or by the file's name.

    Args:
        data: The file, in UTF-8, with or without a byte order mark, with any line ends.
        name: Its name, if it has one.

    Returns:
        The objects, in the order of the file, and what is wrong with each other one: where it stands, such as
        ``"line 3"``, and why.

    Raises:
        InputError: The file as a whole cannot be read: another encoding, an array that is cut off, CSV without texts.
    """
    _check_encoding(data)
    data = data.removeprefix(b"\xef\xbb\xbf")
    start = data[:4096].lstrip().decode("utf-8", "replace")
    first = start.partition("\n")[0].rstrip("\r")
    if start.startswith("[") and (_ARRAY.match(start) or _is_json(data)):
        items = _json(data, "a JSON array")
        return _taken([(f"item {number}", item) for number, item in enumerate(items, 1)])
    if first.strip() == "{" and "\n" in start:
        return _taken([("the object", _json(data, "a JSON object over several lines"))])
    named = name.lower().endswith((".csv", ".tsv"))
    if named or columns_of_csv(first):
        table = _table(data, first, named)
        if table is not None:
            return table
    return _lines(data)


def _check_encoding(data: bytes) -> None:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError("The candidates are in UTF-16. Expected UTF-8: save the file as that.")
    if data.startswith(b"\x1f\x8b"):
        raise InputError("The candidates are gzip. Unpack them: gzip -dc FILE | rerank-plugins rank QUERY -")
    if b"\0" in data:
        raise InputError("The candidates are no text: there are zero bytes. Expected JSON lines, CSV or lines of text.")


def _json(data: bytes, what: str) -> Any:
    try:
        return parse_json(data)
    except ValueError as error:
        raise InputError(
            f"The candidates look like {what}, which is not valid JSON: {error}. Expected valid JSON, or JSON lines "
            '{"text": ...}.'
        ) from error


def _is_json(data: bytes) -> bool:
    try:
        parse_json(data)
    except ValueError:
        return False
    return True


def _taken(items: list[tuple[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    rows, problems = [], []
    for where, item in items:
        try:
            rows.append({"text": item} if isinstance(item, str) else _checked(item))
        except ValueError as error:
            problems.append((where, str(error)))
    return rows, problems


def _table(data: bytes, first: str, named: bool) -> tuple[list[dict[str, Any]], list[tuple[str, str]]] | None:
    """Candidates of CSV; None where it is text, whose first line only looks like names."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"The candidates are not UTF-8: {error}. Save the file as that.") from error
    delimiter = max("\t,;", key=first.count)
    try:
        cells = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise InputError(f"The candidates look like CSV, which cannot be read: {error}.") from error
    filled = [row for row in cells if any(cell.strip() for cell in row)]
    if not filled:
        return None
    columns = [cell.strip() for cell in filled[0]]
    if "text" not in columns:
        if named or (len(filled) > 1 and all(len(row) == len(columns) for row in filled)):
            raise InputError(
                f'The candidates look like CSV. Expected a column "text"; columns found: {", ".join(columns)[:200]}. '
                "Rename the column that holds the texts."
            )
        return None
    rows, problems = [], []
    for number, row in enumerate(filled[1:], 2):
        if len(row) != len(columns):
            problems.append((f"row {number}", f"expected {len(columns)} columns, got {len(row)}."))
        else:
            rows.append(dict(zip(columns, row, strict=True)))
    return rows, problems


def _lines(data: bytes) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    lines = [line.removesuffix(b"\r") for line in data.split(b"\n")]
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    objects = [line.lstrip().startswith(b"{") for _, line in numbered]
    only_json = bool(objects) and (objects[0] or 2 * sum(objects) > len(objects))
    rows: list[dict[str, Any]] = []
    problems: list[tuple[str, str]] = []
    for number, line in numbered:
        try:
            rows.append(_row(line.decode("utf-8"), only_json))
        except UnicodeDecodeError as error:
            why = f"expected UTF-8, got the byte 0x{line[error.start]:02x} at {error.start}."
            problems.append((f"line {number}", why))
        except ValueError as error:
            problems.append((f"line {number}", str(error)))
    return rows, problems


def _row(line: str, only_json: bool) -> dict[str, Any]:
    if not line.lstrip().startswith("{"):
        if only_json:
            raise ValueError(f'expected a JSON object like {{"text": ...}}, as on the other lines; got {line[:60]!r}.')
        return {"text": line}
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    return _checked(row)


def _checked(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'expected an object like {{"text": ...}} or a string; got {type(row).__name__}.')
    if lacking := found_keys(row, ["text"]):
        raise ValueError(f'expected a string in the field "text"; the object {lacking}.')
    if not isinstance(row["text"], str):
        raise ValueError(f'expected a string in the field "text"; "text" is {row["text"]!r:.60}.')
    return dict(row)
