"""Results in words, the same in the table, the report and the plots."""

from __future__ import annotations

from typing import Literal

from rerank_plugins.evaluation._results import DatasetResult, Evaluation
from rerank_plugins.evaluation.measures import Comparison

__all__ = ["facts_text", "interval_text", "p_text", "tested_text", "value_text", "verdict"]


def value_text(value: float) -> str:
    """A measure as it is printed."""
    return f"{value:.4f}"


def p_text(p_value: float | None) -> str:
    """A p-value as it is printed."""
    if p_value is None:
        return "–"
    return "<0.0001" if p_value < 0.0001 else f"{p_value:.4f}"


def interval_text(comparison: Comparison) -> str:
    """The confidence interval of a difference as it is printed."""
    if comparison.low is None or comparison.high is None:
        return "–"
    return f"{comparison.low:+.4f} … {comparison.high:+.4f}"


def verdict(comparison: Comparison) -> Literal["better", "worse", "unclear"]:
    """``"better"`` or ``"worse"`` where the confidence interval leaves out 0, otherwise ``"unclear"``."""
    if comparison.low is not None and comparison.low > 0:
        return "better"
    if comparison.high is not None and comparison.high < 0:
        return "worse"
    return "unclear"


def tested_text(evaluation: Evaluation) -> str:
    """How many differences were tested, and how many of them are clear after the correction for that; perhaps none."""
    values = evaluation.corrected()
    known = [value for value in values.values() if value is not None]
    clear = sum(value < 0.05 for value in known)
    if len(known) < 2:
        return ""
    return (
        f"The first measure, {evaluation.measures[0]}, is the one to go by. {len(known)} differences were tested in "
        f"all, and with so many some look clear by chance: after Holm's correction {clear or 'none'} of them "
        f"{'is' if clear == 1 else 'are'} (p below 0.05)."
    )


def facts_text(result: DatasetResult) -> str:
    """Which queries were measured, and over what."""
    left_out = [
        f"{count} {what}"
        for count, what in (
            (result.unjudged, "left out for having no judgement"),
            (result.without_relevant, "left out for having no relevant document"),
            (result.without_candidates, "without candidates, counted as 0"),
        )
        if count
    ]
    return (
        f"{len(result.queries)} queries, {len(result.dataset.documents):,} documents; top {result.top_k} of "
        f"{result.first_stage}" + (f"; queries {', '.join(left_out)}" if left_out else "")
    )
