"""Which part of a text it was: windows and sentences of what is kept, and what compression leaves of them."""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Sequence

import numpy as np
import pytest
from checkpoints import tiny
from hypothesis import given
from hypothesis import strategies as st

from rerank_plugins import Candidate, ConfigurationError, Reranker, ServerError, Settings
from rerank_plugins._texts import scorable
from rerank_plugins.backends import Backend, PairLogits
from rerank_plugins.cache import MemoryCache, _scored
from rerank_plugins.sentences import split_sentences
from rerank_plugins.spans import LARGEST_SHARE, MARGIN, shown
from rerank_plugins.testing import FakeBackend, word_overlap
from rerank_plugins.types import RankedCandidate, Span, excerpt

FOX = "A whale swims in the sea. The red fox runs. Nobody of them can know why. It rains a lot in the autumn."
OTHER = "Nothing of it here. Just a text. It has some more words. None of them is of use to anyone."


def fake(**keywords: object) -> Reranker:
    return Reranker(FakeBackend(), **{"scale": "logit", **keywords})  # type: ignore[arg-type]


def texts_of(item: RankedCandidate) -> list[str]:
    return [item.text[span.start : span.end] for span in item.spans]


class Tokens(FakeBackend):
    """A fake with a tokenizer: a token is what stands between blanks, and each full stop of the gap."""

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        return [[(0, 0)] * len(text.replace("...", ". . .").split()) for text in texts]


# -- sentences ----------------------------------------------------------------------------------------------------


def test_each_sentence_has_its_own_score_and_place_best_first() -> None:
    (item,) = fake(spans="sentences").rank("red fox", [Candidate(FOX, header="the title\n")])
    assert sorted(span[:2] for span in item.spans) == split_sentences(FOX)
    expected = {text: word_overlap("red fox", f"the title\n{text}") for text in texts_of(item)}
    assert [span.score for span in item.spans] == pytest.approx(sorted(expected.values(), reverse=True))
    assert [span.score for span in item.spans] == pytest.approx(list(expected.values()))
    assert texts_of(item)[0] == "The red fox runs."
    assert all(type(value) in (int, float) for span in item.spans for value in span)


def test_the_order_and_the_scores_of_texts_stay_the_same() -> None:
    texts = [OTHER, FOX, "", "red fox " * 20, FOX]
    plain = fake().rank("red fox", texts)
    with_spans = fake(spans="sentences").rank("red fox", texts)
    assert [(item.index, item.score) for item in with_spans] == [(item.index, item.score) for item in plain]
    assert all(item.spans == () for item in plain)
    assert [bool(item.spans) for item in with_spans] == [item.text != "" for item in with_spans]


def test_equal_sentences_keep_the_order_of_the_text() -> None:
    (item,) = fake(spans="sentences").rank("q", ["One two. Two one. Red fox."])
    assert [span[:2] for span in item.spans] == [(0, 8), (9, 17), (18, 26)]


def test_sentences_of_all_that_is_kept_are_scored_in_one_call_and_nothing_else_is() -> None:
    backend = FakeBackend()
    reranker = Reranker(backend, spans="sentences")
    many = [f"The {kind} fox runs. It is number {i}." for i in range(30) for kind in ("red", "blue")]
    reranker.rank_many([("red fox", many), ("blue fox", many), ("nothing", [" "])], top_n=2)
    wholes, sentences = backend.calls
    assert len(wholes) == 120
    # Repeated ones once a query.
    assert len(sentences) == 6
    assert {query for query, _ in sentences} == {"red fox", "blue fox"}


def test_scores_of_sentences_are_calibrated_and_scaled_as_those_of_texts() -> None:
    settings = {"calibration": {"slope": 0.5, "intercept": 1.0}, "scale": "probability"}
    (item,) = fake(spans="sentences", **settings).rank("red fox", ["The red fox runs."])
    assert item.spans == (Span(0, 17, item.score),)
    assert item.score == pytest.approx(1 / (1 + np.exp(-(0.5 * word_overlap("red fox", item.text) + 1.0))))


