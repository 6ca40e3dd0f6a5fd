"""`rerank-plugins evaluate`: does reranking help here?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from rerank_plugins._extras import import_extra
from rerank_plugins._paths import cache_directory, write_file
from rerank_plugins._printable import json_text
from rerank_plugins._secrets import without_passwords
from rerank_plugins.cli._options import takes_settings
from rerank_plugins.cli._progress import bar
from rerank_plugins.cli._screen import COMMAND, Screen, echo, styled, write_json
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.evaluation.measures import means, split_measures
from rerank_plugins.evaluation.wording import facts_text, interval_text, p_text, tested_text, verdict
from rerank_plugins.models import BUNDLED_NAME

if TYPE_CHECKING:
    from rerank_plugins import Reranker
    from rerank_plugins.evaluation import DatasetResult, Evaluation, ModelResult, Speed

__all__ = ["evaluate"]

_STYLES = {"better": "green", "worse": "red", "unclear": ""}
_WIDTH = 100
"""Columns at least: figures that wrap are better than figures that are cut."""


@takes_settings("precision", "max_length", "label", "instruction", "device", "revision", "trust_remote_code")
def evaluate(
    context: typer.Context,
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders in BEIR layout: queries.jsonl, corpus.jsonl[.gz], qrels.tsv, and perhaps candidates.tsv. Or "
            'files of JSON lines {"query", "passage", "label"}: all their passages are searched for each query.'
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help=f"Hub id or local directory; may be repeated. The bundled model, {BUNDLED_NAME}, if not given.",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="auto|onnx|openvino|torch",
            help="The engine; may be repeated to compare engines. auto takes the fastest one there is.",
        ),
    ] = None,
    first_stage: Annotated[
        str,
        typer.Option(
            metavar="auto|candidates|bm25|faiss|PATH",
            help="What finds the candidates: candidates (candidates.tsv or candidates-bm25.tsv of the folder), bm25 or "
            "faiss over the corpus, or a file, looked for in each folder first: a TREC run, or, named .tsv, lines of "
            "query id, document id and rank. auto takes the folder's candidates, or else bm25.",
        ),
    ] = "auto",
    top_k: Annotated[int, typer.Option(min=1, help="Candidates of each query that are reranked and measured.")] = 100,
    metrics: Annotated[
        str,
        typer.Option(help="Names of ir-measures; the report plots the first. AP(rel=2) counts grades from 2 on."),
    ] = "nDCG@10 MRR@10 R@10 AP",
    fusion: Annotated[
        str,
        typer.Option(
            help="Measured too, out of the same scores: rrf, and weights of the first stage from 0 to 1. An empty text "
            "leaves it out."
        ),
    ] = "rrf 0.1 0.3 0.5",
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML file with plots, and the best and worst queries.")
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="PATH", help="Write all figures as JSON; - for standard output, without table."),
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Write TREC run files into this directory.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Where scores are kept, so that an interrupted run goes on; the user's cache if not given.",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Score everything anew, whatever was kept.")] = False,
    **chosen: Any,
) -> None:
    """Measure what reranking does to a first stage, on your own queries and judgements.

    For each folder and model: every measure before and after, the difference with its 95 % confidence interval and
    p-value (paired t-test over queries), how many queries got better or worse, the ceiling that the candidates allow
    (their best possible order), documents per second and the time of a query.

    Queries without judgements, or with none above grade 0, are left out of all means, and counted above the table.
    Queries without candidates count as 0; documents without a judgement count as not relevant.

    An evaluation that was interrupted goes on where it stopped. Scores are found again only for the same texts and a
    model that still gives the same ones. Times are of the queries that this run scored; where it found all scores kept,
    they are those of the earlier run, and marked.
    """
    from rerank_plugins import evaluation

    _check_files(report, json_file)
    rerankers = _rerankers(model or [BUNDLED_NAME], backend or ["auto"], chosen)
    with bar("Evaluating") as tell:
        found = evaluation.evaluate(
            folders,
            rerankers,
            first_stage=first_stage,
            top_k=top_k,
            measures=split_measures(metrics),
            fusion=[_way(word) for word in fusion.replace(",", " ").split()],
            work=work or _work_directory(),
            resume=not fresh,
            progress=tell,
        )
    _tell_trained(model or [], folders)
    if json_file != "-":
        _show(found)
    _write(found, json_file, report, runs, context.meta.get(COMMAND))


def _check_files(report: Path | None, json_file: str | None) -> None:
    """Tell what cannot be written before the evaluation rather than after its hours."""
    for path in (report, None if json_file in (None, "-") else Path(str(json_file))):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigurationError(f"{path} cannot be written: expected a file name in a directory that exists.")
    if report is not None:
        for module in ("jinja2", "matplotlib"):
            import_extra(module, "eval")


def _way(word: str) -> str | float:
    try:
        return float(word)
    except ValueError:
        return word


def _write(
    found: Evaluation, json_file: str | None, report: Path | None, runs: Path | None, command: str | None
) -> None:
    """The files that were asked for."""
    from rerank_plugins.evaluation import write_report

    if json_file is not None:
        content = json_text(found.to_dict(), indent=2)
        if json_file == "-":
            write_json(content)
        else:
            write_file(json_file, content + "\n")
    if report is not None:
        write_report(found, report, command=command)
        echo(f"Report: {report}", err=True)
    if runs is not None:
        written = found.write_runs(runs)
        echo(f"Runs: {len(written)} files in {runs}", err=True)


def _tell_trained(names: list[str], folders: list[Path]) -> None:
    """Say which models know the answers."""
    from rerank_plugins.training import is_trained_on

    for name in names:
        for folder in folders:
            if is_trained_on(Path(name), folder):
                echo(
                    f"Warning: {name} was trained on {folder}. Its figures there say nothing about other queries.",
                    err=True,
                )


def _work_directory() -> Path:
    cache = cache_directory()
    if cache is None:
        raise ConfigurationError(
            "There is no home directory to keep scores in. Give a directory: --work PATH, or set RERANK_PLUGINS_CACHE."
        )
    return cache / "evaluate"


def _rerankers(names: list[str], backends: list[str], settings: dict[str, Any]) -> dict[str, Reranker]:
    from rerank_plugins import Reranker

    found: dict[str, Reranker] = {}
    for name in names:
        for backend in backends:
            label = without_passwords(f"{name} [{backend}]" if len(backends) > 1 else name)
            if label in found:
                raise ConfigurationError(f"The model {label!r} was given twice.")
            found[label] = Reranker(**{**settings, "model": name, "backend": backend})
    return found


def _show(found: Evaluation) -> None:
    console = Screen()
    console = Screen(width=max(_WIDTH, console.width if console.is_terminal else _WIDTH))
    for result in found.datasets:
        _show_dataset(console, result)
        if len(found.model_names) > 1:
            rows = [("first stage", means(result.first))]
            rows += [(model.name, means(model.values)) for model in result.models]
            _show_means(console, f"All models on {result.name}", rows)
        for model in result.models:
            _show_fusion(console, result, model)
    if len(found.datasets) > 1:
        names: list[tuple[str, str | None]] = [("first stage", None), *((name, name) for name in found.model_names)]
        overall = [(label, {m: found.mean(m, name) for m in found.measures}) for label, name in names]
        _show_means(console, f"Means over {len(found.datasets)} data sets", overall)
    if tested := tested_text(found):
        console.print(tested, style="dim", soft_wrap=True)


def _show_means(console: Screen, title: str, rows: Sequence[tuple[str, dict[str, float]]]) -> None:
    table = _table(title)
    table.add_column("", overflow="fold")
    for measure in rows[0][1]:
        table.add_column(styled(measure), justify="right")
    for label, values in rows:
        table.add_row(styled(label), *(f"{value:.4f}" for value in values.values()))
    console.print(table)


def _show_dataset(console: Screen, result: DatasetResult) -> None:
    console.print(styled(result.name, style="bold"))
    console.print(styled(facts_text(result)), soft_wrap=True)
    ceiling = means(result.ceiling)
    for model in result.models:
        table = _table(f"{model.name}" + (f" ({model.engine})" if model.engine else ""))
        table.add_column("measure")
        for name in ("before", "after", "change", "95 % interval", "p", "better", "worse", "same", "ceiling"):
            table.add_column(name, justify="right", no_wrap=True)
        for measure, c in model.comparisons.items():
            table.add_row(
                styled(measure),
                f"{c.before:.4f}",
                f"{c.after:.4f}",
                styled(f"{c.difference:+.4f}", style=_STYLES[verdict(c)]),
                interval_text(c),
                p_text(c.p_value),
                str(c.better),
                str(c.worse),
                str(c.same),
                f"{ceiling[measure]:.4f}",
            )
        console.print(table)
        if (speed := model.speed) is not None:
            console.print(
                f"{speed.documents_per_s:,.0f} documents/s; a query takes {speed.p50_s * 1000:,.1f} ms (median), "
                f"{speed.p95_s * 1000:,.1f} ms (95th percentile); {_timed_queries(speed)}\n",
                soft_wrap=True,
            )


def _show_fusion(console: Screen, result: DatasetResult, model: ModelResult) -> None:
    if not model.fused:
        return
    of = "" if result.dataset.scores else " (weights: of ranks, no scores are known)"
    table = _table(f"{model.name}: fusion with the first stage{of}")
    table.add_column("measure")
    for name in ("reranked", *model.fused):
        table.add_column(name, justify="right", no_wrap=True)
    for measure, found in model.comparisons.items():
        fused = [by_measure[measure] for by_measure in model.fused.values()]
        values = [styled(f"{c.after:.4f}", style=_STYLES[verdict(c)]) for c in fused]
        table.add_row(styled(measure), f"{found.after:.4f}", *values)
    console.print(table)


def _timed_queries(speed: Speed) -> str:
    if speed.earlier:
        return f"times of an earlier run, over {speed.queries} queries: --fresh measures anew"
    return f"over {speed.queries} quer{'y' if speed.queries == 1 else 'ies'}"


def _table(title: str) -> Table:
    return Table(title=styled(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
