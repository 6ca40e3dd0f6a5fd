"""What an order is worth, beside the order that the exact model gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness._work import Work
from rerank_plugins.evaluation import measure_run

__all__ = ["Quality", "compare_orders"]

_TOP = 10

Orders = Sequence[Sequence[int]]
"""Positions of the candidates of each query, best first."""
Logits = Sequence[Sequence[float | None]]
"""Logits of the candidates of each query, in their own order; None where one is not known."""


@dataclass(frozen=True, slots=True)
class Quality:
    """An order beside the reference's.

    Attributes:
        ndcg: nDCG@10 by the judgements of the data, or, where it has none, by the reference's own top 10, graded 10 to
            1: then 1 is the reference's order.
        ndcg_difference: That, less the reference's.
        overlap: Share of the reference's top 10 that is in this top 10, in any order; mean over queries.
        same_order: Whether the top 10 of every query are the same, in the same order.
        logit_difference: Largest absolute difference of logits; None where they are not known.
    """

    ndcg: float
    ndcg_difference: float
    overlap: float
    same_order: bool
    logit_difference: float | None


def compare_orders(
    work: Work, orders: Orders, logits: Logits | None, reference: Orders, reference_logits: Logits | None
) -> Quality:
    """Measure one contender's orders against the reference's."""
    dataset = work.dataset
    found = list(dataset.candidates.items())
    if not work.judged:
        grades = {
            query: {names[place]: _TOP - rank for rank, place in enumerate(order[:_TOP])}
            for (query, names), order in zip(found, reference, strict=True)
        }
        dataset = replace(dataset, qrels=grades)

    def ndcg(of: Orders) -> float:
        run = {
            query: {names[place]: -float(rank) for rank, place in enumerate(order)}
            for (query, names), order in zip(found, of, strict=True)
        }
        return measure_run(dataset, run, ["nDCG@10"])["nDCG@10"]

    tops = [(list(mine[:_TOP]), list(other[:_TOP])) for mine, other in zip(orders, reference, strict=True)]
    own = ndcg(orders)
    return Quality(
        ndcg=own,
        ndcg_difference=own - ndcg(reference),
        overlap=sum(len(set(mine) & set(other)) / len(other) for mine, other in tops) / len(tops),
        same_order=all(mine == other for mine, other in tops),
        logit_difference=_largest_difference(logits, reference_logits),
    )


def _largest_difference(logits: Logits | None, reference: Logits | None) -> float | None:
    if logits is None or reference is None:
        return None
    pairs = [
        (mine, other)
        for row, expected in zip(logits, reference, strict=True)
        for mine, other in zip(row, expected, strict=True)
    ]
    if any(mine is None or other is None for mine, other in pairs):
        return None
    return max(abs(mine - other) for mine, other in pairs if mine is not None and other is not None)
