"""`rerank-plugins demo`: retrieve with FAISS, rerank, and see what moved."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.rule import Rule
from rich.table import Table

from rerank_plugins._printable import json_text
from rerank_plugins.cli._options import Backend, Json, Model
from rerank_plugins.cli._progress import bar, spinner
from rerank_plugins.cli._screen import Screen, styled, write_json
from rerank_plugins.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from rerank_plugins import Reranker
    from rerank_plugins.cli._corpus import Passage
    from rerank_plugins.cli._frameworks import Hit
    from rerank_plugins.cli._index import Embedder, PassageIndex

__all__ = ["demo"]

QUESTIONS = (
    "Which class lets several threads wait until all of them have reached the same point?",
    "Which function splits a string at the last separator?",
    "How can I run another program and read what it prints?",
    "How do I pad a number with zeros?",
)
_SIDE_BY_SIDE = 100
"""Columns from which the two orders stand beside each other."""
_NO_WINDOW = 110
"""Columns of output that goes to a file or a pipe."""
_MOST_ROWS = 20
"""Rows of the first stage that are shown; below them, only what the cross-encoder chose."""


@dataclass(frozen=True, slots=True)
class _Answer:
    question: str
    first_stage: Sequence[Hit]
    reranked: Sequence[Hit]
    search_s: float
    rerank_s: float


def demo(
    question: Annotated[
        str | None, typer.Argument(help="Your question; a few about Python if not given.", show_default=False)
    ] = None,
    docs: Annotated[
        Path | None,
        typer.Option(help="Folder or file of your own texts (.txt .md .rst .html .pdf), instead of Python's manual."),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many passages FAISS retrieves.")] = 20,
    top_n: Annotated[int, typer.Option(min=1, help="How many of them the cross-encoder keeps.")] = 3,
    model: Model = None,
    backend: Backend = "auto",
    framework: Annotated[
        Literal["langchain", "llama-index"],
        typer.Option(help="Whose classes to use; both give the same order."),
    ] = "langchain",
    as_json: Json = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build the index again.")] = False,
) -> None:
    """Search real texts with FAISS, rerank with a cross-encoder, and show both orders side by side.

    The texts are the manual and the docstrings of this Python, or your own with --docs. Their index is built once
    and kept in the user's cache directory. Nothing is downloaded.
    """
    if question is not None and not question.strip():
        raise InputError("The question is blank. Ask one, or leave it out for the built-in ones.")
    if question is None and docs is not None:
        raise ConfigurationError('The built-in questions are about Python. Ask your own: demo "question" --docs PATH')
    questions = QUESTIONS if question is None else (question,)

    from rerank_plugins import Reranker

    started = time.perf_counter()
    reranker = Reranker(model, backend=backend)
    index, embedder, build_s = _open_index(docs, rebuild, Screen(err=True))
    with spinner(f"Loading {reranker.model_name}"):
        from rerank_plugins.cli._frameworks import FRAMEWORKS

        search = FRAMEWORKS[framework](index, embedder, reranker, k=k, top_n=top_n)
        # The first call of an engine is slow; that is part of loading, not of a search.
        embedder.query(questions[0])
        reranker.logits(questions[0], ["warm up"])
    load_s = time.perf_counter() - started - build_s

    for asked in questions:
        began = time.perf_counter()
        found = search.retrieve(asked)
        between = time.perf_counter()
        best = search.rerank(asked)
        answer = _Answer(asked, found, best, between - began, time.perf_counter() - between)
        if as_json:
            facts = {"framework": framework, "k": k, "top_n": top_n, "load_s": round(load_s, 4)}
            write_json(json_text(_facts(answer, index.passages, reranker) | facts))
        else:
            _show(_console(), answer, index.passages)
    if not as_json:
        _show_times(_console(), index, reranker, framework, load_s)


def _open_index(docs: Path | None, rebuild: bool, console: Screen) -> tuple[PassageIndex, Embedder, float]:
    """The index, the embedder, and the seconds that building took."""
    from rerank_plugins.cli._corpus import files_corpus, manual_corpus

    corpus = manual_corpus() if docs is None else files_corpus(docs)
    with spinner("Loading the embedder"):
        from rerank_plugins.cli._index import Embedder, build_index, index_directory, load_index

        _silence_transformers()
        embedder = Embedder()
        directory = index_directory(corpus)
        index = None if rebuild else load_index(directory)
    build_s = 0.0
    if index is None:
        news = f"Building an index of {corpus.name}: once, then it is reused."
        console.print(news, style="dim", soft_wrap=True)
        began = time.perf_counter()
        with bar("Building the index") as tell:
            index = build_index(corpus, embedder, directory, tell)
        build_s = time.perf_counter() - began
        news = f"{_passages(index)} in {build_s:.0f} s" + (f", kept in {directory}" if directory else "")
        console.print(news, style="dim", soft_wrap=True)
    for note in index.notes:
        console.print(f"Note: {note}", style="yellow", soft_wrap=True)
    return index, embedder, build_s


def _console() -> Screen:
    console = Screen()
    # Where there is no window, rich takes 80 columns, too few for two orders.
    return console if console.is_terminal or "COLUMNS" in os.environ else Screen(width=_NO_WINDOW)


def _silence_transformers() -> None:
    """No bars and reports of weights between our own lines."""
    from rerank_plugins._extras import import_extra

    logging: Any = import_extra("transformers", "demo").utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _facts(answer: _Answer, passages: Sequence[Passage], reranker: Reranker) -> dict[str, Any]:
    place = {hit.row: rank for rank, hit in enumerate(answer.first_stage, start=1)}

    def entry(hit: Hit) -> dict[str, Any]:
        return {"id": str(hit.row), "score": hit.score} | {
            "source": passages[hit.row].source,
            "text": passages[hit.row].text,
        }

    return {
        "question": answer.question,
        "model": reranker.model_name,
        "backend": reranker.backend_name,
        "first_stage": [{"rank": rank, **entry(hit)} for rank, hit in enumerate(answer.first_stage, start=1)],
        "reranked": [
            {"rank": rank, "first_stage_rank": place[hit.row], **entry(hit)}
            for rank, hit in enumerate(answer.reranked, start=1)
        ],
        "search_s": round(answer.search_s, 4),
        "rerank_s": round(answer.rerank_s, 4),
    }


def _show(console: Screen, answer: _Answer, passages: Sequence[Passage]) -> None:
    console.print()
    console.print(Rule(styled(answer.question, "bold"), align="left", style="dim"))
    beside = console.width >= _SIDE_BY_SIDE
    gap = 3
    width = (console.width - gap) // 2 if beside else console.width
    shown = min(len(answer.first_stage), _MOST_ROWS)
    lines = max(3, shown // max(1, len(answer.reranked)) - 1) if beside else 4
    first = _first_stage(answer, passages, shown, width)
    second = _reranked(answer, passages, lines, width)
    if beside:
        grid = Table.grid(padding=(0, gap, 0, 0), pad_edge=False)
        grid.add_row(first, second)
        console.print(grid)
    else:
        console.print(first, "", second, sep="\n")
    timing = f"embed and search in {_ms(answer.search_s)}, rerank {len(answer.first_stage)} in {_ms(answer.rerank_s)}"
    console.print(timing, style="dim")


def _first_stage(answer: _Answer, passages: Sequence[Passage], shown: int, width: int) -> Table:
    table = _table("first stage: FAISS, nearest embeddings", width)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("cosine", justify="right", no_wrap=True)
    table.add_column("passage", ratio=1, no_wrap=True, overflow="ellipsis")
    chosen = {hit.row for hit in answer.reranked}
    for rank, hit in enumerate(answer.first_stage, start=1):
        if rank <= shown or hit.row in chosen:
            style = "bold green" if hit.row in chosen else ""
            table.add_row(str(rank), f"{hit.score:.3f}", _one_line(passages[hit.row].text), style=style)
    return table


def _reranked(answer: _Answer, passages: Sequence[Passage], lines: int, width: int) -> Table:
    place = {hit.row: rank for rank, hit in enumerate(answer.first_stage, start=1)}
    table = _table(f"reranked: the cross-encoder's top {len(answer.reranked)}", width)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("was", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("passage", ratio=1)
    room = width - 21
    for rank, hit in enumerate(answer.reranked, start=1):
        passage = passages[hit.row]
        body = styled(_cut(_one_line(passage.text), room, lines))
        if not passage.text.startswith(passage.source):
            body = styled(passage.source, "cyan").append("\n").append_text(body)
        table.add_row(
            styled(str(rank), "bold green"),
            str(place[hit.row]),
            f"{hit.score:.3f}",
            body,
            end_section=True,
        )
    return table


def _table(title: str, width: int) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        width=width,
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="dim",
    )


def _show_times(console: Screen, index: PassageIndex, reranker: Reranker, framework: str, load_s: float) -> None:
    console.print()
    console.print(
        f"{_passages(index)}, {framework}; {reranker.model_name} on {reranker.backend_name} "
        f"({reranker.precision}); loaded in {load_s:.1f} s",
        style="dim",
    )


def _passages(index: PassageIndex) -> str:
    count = len(index.passages)
    return f"{count:,} passage{'' if count == 1 else 's'}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cut(text: str, width: int, lines: int) -> str:
    """The beginning of a text, as much as about `lines` lines hold."""
    room = width * lines - width // 2
    return text if len(text) <= room else text[:room].rsplit(" ", 1)[0] + " …"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
