"""Batching by token count: batches with little padding under a token budget, for one call or several at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchCost", "Waiting", "next_batch", "token_budget_batches"]

_PEER = 4
"""Size ratio of calls that share a batch as equals. Calls that fit into one batch always do."""


@dataclass(frozen=True, slots=True)
class BatchCost:
    """Cost of a batch, in tokens: its padded size plus a fixed cost.

    Attributes:
        token_budget: Largest padded size of a batch.
        fixed: Cost of running one more batch. A batch is split where the split saves more padding than this.
        width_step: Widths are padded to a multiple of this many tokens.
    """

    token_budget: int
    fixed: int
    width_step: int = 1

    def widths(self, lengths: NDArray[np.intp]) -> NDArray[np.intp]:
        """Padded widths of batches, given the lengths of their longest items."""
        widths: NDArray[np.intp] = -(-np.maximum(1, lengths) // self.width_step) * self.width_step
        return widths

    def places(self, lengths: NDArray[np.intp]) -> NDArray[np.intp]:
        """Most items of batches, given the lengths of their longest items; at least 1."""
        places: NDArray[np.intp] = np.maximum(1, self.token_budget // self.widths(lengths))
        return places


@dataclass(slots=True, eq=False)
class Waiting:
    """Unscored items of one call. Immutable: `without` returns a new object.

    Attributes:
        positions: Input positions, int, shape (n_waiting,), longest item first. Equal lengths keep their input order.
        lengths: Token counts, int, shape (n_waiting,), descending.
        tokens: Tokens of the whole call.
        due: Priority: the call with the lowest number goes first.
    """

    positions: NDArray[np.intp]
    lengths: NDArray[np.intp]
    tokens: int
    due: int
    _plan: tuple[BatchCost, NDArray[np.intp]] | None = field(default=None, init=False)
    """Batch sizes of this call alone, for a batch that begins at each item; see `_sizes`."""

    @classmethod
    def of(cls, lengths: Sequence[int] | NDArray[np.intp], now: int = 0) -> Waiting:
        """A new call.

        It is due once as many tokens have been scored since its arrival as it has itself. A small call therefore
        overtakes a large one that is running, and small calls that keep coming cannot hold up a large one for ever.

        Args:
            lengths: Token count of each item.
            now: Tokens scored so far, of all calls.
        """
        counts = np.asarray(lengths, dtype=np.intp)
        order = np.argsort(-counts, kind="stable")
        tokens = int(counts.sum())
        return cls(order, counts[order], tokens, now + tokens)

    def first_batch(self, cost: BatchCost) -> int:
        """Size of the first batch of this call alone."""
        if self._plan is None or self._plan[0] != cost:
            self._plan = cost, _sizes(self.lengths, cost)
        return int(self._plan[1][0])

    def without(self, scored: slice) -> Waiting:
        """The call without a slice of its items, which are scored."""
        start, stop = scored.start, scored.stop
        if start == 0:
            # Views, so that taking all batches out of a call is linear in its items.
            rest = Waiting(self.positions[stop:], self.lengths[stop:], self.tokens, self.due)
        else:
            rest = Waiting(np.delete(self.positions, scored), np.delete(self.lengths, scored), self.tokens, self.due)
        if self._plan is not None:
            # A batch depends only on the items from its first one on; one that loses items stays a batch.
            cost, sizes = self._plan
            kept = sizes[stop:]
            if start > 0:
                ends = np.arange(start) + sizes[:start]
                gone = np.clip(ends - start, 0, stop - start)
                kept = np.concatenate((sizes[:start] - gone, kept))
            rest._plan = cost, kept
        return rest


def token_budget_batches(lengths: Sequence[int] | NDArray[np.intp], cost: BatchCost) -> Iterator[NDArray[np.intp]]:
    """Batches of one call, at the least total cost.

    The longest items come first, so that memory peaks in the first batch. An item longer than the budget gets a batch
    of its own. Equal lengths keep their input order, so the batches depend on the lengths alone.

    Args:
        lengths: Token count of each item.
        cost: Cost of a batch.

    Yields:
        Input positions of each batch, int, shape (n_items,). Together they are a permutation of
        ``range(len(lengths))``: writing each batch's result to ``result[positions]`` restores the input order.
    """
    call = Waiting.of(lengths)
    while len(call.positions):
        batch = slice(0, call.first_batch(cost))
        yield call.positions[batch]
        call = call.without(batch)


def next_batch(calls: Sequence[Waiting], cost: BatchCost) -> list[tuple[int, slice]]:
    """Items of the next batch, from one call or several.

    The batch holds the longest item of the call that is due first. It is filled with items of similar length, of that
    call and of calls of its size: among all such batches it has the least cost a token. Free places go to shorter
    items of larger calls. An item longer than the budget gets a batch of its own.

    Many small calls thus share batches with little padding, and a large call never holds up a small one. A call alone
    gets the batches of `token_budget_batches`.

    Args:
        calls: At least one call, each with at least one item.
        cost: Cost of a batch.

    Returns:
        For each call with items in the batch: its index in `calls`, and the slice of its `Waiting.positions`.
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
        # An upper bound: a batch that begins with a longer item is wider and holds fewer.
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
    """Size of the first batch in the cheapest partition of ``lengths[i:]``, for each i; lengths are descending.

    Dynamic programming from the shortest item up: the cheapest partition is a first batch plus the cheapest partition
    of the rest.
    """
    n = len(lengths)
    sizes = np.empty(n, dtype=np.intp)
    least = np.zeros(n + 1, dtype=np.intp)
    widths, places = cost.widths(lengths).tolist(), cost.places(lengths).tolist()
    counts = np.arange(max(places, default=0), 0, -1)
    for start in range(n - 1, -1, -1):
        most = min(places[start], n - start)
        # From the largest batch down: argmin takes the first of equal costs.
        costs = widths[start] * counts[-most:] + least[start + most : start : -1]
        best = int(costs.argmin())
        least[start] = costs[best] + cost.fixed
        sizes[start] = most - best
    return sizes


