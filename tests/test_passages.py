from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerank_plugins.errors import ConfigurationError
from rerank_plugins.passages import check_windows, fold_max, split_windows


def words(n: int) -> tuple[str, list[tuple[int, int]]]:
    text, offsets = "", []
    for i in range(n):
        text += " " if text else ""
        offsets.append((len(text), len(text) + len(f"w{i}")))
        text += f"w{i}"
    return text, offsets


@given(st.integers(0, 120), st.integers(1, 40), st.data())
def test_windows_cover_every_token(n: int, length: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, length - 1))
    text, offsets = words(n)
    windows = [text[start:end] for start, end in split_windows(text, offsets, length, overlap)]
    assert {word for window in windows for word in window.split()} == set(text.split())
    assert all(len(window.split()) <= length for window in windows)
    assert all(window in text for window in windows)
    if n > length:
        assert all(len(window.split()) == length for window in windows)
        for first, second in itertools.pairwise(windows):
            assert len(set(first.split()) & set(second.split())) >= overlap


def test_a_short_text_is_one_window() -> None:
    text, offsets = words(5)
    assert split_windows(text, offsets, 5, 0) == [(0, len(text))]


@pytest.mark.parametrize(("length", "overlap"), [(0, 0), (-1, 0), (4, 4), (4, -1)])
def test_windows_that_do_not_move_are_refused(length: int, overlap: int) -> None:
    with pytest.raises(ConfigurationError):
        check_windows(length, overlap)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(-20, 20)), max_size=50))
def test_fold_is_the_maximum_of_each_owner(windows: list[tuple[int, float]]) -> None:
    folded = fold_max(np.array([score for _, score in windows]), [owner for owner, _ in windows], 10)
    for owner in range(10):
        mine = [score for o, score in windows if o == owner]
        assert folded[owner] == (max(mine) if mine else -np.inf)
