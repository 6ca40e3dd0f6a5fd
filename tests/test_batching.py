from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rerank_plugins.batching import token_budget_batches

lengths = st.lists(st.integers(0, 600), max_size=200)


@given(lengths, st.integers(1, 4096), st.none() | st.integers(1, 64))
def test_batches_are_a_permutation(lengths: list[int], budget: int, max_items: int | None) -> None:
    batches = list(token_budget_batches(lengths, budget, max_items=max_items))
    together = np.concatenate(batches) if batches else np.array([], dtype=int)
    assert sorted(together.tolist()) == list(range(len(lengths)))


@given(lengths, st.integers(1, 4096), st.none() | st.integers(1, 64))
def test_batches_keep_to_the_budget(lengths: list[int], budget: int, max_items: int | None) -> None:
    for batch in token_budget_batches(lengths, budget, max_items=max_items):
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1
        assert max_items is None or len(batch) <= max_items


@given(lengths, st.integers(1, 4096))
def test_longest_first_and_stable(lengths: list[int], budget: int) -> None:
    order = [int(i) for batch in token_budget_batches(lengths, budget) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


@given(lengths, st.integers(1, 4096))
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
