from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rerank_plugins.batching import BatchCost, Waiting, next_batch, token_budget_batches

lengths = st.lists(st.integers(0, 600), max_size=200)
budgets = st.integers(1, 4096)
costs = st.builds(BatchCost, budgets, st.integers(0, 4096), st.sampled_from([1, 8]))
callers = st.lists(st.lists(st.integers(1, 600), min_size=1, max_size=40), min_size=1, max_size=8)


def batches(calls: list[Waiting], cost: BatchCost) -> Iterator[list[tuple[int, list[int]]]]:
    """Every batch until nothing waits, as the positions of each call that takes part."""
    calls = list(calls)
    while alive := [i for i, call in enumerate(calls) if len(call.positions)]:
        batch = []
        for place, part in next_batch([calls[i] for i in alive], cost):
            i = alive[place]
            batch.append((i, calls[i].positions[part].tolist()))
            calls[i] = calls[i].without(part)
        yield batch


def width(lengths: list[int], cost: BatchCost) -> int:
    """Of a batch of these items, padded."""
    return -(-max(1, *lengths) // cost.width_step) * cost.width_step


def alone(counts: list[int], cost: BatchCost) -> list[list[int]]:
    return [positions for ((_, positions),) in batches([Waiting.of(counts)], cost)]


@given(lengths, costs)
def test_batches_are_a_permutation(lengths: list[int], cost: BatchCost) -> None:
    batches = list(token_budget_batches(lengths, cost))
    together = np.concatenate(batches) if batches else np.array([], dtype=int)
    assert sorted(together.tolist()) == list(range(len(lengths)))


@given(lengths, costs)
def test_batches_of_one_call_keep_to_the_budget(lengths: list[int], cost: BatchCost) -> None:
    for batch in token_budget_batches(lengths, cost):
        assert len(batch) * width([lengths[i] for i in batch], cost) <= cost.token_budget or len(batch) == 1


@given(lengths, costs)
def test_longest_first_and_stable(lengths: list[int], cost: BatchCost) -> None:
    order = [int(i) for batch in token_budget_batches(lengths, cost) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


@given(lengths, costs)
def test_writing_back_restores_the_input_order(lengths: list[int], cost: BatchCost) -> None:
    result = np.full(len(lengths), -1)
    for batch in token_budget_batches(lengths, cost):
        result[batch] = [lengths[i] for i in batch]
    assert result.tolist() == lengths


def test_similar_lengths_share_a_batch() -> None:
    batches = [b.tolist() for b in token_budget_batches([10, 500, 11, 490, 12], BatchCost(1000, 100))]
    assert batches == [[1, 3], [4, 2, 0]]


def test_batches_fill_the_budget() -> None:
    assert [len(b) for b in token_budget_batches([100] * 50, BatchCost(1000, 1))] == [10] * 5
    padded_to_104 = token_budget_batches([100] * 50, BatchCost(1000, 1, 8))
    assert [len(b) for b in padded_to_104] == [9, 9, 9, 9, 9, 5]


def spent(batches: list[list[int]], lengths: list[int], cost: BatchCost) -> int:
    """What batches cost together."""
    return sum(width([lengths[i] for i in batch], cost) * len(batch) + cost.fixed for batch in batches)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 200), st.integers(0, 60))
def test_no_other_batches_of_neighbours_cost_less(lengths: list[int], budget: int, fixed: int) -> None:
    cost = BatchCost(budget, fixed, 8)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    least = spent([batch.tolist() for batch in token_budget_batches(lengths, cost)], lengths, cost)

    for cuts in product([False, True], repeat=len(order) - 1):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(order)]
        other = [order[start:stop] for start, stop in pairwise(places)]
        if all(len(batch) == 1 or len(batch) * width([lengths[batch[0]]], cost) <= budget for batch in other):
            assert least <= spent(other, lengths, cost)


def test_a_few_long_texts_do_not_pad_the_short_ones() -> None:
    lengths = [300, 40, 35, 42, 38, 40, 36]
    split = [batch.tolist() for batch in token_budget_batches(lengths, BatchCost(4096, 32))]
    assert split == [[0], [3, 1, 5, 4, 6, 2]]
    whole = [batch.tolist() for batch in token_budget_batches(lengths, BatchCost(4096, 4096))]
    assert whole == [[0, 3, 1, 5, 4, 6, 2]]


# -- several calls ------------------------------------------------------------------------------------------------


@given(lengths, costs)
def test_a_call_alone_has_the_batches_of_one_call(lengths: list[int], cost: BatchCost) -> None:
    assert alone(lengths, cost) == [batch.tolist() for batch in token_budget_batches(lengths, cost)]


def test_longer_pairs_of_another_call_join_rather_than_wait() -> None:
    assert list(batches([Waiting.of([20]), Waiting.of([15])], BatchCost(1000, 100))) == [[(0, [0]), (1, [0])]]


