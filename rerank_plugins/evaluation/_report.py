"""An evaluation as one HTML file, which opens without a network."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rerank_plugins import __version__
from rerank_plugins._extras import import_extra
from rerank_plugins._paths import write_file
from rerank_plugins._printable import printable
from rerank_plugins._secrets import without_passwords
from rerank_plugins.evaluation import wording
from rerank_plugins.evaluation._plots import GAIN, LOSS, Point, gains_plot, moves_plot, quality_plot
from rerank_plugins.evaluation._results import DatasetResult, Evaluation, ModelResult
from rerank_plugins.evaluation.measures import means

_EXAMPLES = 5
_SHOWN = 3
_EXCERPT = 400
_RANGES = ((1, 1), (2, 3), (4, 10), (11, 20), (21, 50), (51, 100))


def write_report(evaluation: Evaluation, path: str | os.PathLike[str], *, command: str | None = None) -> None:
    """Write an evaluation as one HTML file with its plots and its worst and best queries.

    The first measure is the one that is plotted. The file has no script and loads nothing; texts of the data set are
    escaped, stand apart from what is beside them, and have their control characters shown.

    Args:
        evaluation: What to show.
        path: The file; it is replaced if it is there.
        command: The command line that made it, to be shown.

    Raises:
        ConfigurationError: The file cannot be written.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    write_file(path, report_html(evaluation, command=command))


def report_html(evaluation: Evaluation, *, command: str | None = None) -> str:
    """The HTML of `write_report`."""
    jinja: Any = import_extra("jinja2", "eval")
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja.StrictUndefined
    )
    environment.filters |= {
        "foreign": _foreign,
        "short": _short,
        "excerpt": _excerpt,
        "means": means,
        "facts": wording.facts_text,
        "interval": wording.interval_text,
        "p": wording.p_text,
        "value": wording.value_text,
        "verdict": wording.verdict,
    }
    html: str = environment.get_template("report.html.jinja").render(
        evaluation=evaluation,
        measure=evaluation.measures[0],
        corrected=evaluation.corrected(),
        tested=wording.tested_text(evaluation),
        quality=[_quality(result) for result in evaluation.datasets],
        views=[[_view(result, model) for model in result.models] for result in evaluation.datasets],
        command=None if command is None else without_passwords(command),
        made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        version=__version__,
        shown=_SHOWN,
        gain_colour=GAIN,
        loss_colour=LOSS,
    )
    return html


def _foreign(text: str) -> Any:
    """A text that may be in any language and hold anything, set apart from what stands beside it."""
    return import_extra("markupsafe", "eval").Markup("<bdi>{}</bdi>").format(printable(text))


def _short(name: str) -> Any:
    """An id or a model's name; a long one without its middle."""
    return _foreign(name if len(name) <= 60 else f"{name[:40]}…{name[-16:]}")


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else text[:_EXCERPT].rstrip() + " …"


def _quality(result: DatasetResult) -> str:
    """Quality against latency; empty where nothing was timed."""
    plotted = result.measures[0]
    points = [
        Point(
            model.name,
            model.speed.p50_s * 1000,
            found.after,
            None if found.low is None else found.before + found.low,
            None if found.high is None else found.before + found.high,
            model.speed.earlier,
        )
        for model in result.models
        if model.speed is not None
        for found in [model.comparisons[plotted]]
    ]
    return quality_plot(points, means(result.first)[plotted], means(result.ceiling)[plotted], plotted) if points else ""


@dataclass(frozen=True, slots=True)
class _Moves:
    """Where the relevant documents went: how many up, down or nowhere, and how many are no candidates."""

    plot: str
    up: int
    down: int
    stayed: int
    missed: int


@dataclass(frozen=True, slots=True)
class _View:
    """A model on a data set: its plots, and the queries that lost and gained the most, by their ids."""

    gains: str
    moves: _Moves
    worst: list[str]
    best: list[str]


def _view(result: DatasetResult, model: ModelResult) -> _View:
    measure = result.measures[0]
    before, after = result.first[measure], model.values[measure]
    changes = {query: after[query] - before[query] for query in result.queries}
    order = sorted(result.queries, key=lambda query: changes[query])
    return _View(
        gains=gains_plot([(result.dataset.queries[query], change) for query, change in changes.items()], measure),
        moves=_moves(result, model),
        worst=[query for query in order[:_EXAMPLES] if changes[query] < 0],
        best=[query for query in order[::-1][:_EXAMPLES] if changes[query] > 0],
    )


def _moves(result: DatasetResult, model: ModelResult) -> _Moves:
    deepest = max((len(found) for found in result.candidates.values()), default=0)
    ranges = [pair for pair in _RANGES if pair[0] <= deepest]
    if deepest > _RANGES[-1][1]:
        ranges.append((_RANGES[-1][1] + 1, deepest))
    counts = [[0] * len(ranges) for _ in ranges]
    up = down = stayed = missed = 0
    for query in result.queries:
        found = result.candidates.get(query, [])
        old = {document: rank for rank, document in enumerate(found, 1)}
        new = {document: rank for rank, document in enumerate(model.rankings.get(query, []), 1)}
        for document, grade in result.dataset.qrels[query].items():
            if grade <= 0:
                continue
            if document not in old:
                missed += 1
                continue
            was, now = old[document], new[document]
            up, down, stayed = up + (now < was), down + (now > was), stayed + (now == was)
            row, column = (
                next(i for i, (low, high) in enumerate(ranges) if low <= rank <= high) for rank in (was, now)
            )
            counts[row][column] += 1
    labels = [str(low) if low == high else f"{low}–{high}" for low, high in ranges]
    return _Moves(moves_plot(counts, labels), up, down, stayed, missed)