class _Pool:
    """Items of several calls with lengths around a given one, longest first; equal lengths in the order of `chosen`.

    Args:
        calls: All calls.
        chosen: Indices of the calls whose items are taken.
        length: The given length.
        before: Most longer items of each call; the shortest are taken.
        after: Most other items of each call; the longest are taken.
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
        """Index of the first item that is not longer than the length."""

    def parts(self, start: int, stop: int) -> list[tuple[int, slice]]:
        """Slices of the calls that ``lengths[start:stop]`` consists of. The pool keeps each call's order: no gaps."""
        result = []
        for i, begin in sorted(self.begins.items()):
            of_call = np.flatnonzero(self.owners == i)
            first, last = np.searchsorted(of_call, (start, stop)).tolist()
            if first < last:
                result.append((i, slice(begin + first, begin + last)))
        return result


def _cheapest(lengths: NDArray[np.intp], needed: int, most: int, cost: BatchCost) -> tuple[int, int]:
    """Start and end of the batch with the least cost a token that holds item `needed`; lengths are descending."""
    starts = np.arange(max(0, needed + 1 - most), needed + 1)
    ends = np.arange(needed + 1, min(len(lengths), needed + most) + 1)
    sums = np.concatenate(([0], np.cumsum(lengths)))
    counts, tokens = ends - starts[:, None], sums[ends] - sums[starts, None]
    price = (cost.widths(lengths[starts, None]) * counts + cost.fixed) / np.maximum(1, tokens)
    price[counts > cost.places(lengths[starts, None])] = np.inf
    # The largest of equal costs.
    start, end = divmod(int(price[:, ::-1].argmin()), len(ends))
    return int(starts[start]), int(ends[::-1][end])
