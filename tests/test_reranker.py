from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from checkpoints import QUERY, TEXTS, tiny
from hypothesis import given
from hypothesis import strategies as st

from rerank_plugins import Candidate, Ranking, Reranker
from rerank_plugins.errors import ConfigurationError, InputError, ModelLoadError, ScoringError
from rerank_plugins.testing import FakeBackend, word_overlap


def by_table(table: dict[str, float]) -> FakeBackend:
    return FakeBackend(lambda query, text: table[text])


# -- ranking ----------------------------------------------------------------------------------------------------


def test_rank_gives_the_best_first_with_everything_about_it() -> None:
    ranking = Reranker(by_table({"a": -1.0, "b": 3.0, "c": 0.0})).rank("q", ["a", "b", "c"])
    assert isinstance(ranking, Ranking)
    assert [item.text for item in ranking] == ["b", "c", "a"]
    best = ranking[0]
    assert (best.rank, best.index, best.first_stage_rank, best.logit) == (1, 1, 2, 3.0)
    assert best.score == pytest.approx(1 / (1 + math.exp(-3)), rel=1e-12)
    assert type(best.score) is float
    assert type(best.logit) is float
    assert not best.truncated
    assert (ranking.query, ranking.model, ranking.scale) == ("q", "fake", "probability")
    assert len(ranking[:2]) == 2
    json.dumps([dataclasses.asdict(item) for item in ranking])


def test_candidates_are_carried_as_they_came() -> None:
    metadata = {"page": 3}
    candidate = Candidate("a text", id="x", metadata=metadata, first_stage_score=0.25)
    ranked = Reranker(FakeBackend()).rank("text", [candidate, "other"])
    assert ranked[0].candidate is candidate
    assert ranked[0].candidate.metadata is metadata
    assert ranked[1].candidate == Candidate("other")


@given(st.lists(st.sampled_from(["a", "b b", "c", "a c", "", "  ", "\n"]), max_size=30))
def test_nothing_is_lost_or_doubled(texts: list[str]) -> None:
    ranking = Reranker(FakeBackend()).rank("a c", texts)
    assert sorted(item.index for item in ranking) == list(range(len(texts)))
    assert [item.rank for item in ranking] == list(range(1, len(texts) + 1))
    assert all(item.text == texts[item.index] for item in ranking)


def test_equal_logits_keep_the_first_stage_order() -> None:
    ranking = Reranker(by_table({"a": 1.0, "b": 2.0, "c": 1.0, "d": 1.0})).rank("q", ["a", "b", "c", "d"])
    assert [item.text for item in ranking] == ["b", "a", "c", "d"]


def test_each_distinct_pair_is_scored_once() -> None:
    backend = FakeBackend()
    logits = Reranker(backend).logits("a", ["a", "b", "a", "a", "b"])
    assert backend.calls == [[("a", "a"), ("a", "b")]]
    assert logits[0] == logits[2] == logits[3]


def test_score_keeps_the_input_order() -> None:
    logits = Reranker(by_table({"a": -1.0, "b": 3.0})).logits("q", ["a", "b", "a"])
    assert logits.dtype == np.float32
    assert logits.tolist() == [-1.0, 3.0, -1.0]


def test_blank_texts_rank_last_with_score_zero_and_are_not_sent() -> None:
    backend = FakeBackend(lambda query, text: -50.0)
    ranking = Reranker(backend).rank("q", ["", "x", " \n\t", "　"])
    assert [item.index for item in ranking] == [1, 0, 2, 3]
    assert [item.score for item in ranking[1:]] == [0.0, 0.0, 0.0]
    assert backend.calls == [[("q", "x")]]
    assert Reranker(backend).logits("q", ["", "x"])[0] == np.finfo(np.float32).min