def test_a_long_header_stands_before_each_sentence_with_its_first_lines_alone() -> None:
    backend = FakeBackend()
    header = "title: red\n" + "tags: " + "many " * 100 + "\n"
    Reranker(backend, spans="sentences").rank("fox", [Candidate("One fox. Two foxes.", header=header)])
    assert [text for _, text in backend.calls[1]] == ["title: red\nOne fox.", "title: red\nTwo foxes."]
    Reranker(backend, spans="sentences").rank("fox", [Candidate("One fox.", header="many " * 100)])
    assert backend.calls[3] == [("fox", ("many " * 100)[:256] + "\nOne fox.")]


def test_kept_sentences_are_read_from_the_cache() -> None:
    backend = FakeBackend()
    reranker = Reranker(backend, spans="sentences", cache=100)
    first = reranker.rank("red fox", [FOX, OTHER])
    assert reranker.rank("red fox", [FOX, OTHER]) == first
    assert len(backend.calls) == 2


async def test_async_and_many_give_the_same() -> None:
    reranker = fake(spans="sentences")
    expected = reranker.rank("red fox", [FOX, OTHER], compress=True)
    assert await reranker.arank("red fox", [FOX, OTHER], compress=True) == expected
    assert reranker.rank_many([("red fox", [FOX, OTHER])], compress=True) == [expected]
    assert await reranker.arank_many([("red fox", [FOX, OTHER])], compress=True) == [expected]


# -- windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, 100])
def test_windows_have_their_places_and_the_best_one_is_the_score_of_the_text(cache: int | None) -> None:
    reranker = Reranker(tiny("bert"), backend="torch", passage_length=12, passage_overlap=4, cache=cache)
    text = "  " + " ".join(f"git revert undoes commit {i}" for i in range(12)) + " \n"
    candidates = [Candidate(text, header="the title\n"), Candidate("git revert"), Candidate("")]
    ranking = reranker.rank("undo a commit", candidates)
    long = next(item for item in ranking if item.index == 0)
    assert len(long.spans) > 8
    assert long.spans[0].score == long.score
    assert [span.score for span in long.spans] == sorted((span.score for span in long.spans), reverse=True)
    plain = Reranker(tiny("bert"), backend="torch")
    for span in long.spans:
        window = text[span.start : span.end]
        assert window == window.strip()
        assert plain.score("undo a commit", ["the title\n" + window])[0] == pytest.approx(span.score, abs=1e-6)
    starts = sorted(span.start for span in long.spans)
    assert (starts[0], max(span.end for span in long.spans)) == (2, len(text.rstrip()))
    short = next(item for item in ranking if item.index == 1)
    assert short.spans == (Span(0, 10, short.score),)
    assert next(item for item in ranking if item.index == 2).spans == ()
    assert reranker.rank("undo a commit", candidates) == ranking


def test_kept_windows_without_places_are_scored_again() -> None:
    store = MemoryCache(100)
    reranker = Reranker(tiny("bert"), backend="torch", passage_length=6, cache=store)
    expected = reranker.rank("fox", [FOX])
    (key,) = store._data
    for wrong in (lambda row: row._replace(places=b""), lambda row: row._replace(places=row.places[8:])):
        row = _scored._decode(key, store.mget([key])[0])
        assert row is not None
        store.mset([(key, _scored._encode(key, wrong(row)))])
        assert reranker.rank("fox", [FOX]) == expected


def test_places_of_windows_are_those_of_the_text_that_was_given() -> None:
    """A pair of surrogates is one character for the tokenizer, and two in a string of broken JSON."""
    reranker = Reranker(tiny("bert"), backend="torch", passage_length=4)
    text = "\ud83d\ude00 red fox \ud83d\ude00 blue whale " * 6 + "\ud800 the end"
    (item,), (clean,) = reranker.rank("fox", [text]), reranker.rank("fox", [scorable(text)])
    assert len(item.spans) > 5
    assert max(span.end for span in item.spans) == len(text)
    assert [scorable(part) for part in texts_of(item)] == texts_of(clean)
    assert [span.score for span in item.spans] == [span.score for span in clean.spans]


def test_sentences_can_be_asked_for_beside_windows() -> None:
    reranker = Reranker(tiny("bert"), backend="torch", passage_length=6, spans="sentences")
    text = "The red fox runs far. " * 3 + "A sentence with many more words than a window has room for stands here."
    (item,) = reranker.rank("fox", [Candidate(text, header="title\n")])
    assert sorted(span[:2] for span in item.spans) == split_sentences(text)


