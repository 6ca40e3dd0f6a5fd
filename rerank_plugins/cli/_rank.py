"""`rerank-plugins rank`: candidates in, the same candidates out, best first, with their scores."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

from rerank_plugins.cli._options import Backend, Label, Model, Revision, TrustRemoteCode, class_label

__all__ = ["rank", "read_rows"]


def rank(
    query: Annotated[str, typer.Argument(help="What the candidates are ranked for.")],
    file: Annotated[
        typer.FileBinaryRead,
        typer.Argument(help='JSON lines {"text": ..., "id"?: ..., ...} or plain lines of text, in UTF-8; - for stdin.'),
    ],
    top_n: Annotated[int | None, typer.Option(min=1, help="Keep the best this many.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Keep those that score at least this.")] = None,
    model: Model = None,
    backend: Backend = "auto",
    scale: Annotated[Literal["probability", "logit"], typer.Option(help="What a score means.")] = "probability",
    label: Label = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Most tokens of a query and a text together.")] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16", "int8"], typer.Option(help="Number format.")] = "auto",
    instruction: Annotated[str | None, typer.Option(help="Task description, for models that take one.")] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Rank the lines of a file for a query.

    Writes one JSON line for each candidate, best first: all its own fields, and "score", "rank" and
    "first_stage_rank" (its place among the candidates of the file).

    A line that cannot be read is named by its number on standard error; all others are ranked and written, and the
    exit code is 2.
    """
    rows, problems = read_rows(file.read())
    for number, problem in problems:
        typer.echo(f"Error: line {number}: {problem}", err=True)

    from rerank_plugins import Candidate, Reranker

    reranker = Reranker(
        model,
        backend=backend,
        precision=precision,
        max_length=max_length,
        scale=scale,
        label=class_label(label),
        revision=revision,
        trust_remote_code=trust_remote_code,
        instruction=instruction,
    )
    ranking = reranker.rank(query, [Candidate(row["text"]) for row in rows], top_n, min_score)
    for item in ranking:
        scored = {
            **rows[item.index],
            "score": item.score,
            "rank": item.rank,
            "first_stage_rank": item.first_stage_rank,
        }
        typer.echo(_json_line(scored))
    if problems:
        raise typer.Exit(2)


def read_rows(data: bytes) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Read candidates from lines.

    A line that starts with ``{`` is a JSON object with a string ``"text"``. Any other line is a text, unless the
    first line or most lines of the file start with ``{``: among JSON lines it can only be a broken one. Blank lines
    are left out.

    Args:
        data: The file, in UTF-8, with or without a byte order mark, with any line ends.

    Returns:
        The objects, in the order of the file, and what is wrong with each other line: its number, from 1, and why.
    """
    lines = [line.removesuffix(b"\r") for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    objects = [line.lstrip().startswith(b"{") for _, line in numbered]
    only_json = bool(objects) and (objects[0] or 2 * sum(objects) > len(objects))
    rows: list[dict[str, Any]] = []
    problems: list[tuple[int, str]] = []
    for number, line in numbered:
        try:
            rows.append(_row(line.decode("utf-8"), only_json))
        except UnicodeDecodeError as error:
            problems.append((number, f"expected UTF-8, got the byte 0x{line[error.start]:02x} at {error.start}."))
        except (ValueError, RecursionError) as error:
            problems.append((number, str(error)))
    return rows, problems


def _row(line: str, only_json: bool) -> dict[str, Any]:
    if not line.lstrip().startswith("{"):
        if only_json:
            raise ValueError(f'expected a JSON object like {{"text": ...}}, as on the other lines; got {line[:60]!r}.')
        return {"text": line}
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(row.get("text"), str):
        got = f"fields {', '.join(map(repr, row))}" if "text" not in row else f'"text" is {row["text"]!r:.60}'
        raise ValueError(f'expected a string in the field "text"; got {got}.')
    return dict(row)


def _json_line(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # A lone surrogate, which JSON can escape and UTF-8 cannot hold.
        return json.dumps(value).encode()
