"""`rerank-plugins calibrate`: scores that mean something on your own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rerank_plugins.cli._options import Backend, Label, Model, Overwrite, Revision, TrustRemoteCode, class_label
from rerank_plugins.errors import ConfigurationError, InputError

__all__ = ["calibrate"]

FOLDS = 5


def calibrate(
    data: Annotated[
        list[Path], typer.Argument(help='Files of JSON lines {"query", "passage", "label"}, labels from 0 to 1.')
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, for Reranker(calibration=...).")],
    model: Model = None,
    backend: Backend = "auto",
    label: Label = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Fit the map that turns a model's logits into probabilities on judged pairs, and save it.

    The expected calibration error is reported before and after, the latter on queries that the map was not fitted on
    (5-fold cross-validation over queries).
    """
    import numpy as np

    from rerank_plugins import Reranker
    from rerank_plugins.calibration import expected_calibration_error, fit_calibration
    from rerank_plugins.cli._progress import bar
    from rerank_plugins.training import read_pairs

    if out.exists() and not overwrite:
        raise ConfigurationError(f"{out} exists. Give another name, or --overwrite to replace it.")
    texts: dict[str, list[tuple[str, float]]] = {}
    for pair in read_pairs(data):
        texts.setdefault(pair.query, []).append((pair.passage, pair.label))
    if len(texts) < FOLDS:
        raise InputError(f"Calibration needs judged pairs of at least {FOLDS} queries; got {len(texts)}.")
    reranker = Reranker(
        model,
        backend=backend,
        label=class_label(label),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    logits, labels, folds = [], [], []
    with bar("Scoring") as tell:
        for number, (query, pairs) in enumerate(texts.items()):
            logits.append(reranker.logits(query, [passage for passage, _ in pairs]))
            labels.append([judged for _, judged in pairs])
            folds.append([number % FOLDS] * len(pairs))
            tell(query[:40], (number + 1) / len(texts))
    x, y, fold = (np.concatenate(parts).astype(np.float64) for parts in (logits, labels, folds))
    held_out = np.empty_like(x)
    for number in range(FOLDS):
        part = fold == number
        held_out[part] = fit_calibration(x[~part], y[~part])(x[part])
    fitted = fit_calibration(x, y)
    fitted.save(out)
    truth = (y >= 0.5).astype(np.float64)
    typer.echo(f"{len(x)} pairs of {len(texts)} queries; slope {fitted.slope:.4f}, intercept {fitted.intercept:.4f}")
    typer.echo(
        f"expected calibration error {expected_calibration_error(x, truth):.4f}, "
        f"calibrated {expected_calibration_error(held_out, truth):.4f}"
    )
    typer.echo(f'Use it with Reranker(..., calibration="{out}").')