# -- when it fails ------------------------------------------------------------------------------------------------


class FailingSecond(FakeBackend):
    """Scores texts, and fails at their sentences."""

    def logits(self, pairs):  # type: ignore[no-untyped-def]
        if self.calls:
            raise ServerError("busy", url="http://localhost:1", status=503)
        return super().logits(pairs)


def test_without_sentences_the_ranking_stays_and_says_so() -> None:
    for on_error in ("keep_order", Reranker(FakeBackend())):
        ranking = Reranker(FailingSecond(), spans="sentences", on_error=on_error).rank("red fox", [OTHER, FOX, ""])
        assert [item.index for item in ranking] == [1, 0, 2]
        assert all(item.scored and item.spans == () for item in ranking)
        assert ranking.fallback is not None
        assert ranking.fallback.startswith("no spans: fake failed (ServerError")
    with pytest.raises(ServerError):
        Reranker(FailingSecond(), spans="sentences").rank("red fox", [OTHER, FOX])
    kept = Reranker(FailingSecond(), on_error="keep_order").rank("red fox", [OTHER, FOX], compress=True)
    assert [item.excerpt for item in kept] == [FOX, OTHER]


def test_what_was_not_scored_has_no_spans_and_stays_whole() -> None:
    def down(query: str, text: str) -> float:
        raise ServerError("down", url="http://localhost:1", status=None)

    broken = Reranker(FakeBackend(down), spans="sentences", on_error="keep_order")
    ranking = broken.rank("red fox", [OTHER, FOX], compress=True)
    assert [(item.index, item.spans, item.excerpt) for item in ranking] == [(0, (), OTHER), (1, (), FOX)]
    other = Reranker(FakeBackend(down), on_error=Reranker(FakeBackend(), spans="sentences"))
    assert other.rank("red fox", [FOX], compress=0.3)[0].excerpt == "The red fox runs."


class Slow(Backend):
    name = "slow"

    def logits(self, pairs):  # type: ignore[no-untyped-def]
        time.sleep(0.2)
        return PairLogits(np.zeros((len(pairs), 1), dtype=np.float32), np.zeros(len(pairs), dtype=bool))


def test_a_deadline_holds_for_spans_too() -> None:
    ranking = Reranker(Slow(), spans="sentences").rank("q", [FOX, OTHER, ""], deadline_s=0.1)
    assert all(item.scored and item.spans == () for item in ranking)
    assert ranking.fallback == "time was up: 2 of 3 results have no spans"
    assert Reranker(Slow(), spans="sentences").rank("q", [FOX], deadline_s=60).fallback is None


# -- compression --------------------------------------------------------------------------------------------------


def by_table(logits: dict[str, float], **keywords: object) -> Reranker:
    return Reranker(FakeBackend(lambda query, text: logits.get(text, -5.0)), **{"scale": "logit", **keywords})  # type: ignore[arg-type]


def test_compression_leaves_what_is_relevant_of_all_texts() -> None:
    long = " ".join(["The red fox runs.", *(f"It is the year {1900 + i}." for i in range(20)), "A fox is red."])
    short, whole = "Red is a colour. It has many shades of light.", "A single sentence stays as it is."
    logits = {long: 6.0, short: 4.0, "The red fox runs.": 10.0, "A fox is red.": 8.0, "Red is a colour.": 5.0}
    ranking = by_table(logits).rank("red fox", [OTHER, long, "", short, whole], compress=True)
    assert [(item.index, item.excerpt, item.rank) for item in ranking] == [
        (1, "The red fox runs. ... A fox is red.", 1),
        (3, "Red is a colour.", 2),
        (4, whole, 3),
        (2, "", 4),
    ]
    assert texts_of(ranking[0]) == ["The red fox runs.", "A fox is red."]
    assert ranking[0].text == long


def test_the_share_holds_for_all_texts_and_the_best_sentence_always_stays() -> None:
    texts = [" ".join(f"Sentence {i} of text {n} is as good as all." for i in range(10)) for n in range(3)]
    for share in (True, 0.2, 0.8):
        ranking = by_table({}).rank("q", texts, compress=share)
        kept = sum(span.end - span.start for item in ranking for span in item.spans)
        most = (LARGEST_SHARE if share is True else share) * sum(map(len, texts))
        assert most - 50 < kept <= most
    (item,) = by_table({"One.": 1.0}).rank("q", ["One. " + "Two. " * 3], compress=0.01)
    assert item.excerpt == "One."


