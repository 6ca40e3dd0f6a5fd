"""Logits to a `Ranking`: order, fusion, repetition, thresholds and cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rerank_plugins import fusion, selection
from rerank_plugins.errors import InputError
from rerank_plugins.pipeline import TextLogits
from rerank_plugins.settings import Settings
from rerank_plugins.types import Candidate, Limits, RankedCandidate, Ranking

__all__ = ["as_ranking", "best_first", "scores"]


def scores(settings: Settings, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logits as the scores that are reported: calibrated, in the scale of the settings."""
    if settings.calibration is not None:
        logits = np.where(logits > selection.BLANK_LOGIT, settings.calibration(logits), logits)
    return selection.to_scale(logits, settings.scale)


def best_first(
    settings: Settings, candidates: Sequence[Candidate], found: TextLogits, limits: Limits
) -> list[RankedCandidate]:
    """The candidates of one query in their order, without repetitions, and cut by score and number.

    Args:
        settings: Scale, calibration, fusion and so on.
        candidates: In the order of the first stage.
        found: Their logits.
        limits: `Limits.max_tokens` and `Limits.compress` are left for later.

    Raises:
        InputError: `fusion` needs scores of the first stage, and a candidate has none.
    """
    items = _items(settings, candidates, found)
    positions = [int(i) for i in selection.order(_keys(settings, items, found.logits))]
    # No threshold for what has no score.
    judged = np.array([np.inf if item.score is None else item.score for item in items])
    kept = selection.select(positions, judged, min_score=limits.min_score)
    if settings.dedup is not None:
        kept, items = _without_duplicates(settings.dedup, kept, items)
    return [items[i] for i in kept[: limits.top_n]]


def as_ranking(settings: Settings, query: str, items: Sequence[RankedCandidate], fallback: str | None) -> Ranking:
    """The result for one query.

    Args:
        settings: Of the order.
        query: The query.
        items: What is kept, best first.
        fallback: Why some of it was not scored.
    """
    ranked = [replace(item, rank=rank) for rank, item in enumerate(items, start=1)]
    if settings.order == "ends":
        ranked = [ranked[i] for i in fusion.best_at_both_ends(range(len(ranked)))]
    return Ranking(query, tuple(ranked), settings.model_name, settings.scale, fallback)


def _items(settings: Settings, candidates: Sequence[Candidate], found: TextLogits) -> list[RankedCandidate]:
    """What is known of each candidate, in their order; ranks are given later."""
    reported = scores(settings, found.logits)
    return [
        RankedCandidate(
            candidate=candidate,
            score=float(reported[i]) if found.scored[i] else None,
            logit=float(found.logits[i]) if found.scored[i] else None,
            index=i,
            rank=i + 1,
            truncated=bool(found.truncated[i]),
        )
        for i, candidate in enumerate(candidates)
    ]


def _keys(settings: Settings, items: Sequence[RankedCandidate], logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the order is made of: the logits, adjusted and fused. What was not scored or is blank keeps its mark."""
    read = np.isfinite(logits) & (logits > selection.BLANK_LOGIT)
    if not read.any():
        return logits
    keys = logits.copy()
    if settings.adjust is not None:
        keys[read] += [_adjustment(settings, item) for item, known in zip(items, read, strict=True) if known]
    if settings.fusion is None:
        return keys
    places = np.flatnonzero(read).tolist()
    first_stage = -np.asarray(places, dtype=np.float64)
    if not isinstance(settings.fusion, str):
        given = [items[i].candidate.first_stage_score for i in places]
        if None in given:
            raise InputError(
                f"fusion={settings.fusion!r} needs the first stage's score of every candidate; the one at position "
                f"{places[given.index(None)]} has none. Give Candidate(first_stage_score=...), or take fusion='rrf', "
                "which needs the order alone."
            )
        first_stage = np.asarray(given, dtype=np.float64)
    keys[read] = fusion.fused(keys[read], settings.fusion, first_stage)
    return keys


def _adjustment(settings: Settings, item: RankedCandidate) -> float:
    value = settings.adjust(item)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise InputError(
            "adjust must return a finite number that is added to the logit; for the candidate at position "
            f"{item.index} it returned {value!r}."
        )
    return float(value)


def _without_duplicates(
    threshold: float, kept: Sequence[int], items: Sequence[RankedCandidate]
) -> tuple[list[int], list[RankedCandidate]]:
    """The better one of texts that are alike stays, and lists the positions of those that it stands for."""
    repeats = fusion.duplicates([items[i].text for i in kept], threshold)
    stands_for: dict[int, list[int]] = {}
    for i, better in zip(kept, repeats, strict=True):
        if better is not None:
            stands_for.setdefault(kept[better], []).append(i)
    marked = list(items)
    for i, others in stands_for.items():
        marked[i] = replace(items[i], duplicates=tuple(others))
    return [i for i, better in zip(kept, repeats, strict=True) if better is None], marked
