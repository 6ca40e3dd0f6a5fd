"""Batches of little padding under a token budget, of one call or of several, and the way back to the input order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchCost", "Waiting", "next_batch", "token_budget_batches"]

_PEER = 4
"""A call up to this many times as large as another one, or no larger than a batch, shares batches as an equal."""


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What a batch costs an engine, in tokens: its padded size and something for the batch itself.

    Attributes:
        token_budget: The largest padded size.
        fixed: What running a batch costs besides its tokens. Batches are split where that saves more padding.
        width_step: Widths are padded to a multiple of so many tokens.
    """

    token_budget: int
    fixed: int
    width_step: int = 1

    def widths(self, lengths: NDArray[np.intp]) -> NDArray[np.intp]:
        """Padded widths of batches whose longest items have these lengths."""
        widths: NDArray[np.intp] = -(-np.maximum(1, lengths) // self.width_step) * self.width_step
        return widths

    def places(self, lengths: NDArray[np.intp]) -> NDArray[np.intp]:
        """How many items batches hold whose longest ones have these lengths: at least 1."""
        places: NDArray[np.intp] = np.maximum(1, self.token_budget // self.widths(lengths))
        return places


@dataclass(slots=True, eq=False)
class Waiting:
    """The items of one call that are not scored yet. Nothing changes them but `without`, which makes new ones.

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
    _plan: tuple[BatchCost, NDArray[np.intp]] | None = field(default=None, init=False)
    """How many items the batch has that begins at each item, if this call is alone; see `_sizes`."""

    @classmethod
    def of(cls, lengths: Sequence[int] | NDArray[np.intp], now: int = 0) -> Waiting:
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

    def first_batch(self, cost: BatchCost) -> int:
        """How many items the first batch has, if this call is alone."""
        if self._plan is None or self._plan[0] != cost:
            self._plan = cost, _sizes(self.lengths, cost)
        return int(self._plan[1][0])

    def without(self, scored: slice) -> Waiting:
        """What is left when the items of a part of a batch are scored."""
        start, stop = scored.start, scored.stop
        if start == 0:
            # Views, so that taking all batches out of a call is linear in its items.
            rest = Waiting(self.positions[stop:], self.lengths[stop:], self.tokens, self.due)
        else:
            rest = Waiting(np.delete(self.positions, scored), np.delete(self.lengths, scored), self.tokens, self.due)
        if self._plan is not None:
            # Whatever comes before an item has no say in its batch; a batch that items are taken out of stays one.
            cost, sizes = self._plan
            kept = sizes[stop:]
            if start > 0:
                ends = np.arange(start) + sizes[:start]
                gone = np.clip(ends - start, 0, stop - start)
                kept = np.concatenate((sizes[:start] - gone, kept))
            rest._plan = cost, kept
        return rest


def token_budget_batches(lengths: Sequence[int] | NDArray[np.intp], cost: BatchCost) -> Iterator[NDArray[np.intp]]:
    """Group the items of one call at the least cost.

    The longest items come first, so that memory peaks at once or never. An item longer than the budget gets a batch of
    its own. Equal lengths keep their input order, hence the batches depend on the lengths alone.

    Args:
        lengths: Token count of each item.
        cost: Of a batch.

    Yields:
        Integer arrays of input positions, disjoint, together a permutation of ``range(len(lengths))``. Write the
        result of a batch to ``result[positions]`` and the input order is restored.
    """
    call = Waiting.of(lengths)
    while len(call.positions):
        batch = slice(0, call.first_batch(cost))
        yield call.positions[batch]
        call = call.without(batch)


def next_batch(calls: Sequence[Waiting], cost: BatchCost) -> list[tuple[int, slice]]:
    """Choose the items that go into one padded batch.

    An item longer than the budget gets a batch of its own. The call that is due first has its longest item in it, among
    the items of like length of that call and of others of its size: of all such batches, the one with the least cost
    for each of its tokens. Places that stay free go to shorter items of larger calls, which therefore never hold up a
    small one.

    Hence little padding among many small calls; and a call that is alone gets what `token_budget_batches` gives.

    Args:
        calls: At least one call, each with at least one item.
        cost: Of a batch.

    Returns:
        For each call that takes part, its index in `calls` and the part of its `Waiting.positions`.
    """
    if len(calls) == 1:
        return [(0, slice(0, calls[0].first_batch(cost)))]
    turns = sorted(range(len(calls)), key=lambda i: calls[i].due)
    first = calls[turns[0]]
    longest = int(first.lengths[0])
    equal = max(_PEER * first.tokens, cost.token_budget)
    peers = [i for i in turns if calls[i].tokens <= equal]
    if len(peers) == 1:
        batch = [(turns[0], slice(0, first.first_batch(cost)))]
    else:
        # No batch with that item in it holds more: those that begin earlier are wider.
        most = int(cost.places(first.lengths[:1])[0])
        pool = _Pool(calls, peers, longest, before=most - 1, after=most)
        start, stop = _cheapest(pool.lengths, pool.needed, most, cost)
        batch = pool.parts(start, stop)
        longest = int(pool.lengths[start])
    free = int(cost.places(np.array([longest]))[0]) - sum(part.stop - part.start for _, part in batch)
    larger = [i for i in turns if calls[i].tokens > equal]
    if free and larger:
        batch += _Pool(calls, larger, longest, before=0, after=free).parts(0, free)
    return batch


def _sizes(lengths: NDArray[np.intp], cost: BatchCost) -> NDArray[np.intp]:
    """How many items the first batch has in the cheapest partition of the items from each one on; lengths descend.

    By dynamic programming from the shortest item up: the cheapest partition is that of the rest after its first batch.
    """
    n = len(lengths)
    sizes = np.empty(n, dtype=np.intp)
    least = np.zeros(n + 1, dtype=np.intp)
    widths, places = cost.widths(lengths).tolist(), cost.places(lengths).tolist()
    counts = np.arange(max(places, default=0), 0, -1)
    for start in range(n - 1, -1, -1):
        most = min(places[start], n - start)
        # From the largest batch down, which is what comes out where several cost the same.
        costs = widths[start] * counts[-most:] + least[start + most : start : -1]
        best = int(costs.argmin())
        least[start] = costs[best] + cost.fixed
        sizes[start] = most - best
    return sizes


class _Pool:
    """Items of several calls around a length, longest first; equal ones go by the order of `chosen`.

    Args:
        calls: All calls.
        chosen: Those that items are taken of.
        length: The length.
        before: How many longer items of each call, the shortest of them.
        after: How many other items of each call, the longest of them.
    """

    def __init__(self, calls: Sequence[Waiting], chosen: Sequence[int], length: int, before: int, after: int) -> None:
        # Lengths descend, so they are searched from their end.
        places = [len(calls[i].lengths) - int(np.searchsorted(calls[i].lengths[::-1], length, "right")) for i in chosen]
        self.begins = {i: max(0, place - before) for i, place in zip(chosen, places, strict=True)}
        taken = [calls[i].lengths[self.begins[i] : place + after] for i, place in zip(chosen, places, strict=True)]
        lengths = np.concatenate(taken)
        order = np.argsort(-lengths, kind="stable")
        self.lengths: NDArray[np.intp] = lengths[order]
        self.owners = np.repeat(np.asarray(chosen, dtype=np.intp), [len(part) for part in taken])[order]
        self.needed = int((lengths > length).sum())
        """Where the first item stands that is not longer than the length."""

    def parts(self, start: int, stop: int) -> list[tuple[int, slice]]:
        """The part of each call in a stretch of the pool. A pool keeps every call's order, so a part has no gaps."""
        result = []
        for i, begin in sorted(self.begins.items()):
            of_call = np.flatnonzero(self.owners == i)
            first, last = np.searchsorted(of_call, (start, stop)).tolist()
            if first < last:
                result.append((i, slice(begin + first, begin + last)))
        return result


def _cheapest(lengths: NDArray[np.intp], needed: int, most: int, cost: BatchCost) -> tuple[int, int]:
    """Where a batch of at most `most` begins and ends among descending lengths, so that the item `needed` is in it."""
    starts = np.arange(max(0, needed + 1 - most), needed + 1)
    ends = np.arange(needed + 1, min(len(lengths), needed + most) + 1)
    sums = np.concatenate(([0], np.cumsum(lengths)))
    counts, tokens = ends - starts[:, None], sums[ends] - sums[starts, None]
    price = (cost.widths(lengths[starts, None]) * counts + cost.fixed) / np.maximum(1, tokens)
    price[counts > cost.places(lengths[starts, None])] = np.inf
    # Of those that cost the same, the largest.
    start, end = divmod(int(price[:, ::-1].argmin()), len(ends))
    return int(starts[start]), int(ends[::-1][end])