@given(callers, costs)
def test_every_item_of_every_call_is_in_one_batch(callers: list[list[int]], cost: BatchCost) -> None:
    seen = [(i, p) for batch in batches([Waiting.of(c) for c in callers], cost) for i, part in batch for p in part]
    assert sorted(seen) == [(i, p) for i, counts in enumerate(callers) for p in range(len(counts))]


@given(callers, costs)
def test_batches_keep_to_the_budget(callers: list[list[int]], cost: BatchCost) -> None:
    for batch in batches([Waiting.of(c) for c in callers], cost):
        found = [callers[i][p] for i, part in batch for p in part]
        assert len(found) * width(found, cost) <= cost.token_budget or len(found) == 1


@given(callers, costs)
def test_the_call_that_is_due_is_in_every_batch(callers: list[list[int]], cost: BatchCost) -> None:
    left = [len(counts) for counts in callers]
    for batch in batches([Waiting.of(c) for c in callers], cost):
        first = min((i for i, n in enumerate(left) if n), key=lambda i: sum(callers[i]))
        assert first in {i for i, _ in batch}
        for i, part in batch:
            left[i] -= len(part)


def test_small_calls_cost_less_together_than_alone() -> None:
    random = np.random.default_rng(0)
    callers = [random.integers(20, 300, 10).tolist() for _ in range(32)]
    cost = BatchCost(1024, 32)
    every = [length for counts in callers for length in counts]
    first = np.cumsum([0, *map(len, callers)])

    together = [
        [first[i] + p for i, part in batch for p in part] for batch in batches([Waiting.of(c) for c in callers], cost)
    ]
    apart = sum(spent(alone(counts, cost), counts, cost) for counts in callers)
    assert spent(together, every, cost) < min(0.95 * apart, 1.1 * sum(every))


def test_a_small_call_beside_a_large_one_is_scored_as_if_it_were_alone() -> None:
    small = [200, 150, 100, 90, 80, 70, 60, 50, 40, 30]
    large, cost = Waiting.of([100] * 1000), BatchCost(1024, 32)
    found = batches([large, Waiting.of(small)], cost)
    parts = [dict(batch).get(1, []) for batch, _ in zip(found, range(len(alone(small, cost)) + 1), strict=False)]
    assert parts == [*alone(small, cost), []]


def test_places_that_a_small_call_leaves_free_go_to_the_large_one() -> None:
    first = next(batches([Waiting.of([100] * 1000), Waiting.of([120, 110])], BatchCost(1200, 40)))
    assert [(i, len(part)) for i, part in first] == [(1, 2), (0, 8)]


def test_small_calls_that_keep_coming_do_not_put_off_a_large_one_for_ever() -> None:
    large, now, rounds = Waiting.of([100] * 100), 0, 0
    while len(large.positions):
        # Two full batches of small calls come for every batch that runs.
        small = [Waiting.of([100] * 10, now) for _ in range(2)]
        for i, part in next_batch([large, *small], BatchCost(1000, 30)):
            now += int([large, *small][i].lengths[part].sum())
            if i == 0:
                large = large.without(part)
        rounds += 1
    assert rounds == 19


def test_taking_all_batches_out_of_a_call_is_linear_in_its_items() -> None:
    def seconds(n: int) -> float:
        call = Waiting.of(np.random.default_rng(0).integers(8, 60, n))
        cost = BatchCost(64, 8, 8)
        call.first_batch(cost)
        started = time.process_time()
        while len(call.positions):
            ((_, part),) = next_batch([call], cost)
            call = call.without(part)
        return time.process_time() - started

    # Ten times as many items took a hundred times as long.
    assert min(seconds(100_000) for _ in range(2)) < 30 * max(seconds(10_000) for _ in range(2))


def test_a_batch_beside_a_huge_call_looks_at_few_of_its_items() -> None:
    cost = BatchCost(1024, 32, 8)
    huge, small = Waiting.of(np.full(1_000_000, 20)), Waiting.of([30, 18, 12])
    started = time.process_time()
    for _ in range(20):
        assert next_batch([huge, small], cost) == [(1, slice(0, 3)), (0, slice(0, 29))]
    assert time.process_time() - started < 0.5


def test_what_is_taken_out_of_the_middle_leaves_batches_within_the_budget() -> None:
    cost = BatchCost(64, 8)
    call = Waiting.of(list(range(1, 33)))
    call.first_batch(cost)
    rest = call.without(slice(5, 11))
    assert rest.lengths.tolist() == [*range(32, 27, -1), *range(21, 0, -1)]
    scored: list[int] = []
    while len(rest.positions):
        part = slice(0, rest.first_batch(cost))
        assert rest.lengths[0] * (part.stop - part.start) <= 64
        scored += rest.lengths[part].tolist()
        rest = rest.without(part)
    assert scored == [*range(32, 27, -1), *range(21, 0, -1)]
