"""`rerank-plugins mine`: hard negatives for judged queries, as a file of triples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rerank_plugins.cli._options import JudgedData, Overwrite
from rerank_plugins.cli._screen import echo

__all__ = ["mine"]


def mine(
    data: JudgedData,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of triples, JSON lines; .gz compresses it.")],
    encoder: Annotated[
        str | None,
        typer.Option(help="Bi-encoder that finds the negatives; all-MiniLM-L6-v2 if not given.", show_default=False),
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option(
            help="Cross-encoder that scores them and tells false negatives; the bundled model if not given.",
            show_default=False,
        ),
    ] = None,
    negatives: Annotated[int, typer.Option(min=1, help="Most negatives of a query.")] = 4,
    negatives_below: Annotated[
        float, typer.Option(help="Leave out unjudged passages that get at least this probability; 1 keeps all.")
    ] = 0.5,
    margin: Annotated[
        float,
        typer.Option(help="How much less similar, in cosine, than the relevant ones unjudged passages must be."),
    ] = 0.05,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only so many queries, drawn at random.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of that draw.")] = 0,
    device: Annotated[str | None, typer.Option(help="torch device.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Mine hard negatives for judged queries, without those that a cross-encoder takes for further answers.

    Each line of the file is a triple with the cross-encoder's logits, for `train` and `train-retriever`.
    """
    from rerank_plugins import training
    from rerank_plugins.cli._progress import bar

    with bar("Mining") as tell:
        found = training.mine(
            data,
            out,
            encoder=encoder,
            filter=filter,
            negatives=negatives,
            negatives_below=negatives_below,
            margin=margin,
            limit=limit,
            seed=seed,
            device=device,
            overwrite=overwrite,
            progress=tell,
        )
    echo(f"{found.path}: {found.triples} triples of {found.queries} queries")
    echo(
        f"{found.scored} passages scored, {found.rejected} left out as likely answers; "
        f"no negative for {found.without} queries"
    )
