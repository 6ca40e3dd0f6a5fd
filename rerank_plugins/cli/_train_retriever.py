"""`rerank-plugins train-retriever`: a bi-encoder of your own, for the first stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rerank_plugins._extras import import_extra
from rerank_plugins.cli._options import takes_options
from rerank_plugins.cli._screen import echo
from rerank_plugins.training import RetrieverSettings

__all__ = ["train_retriever"]


@takes_options(RetrieverSettings)
def train_retriever(
    triples: Annotated[
        list[Path],
        typer.Argument(
            help='Files of JSON lines {"query", "positive", "negative"}, as `rerank-plugins mine` writes them.'
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model's directory.")],
    **chosen: Any,
) -> None:
    """Fine-tune a bi-encoder, the first stage, on triples of a query, its answer and hard negatives.

    A run that was interrupted goes on where it stopped when it is started again.
    """
    from rerank_plugins import training
    from rerank_plugins.cli._progress import bar

    # No reports of weights and checkpoints between our own lines.
    import_extra("transformers", "train").utils.logging.set_verbosity_error()
    with bar("Training") as tell:
        result = training.train_retriever(triples, out, progress=tell, **chosen)
    echo(f"{result.path}: {result.steps} steps, {result.seconds:.0f} s")
    for name, (before, after) in result.measures.items():
        echo(f"{name} of the held-out queries {before:.4f} before, {after:.4f} after")
    if any(after < before for before, after in result.measures.values()):
        echo("It got worse there. Try a smaller --learning-rate, fewer --steps or more data.", err=True)
    echo(f'Use it with SentenceTransformer("{result.path}") or HuggingFaceEmbeddings(model_name="{result.path}").')
