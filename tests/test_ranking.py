"""What the order is made of beside the logit: fusion, adjustment, repetition, and the place in a prompt."""

from __future__ import annotations

import math
import random
from datetime import date

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerank_plugins import Candidate, ConfigurationError, InputError, Reranker
from rerank_plugins.fusion import best_at_both_ends, duplicates, min_max, reciprocal_rank, weighted
from rerank_plugins.testing import FakeBackend

LOGITS = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.0}


def by_table(**keywords: object) -> Reranker:
    return Reranker(FakeBackend(lambda query, text: LOGITS[text]), **keywords)  # type: ignore[arg-type]


def texts(ranking: object) -> str:
    return "".join(item.text or "-" for item in ranking)  # type: ignore[attr-defined]


# -- fusion -----------------------------------------------------------------------------------------------------


def test_reciprocal_rank_fusion_has_the_published_values() -> None:
    fused = reciprocal_rank(np.array([1.0, 3.0, 2.0]), np.array([3.0, 2.0, 1.0]))
    assert fused.tolist() == pytest.approx([1 / 63 + 1 / 61, 1 / 61 + 1 / 62, 1 / 62 + 1 / 63])


def test_weights_mix_scores_that_are_brought_to_one_range() -> None:
    assert min_max(np.array([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert min_max(np.array([7.0, 7.0])).tolist() == [0.5, 0.5]
    mixed = weighted(np.array([-5.0, 5.0]), np.array([0.9, 0.1]), 0.25)
    assert mixed.tolist() == pytest.approx([0.25, 0.75])


def test_fusion_changes_the_order_and_neither_scores_nor_logits() -> None:
    given = {"d": 9.0, "c": 8.0, "b": 1.0, "a": 0.0}
    candidates = [Candidate(text, first_stage_score=score) for text, score in given.items()]
    plain = {item.text: (item.score, item.logit) for item in by_table().rank("q", candidates)}
    assert texts(by_table().rank("q", candidates)) == "abcd"
    assert texts(by_table(fusion=0.0).rank("q", candidates)) == "abcd"
    assert texts(by_table(fusion=1.0).rank("q", candidates)) == "dcba"
    fused = by_table(fusion=0.5).rank("q", candidates)
    assert texts(fused) == "cdab"  # 0.61, 0.5, 0.5, 0.39: equal ones keep the order of the first stage
    assert {item.text: (item.score, item.logit) for item in fused} == plain


def test_rrf_needs_no_scores_and_spares_blanks() -> None:
    # First-stage order d a b c: d is 1st there and 4th by logit, a 2nd and 1st, b 3rd and 2nd, c 4th and 3rd.
    ranking = by_table(fusion="rrf").rank("q", ["", "d", "a", "b", "c"])
    assert texts(ranking) == "adbc-"


def test_a_missing_first_stage_score_is_said() -> None:
    with pytest.raises(InputError, match="position 1 has none.*fusion='rrf'"):
        by_table(fusion=0.3).rank("q", [Candidate("a", first_stage_score=1.0), "b"])


@pytest.mark.parametrize("bad", ["mean", -0.1, 1.1, True, math.nan, [0.5]])
def test_fusion_is_checked(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="fusion must be 'rrf', a weight"):
        Reranker(fusion=bad)  # type: ignore[arg-type]


# -- adjustment -------------------------------------------------------------------------------------------------


def test_an_adjustment_is_added_to_the_logit_for_the_order_alone() -> None:
    today = date(2026, 1, 1)

    def recency(item: object) -> float:
        return -0.01 * (today - item.candidate.metadata["date"]).days  # type: ignore[attr-defined]

    candidates = [Candidate("a", metadata={"date": date(2020, 1, 1)}), Candidate("d", metadata={"date": today})]
    ranking = by_table(adjust=recency).rank("q", candidates)
    assert texts(ranking) == "da"
    assert [item.logit for item in ranking] == [0.0, 3.0]
    assert texts(by_table(adjust=lambda item: 0).rank("q", candidates)) == "ad"


@pytest.mark.parametrize("bad", [None, math.nan, "1", True])
def test_an_adjustment_that_is_no_number_names_the_candidate(bad: object) -> None:
    with pytest.raises(InputError, match="position 0 it returned"):
        by_table(adjust=lambda item: bad).rank("q", ["a"])
    with pytest.raises(ConfigurationError, match="adjust must be a function"):
        Reranker(adjust=3)


# -- repetition -------------------------------------------------------------------------------------------------


def test_the_better_one_of_equal_texts_stays_and_lists_the_others() -> None:
    backend = FakeBackend(lambda query, text: float(len(text)))
    found = Reranker(backend, dedup="exact").rank("q", ["Same text", "other", "same  text ", "Same text", ""])
    assert [(item.text, item.duplicates) for item in found] == [("same  text ", (0, 3)), ("other", ()), ("", ())]
    assert [item.rank for item in found] == [1, 2, 3]
    assert len(Reranker(backend, dedup="exact").rank("q", ["a", "a", "b"], top_n=2)) == 2


def test_near_duplicates_go_by_their_likeness() -> None:
    text = "The giant panda is a bear that lives in the mountains of central China and eats bamboo."
    near = text.replace("eats bamboo", "eats mainly bamboo")
    far = "The red panda lives in the eastern Himalayas and is no bear."
    assert duplicates([text, near, far, text], 0.7) == [None, 0, None, 0]
    assert duplicates([text, near, far, text], 1.0) == [None, None, None, 0]
    assert duplicates(["", " ", "a"], 0.9) == [None, 0, None]
    assert duplicates(["大熊猫是一种生活在中国的熊。", "大熊猫是一种生活在中国的熊", "巴黎是法国的首都。"], 0.8) == [
        None,
        0,
        None,
    ]


@given(st.lists(st.text(alphabet="ab c", max_size=12), max_size=12), st.floats(0.05, 1.0))
def test_a_repetition_is_always_of_one_that_stays(lines: list[str], threshold: float) -> None:
    found = duplicates(lines, threshold)
    for position, better in enumerate(found):
        if better is not None:
            assert better < position
            assert found[better] is None


def test_many_candidates_are_compared_without_all_pairs() -> None:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(3000)]
    lines = [" ".join(chance.choices(words, k=30)) for _ in range(2000)]
    assert duplicates(lines, 0.8) == [None] * 2000


@pytest.mark.parametrize("bad", ["near", 0, 1.5, True, math.nan])
def test_dedup_is_checked(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="dedup must be 'exact', a likeness"):
        Reranker(dedup=bad)  # type: ignore[arg-type]


# -- order ------------------------------------------------------------------------------------------------------


def test_the_best_stand_at_both_ends() -> None:
    assert best_at_both_ends([1, 2, 3, 4, 5]) == [1, 3, 5, 4, 2]
    ranking = by_table(order="ends").rank("q", list("dbca"))
    assert texts(ranking) == "acdb"
    assert [item.rank for item in ranking] == [1, 3, 4, 2]
    assert texts(by_table(order="ends").rank("q", list("dbca"), top_n=2)) == "ab"
    with pytest.raises(ConfigurationError, match="order must be one of 'best_first', 'ends'"):
        Reranker(order="worst")  # type: ignore[arg-type]


def test_all_is_off_by_default() -> None:
    candidates = ["b", "b", "a", ""]
    ranking = by_table().rank("q", candidates)
    assert texts(ranking) == "abb-"
    assert all(item.duplicates == () for item in ranking)