def test_a_span_far_below_the_best_one_is_not_relevant() -> None:
    logits = {"a.": 5.0, "b.": 5.0 - MARGIN + 0.1, "c.": 5.0 - MARGIN - 0.1}
    backend = FakeBackend(lambda query, text: logits.get(text, -9.0))
    filler = " ".join(f"{letter}." for letter in "defghijklmnop")
    text = f"a. b. c. {filler}".replace(". ", ".\n\n")
    for scale in ("logit", "probability"):
        (item,) = Reranker(backend, scale=scale).rank("q", [text], compress=True)  # type: ignore[arg-type]
        assert texts_of(item) == ["a.", "b."]
    (item,) = Reranker(backend, scale="logit").rank("q", [text], compress=1.0)
    assert len(item.spans) == 16
    (item,) = Reranker(backend, scale="logit").rank("q", [text], compress=6.5 / len(text))
    assert texts_of(item) == ["a.", "b.", "c."]


def test_a_budget_takes_the_best_spans_of_all_texts_until_it_is_full() -> None:
    logits = {"a one two.": 5.0, "a bb.": 1.0, "b three.": 4.0, "b cc dd ee.": 3.0, "c.": -1.0}
    backend = Tokens(lambda query, text: logits.get(text, 9.0 - len(text) / 100))
    reranker = Reranker(backend, scale="logit", spans="sentences")
    candidates = [
        Candidate("a bb.\n\na one two.", header="h h\n"),
        Candidate("b three.\n\nskip me.\n\nb cc dd ee."),
        Candidate("c."),
    ]
    backend.logit = lambda query, text: logits.get(text.removeprefix("h h\n"), 0.5 if text == "skip me." else 8.0)

    def left(max_tokens: int) -> list[str]:
        return [item.excerpt for item in reranker.rank("q", candidates, compress=1.0, max_tokens=max_tokens)]

    assert left(4) == []
    assert left(5) == ["a one two."]
    assert left(7) == ["a one two.", "b three."]
    assert left(13) == ["a one two.", "b three."]
    assert left(14) == ["a one two.", "b three. ... b cc dd ee."]
    assert left(100) == ["a bb.\n\na one two.", "b three.\n\nskip me.\n\nb cc dd ee.", "c."]
    ranks = [item.rank for item in reranker.rank("q", candidates, compress=1.0, max_tokens=7)]
    assert ranks == [1, 2]


def test_a_budget_holds_by_the_tokenizer_of_the_model() -> None:
    reranker = Reranker(tiny("bert"), backend="torch")
    texts = [" ".join(f"The fox number {i} of {n} runs away, and then it comes back." for i in range(9)) for n in "abc"]
    for most in (40, 100):
        ranking = reranker.rank("the fox", texts, compress=1.0, max_tokens=most)
        used = sum(reranker._token_counts([item.excerpt for item in ranking]))
        assert most - 25 < used <= most
    plain = reranker.rank("the fox", texts, max_tokens=100)
    assert all(item.excerpt == item.text for item in plain)


def test_compression_goes_with_repetition_order_and_fusion() -> None:
    scores = ((OTHER, 0.9), (FOX, 0.2), (FOX, 0.1), ("Fox.", 0.5))
    candidates = [Candidate(text, first_stage_score=score) for text, score in scores]
    logits = {"The red fox runs.": 3.0, "Just a text.": 2.9}
    reranker = by_table(logits, dedup="exact", order="ends", fusion=1.0, spans="sentences")
    ranking = reranker.rank("red fox", candidates, compress=0.2)
    assert [(item.index, item.rank) for item in ranking] == [(0, 1), (1, 3), (3, 2)]
    assert ranking[1].duplicates == (2,)
    assert ranking[1].excerpt == "The red fox runs."
    assert ranking[1].text == FOX


