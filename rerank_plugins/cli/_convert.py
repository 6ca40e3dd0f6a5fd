"""`rerank-plugins convert`: a checkpoint as one ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rerank_plugins.cli._options import Overwrite, Revision, TrustRemoteCode
from rerank_plugins.cli._screen import echo

__all__ = ["convert"]


def convert(
    model: Annotated[str, typer.Argument(help="Hub id or local directory of a cross-encoder.")],
    out: Annotated[
        Path | None,
        typer.Argument(help='A new directory. If not given, the user cache, where backend "auto" finds the graph.'),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Compute in int8: faster, a quarter of the size.")] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help='With --int8: pairs like yours, JSON Lines with "query" and "text". Otherwise built-in ones.'
        ),
    ] = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Export a cross-encoder to ONNX, for machines without PyTorch and for faster scoring on a CPU.

    The scores of the graph are compared with those of the checkpoint before anything is written.
    """
    from rerank_plugins.backends import converted_directory
    from rerank_plugins.backends.load import open_weights
    from rerank_plugins.cli._progress import bar
    from rerank_plugins.conversion import convert as convert_model

    with bar("Converting") as tell:
        where = out
        if where is None:
            checkpoint = open_weights(model, revision=revision, trust_remote_code=trust_remote_code)
            where = converted_directory(checkpoint.files)
        report = convert_model(
            model,
            where,
            int8=int8,
            calibrate=calibrate,
            revision=revision,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=tell,
        )
    echo(
        f"{report.path}: model.onnx, {report.weights}, {report.bytes / 1e6:.1f} MB\n"
        f"compared with {report.source} on {report.pairs} pairs: largest difference of logits "
        f"{report.max_difference:.2g}, rank correlation {report.rank_correlation:.4f}"
    )
    if out is None:
        echo(f'Reranker("{model}") uses it from now on.')
    else:
        echo(f'Use it with Reranker("{out}").')
