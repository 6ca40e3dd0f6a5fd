"""An evaluation as one HTML file, which opens without a network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape as _html_escape

from rerank_plugins import __version__
from rerank_plugins._paths import write_file
from rerank_plugins._printable import printable
from rerank_plugins._secrets import without_passwords
from rerank_plugins.evaluation._results import DatasetResult, Evaluation, ModelResult
from rerank_plugins.evaluation._svg import Point, escape, gains_plot, moves_plot, quality_plot
from rerank_plugins.evaluation.measures import means
from rerank_plugins.evaluation.wording import facts_text, interval_text, p_text, tested_text, value_text, verdict

_EXAMPLES = 5
_SHOWN = 3
_EXCERPT = 400
_RANGES = ((1, 1), (2, 3), (4, 10), (11, 20), (21, 50), (51, 100))

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c6670; --line: #d8dde2; --paper: #fff; --panel: #f5f7f9;
  --gain: #0072b2; --loss: #d55e00; --stay: #8a949e; --shade: rgb(0 0 0 / 35%); }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8eb; --soft: #9aa5af; --line: #3a4148; --paper: #16191c;
  --panel: #1f2428; --gain: #4aa8e0; --loss: #f08a3c;
  --shade: rgb(255 255 255 / 35%); } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 78rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { text-align: right; padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); white-space: nowrap;
  overflow-wrap: normal; }
th.name, td.name { text-align: left; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
/* Shadows at the edges tell that a table or plot goes on there; they vanish at its end. */
.scroll { overflow-x: auto; overscroll-behavior-x: contain; margin: 0.5rem 0;
  background: linear-gradient(to right, var(--paper) 30%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--paper) 30%, transparent) right / 3rem 100% no-repeat local,
    radial-gradient(farthest-side at 0 50%, var(--shade), transparent) left / 1rem 100% no-repeat scroll,
    radial-gradient(farthest-side at 100% 50%, var(--shade), transparent) right / 1rem 100% no-repeat scroll; }
.hint { display: none; } .soft { color: var(--soft); } code { font: 0.9em ui-monospace, monospace; }
.gained { color: var(--gain); } .lost { color: var(--loss); }
svg { width: 100%; min-width: 600px; height: auto; display: block; font: 13px system-ui, sans-serif; }
svg text { fill: var(--ink); unicode-bidi: isolate; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.first { stroke: var(--stay); stroke-width: 2; }
.ceiling { stroke: var(--stay); stroke-width: 2; stroke-dasharray: 5 4; }
.gain { fill: var(--gain); } .loss { fill: var(--loss); } .stay { fill: var(--stay); }
details { background: var(--panel); border-radius: 6px; padding: 0.5rem 0.8rem; margin: 0.5rem 0; }
summary { cursor: pointer; } .columns { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.columns > div { min-width: 0; }
.columns ol { padding-left: 1.4rem; margin: 0.3rem 0; } .columns li { margin-bottom: 0.5rem; }
.grade { font-weight: 600; }
@media (max-width: 46rem) { .columns { grid-template-columns: 1fr; } .hint { display: block; font-size: 0.85rem; } }
"""


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
    """
    write_file(path, report_html(evaluation, command=command))


def report_html(evaluation: Evaluation, *, command: str | None = None) -> str:
    """The HTML of `write_report`."""
    many = len(evaluation.datasets) > 1
    body = [_summary(evaluation)] if many else []
    corrected = evaluation.corrected()
    body += [_dataset(result, corrected) for result in evaluation.datasets]
    verdicts = "".join(
        f"<li>{_verdict(result, model)}</li>" for result in evaluation.datasets for model in result.models
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Does reranking help?</title><style>{_STYLE}</style></head><body>"
        f"<h1>Does reranking help?</h1>{_made(evaluation, command)}<ul>{verdicts}</ul>"
        f"<p>{escape(tested_text(evaluation))}</p>"
        f"{''.join(body)}{_NOTES}</body></html>\n"
    )


def _made(evaluation: Evaluation, command: str | None) -> str:
    """When, by what, and on what."""
    names = ", ".join(_foreign(result.name) for result in evaluation.datasets)
    parts = [
        f"Data: {names}",
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        f"rerank-plugins {__version__}",
    ]
    line = f"<p class=soft>{'; '.join(parts)}.</p>"
    if command is not None:
        line += f"<p class=soft>Made by: <code>{_foreign(without_passwords(command))}</code></p>"
    return line


_NOTES = """<h2>How to read this</h2>
<ul>
<li>Every model re-sorts the candidates that the first stage found; both orders are measured over the same candidates.
The <b>ceiling</b> is the best order that these candidates allow: relevant documents that the first stage did not find
are out of reach.</li>
<li>A query counts if its judgements name a relevant document (a grade above 0). Queries without judgements, or with
none that is relevant, are left out, and counted above. A query without candidates counts as 0. A document without a
judgement counts as not relevant.</li>
<li>Intervals and p-values are of a paired t-test over queries, two-sided, at 95 %, not corrected for the number of
models and measures, but for the column "p, Holm".</li>
<li>Times are of one query after the other, each with all its candidates, after a first call to warm up. Those without a
mark were measured by the run that made this report. Those marked "earlier run", and hollow dots in the plot, were kept
from a run before, perhaps under another load: do not compare them with the others.</li>
</ul>"""


def _foreign(text: str) -> str:
    """A text that may be in any language and hold anything, set apart from what stands beside it."""
    return f"<bdi>{_html_escape(printable(text))}</bdi>"


def _short(name: str) -> str:
    """An id or a model's name; a long one without its middle."""
    return _foreign(name if len(name) <= 60 else f"{name[:40]}…{name[-16:]}")


