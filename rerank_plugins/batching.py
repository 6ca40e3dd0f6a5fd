"""Batches of similar length under a token budget, and the way back to the input order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["token_budget_batches"]


def token_budget_batches(
    lengths: Sequence[int] | NDArray[np.intp], token_budget: int, *, max_items: int | None = None
) -> Iterator[NDArray[np.intp]]:
    """Group items so that every batch holds similar lengths and little padding.

    The longest items come first, so that memory peaks at once or never. A batch costs its longest item times its
    number of items; an item longer than the budget gets a batch of its own. Equal lengths keep their input order,
    hence the batches depend on the lengths alone.

    Args:
        lengths: Token count of each item.
        token_budget: Largest padded size of a batch, in tokens.
        max_items: Largest number of items in a batch; None means no such limit.

    Yields:
        Integer arrays of input positions, disjoint, together a permutation of ``range(len(lengths))``. Write the
        result of a batch to ``result[positions]`` and the input order is restored.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.intp), kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        size = max(1, token_budget // longest)
        if max_items is not None:
            size = min(size, max_items)
        yield order[start : start + size]
        start += size
