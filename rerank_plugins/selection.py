"""Which candidates are kept, and in which order: pure functions of logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins.errors import ConfigurationError
from rerank_plugins.types import Scale

__all__ = ["BLANK_LOGIT", "check_limits", "class_logit", "order", "select", "to_logit", "to_scale", "within_tokens"]

BLANK_LOGIT = float(np.finfo(np.float32).min)
"""Logit of a blank text, which no model has seen: below every other, its probability 0.0, and good JSON unlike -inf."""

Floats = NDArray[np.float32] | NDArray[np.float64]


def check_limits(top_n: Any, min_score: Any = None, max_tokens: Any = None, compress: Any = False) -> None:
    """Refuse a cut that could only be a mistake.

    Raises:
        ConfigurationError: `top_n` or `max_tokens` is neither None nor an int of at least 1, `min_score` is neither
            None nor a number, or `compress` is neither a flag nor a share.
    """
    if not isinstance(compress, bool) and (not isinstance(compress, Real) or not 0 < float(compress) <= 1):
        raise ConfigurationError(
            f"compress must be True, False, or the largest share of the text, above 0 up to 1; got {compress!r}."
        )
    for name, value in (("top_n", top_n), ("max_tokens", max_tokens)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ConfigurationError(f"{name} must be an int of at least 1, or None for no limit; got {value!r}.")
    if min_score is None:
        return
    if isinstance(min_score, bool) or not isinstance(min_score, Real) or math.isnan(min_score):
        raise ConfigurationError(f"min_score must be a number, or None to keep all; got {min_score!r}.")


def class_logit(logits: Floats, label: int) -> NDArray[np.float64]:
    """The log-odds of one class: ``z_l - logsumexp(z_others)``, so that its sigmoid is the softmax probability.

    Args:
        logits: Shape (n, n_labels), raw logits.
        label: Column of the class to rank by.

    Returns:
        Shape (n,). NaN and infinities are passed on.
    """
    z = np.asarray(logits, dtype=np.float64)
    others = np.delete(z, label, axis=1)
    peak = others.max(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(z[:, label] - peak - np.log(np.exp(others - peak[:, None]).sum(axis=1)), dtype=np.float64)


def to_logit(probabilities: Floats) -> NDArray[np.float64]:
    """The inverse of the sigmoid, kept finite at 0 and 1 by the smallest steps that float64 has there."""
    p = np.clip(np.asarray(probabilities, dtype=np.float64), np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).epsneg)
    return np.asarray(np.log(p) - np.log1p(-p), dtype=np.float64)


def to_scale(logits: Floats, scale: Scale) -> NDArray[np.float64]:
    """Logits as the scale that is reported; strictly monotone up to float64, and never used for the order.

    Args:
        logits: Any shape, raw logits.
        scale: ``"probability"`` for the float64 sigmoid, ``"logit"`` for the logits themselves.
    """
    z = np.asarray(logits, dtype=np.float64)
    if scale == "logit":
        return z
    # exp of a negative number only: it cannot overflow.
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + small), small / (1 + small))


def order(logits: Floats) -> NDArray[np.intp]:
    """Positions by logit, descending; equal logits keep their input order.

    NaN stands for what was not scored: it comes after all that was, and before blank texts.
    """
    z = np.asarray(logits, dtype=np.float64)
    group = np.where(np.isnan(z), 1, np.where(z <= BLANK_LOGIT, 2, 0))
    return np.lexsort((-np.where(np.isnan(z), 0.0, z), group))


def select(
    positions: Sequence[int] | NDArray[np.intp],
    scores: Floats,
    *,
    min_score: float | None = None,
    top_n: int | None = None,
) -> list[int]:
    """Cut an ordered list: first the threshold, then `top_n`.

    Args:
        positions: Input positions, best first.
        scores: Score by input position, in the reported scale.
        min_score: Smallest score that is kept; None keeps all.
        top_n: Largest number that is kept; None keeps all.

    Returns:
        The kept positions, best first.
    """
    kept = [int(i) for i in positions if min_score is None or scores[i] >= min_score]
    return kept if top_n is None else kept[:top_n]


_COUNTED_AT_ONCE = 64


def within_tokens(
    positions: Sequence[int], count: Callable[[Sequence[int]], Sequence[int]], max_tokens: int
) -> list[int]:
    """Cut an ordered list where its tokens exceed a budget.

    Args:
        positions: Input positions, best first.
        count: Tokens of some positions. Asked for a few at a time, and for none after the end of the list.
        max_tokens: Largest sum of tokens that is kept. The list ends before the first item that does not fit: a
            worse item never takes the place of a better one.

    Returns:
        The kept positions, best first.
    """
    kept: list[int] = []
    left = max_tokens
    for start in range(0, len(positions), _COUNTED_AT_ONCE):
        some = positions[start : start + _COUNTED_AT_ONCE]
        for position, tokens in zip(some, count(some), strict=True):
            left -= tokens
            if left < 0:
                return kept
            kept.append(position)
    return kept