def test_a_blank_text_is_last_and_good_json_in_logits_too() -> None:
    reranker = Reranker(FakeBackend(lambda query, text: -5e4), scale="logit")
    ranking = reranker.rank("q", ["", "x"])
    assert [item.index for item in ranking] == [1, 0]
    json.dumps([item.score for item in ranking], allow_nan=False)
    assert [item.index for item in reranker.rank("q", ["", "x"], min_score=-1e5)] == [1]


def test_empty_in_empty_out_without_loading() -> None:
    reranker = Reranker("no-such/model")
    assert len(reranker.rank("q", [])) == 0
    assert reranker.rank("q", iter([])).items == ()
    assert reranker.logits("q", []).shape == (0,)
    assert len(reranker.rank("q", ["", " "])) == 2


def test_top_n_and_min_score() -> None:
    reranker = Reranker(by_table({"a": -2.0, "b": 2.0, "c": 0.0}))
    texts = ["a", "b", "c"]
    assert [item.text for item in reranker.rank("q", texts, top_n=2)] == ["b", "c"]
    assert [item.text for item in reranker.rank("q", texts, top_n=99)] == ["b", "c", "a"]
    assert [item.text for item in reranker.rank("q", texts, min_score=0.5)] == ["b", "c"]
    assert [item.text for item in reranker.rank("q", texts, min_score=0.0)] == ["b", "c", "a"]
    assert [item.text for item in reranker.rank("q", texts, 1, 0.99)] == []


@pytest.mark.parametrize("top_n", [0, -1, 2.0, True])
def test_a_bad_top_n_is_refused_before_anything_is_scored(top_n: object) -> None:
    backend = FakeBackend()
    with pytest.raises(ConfigurationError, match="top_n"):
        Reranker(backend).rank("q", ["a"], top_n=top_n)  # type: ignore[arg-type]
    assert backend.calls == []


@pytest.mark.parametrize("query", ["", "  \n", None, 3])
def test_a_blank_query_is_an_input_error(query: object) -> None:
    for call in (Reranker(FakeBackend()).rank, Reranker(FakeBackend()).score):
        with pytest.raises(InputError, match="query must"):
            call(query, ["a"])  # type: ignore[arg-type, operator]


@pytest.mark.parametrize("candidates", ["one text", b"bytes", Candidate("x"), [None], [3], [["a"]]])
def test_what_is_no_list_of_texts_is_an_input_error(candidates: object) -> None:
    with pytest.raises(InputError):
        Reranker(FakeBackend()).rank("q", candidates)  # type: ignore[arg-type]


def test_a_candidate_without_text_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"Candidate\.text must be a str, got NoneType"):
        Candidate(None)  # type: ignore[arg-type]


# -- scales, classes ----------------------------------------------------------------------------------------------


def test_scale_changes_the_score_and_nothing_else() -> None:
    table = {"a": 20.0, "b": 17.0, "c": -3.0, "d": 18.0}
    probability, logit = (Reranker(by_table(table), scale=scale).rank("q", list(table)) for scale in _SCALES)
    assert [item.index for item in probability] == [item.index for item in logit] == [0, 3, 1, 2]
    assert [item.score for item in logit] == [20.0, 18.0, 17.0, -3.0]
    assert all(0 < item.score < 1 for item in probability)


_SCALES = ("probability", "logit")


def test_probabilities_of_a_server_are_not_squashed_again() -> None:
    backend = FakeBackend(lambda query, text: {"a": 0.9, "b": 0.2}[text], emits="probability")
    ranking = Reranker(backend).rank("q", ["b", "a"])
    assert [item.text for item in ranking] == ["a", "b"]
    assert [item.score for item in ranking] == pytest.approx([0.9, 0.2], abs=1e-7)
    assert ranking[0].logit == pytest.approx(math.log(9), abs=1e-5)


def nli(query: str, text: str) -> list[float]:
    return {"yes": [-2.0, 4.0, 0.0], "no": [5.0, -1.0, 0.0], "maybe": [0.0, 1.0, 3.0]}[text]


LABELS = ["contradiction", "entailment", "neutral"]


