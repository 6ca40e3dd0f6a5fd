"""Batches of similar length under a token budget, of one call or of several, and the way back to the input order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["Waiting", "next_batch", "token_budget_batches"]

_PEER = 4
"""A call up to this many times as large as another one, or no larger than a batch, shares batches as an equal."""

_FIXED_COST = 8
"""What running a batch costs besides its tokens, as one part in so many of a full batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """The items of one call that are not scored yet.

    Attributes:
        positions: Where the items stand in the call, int, shape (n_waiting,), longest item first; equal lengths keep
            their input order.
        lengths: Their token counts, int, shape (n_waiting,), descending.
        tokens: Tokens of the whole call.
        due: Whose turn it is: the call with the least goes first.
    """

    positions: NDArray[np.intp]
    lengths: NDArray[np.intp]
    tokens: int
    due: int

    @classmethod
    def of(cls, lengths: Sequence[int], now: int = 0) -> Waiting:
        """A call that arrives.

        It is due when as many tokens have been scored since its arrival as it has itself. So a small call goes before
        a large one that runs, and a large one is not put off for ever by small ones that keep coming.

        Args:
            lengths: Token count of each item.
            now: Tokens scored so far, of all calls.
        """
        counts = np.asarray(lengths, dtype=np.intp)
        order = np.argsort(-counts, kind="stable")
        tokens = int(counts.sum())
        return cls(order, counts[order], tokens, now + tokens)

    def without(self, scored: slice) -> Waiting:
        """What is left when the items of a part of a batch are scored."""
        return replace(self, positions=np.delete(self.positions, scored), lengths=np.delete(self.lengths, scored))


def token_budget_batches(lengths: Sequence[int] | NDArray[np.intp], token_budget: int) -> Iterator[NDArray[np.intp]]:
    """Group the items of one call so that every batch holds similar lengths and little padding.

    The longest items come first, so that memory peaks at once or never. A batch costs its longest item times its
    number of items; an item longer than the budget gets a batch of its own. Equal lengths keep their input order,
    hence the batches depend on the lengths alone.

    Args:
        lengths: Token count of each item.
        token_budget: Largest padded size of a batch, in tokens.

    Yields:
        Integer arrays of input positions, disjoint, together a permutation of ``range(len(lengths))``. Write the
        result of a batch to ``result[positions]`` and the input order is restored.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.intp), kind="stable")
    start = 0
    while start < len(order):
        stop = start + _places(lengths[order[start]], token_budget)
        yield order[start:stop]
        start = stop


def next_batch(calls: Sequence[Waiting], token_budget: int) -> list[tuple[int, slice]]:
    """Choose the items that go into one padded batch.

    A batch costs its longest item times its number of items; an item longer than the budget gets a batch of its own.
    The call that is due first has its longest item in it, among the items of like length of that call and of others of
    its size: of all such batches, the one with the least cost for each of its tokens. Places that stay free go to
    shorter items of larger calls, which therefore never hold up a small one.

    Hence little padding among many small calls; and a call that is alone gets what `token_budget_batches` gives.

    Args:
        calls: At least one call, each with at least one item.
        token_budget: Largest padded size of a batch, in tokens.

    Returns:
        For each call that takes part, its index in `calls` and the part of its `Waiting.positions`.
    """
    if len(calls) == 1:
        return [(0, slice(0, min(_places(calls[0].lengths[0], token_budget), len(calls[0].lengths))))]
    turns = sorted(range(len(calls)), key=lambda i: calls[i].due)
    first = calls[turns[0]]
    equal = max(_PEER * first.tokens, token_budget)
    lengths, owners = _pool(calls, [i for i in turns if calls[i].tokens <= equal])
    start, places = _cheapest(lengths, int(np.searchsorted(-lengths, -first.lengths[0])), token_budget)
    batch = _parts(owners, start, places)
    free = places - len(lengths[start : start + places])
    larger = [i for i in turns if calls[i].tokens > equal]
    if free and larger:
        longest = lengths[start]
        lengths, owners = _pool(calls, larger)
        batch += _parts(owners, int(np.searchsorted(-lengths, -longest)), free)
    return batch


def _places(longest: int | np.intp, token_budget: int) -> int:
    return max(1, token_budget // max(1, int(longest)))


def _pool(calls: Sequence[Waiting], chosen: Sequence[int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """All lengths of the chosen calls, descending, and whose they are; equal ones go by the order of `chosen`."""
    lengths = np.concatenate([calls[i].lengths for i in chosen])
    owners = np.repeat(np.asarray(chosen, dtype=np.intp), [len(calls[i].lengths) for i in chosen])
    order = np.argsort(-lengths, kind="stable")
    return lengths[order], owners[order]


def _cheapest(lengths: NDArray[np.intp], needed: int, token_budget: int) -> tuple[int, int]:
    """Where to begin among descending lengths, and the number of places, so that the item `needed` has one."""
    starts = np.arange(needed + 1)
    longest = np.maximum(1, lengths[: needed + 1])
    places = np.maximum(1, token_budget // longest)
    ends = np.minimum(starts + places, len(lengths))
    sums = np.concatenate(([0], np.cumsum(lengths)))
    cost = longest * (ends - starts) + token_budget / _FIXED_COST
    price = np.where(starts + places > needed, cost / np.maximum(1, sums[ends] - sums[starts]), np.inf)
    start = int(np.argmin(price))
    return start, int(places[start])


def _parts(owners: NDArray[np.intp], start: int, places: int) -> list[tuple[int, slice]]:
    """The part of each call in a stretch of the pool. A pool keeps every call's order, so a part has no gaps."""
    before = np.bincount(owners[:start], minlength=int(owners.max()) + 1)
    chosen, counts = np.unique(owners[start : start + places], return_counts=True)
    return [
        (i, slice(int(before[i]), int(before[i]) + count))
        for i, count in zip(chosen.tolist(), counts.tolist(), strict=True)
    ]
