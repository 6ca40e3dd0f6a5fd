"""Our engines against what else there is: speed, order, short calls, start and memory.

python benchmarks/compare.py --data DATA/eval/trec-dl20 --queries 2 --short --precision fp32,int8
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rerank_plugins.cli._progress import bar
from rerank_plugins.errors import ConfigurationError, RerankError
from rerank_plugins.models import BUNDLED_NAME

if TYPE_CHECKING:
    from harness import Report, Row

_WIDTH = 110
"""Columns at least: figures that wrap are better than figures that are cut."""


def benchmark(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f"Directory or Hub id of a cross-encoder with one logit, or {BUNDLED_NAME}, which only ONNX engines "
            "load. A MiniLM-L6 with a seeded head if not given.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder in BEIR layout; paragraphs of Python's manual if not given.", show_default=False),
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates of each query.")] = 100,
    queries: Annotated[int, typer.Option(min=1, help="How many queries.")] = 3,
    against: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="What to compare with, between commas: all, or of langchain, llama-index, sentence-transformers, "
            "sentence-transformers-bf16, flashrank, fastembed, rerankers, as far as installed; or module:function. "
            "The first one that runs is what ratios are of.",
        ),
    ] = "all",
    backends: Annotated[
        str, typer.Option(metavar="NAMES", help="Our engines, between commas.")
    ] = "onnx,openvino,torch",
    precision: Annotated[
        str, typer.Option(metavar="NAMES", help="Of our engines, between commas: fp32, bf16, int8.")
    ] = "fp32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of every engine; one for each core if not given.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 3,
    short: Annotated[
        bool,
        typer.Option("--short", help="Also calls with 10 candidates of 50 tokens, and what the adapters add to them."),
    ] = False,
    process: Annotated[
        bool,
        typer.Option(
            "--process", help="Also import time, start to first score, and memory for 10 to 10,000 candidates."
        ),
    ] = False,
    longest: Annotated[
        float, typer.Option(min=0, help="Seconds for one number of candidates of --process; longer ones are left out.")
    ] = 120.0,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart, for example out.png.")] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="PATH", help="Write all figures as JSON; - for standard output, without table."),
    ] = None,
) -> None:
    """Measure our engines against what else there is, side by side, on the same weights.

    All contenders take turns in every round, each in a process of its own with the same number of threads, on the CPU.
    Figures are medians over rounds, and ratios are of the same round, with the lowest and the highest. Beside each
    speed stands its quality: whether the order is that of the exact model (sentence-transformers in fp32).

    The graph that ONNX engines need is made by the rules of rerank-plugins convert, and kept where it keeps them.
    """
    from harness import run, write_plot

    for path in (plot, None if json_file in (None, "-") else Path(str(json_file))):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigurationError(f"{path} cannot be written: expected a file name in a directory that exists.")
    if plot is not None:
        _check_plot(plot)
    with bar("Measuring") as tell:
        report = run(
            model,
            data=data,
            candidates=candidates,
            queries=queries,
            against=_names(against),
            backends=_names(backends),
            precisions=_names(precision),
            threads=threads,
            rounds=rounds,
            short=short,
            process=process,
            longest_s=longest,
            progress=tell,
        )
    if json_file != "-":
        _show(report)
    if json_file is not None:
        content = json.dumps(report.to_dict(), indent=2) + "\n"
        if json_file == "-":
            typer.echo(content, nl=False)
        else:
            Path(json_file).write_text(content, encoding="utf-8")
    if plot is not None:
        write_plot(report, plot)
        typer.echo(f"Plot: {plot}", err=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _check_plot(path: Path) -> None:
    """Complain before the minutes of measuring, not after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("--plot needs matplotlib: pip install -r requirements/benchmarks.txt")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigurationError(f"{path} cannot be written: expected a name that ends in .png, .svg or .pdf.")


