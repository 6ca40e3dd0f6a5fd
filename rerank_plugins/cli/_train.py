"""`rerank-plugins train`: a cross-encoder of your own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rerank_plugins.cli._options import Overwrite
from rerank_plugins.cli._screen import echo

if TYPE_CHECKING:
    from rerank_plugins.training import TrainedModel

__all__ = ["train"]


def train(
    data: Annotated[
        list[Path],
        typer.Argument(
            help='Files of JSON lines {"query", "passage", "label"} or {"query", "positive", "negative"}, folders with '
            "pairs.jsonl, or BEIR folders."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model's directory.")],
    trunk: Annotated[
        str | None,
        typer.Option(
            help="Cross-encoder to start from, or encoder, which gets a fresh head; the bundled model if not given.",
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Minutes that all of it may take, mining and export included. Give this or --steps."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, of eight queries each.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all sampling.")] = 0,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a pair while training.")] = None,
    group_size: Annotated[int | None, typer.Option(min=2, help="Passages in a list, 8 if not given.")] = None,
    mine: Annotated[bool, typer.Option("--mine/--no-mine", help="Find hard negatives among all passages.")] = True,
    negatives_below: Annotated[
        float | None,
        typer.Option(
            help="Leave out mined passages to which a cross-encoder gives at least this probability; 0.5 with --filter."
        ),
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option(help="That cross-encoder; the bundled model if not given.", show_default=False),
    ] = None,
    loss: Annotated[
        Literal["mix", "listwise", "binary"] | None, typer.Option(help="What to learn by; a mix of both if not given.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Learn also from the scores of this cross-encoder or bi-encoder, or of the one that mines: miner, the "
            "default where it mines.",
            show_default=False,
        ),
    ] = None,
    teacher_share: Annotated[
        float | None, typer.Option(help="Share of the teacher in the targets, 0.4 if not given.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the teacher's scores; 1 for logits, 0.05 for cosines if not given.")
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(min=1, help="How often nDCG@10 of held-out queries is measured, 4 if not given.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many evaluations without a better one.")
    ] = None,
    licences: Annotated[
        list[str] | None,
        typer.Option("--license", help="Licence of the data, for the model card; one for all, or one for each."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="torch device.")] = None,
    export: Annotated[bool, typer.Option("--export/--no-export", help="Also write the int8 ONNX graph.")] = True,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a cross-encoder on judged data.

    A run that was interrupted goes on where it stopped when it is started again. The best weights by nDCG@10 of
    held-out queries are kept, and a model card is written beside them.
    """
    from rerank_plugins import training
    from rerank_plugins.cli._progress import bar

    optional = {
        "trunk": trunk,
        "steps": steps,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "group_size": group_size,
        "negatives_below": negatives_below,
        "filter": filter,
        "loss": loss,
        "teacher": teacher,
        "teacher_share": teacher_share,
        "temperature": temperature,
        "evaluations": evaluations,
        "patience": patience,
        "licences": licences,
    }
    chosen: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
    with bar("Training") as tell:
        result = training.train(
            data,
            out,
            minutes=minutes,
            seed=seed,
            mine=mine,
            device=device,
            export=export,
            overwrite=overwrite,
            progress=tell,
            **chosen,
        )
    run = result.result
    stopped = ", stopped early" if run.stopped_early else ""
    echo(f"{result.path}: {run.steps} steps, {run.pairs} pairs, {run.seconds:.0f} s{stopped}")
    _tell_quality(result, out)
    if result.ece_after is not None:
        echo(f"expected calibration error {result.ece_before:.4f}, calibrated {result.ece_after:.4f}")
    if result.conversion is not None:
        echo(
            f"safetensors against int8 ONNX on {result.conversion.pairs} pairs: Spearman correlation "
            f"{result.conversion.rank_correlation:.4f}, largest difference of logits "
            f"{result.conversion.max_difference:.3g}"
        )
    echo(f'Use it with Reranker("{result.path}"). The model card is {result.path / "README.md"}.')


def _tell_quality(result: TrainedModel, out: Path) -> None:
    """The measures, what they rest on, and what they are to be compared with."""
    from rerank_plugins.training._card import FEW_QUERIES

    run, count = result.result, result.held_out
    if not run.measures:
        echo("Warning: no query was held out, so nothing was measured. Give more queries, or a split.", err=True)
        return
    over = f"of {count} held-out queries " if count else ""
    echo(f"nDCG@10 {over}{run.measures[0]:.4f} at the start, {run.best:.4f} after training")
    if result.bundled is not None:
        echo(f"nDCG@10 of the bundled model on them {result.bundled:.4f}")
    if 0 < count < FEW_QUERIES:
        echo(
            f"Warning: {count} held-out quer{'y is' if count == 1 else 'ies are'} few, and chose the weights too: "
            'these figures say little. Hold out more with "split": "dev", or measure on other queries: rerank-plugins '
            f"evaluate DATA --model {out}",
            err=True,
        )
    if result.bundled is not None and not run.best > result.bundled:
        echo("Warning: the bundled model is no worse on them. Start from it (no --trunk), or give more data.", err=True)
    elif not run.best > run.measures[0]:
        echo("Warning: training did not make the order better. Try more data or more time.", err=True)