def _verdict(result: DatasetResult, model: ModelResult) -> str:
    measure = result.measures[0]
    found = model.comparisons[measure]
    words = (
        "<b>changes nothing</b> in"
        if found.same == len(result.queries)
        else {
            "better": '<b class="gained">improves</b>',
            "worse": '<b class="lost">worsens</b>',
            "unclear": "<b>makes no clear difference</b> to",
        }[verdict(found)]
    )
    return (
        f"<b>{_foreign(model.name)}</b> {words} {escape(measure)} on {_foreign(result.name)}: "
        f"{value_text(found.before)} → {value_text(found.after)} "
        f"(95 % interval of the difference {interval_text(found)}, p {p_text(found.p_value)}); "
        f"{found.better} queries better, {found.worse} worse, {found.same} the same."
    )


_HINT = '<div class="hint soft">More to the right: scroll sideways. →</div>'


def _scrolling(content: str) -> str:
    return f'{_HINT}<div class="scroll" tabindex="0">{content}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=name' if place < names else ''}>{cell}</{tag}>" for place, cell in enumerate(row)
        )

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return _scrolling(f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{lines}</tbody></table>")


def _summary(evaluation: Evaluation) -> str:
    names = [("first stage", None), *((name, name) for name in evaluation.model_names)]
    rows = [
        [_short(label), *(value_text(evaluation.mean(measure, name)) for measure in evaluation.measures)]
        for label, name in names
    ]
    head = ["", *(escape(measure) for measure in evaluation.measures)]
    return f"<h2>Mean over {len(evaluation.datasets)} data sets</h2>{_table(head, rows)}"


def _dataset(result: DatasetResult, corrected: Mapping[tuple[str, str, str], float | None]) -> str:
    first, ceiling, plotted = means(result.first), means(result.ceiling), result.measures[0]
    rows = []
    for model in result.models:
        for place, (measure, found) in enumerate(model.comparisons.items()):
            style = {"better": "gained", "worse": "lost", "unclear": ""}[verdict(found)]
            rows.append(
                [
                    _short(model.name) if place == 0 else "",
                    escape(measure),
                    value_text(found.before),
                    f"<b>{value_text(found.after)}</b>",
                    f'<span class="{style}">{found.difference:+.4f}</span>',
                    interval_text(found),
                    escape(p_text(found.p_value)),
                    escape(p_text(corrected[result.name, model.name, measure])),
                    f"{found.better} / {found.worse} / {found.same}",
                    value_text(ceiling[measure]),
                ]
            )
    head = ["model", "measure", "first stage", "reranked", "difference", "95 % interval", "p", "p, Holm",
            "better / worse / same", "ceiling"]  # fmt: skip
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
    plot = quality_plot(points, first[plotted], ceiling[plotted], plotted) if points else ""
    return (
        f"<h2>{_foreign(result.name)}</h2><p class=soft>{_foreign(facts_text(result))}</p>{_table(head, rows, 2)}"
        f"{_speeds(result)}<h3>Quality against latency</h3>{plot and _scrolling(plot)}"
        f"<p class=soft>{escape(plotted)}; the bar is the 95 % interval of the difference to the first stage.</p>"
        + "".join(_model(result, model) for model in result.models)
    )


def _speeds(result: DatasetResult) -> str:
    rows = [
        [
            _short(model.name),
            escape(model.engine or "–"),
            f"{model.speed.queries:,}" + (" (earlier run)" if model.speed.earlier else ""),
            f"{model.speed.documents:,}",
            f"{model.speed.documents_per_s:,.0f}",
            f"{model.speed.p50_s * 1000:,.1f}",
            f"{model.speed.p95_s * 1000:,.1f}",
        ]
        for model in result.models
        if model.speed is not None
    ]
    head = ["model", "engine", "queries timed", "documents", "documents / s", "ms a query, median", "95th percentile"]
    return f"<h3>Speed</h3>{_table(head, rows, 2)}"


def _model(result: DatasetResult, model: ModelResult) -> str:
    measure = result.measures[0]
    before, after = result.first[measure], model.values[measure]
    changes = {query: after[query] - before[query] for query in result.queries}
    order = sorted(result.queries, key=lambda query: changes[query])
    worst = [query for query in order[:_EXAMPLES] if changes[query] < 0]
    best = [query for query in order[::-1][:_EXAMPLES] if changes[query] > 0]
    bars = gains_plot([(result.dataset.queries[query], change) for query, change in changes.items()], measure)
    parts = [f"<h3>{_short(model.name)}: gains and losses</h3>{_scrolling(bars)}", _moves(result, model)]
    for title, queries in (("Worst queries", worst), ("Best queries", best)):
        listed = "".join(_query(result, model, query, measure) for query in queries)
        parts.append(f"<h3>{_short(model.name)}: {title.lower()}</h3>" + (listed or "<p>None.</p>"))
    return "".join(parts)


def _moves(result: DatasetResult, model: ModelResult) -> str:
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
    return (
        f"<h3>{_short(model.name)}: where the relevant documents moved</h3>{_scrolling(moves_plot(counts, labels))}"
        f"<p class=soft>Of {up + down + stayed:,} relevant documents among the candidates {up:,} moved up, "
        f"{down:,} down and {stayed:,} stayed; {missed:,} more are not among the candidates. Blue cells are moves up, "
        "orange ones moves down.</p>"
    )


def _query(result: DatasetResult, model: ModelResult, query: str, measure: str) -> str:
    before, after = result.first[measure][query], model.values[measure][query]
    ranks = {document: rank for rank, document in enumerate(result.candidates.get(query, []), 1)}
    columns = "".join(
        f"<div><b>{title}</b><ol>{''.join(_document(result, query, d, ranks) for d in found[:_SHOWN])}</ol></div>"
        for title, found in (
            ("First stage", result.candidates.get(query, [])),
            ("Reranked", model.rankings.get(query, [])),
        )
    )
    return (
        f"<details><summary>{after - before:+.3f} ({before:.3f} → {after:.3f}) "
        f"<b>{_foreign(_excerpt(result.dataset.queries[query]))}</b></summary>"
        f'<p class=soft>query {_short(query)}</p><div class="columns">{columns}</div></details>'
    )


def _document(result: DatasetResult, query: str, document: str, ranks: dict[str, int]) -> str:
    grade = result.dataset.qrels[query].get(document)
    told = "not judged" if grade is None else f"grade {grade}"
    style = "gained" if grade is not None and grade > 0 else "soft"
    return (
        f'<li><span class="grade {style}">{told}</span> <span class=soft>{_short(document)}, first stage '
        f"{ranks[document]}</span><br>{_foreign(_excerpt(result.dataset.documents[document]))}</li>"
    )


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else text[:_EXCERPT].rstrip() + " …"
