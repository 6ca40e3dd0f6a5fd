"""Where a candidate comes in beside its logit: the first stage's opinion, repetition, and the place in a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["best_at_both_ends", "duplicates", "fused", "min_max", "reciprocal_rank", "weighted"]

RRF_CONSTANT = 60
"""k of reciprocal rank fusion, as its authors chose it."""
SHINGLE = 5
"""Characters of a shingle: long enough that common letters make no likeness, and right for texts without blanks too."""

Floats = NDArray[np.float64]


def reciprocal_rank(logits: Floats, first_stage: Floats) -> Floats:
    """Reciprocal rank fusion of two orders: ``1 / (60 + rank)``, summed.

    Args:
        logits: Shape (n,), higher is better.
        first_stage: Shape (n,), higher is better.

    Returns:
        Shape (n,), higher is better.

    References:
        Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning
        Methods", SIGIR 2009 (https://doi.org/10.1145/1571941.1572114).
    """
    ranks = [np.argsort(np.argsort(-values, kind="stable"), kind="stable") + 1 for values in (logits, first_stage)]
    return np.asarray(sum(1.0 / (RRF_CONSTANT + rank) for rank in ranks), dtype=np.float64)


def min_max(values: Floats) -> Floats:
    """Values brought to 0..1 within their list, shape (n,); 0.5 each where all are equal."""
    low, high = float(values.min()), float(values.max())
    return np.full(len(values), 0.5) if high == low else (values - low) / (high - low)


def weighted(logits: Floats, first_stage: Floats, weight: float) -> Floats:
    """A weighted mean of two lists of scores, each brought to 0..1 within its list.

    Args:
        logits: Shape (n,), higher is better.
        first_stage: Shape (n,), higher is better.
        weight: Of the first stage, from 0 to 1.

    Returns:
        Shape (n,), higher is better.
    """
    return weight * min_max(first_stage) + (1 - weight) * min_max(logits)


def fused(logits: Floats, how: str | float, first_stage: Floats) -> Floats:
    """Logits with the first stage's opinion: by ``"rrf"``, or with a weight of the first stage.

    Args:
        logits: Shape (n,), higher is better.
        how: As `Settings.fusion`.
        first_stage: Shape (n,), higher is better.

    Returns:
        Shape (n,), higher is better.
    """
    return reciprocal_rank(logits, first_stage) if isinstance(how, str) else weighted(logits, first_stage, how)


def duplicates(texts: Sequence[str], threshold: float) -> list[int | None]:
    """Which texts repeat a better one.

    The likeness of two texts is the Jaccard index of their sets of five-character shingles, blanks and case aside. Only
    texts that repeat no other are compared with, through an index of their shingles: the work grows with the shingles
    that texts share, not with the number of pairs.

    Args:
        texts: Best first.
        threshold: Smallest likeness, from 0 to 1, of a repetition; 1.0 for texts that are the same.

    Returns:
        For each text the position of the one that it repeats, or None.

    References:
        Broder, "On the resemblance and containment of documents", SEQUENCES 1997.
    """
    found: list[int | None] = []
    plain = [" ".join(text.lower().split()) for text in texts]
    first: dict[str, int] = {}
    index: dict[str, list[int]] = {}
    sizes: dict[int, int] = {}
    for position, text in enumerate(plain):
        if text in first:
            found.append(first[text])
            continue
        first[text] = position
        if threshold >= 1.0:
            found.append(None)
            continue
        shingles = {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}
        shared = Counter(other for shingle in shingles for other in index.get(shingle, ()))
        like = [
            (count / (len(shingles) + sizes[other] - count), -other)
            for other, count in shared.items()
            if count >= threshold * (len(shingles) + sizes[other] - count)
        ]
        if like:
            found.append(-max(like)[1])
            first[text] = -max(like)[1]
            continue
        found.append(None)
        sizes[position] = len(shingles)
        for shingle in shingles:
            index.setdefault(shingle, []).append(position)
    return found


def best_at_both_ends(positions: Sequence[int]) -> list[int]:
    """An order with the best at both ends and the worst in the middle.

    Language models use what stands at the beginning and at the end of a long context better than what stands between.

    Args:
        positions: Best first.

    References:
        Liu et al., "Lost in the Middle: How Language Models Use Long Contexts", TACL 2024
        (https://arxiv.org/abs/2307.03172).
    """
    return [*positions[::2], *reversed(positions[1::2])]