def test_windows_are_compressed_where_no_sentences_are_asked_for() -> None:
    reranker = Reranker(tiny("bert"), backend="torch", passage_length=8)
    text = " ".join(f"git revert undoes commit {i}" for i in range(20))
    whole = reranker.rank("undo", [text])[0]
    (item,) = reranker.rank("undo", [text], compress=True)
    assert item.score == whole.score
    assert item.spans == whole.spans[: len(item.spans)]
    assert 0 < len(item.excerpt) < len(text) * 0.4


@pytest.mark.parametrize("bad", ["True", 0, -0.1, 1.1, None, float("nan")])
def test_a_share_that_is_none_is_refused(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="compress must be True, False, or the largest share"):
        fake().rank("q", ["a"], compress=bad)  # type: ignore[arg-type]


# -- values -------------------------------------------------------------------------------------------------------


def test_the_setting_is_checked_shown_and_carried() -> None:
    reranker = fake(spans="sentences")
    assert "spans='sentences'" in repr(reranker)
    assert Settings(spans="sentences").keywords()["spans"] == "sentences"
    assert pickle.loads(pickle.dumps(Reranker(spans="sentences"))).settings.spans == "sentences"
    item = reranker.rank("red fox", [FOX])[0]
    assert pickle.loads(pickle.dumps(item)) == item
    for bad in ("words", True, 3, ""):
        with pytest.raises(ConfigurationError, match="spans must be one of 'sentences', or None"):
            Reranker(spans=bad)  # type: ignore[arg-type]


def test_an_excerpt_joins_what_stands_together_and_shows_gaps() -> None:
    text = "One. Two.\n\nThree. Four."
    one, two, three, four = (Span(*place, 0.5) for place in split_sentences(text))
    assert excerpt(text, ()) == text
    assert excerpt(text, (three,)) == "Three."
    assert excerpt(text, (two, one)) == "One. Two."
    assert excerpt(text, (three, two)) == "Two.\n\nThree."
    assert excerpt(text, (four, one)) == "One. ... Four."
    # Windows overlap.
    assert excerpt(text, (Span(0, 9, 1.0), Span(5, 17, 0.5), Span(6, 8, 0.1))) == "One. Two.\n\nThree."


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1))
def test_an_excerpt_has_all_that_its_spans_cover(starts: list[tuple[int, int]]) -> None:
    text = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP"
    spans = [Span(start, start + n, 0.0) for start, n in starts]
    covered = sorted({place for span in spans for place in range(span.start, span.end)})
    found = excerpt(text, spans)
    assert found.replace(" ... ", "") == "".join(text[place] for place in covered)
    gaps = sum(second - first > 1 for first, second in itertools.pairwise(covered))
    assert found.count(" ... ") == gaps


@pytest.mark.parametrize(
    ("scored", "text", "expected"),
    [
        ("The fox runs.", "The fox runs.", [(4, 7), (8, 13)]),
        ("The fox runs.", " \nThe fox runs. ", [(6, 9), (10, 15)]),
        ("title\n\nThe fox runs.\nfooter", "The fox runs.", []),
        ("The fox runs.", "fox runs", [(0, 3), (4, 8)]),
        ("The fox runs.", "A whale.", []),
        ("The fox runs.", " ", []),
    ],
)
def test_spans_are_shown_in_the_text_of_the_callers_object(
    scored: str, text: str, expected: list[tuple[int, int]]
) -> None:
    item = RankedCandidate(Candidate(scored), 0.5, 0.0, 0, 1, spans=(Span(4, 7, 0.5), Span(8, 13, 0.4)))
    if scored.startswith("title"):
        item = RankedCandidate(Candidate(scored), 0.5, 0.0, 0, 1, spans=(Span(0, 5, 0.5), Span(7, 20, 0.4)))
        expected = [(0, 13)]
    assert [span[:2] for span in shown(item, text)] == expected


def test_pairs_grow_with_sentences_and_nothing_else() -> None:
    def pairs(n: int) -> int:
        backend = FakeBackend()
        texts = [" ".join(f"Sentence {i} of text {number} is here." for i in range(n)) for number in range(20)]
        Reranker(backend, spans="sentences").rank("q", texts)
        return sum(map(len, backend.calls))

    assert [pairs(n) for n in (1, 10, 100)] == [20 * (n + 1) for n in (1, 10, 100)]
