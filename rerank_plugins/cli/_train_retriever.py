"""`rerank-plugins train-retriever`: a bi-encoder of your own, for the first stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rerank_plugins._extras import import_extra
from rerank_plugins.cli._options import Overwrite
from rerank_plugins.cli._screen import echo

__all__ = ["train_retriever"]


def train_retriever(
    triples: Annotated[
        list[Path],
        typer.Argument(
            help='Files of JSON lines {"query", "positive", "negative"}, as `rerank-plugins mine` writes them.'
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model's directory.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Bi-encoder to start from; all-MiniLM-L6-v2 if not given.", show_default=False
        ),
    ] = None,
    loss: Annotated[
        Literal["multiple-negatives", "margin-mse"],
        typer.Option(help="margin-mse distils a cross-encoder's scores."),
    ] = "multiple-negatives",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Cross-encoder for scores that the file lacks, with margin-mse; the bundled model if not given.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Rounds over the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Triples in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    max_length: Annotated[int, typer.Option(min=3, help="Tokens of a text while training.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of all sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps.")] = None,
    dev_fraction: Annotated[float, typer.Option(help="Share of the queries that is held out to measure.")] = 0.1,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a bi-encoder, the first stage, on triples of a query, its answer and hard negatives.

    A run that was interrupted goes on where it stopped when it is started again.
    """
    from rerank_plugins import training
    from rerank_plugins.cli._progress import bar

    # No reports of weights and checkpoints between our own lines.
    import_extra("transformers", "train").utils.logging.set_verbosity_error()
    with bar("Training") as tell:
        result = training.train_retriever(
            list(triples),
            out,
            model=model,
            loss=loss,
            teacher=teacher,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_length=max_length,
            seed=seed,
            device=device,
            dev_fraction=dev_fraction,
            overwrite=overwrite,
            progress=tell,
        )
    echo(f"{result.path}: {result.steps} steps, {result.seconds:.0f} s")
    for name, (before, after) in result.measures.items():
        echo(f"{name} of the held-out queries {before:.4f} before, {after:.4f} after")
    if any(after < before for before, after in result.measures.values()):
        echo("It got worse there. Try a smaller --learning-rate, fewer --steps or more data.", err=True)
    echo(f'Use it with SentenceTransformer("{result.path}") or HuggingFaceEmbeddings(model_name="{result.path}").')
