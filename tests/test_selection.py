from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerank_plugins.errors import ConfigurationError
from rerank_plugins.selection import (
    BLANK_LOGIT,
    check_limits,
    class_logit,
    order,
    select,
    to_logit,
    to_scale,
    within_tokens,
)

finite = st.floats(-40, 40, allow_nan=False)
logit_lists = st.lists(finite, max_size=60)


@given(logit_lists)
def test_order_is_descending_and_stable(logits: list[float]) -> None:
    expected = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert order(np.array(logits, dtype=np.float64)).tolist() == expected


def test_blank_texts_come_last() -> None:
    assert order(np.array([BLANK_LOGIT, -30.0, 2.0, BLANK_LOGIT])).tolist() == [2, 1, 0, 3]


@given(logit_lists)
def test_scales_never_change_the_order(logits: list[float]) -> None:
    z = np.array(logits, dtype=np.float64)
    ranked = order(z)
    for scale in ("probability", "logit"):
        reported = to_scale(z, scale)[ranked]  # type: ignore[arg-type]
        assert (np.diff(reported) <= 0).all()


def test_probability_is_the_float64_sigmoid() -> None:
    z = np.array([-800.0, -20.0, -1.0, 0.0, 1.0, 17.0, 18.0, 20.0, 800.0, BLANK_LOGIT])
    p = to_scale(z, "probability")
    assert p.dtype == np.float64
    assert p[3] == 0.5
    assert p[-1] == 0.0
    assert p[4] == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-15)
    # float32 gives 1.0 for all three.
    assert p[5] < p[6] < p[7] < 1


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_to_logit_inverts_the_sigmoid(logits: list[float]) -> None:
    z = np.array(logits)
    assert np.allclose(to_logit(to_scale(z, "probability")), z, atol=1e-2)


def test_to_logit_of_certainty_is_finite_and_ordered() -> None:
    z = to_logit(np.array([0.0, 1e-30, 0.5, 1.0]))
    assert np.isfinite(z).all()
    assert (np.diff(z) > 0).all()


@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=10), st.integers(0, 2))
def test_sigmoid_of_a_class_logit_is_the_softmax(rows: list[list[float]], label: int) -> None:
    z = np.array(rows)
    softmax = np.exp(z - z.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    assert np.allclose(to_scale(class_logit(z, label), "probability"), softmax[:, label], atol=1e-12)


def test_class_logit_of_two_classes_is_the_difference() -> None:
    assert class_logit(np.array([[1.0, 4.0], [2.0, -1.0]]), 1).tolist() == [3.0, -3.0]


@given(
    logit_lists,
    st.none() | st.floats(0, 1),
    st.none() | st.integers(1, 70),
    st.none() | st.integers(1, 500),
    st.randoms(),
)
def test_select_is_a_prefix_of_the_order(
    logits: list[float], min_score: float | None, top_n: int | None, max_tokens: int | None, random: object
) -> None:
    z = np.array(logits, dtype=np.float64)
    ranked, scores = order(z), to_scale(z, "probability")
    counts = [random.randrange(1, 60) for _ in logits]  # type: ignore[attr-defined]
    kept = select(ranked, scores, min_score=min_score, top_n=top_n)
    if max_tokens is not None:
        kept = within_tokens(kept, lambda some: [counts[i] for i in some], max_tokens)
    assert kept == ranked.tolist()[: len(kept)]
    if top_n is not None:
        assert len(kept) <= top_n
    if min_score is not None:
        assert all(scores[i] >= min_score for i in kept)
    if max_tokens is not None:
        assert sum(counts[i] for i in kept) <= max_tokens
    if len(kept) < len(logits):
        following = ranked[len(kept)]
        assert (
            len(kept) == top_n
            or (min_score is not None and scores[following] < min_score)
            or (max_tokens is not None and sum(counts[i] for i in kept) + counts[following] > max_tokens)
        )


@pytest.mark.parametrize("bad", [0, -1, 1.5, "3", True])
def test_bad_limits_are_refused(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="top_n must be an int of at least 1"):
        check_limits(bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="max_tokens"):
        check_limits(None, None, bad)  # type: ignore[arg-type]


def test_good_limits_pass() -> None:
    check_limits(None)
    check_limits(1, 0.5, 10)
    check_limits(None, np.float32(-3))  # type: ignore[arg-type]
    check_limits(np.int64(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), "0.5", True])
def test_a_threshold_that_is_no_number_is_refused(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="min_score must be a number"):
        check_limits(3, bad)
