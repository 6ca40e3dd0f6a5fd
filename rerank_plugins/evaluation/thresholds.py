"""Thresholds on scores, and the area under the ROC curve."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rerank_plugins.errors import InputError

__all__ = ["Threshold", "chance_auc", "roc_auc", "threshold_for"]


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold on scores, and what it does to the pairs that it was chosen on.

    Attributes:
        score: Pairs with this score and above are kept.
        precision: Share of the kept pairs that are relevant.
        recall: Share of the relevant pairs that are kept.
        kept: How many pairs are kept.
    """

    score: float
    precision: float
    recall: float
    kept: int


def roc_auc(scores: ArrayLike, relevant: ArrayLike) -> float:
    """Area under the ROC curve: how often a relevant pair scores above an irrelevant one; ties count half.

    Not scikit-learn's ``roc_auc_score``: `rerank-plugins calibrate` needs the base install and the extra ``cli`` alone.

    Args:
        scores: Shape (n,).
        relevant: True or 1 for relevant pairs, shape (n,).

    Returns:
        From 0 to 1; 0.5 is what chance gives.

    Raises:
        InputError: All pairs are relevant, or none is.

    References:
        J. Hanley, B. McNeil. The Meaning and Use of the Area under a Receiver Operating Characteristic Curve.
        Radiology, 1982.
    """
    x, truth = _checked(scores, relevant)
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[place.reshape(-1)]
    positives = int(truth.sum())
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * (len(x) - positives)))


def chance_auc(n_relevant: int, n_irrelevant: int) -> float:
    """The AUC that scores which say nothing stay below in 97.7 % of samples: two standard errors above 0.5.

    References:
        H. B. Mann, D. R. Whitney. On a Test of Whether One of Two Random Variables Is Stochastically Larger than the
        Other. 1947 (the variance of U).
    """
    return 0.5 + 2 * math.sqrt((n_relevant + n_irrelevant + 1) / (12 * n_relevant * n_irrelevant))


def threshold_for(
    scores: ArrayLike, relevant: ArrayLike, *, precision: float | None = None, recall: float | None = None
) -> Threshold | None:
    """The threshold that reaches a precision and keeps the most, or that reaches a recall and keeps the fewest.

    Args:
        scores: Shape (n,).
        relevant: True or 1 for relevant pairs, shape (n,).
        precision: The wanted share of kept pairs that are relevant, from 0 to 1.
        recall: The wanted share of relevant pairs that are kept. Give this or `precision`.

    Returns:
        The threshold; None where none reaches the precision.

    Raises:
        InputError: All pairs are relevant, or none is.
    """
    x, truth = _checked(scores, relevant)
    order = np.argsort(-x, kind="stable")
    ranked, hits = x[order], np.cumsum(truth[order])
    # Equal scores are kept or cut together.
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    kept, found = ends + 1, hits[ends]
    if precision is not None:
        good = np.flatnonzero(found / kept >= precision)
        if not len(good):
            return None
        at = int(good[-1])
    else:
        at = int(np.flatnonzero(found >= (recall or 0.0) * hits[-1] - 1e-9)[0])
    return Threshold(
        score=float(ranked[ends[at]]),
        precision=float(found[at] / kept[at]),
        recall=float(found[at] / hits[-1]),
        kept=int(kept[at]),
    )


def _checked(scores: ArrayLike, relevant: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    x, truth = np.asarray(scores, dtype=np.float64), np.asarray(relevant).astype(bool)
    if x.shape != truth.shape or x.ndim != 1:
        raise InputError(f"Expected one judgement for each score; got shapes {x.shape} and {truth.shape}.")
    if truth.all() or not truth.any():
        raise InputError("Expected both relevant and irrelevant pairs; all are judged alike.")
    return x, truth