@pytest.mark.parametrize("label", ["entailment", "ENTAILMENT", 1])
def test_label_chooses_the_class(label: str | int) -> None:
    ranking = Reranker(FakeBackend(nli, labels=LABELS), label=label).rank("q", ["no", "maybe", "yes"])
    assert [item.text for item in ranking] == ["yes", "maybe", "no"]
    softmax = math.exp(4) / (math.exp(-2) + math.exp(4) + 1)
    assert ranking[0].score == pytest.approx(softmax, rel=1e-9)


def test_three_classes_need_a_label() -> None:
    with pytest.raises(ConfigurationError, match=r"label=.*0: 'contradiction', 1: 'entailment', 2: 'neutral'"):
        Reranker(FakeBackend(nli, labels=LABELS)).rank("q", ["yes"])


@pytest.mark.parametrize("label", ["relevant", 3, -1])
def test_an_unknown_label_lists_the_labels(label: str | int) -> None:
    with pytest.raises(ConfigurationError, match="no class .* 1: 'entailment'"):
        Reranker(FakeBackend(nli, labels=LABELS), label=label).prepare()


def test_two_classes_mean_the_second() -> None:
    backend = FakeBackend(lambda query, text: [1.0, float(len(text))])
    assert Reranker(backend).logits("q", ["abc", "a"]).tolist() == [2.0, 0.0]
    assert Reranker(backend, label=0).logits("q", ["abc", "a"]).tolist() == [-2.0, 0.0]


@pytest.mark.parametrize(
    "names",
    [("LABEL_0", "LABEL_1"), ("0", "1"), ("no", "yes"), ("not_entailment", "entailment"), ("irrelevant", "relevant"),
     ("non-relevant", "relevant"), ("NEGATIVE", "POSITIVE"), ("false", "true"), ("not_duplicate", "duplicate")],
)  # fmt: skip
def test_the_second_of_two_classes_is_taken_where_their_names_allow_it(names: tuple[str, str]) -> None:
    backend = FakeBackend(lambda query, text: [1.0, float(len(text))], labels=names)
    assert Reranker(backend).logits("q", ["abc", "a"]).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("entailment", "not_entailment"), "the second is by its name the negative one"),
        (("relevant", "non-relevant"), "the second is by its name the negative one"),
        (("duplicate", "not duplicate"), "the second is by its name the negative one"),
        (("cats", "dogs"), "their names leave it open"),
        (("no match", "not related"), "their names leave it open"),
    ],
)
def test_a_class_that_says_no_is_never_ranked_by_unless_asked_for(names: tuple[str, str], reason: str) -> None:
    backend = FakeBackend(lambda query, text: [float(len(text)), 1.0], labels=names)
    with pytest.raises(ConfigurationError, match=f"two classes, and {reason}.*label=NAME"):
        Reranker(backend).prepare()
    assert Reranker(backend, label=names[0]).logits("q", ["abc", "a"]).tolist() == [2.0, 0.0]


def test_a_server_decides_its_engine_itself() -> None:
    with pytest.raises(ConfigurationError, match="backend, threads cannot be set for a rerank server.*http://host'"):
        Reranker("http://me:secret@host".replace("me:secret@", ""), backend="onnx", threads=2)
    with pytest.raises(ConfigurationError) as told:
        Reranker("https://me:secret@host/v1", precision="fp16")
    assert "secret" not in str(told.value)


# -- bad engines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_names_the_pair(bad: float) -> None:
    with pytest.raises(ScoringError, match="'the query'.*'second text'"):
        Reranker(by_table({"first text": 0.1, "second text": bad})).rank("the query", ["first text", "second text"])


def test_a_backend_with_the_wrong_number_of_scores_is_found_out() -> None:
    class Short:
        def score_pairs(self, pairs):  # type: ignore[no-untyped-def]
            return np.zeros(1, dtype=np.float32)

    with pytest.raises(ScoringError, match=r"must return shape \(2,\)"):
        Reranker(Short()).rank("q", ["a", "b"])


