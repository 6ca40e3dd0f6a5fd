"""`rerank-plugins calibrate`: scores that mean something on your own data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rerank_plugins.cli._options import Overwrite, takes_settings
from rerank_plugins.cli._screen import echo
from rerank_plugins.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rerank_plugins import Reranker
    from rerank_plugins.evaluation.thresholds import Threshold
    from rerank_plugins.training import Pair

    Numbers = NDArray[np.float64]

__all__ = ["calibrate"]

FOLDS = 5
PRECISION, RECALL = 0.9, 0.95
"""What thresholds are proposed for, if nothing else is asked."""

_WEAK_AUC = 0.7
_NARROW = 0.1
"""Widths of the range that calibrated scores take, below which no threshold parts anything."""


@takes_settings("model", "backend", "label", "revision", "trust_remote_code")
def calibrate(
    data: Annotated[
        list[Path], typer.Argument(help='Files of JSON lines {"query", "passage", "label"}, labels from 0 to 1.')
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, for Reranker(calibration=...).")],
    precision: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Propose the min_score above which this share of the pairs is relevant, as 0.9 does if nothing is "
            "given.",
            show_default=False,
        ),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Propose the min_score that keeps this share of the relevant pairs, as 0.95 does if nothing is given.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    **chosen: Any,
) -> None:
    """Fit the map that turns a model's logits into probabilities on judged pairs, save it, and propose a min_score.

    The expected calibration error is reported before and after, the latter on queries that the map was not fitted on
    (5-fold cross-validation over queries). Nothing is written where the model does not tell relevant pairs from
    irrelevant ones better than chance.
    """
    import numpy as np

    from rerank_plugins import Reranker
    from rerank_plugins._paths import writable_directory
    from rerank_plugins.calibration import expected_calibration_error, fit_calibration
    from rerank_plugins.training import read_pairs

    if out.exists() and not overwrite:
        raise ConfigurationError(f"{out} exists. Give another name, or --overwrite to replace it.")
    texts: dict[str, list[Pair]] = {}
    for pair in read_pairs(data):
        texts.setdefault(pair.query, []).append(pair)
    if len(texts) < FOLDS:
        raise InputError(f"Calibration needs judged pairs of at least {FOLDS} queries; got {len(texts)}.")
    writable_directory(out.absolute().parent)
    logits, labels, folds = _scored(Reranker(**chosen), texts)
    truth = labels >= 0.5
    if truth.all() or not truth.any():
        raise InputError(
            f"Calibration needs both relevant and irrelevant pairs; all {len(truth)} are judged alike. Add passages "
            "with label 0 (`rerank-plugins mine` finds some), or relevant ones."
        )
    auc = _auc(logits, truth)
    held_out = np.empty_like(logits)
    for number in range(FOLDS):
        part = folds == number
        held_out[part] = fit_calibration(logits[~part], labels[~part])(logits[part])
    fitted = fit_calibration(logits, labels)
    scores = 1 / (1 + np.exp(-fitted(logits)))
    low, high = float(scores.min()), float(scores.max())
    if high - low < _NARROW:
        raise InputError(
            f"Nothing was written: calibrated, all scores would lie from {low:.3f} to {high:.3f}, where no min_score "
            f"parts anything (AUC {auc:.3f}). Try another model, or train one on your data: rerank-plugins train."
        )
    fitted.save(out)
    echo(
        f"{len(logits)} pairs of {len(texts)} queries, {int(truth.sum())} of them relevant; "
        f"slope {fitted.slope:.4f}, intercept {fitted.intercept:.4f}"
    )
    echo(f"AUC {auc:.4f} (0.5 is chance, 1 parts them all); calibrated scores from {low:.4f} to {high:.4f}")
    echo(
        f"expected calibration error {expected_calibration_error(logits, truth):.4f}, "
        f"calibrated {expected_calibration_error(held_out, truth):.4f}"
    )
    _propose(scores, truth, precision, recall)
    if auc < _WEAK_AUC:
        echo(
            f"Warning: an AUC of {auc:.3f} is weak: a relevant pair often scores below an irrelevant one, and any "
            "min_score cuts many relevant ones. Try another model, or train one on your data.",
            err=True,
        )
    echo(f'Use it with Reranker(..., calibration="{out}").')


def _scored(reranker: Reranker, texts: dict[str, list[Pair]]) -> tuple[Numbers, Numbers, Numbers]:
    """Logits, labels and folds of all pairs, by query."""
    import numpy as np

    from rerank_plugins.cli._progress import bar

    logits: list[Any] = []
    labels: list[list[float]] = []
    folds: list[list[int]] = []
    with bar("Scoring") as tell:
        for number, (query, pairs) in enumerate(texts.items()):
            logits.append(reranker.logits(query, [pair.passage for pair in pairs]))
            labels.append([pair.label for pair in pairs])
            folds.append([number % FOLDS] * len(pairs))
            tell(query[:40], (number + 1) / len(texts))
    x, y, fold = (np.concatenate(parts).astype(np.float64) for parts in (logits, labels, folds))
    return x, y, fold


def _auc(logits: Numbers, truth: NDArray[np.bool_]) -> float:
    """The area under the ROC curve.

    Raises:
        InputError: It is no better than chance may give.
    """
    from rerank_plugins.evaluation.thresholds import chance_auc, roc_auc

    auc, relevant = roc_auc(logits, truth), int(truth.sum())
    least = chance_auc(relevant, len(truth) - relevant)
    if auc < least:
        raise InputError(
            f"Nothing was written: on these {len(truth)} pairs the model does not tell relevant from irrelevant ones. "
            f"Its AUC is {auc:.3f}, where chance alone gives up to {least:.3f}. Check the labels, give more pairs, try "
            "another model, or train one on your data: rerank-plugins train."
        )
    return auc


def _propose(scores: Numbers, truth: NDArray[np.bool_], precision: float | None, recall: float | None) -> None:
    from rerank_plugins.evaluation.thresholds import threshold_for

    if precision is None and recall is None:
        precision, recall = PRECISION, RECALL
    if precision is not None:
        found = threshold_for(scores, truth, precision=precision)
        if found is None:
            echo(f"no min_score reaches precision {precision:g} on these pairs")
        else:
            echo(f"for precision {precision:g}: {_described(found, len(scores))}")
    if recall is not None:
        found = threshold_for(scores, truth, recall=recall)
        assert found is not None, "the lowest score keeps everything"
        echo(f"for recall {recall:g}: {_described(found, len(scores))}")
    echo(
        f"These hold where as many candidates are relevant as here, {truth.mean():.0%}; where fewer are, so is the "
        "share of relevant ones above a min_score."
    )


def _described(found: Threshold, pairs: int) -> str:
    # Down, so that the pair at the threshold is kept.
    score = int(found.score * 1_000_000) / 1_000_000
    kept = f"precision {found.precision:.3f}, recall {found.recall:.3f}, keeps {found.kept} of {pairs}"
    return f"min_score={score:.6g} ({kept})"