def _show(report: Report) -> None:
    console = Console()
    console = Console(width=max(_WIDTH, console.width if console.is_terminal else _WIDTH))
    console.print(Text(report.model, style="bold"))
    console.print(
        Text(
            f"{report.queries} queries, {report.documents} candidates of {report.tokens / report.documents:.0f} tokens "
            f"({report.data}), cut at {report.max_length}; {report.rounds} rounds, {report.threads} threads, "
            f"{report.machine['cpu']}"
        ),
        soft_wrap=True,
    )
    _show_speed(console, report)
    if any(row.short_p50_s is not None for row in report.rows):
        _show_short(console, report)
    if any(row.import_s is not None for row in report.rows):
        _show_processes(console, report)
    if report.sizes:
        _show_sizes(console, report)
    for note in report.notes:
        console.print(Text(f"Left out: {note}", style="yellow"), soft_wrap=True)
    console.print(Text(_verdict(report)), soft_wrap=True)


def _show_speed(console: Console, report: Report) -> None:
    table = _table(
        None,
        "documents/s",
        f"x {report.baseline}",
        "range",
        "nDCG@10",
        "top-10 overlap",
        "logits",
    )
    for row in report.rows:
        table.add_row(
            _label(row),
            f"{row.documents_per_s:,.1f}",
            f"{row.ratio:.2f}",
            f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
            f"{row.ndcg_difference:+.4f}",
            f"{row.overlap:.3f}",
            "-" if row.logit_difference is None else f"{row.logit_difference:.1e}",
        )
    console.print(table)
    graded = "by the judgements" if report.judged else "by the reference's own top 10"
    console.print(
        Text(f"nDCG@10 ({graded}), overlap and largest logit difference are against {report.reference}.\n"),
        soft_wrap=True,
    )


def _show_short(console: Console, report: Report) -> None:
    table = _table("A call with 10 candidates of 50 tokens", "p50 ms", "p95 ms")
    for row in report.rows:
        table.add_row(_label(row), _number(row.short_p50_s, 1e3, ".1f"), _number(row.short_p95_s, 1e3, ".1f"))
    console.print(table)
    if report.overheads:
        table = _table("What an adapter adds to it", "p50 ms", "added ms", "share")
        for item in report.overheads:
            table.add_row(
                f"{item.name} ({item.engine})",
                f"{item.median_s * 1e3:.2f}",
                f"{item.added_s * 1e3:+.2f}",
                f"{item.share:+.1%}",
            )
        console.print(table)


def _show_processes(console: Console, report: Report) -> None:
    table = _table("A fresh process", "import s", "first score s", "peak MB, 1,000 candidates")
    for row in report.rows:
        table.add_row(
            _label(row),
            _number(row.import_s, 1, ".2f"),
            _number(row.first_score_s, 1, ".2f"),
            _megabytes(row.peak_bytes),
        )
    console.print(table)


def _show_sizes(console: Console, report: Report) -> None:
    table = _table("From few candidates to many", "candidates", "seconds", "us a token", "peak MB")
    for size in report.sizes:
        table.add_row(
            size.name,
            f"{size.candidates:,}",
            f"{size.seconds:.2f}",
            f"{size.per_token_s * 1e6:.1f}",
            _megabytes(size.peak_bytes),
        )
    console.print(table)


def _verdict(report: Report) -> str:
    if not report.differing:
        return f"The order is the same everywhere: the top 10 of {report.reference}, in its order."
    rows = "\n".join(
        f"  {row.name}: top-10 overlap {row.overlap:.3f}, nDCG@10 {row.ndcg_difference:+.4f}"
        for row in report.differing
    )
    return f"The order differs from that of {report.reference}:\n{rows}"


def _label(row: Row) -> Text:
    return Text(row.name, style="bold" if row.ours else "")


def _number(value: float | None, factor: float, how: str) -> str:
    return "-" if value is None else format(value * factor, how)


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f}"


def _table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right")
    return table


if __name__ == "__main__":
    try:
        typer.run(benchmark)
    except RerankError as error:
        sys.exit(f"Error: {error}")