def test_any_object_with_score_pairs_is_a_backend() -> None:
    class Mine:
        name = "mine"

        def score_pairs(self, pairs):  # type: ignore[no-untyped-def]
            return [word_overlap(*pair) for pair in pairs]

    reranker = Reranker(Mine())
    assert reranker.rank("red fox", ["blue", "red fox"])[0].index == 1
    assert reranker.backend_name == "mine"
    assert reranker.model_name == "mine"


@pytest.mark.parametrize("model", [object(), 3, ["a"]])
def test_what_is_no_model_is_refused(model: object) -> None:
    with pytest.raises(ConfigurationError, match="score_pairs"):
        Reranker(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"backend": "tensorflow"}, "backend must be one of 'auto', 'onnx'"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"scale": "percent"}, "scale must be"),
        ({"max_length": 0}, "max_length"),
        ({"label": 1.5}, "label"),
        ({"revision": "main"}, "revision"),
        ({"model": " "}, "model must be"),
        ({"passage_length": 10, "passage_overlap": 10}, "passage_overlap"),
    ],
)
def test_bad_keywords_are_refused_at_once(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Reranker(**keywords)  # type: ignore[arg-type]


# -- windows, truncation, budgets, with a real tokenizer ----------------------------------------------------------


def test_truncation_cuts_the_text_and_says_so() -> None:
    reranker = Reranker(tiny("bert"))
    long = "panda " * 2000
    ranking = reranker.rank("panda", [long, "panda"])
    assert {item.index: item.truncated for item in ranking} == {0: True, 1: False}
    assert reranker.logits("panda", [long])[0] == reranker.logits("panda", [long + "paris " * 50])[0]


def test_max_length_is_kept_and_checked() -> None:
    assert Reranker(tiny("bert")).max_length == 256
    # 257 positions, of which the first usable one is pad_token_id + 1.
    assert Reranker(tiny("roberta")).max_length == 256
    assert Reranker(tiny("bert"), max_length=32).max_length == 32
    with pytest.raises(ConfigurationError, match="256"):
        Reranker(tiny("bert"), max_length=614).prepare()


def test_max_length_shares_the_weights() -> None:
    long, short = Reranker(tiny("bert")), Reranker(tiny("bert"), max_length=16)
    text = "the giant panda lives in the mountains of central china and eats bamboo all day long"
    assert long.logits("panda", [text])[0] != short.logits("panda", [text])[0]
    assert short.rank("panda", [text])[0].truncated
    assert long._loaded().model is short._loaded().model  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["bert", "causal-qwen3"])
def test_a_query_that_leaves_no_room_is_an_input_error(family: str) -> None:
    with pytest.raises(InputError, match="The query leaves no room for a text.*maximum length is 256"):
        Reranker(tiny(family)).rank("panda " * 2000, ["a text"])


def test_windows_take_the_best_passage_of_a_long_text() -> None:
    filler = "paris is the capital of france and its largest city . " * 60
    answer = "the giant panda eats bamboo in china ."
    document = filler + answer + filler
    whole = Reranker(tiny("bert"))
    windows = Reranker(tiny("bert"), passage_length=60, passage_overlap=20)
    ranked = windows.rank("what do pandas eat", [document])[0]
    assert not ranked.truncated
    offsets = windows._loaded().token_offsets([document])[0]
    from rerank_plugins.passages import split_windows

    parts = [document[start:end] for start, end in split_windows(document, offsets, 60, 20)]
    assert len(parts) > 10
    assert ranked.logit == pytest.approx(float(whole.logits("what do pandas eat", parts).max()), abs=1e-5)


def test_windows_of_a_short_text_change_nothing() -> None:
    short = TEXTS[:6]
    plain = Reranker(tiny("bert")).logits(QUERY, short)
    assert np.allclose(Reranker(tiny("bert"), passage_length=200).logits(QUERY, short), plain, atol=1e-5)


