from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rerank_plugins.batching import Waiting, next_batch, token_budget_batches

lengths = st.lists(st.integers(0, 600), max_size=200)
budgets = st.integers(1, 4096)
callers = st.lists(st.lists(st.integers(1, 600), min_size=1, max_size=40), min_size=1, max_size=8)


def batches(calls: list[Waiting], budget: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Every batch until nothing waits, as the positions of each call that takes part."""
    calls = list(calls)
    while alive := [i for i, call in enumerate(calls) if len(call.positions)]:
        batch = []
        for place, part in next_batch([calls[i] for i in alive], budget):
            i = alive[place]
            batch.append((i, calls[i].positions[part].tolist()))
            calls[i] = calls[i].without(part)
        yield batch


def alone(counts: list[int], budget: int) -> list[list[int]]:
    return [positions for ((_, positions),) in batches([Waiting.of(counts)], budget)]


@given(lengths, budgets)
def test_batches_are_a_permutation(lengths: list[int], budget: int) -> None:
    batches = list(token_budget_batches(lengths, budget))
    together = np.concatenate(batches) if batches else np.array([], dtype=int)
    assert sorted(together.tolist()) == list(range(len(lengths)))


@given(lengths, budgets)
def test_batches_of_one_call_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    for batch in token_budget_batches(lengths, budget):
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1


@given(lengths, budgets)
def test_longest_first_and_stable(lengths: list[int], budget: int) -> None:
    order = [int(i) for batch in token_budget_batches(lengths, budget) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


@given(lengths, budgets)
def test_writing_back_restores_the_input_order(lengths: list[int], budget: int) -> None:
    result = np.full(len(lengths), -1)
    for batch in token_budget_batches(lengths, budget):
        result[batch] = [lengths[i] for i in batch]
    assert result.tolist() == lengths


def test_similar_lengths_share_a_batch() -> None:
    batches = [b.tolist() for b in token_budget_batches([10, 500, 11, 490, 12], 1000)]
    assert batches == [[1, 3], [4, 2, 0]]


def test_batches_fill_the_budget() -> None:
    assert [len(b) for b in token_budget_batches([100] * 50, 1000)] == [10] * 5


# -- several calls ------------------------------------------------------------------------------------------------


@given(lengths, budgets)
def test_a_call_alone_has_the_batches_of_one_call(lengths: list[int], budget: int) -> None:
    assert alone(lengths, budget) == [batch.tolist() for batch in token_budget_batches(lengths, budget)]


def test_longer_pairs_of_another_call_join_rather_than_wait() -> None:
    assert list(batches([Waiting.of([20]), Waiting.of([15])], 1000)) == [[(0, [0]), (1, [0])]]


@given(callers, budgets)
def test_every_item_of_every_call_is_in_one_batch(callers: list[list[int]], budget: int) -> None:
    seen = [(i, p) for batch in batches([Waiting.of(c) for c in callers], budget) for i, part in batch for p in part]
    assert sorted(seen) == [(i, p) for i, counts in enumerate(callers) for p in range(len(counts))]


@given(callers, budgets)
def test_batches_keep_to_the_budget(callers: list[list[int]], budget: int) -> None:
    for batch in batches([Waiting.of(c) for c in callers], budget):
        found = [callers[i][p] for i, part in batch for p in part]
        assert len(found) * max(found) <= budget or len(found) == 1


@given(callers, budgets)
def test_the_call_that_is_due_is_in_every_batch(callers: list[list[int]], budget: int) -> None:
    left = [len(counts) for counts in callers]
    for batch in batches([Waiting.of(c) for c in callers], budget):
        first = min((i for i, n in enumerate(left) if n), key=lambda i: sum(callers[i]))
        assert first in {i for i, _ in batch}
        for i, part in batch:
            left[i] -= len(part)


def test_small_calls_pad_less_together_than_alone() -> None:
    random = np.random.default_rng(0)
    callers = [random.integers(20, 300, 10).tolist() for _ in range(32)]

    def padded(found: Iterator[list[tuple[int, list[int]]]], of: list[list[int]]) -> int:
        sizes = [[of[i][p] for i, part in batch for p in part] for batch in found]
        return sum(len(batch) * max(batch) for batch in sizes)

    together = padded(batches([Waiting.of(c) for c in callers], 1024), callers)
    apart = sum(padded(batches([Waiting.of(c)], 1024), [c]) for c in callers)
    real = sum(map(sum, callers))
    assert together < 1.1 * real < apart


def test_a_small_call_beside_a_large_one_is_scored_as_if_it_were_alone() -> None:
    small = [200, 150, 100, 90, 80, 70, 60, 50, 40, 30]
    large = Waiting.of([100] * 1000)
    found = batches([large, Waiting.of(small)], 1024)
    parts = [dict(batch).get(1, []) for batch, _ in zip(found, range(3), strict=False)]
    assert parts == [*alone(small, 1024), []]


def test_places_that_a_small_call_leaves_free_go_to_the_large_one() -> None:
    first = next(batches([Waiting.of([100] * 1000), Waiting.of([120, 110])], 1200))
    assert [(i, len(part)) for i, part in first] == [(1, 2), (0, 8)]


def test_small_calls_that_keep_coming_do_not_put_off_a_large_one_for_ever() -> None:
    large, now, rounds = Waiting.of([100] * 100), 0, 0
    while len(large.positions):
        # Two full batches of small calls come for every batch that runs.
        small = [Waiting.of([100] * 10, now) for _ in range(2)]
        for i, part in next_batch([large, *small], 1000):
            now += int([large, *small][i].lengths[part].sum())
            if i == 0:
                large = large.without(part)
        rounds += 1
    assert rounds == 19
