"""`rerank-plugins train`: a cross-encoder of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rerank_plugins.cli._options import Overwrite
from rerank_plugins.errors import ConfigurationError

__all__ = ["train"]


def train(
    data: Annotated[
        list[Path],
        typer.Argument(
            help='Files of JSON lines {"query", "passage", "label"}, or folders with pairs.jsonl; '
            "with --bundled, the one folder with train/, corpus/ and eval/."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model's directory.")],
    bundled: Annotated[bool, typer.Option("--bundled", help="Repeat the recipe of the bundled model.")] = False,
    trunk: Annotated[
        str | None,
        typer.Option(help="Model to start from; all-MiniLM-L6-v2 if not given.", show_default=False),
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Time budget. Give this or --steps.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, of eight queries each.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all sampling.")] = 0,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a pair while training.")] = None,
    mine: Annotated[bool, typer.Option("--mine/--no-mine", help="Find hard negatives among all passages.")] = True,
    device: Annotated[str | None, typer.Option(help="torch device.")] = None,
    export: Annotated[bool, typer.Option("--export/--no-export", help="Also write the int8 ONNX graph.")] = True,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a cross-encoder on judged pairs of a query and a passage.

    A run that was interrupted goes on where it stopped when it is started again.
    """
    from rerank_plugins import training
    from rerank_plugins.cli._progress import bar

    settings = {
        "--trunk": trunk,
        "--steps": steps,
        "--learning-rate": learning_rate,
        "--max-length": max_length,
        "--no-mine": None if mine else True,
        "--no-export": None if export else True,
    }
    given = [name for name, value in settings.items() if value is not None]
    if bundled and (len(data) != 1 or given):
        raise ConfigurationError(
            "--bundled takes one data folder and, of the settings, only --minutes, --seed and --device; got "
            f"{len(data)} folders" + (f" and {', '.join(given)}." if given else ".")
        )
    optional = {"minutes": minutes, "learning_rate": learning_rate, "max_length": max_length}
    chosen = {name: value for name, value in optional.items() if value is not None}
    with bar("Training") as tell:
        if bundled:
            result = training.train_bundled(
                data[0],
                out,
                **({} if minutes is None else {"minutes": minutes}),
                seed=seed,
                device=device,
                overwrite=overwrite,
                progress=tell,
            )
        else:
            result = training.train(
                data,
                out,
                trunk=trunk,
                steps=steps,
                seed=seed,
                mine=mine,
                device=device,
                export=export,
                overwrite=overwrite,
                progress=tell,
                **chosen,  # type: ignore[arg-type]
            )
    typer.echo(
        f"{result.path}: {result.result.steps} steps, {result.result.pairs} pairs, {result.result.seconds:.0f} s; "
        f"nDCG@10 of the held-out queries {result.result.best:.4f}"
    )
    if result.ece_after is not None:
        typer.echo(f"expected calibration error {result.ece_before:.4f}, calibrated {result.ece_after:.4f}")
    typer.echo(f'Use it with Reranker("{result.path}").')