def test_a_token_budget_keeps_the_best_that_fit() -> None:
    reranker = Reranker(tiny("bert"))
    texts = TEXTS[:6]
    everything = reranker.rank(QUERY, texts)
    counts = [len(offsets) for offsets in reranker._loaded().token_offsets(texts)]
    budget = counts[everything[0].index] + counts[everything[1].index]
    assert [i.index for i in reranker.rank(QUERY, texts, max_tokens=budget)] == [i.index for i in everything[:2]]
    assert [i.index for i in reranker.rank(QUERY, texts, max_tokens=budget - 1)] == [everything[0].index]


def test_windows_and_budgets_need_a_tokenizer() -> None:
    with pytest.raises(InputError, match="local tokenizer"):
        Reranker(FakeBackend(), passage_length=10).rank("q", ["a"])
    with pytest.raises(InputError, match="local tokenizer"):
        Reranker(FakeBackend()).rank("q", ["a"], max_tokens=3)


def test_broken_unicode_is_scored_and_returned_untouched() -> None:
    texts = ["lone \ud800 surrogate", "nul \x00 byte", "pair \ud83d\udc3c", "￿ ‮ right to left"]
    ranking = Reranker(tiny("bert"), passage_length=50).rank("panda", texts)
    assert sorted(item.text for item in ranking) == sorted(texts)


# -- life -------------------------------------------------------------------------------------------------------


def test_making_a_reranker_loads_nothing() -> None:
    reranker = Reranker("organisation/no-such-model")
    assert reranker.model_name == "organisation/no-such-model"
    assert "no-such-model" in repr(reranker)
    with pytest.raises(ModelLoadError):
        reranker.prepare()


def test_rerankers_of_one_model_share_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Path(tiny("bert"))
    first, second = Reranker(str(directory)).prepare(), Reranker(directory).prepare()
    assert first._shared is second._shared
    monkeypatch.chdir(directory.parent)
    assert Reranker(directory.name).prepare()._shared is first._shared


def test_the_copy_is_freed_with_its_last_user() -> None:
    import gc
    import weakref

    first, second = Reranker(tiny("distilroberta")).prepare(), Reranker(tiny("distilroberta")).prepare()
    alive = weakref.ref(first._shared)
    first.close()
    assert second.logits("q", ["a"]).shape == (1,)
    assert alive() is not None
    second.close()
    gc.collect()
    assert alive() is None
    assert first.logits("q", ["a"]).shape == (1,)


def test_context_manager_loads_and_frees() -> None:
    with Reranker(tiny("bert")) as reranker:
        assert reranker._backend is not None
    assert reranker._backend is None


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_carry_configuration_only(copier: object) -> None:
    reranker = Reranker(tiny("bert"), scale="logit", max_length=64).prepare()
    other = copier(reranker)  # type: ignore[operator]
    assert other._backend is None
    assert other.config == reranker.config
    assert other.rank(QUERY, TEXTS).items == reranker.rank(QUERY, TEXTS).items
    assert len(pickle.dumps(reranker)) < 2000


def test_config_makes_the_same_reranker_again() -> None:
    reranker = Reranker(FakeBackend(), scale="logit", label=0)
    assert Reranker(**reranker.config).config == reranker.config


def test_repr_shows_what_differs_from_the_default() -> None:
    assert repr(Reranker()) == "Reranker(model='rerank-plugins/minilm-l6')"
    assert repr(Reranker("a/b", scale="logit")) == "Reranker(model='a/b', scale='logit')"


def test_repr_tells_what_was_chosen() -> None:
    reranker = Reranker(FakeBackend()).prepare()
    assert repr(reranker).startswith("Reranker(model=<rerank_plugins.testing.FakeBackend") or "fake" in repr(reranker)
    assert repr(reranker).endswith("backend='fake', precision='fp32')")
