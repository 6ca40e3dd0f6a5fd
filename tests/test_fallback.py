"""Failing open: what happens when time is up, or when a server fails for a reason that passes."""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np
import pytest
from checkpoints import tiny

from rerank_plugins import Candidate, ConfigurationError, InputError, Reranker, ScoringError, ServerError, ServerTimeout
from rerank_plugins.backends import Backend, PairLogits
from rerank_plugins.backends.base import Batch, LocalBackend
from rerank_plugins.testing import FakeBackend

TEXTS = ["one", "two two", "", "red fox", "five"]


class Failing(FakeBackend):
    """A server that fails with the errors that it was given, and then works."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)

    def logits(self, pairs):  # type: ignore[no-untyped-def]
        if self.errors:
            raise self.errors.pop(0)
        return super().logits(pairs)


def server(status: int | None) -> ServerError:
    return ServerError("busy", url="http://localhost:1", status=status)


PASSING = [server(None), server(429), server(503), server(408), ServerTimeout("slow", url="http://localhost:1"),
           ConnectionRefusedError(), TimeoutError(), OSError(28, "No space left on device")]  # fmt: skip
LASTING = [server(401), server(403), server(404), server(422), InputError("bad"), ConfigurationError("bad"),
           ScoringError("NaN"), FileNotFoundError("no"), ValueError("bug")]  # fmt: skip


@pytest.mark.parametrize("error", [*PASSING, *LASTING], ids=repr)
def test_the_default_raises_whatever_it_is(error: Exception) -> None:
    with pytest.raises(type(error)):
        Reranker(Failing(error)).rank("red fox", TEXTS)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_will_fail_again_is_raised(error: Exception) -> None:
    for on_error in ("keep_order", Reranker(FakeBackend())):
        with pytest.raises(type(error)):
            Reranker(Failing(error), on_error=on_error).rank("red fox", TEXTS)


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_keep_order_keeps_the_order_of_the_first_stage_and_says_so(error: Exception) -> None:
    ranking = Reranker(Failing(error), on_error="keep_order").rank("red fox", TEXTS, top_n=3, min_score=0.99)
    assert [item.index for item in ranking] == [0, 1, 3]
    assert [(item.scored, item.score, item.logit, item.rank) for item in ranking] == [
        (False, None, None, rank) for rank in (1, 2, 3)
    ]
    assert ranking.fallback is not None
    assert type(error).__name__ in ranking.fallback


def test_what_works_has_no_fallback() -> None:
    reranker = Reranker(Failing(server(503)), on_error="keep_order")
    assert reranker.rank("red fox", TEXTS).fallback is not None
    ranking = reranker.rank("red fox", TEXTS)
    assert ranking.fallback is None
    assert [item.index for item in ranking] == [3, 0, 4, 1, 2]
    assert all(item.scored for item in ranking)


def test_a_chain_of_rerankers_ends_in_the_order_of_the_first_stage() -> None:
    last = Reranker(Failing(server(500)), on_error="keep_order")
    middle = Reranker(Failing(server(503)), on_error=last)
    first = Reranker(Failing(server(None)), on_error=middle)
    ranking = first.rank("red fox", TEXTS, min_score=0.9)
    assert [item.index for item in ranking] == [0, 1, 3, 4, 2][:4]
    assert ranking.fallback is not None
    assert ranking.fallback.count("ServerError") == 3

    ranked = Reranker(Failing(server(None)), on_error=Reranker(FakeBackend())).rank("red fox", TEXTS)
    assert [item.index for item in ranked] == [3, 0, 4, 1, 2]
    assert all(item.scored for item in ranked)
    assert ranked.model == "fake"
    assert ranked.fallback is not None
    assert ranked.fallback.endswith("ranked by fake")


@pytest.mark.parametrize("bad", [None, "keep", True, 3])
def test_on_error_is_checked(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="on_error must be 'raise', 'keep_order' or another Reranker"):
        Reranker(on_error=bad)


def test_an_outage_is_said_once_a_minute(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rerank_plugins.rank._last_said", -1e9)
    with caplog.at_level(logging.WARNING, "rerank_plugins"):
        for _ in range(3):
            Reranker(Failing(server(503)), on_error="keep_order").rank("red fox", ["secret text"])
    assert len(caplog.records) == 1
    assert "secret text" not in caplog.text
    assert "red fox" not in caplog.text


class Slow(LocalBackend):
    """Takes a while for each batch; logits are the lengths of the texts."""

    name = "slow"

    def __init__(self, seconds: float) -> None:
        super().__init__(Reranker(tiny("bert")).prepare()._backend.encoder, token_budget=64)  # type: ignore[union-attr]
        self.seconds = seconds
        self.batches = 0

    def forward(self, batch: Batch) -> np.ndarray:
        self.batches += 1
        time.sleep(self.seconds)
        return batch.attention_mask.sum(axis=1, dtype=np.float32)[:, None]


def test_a_deadline_scores_in_the_order_of_the_first_stage_until_time_is_up() -> None:
    backend = Slow(0.1)
    texts = ["a bird " * (1 + i % 3) for i in range(200)]
    texts = [f"{text} {i}" for i, text in enumerate(texts)]
    ranking = Reranker(backend).rank("the sea", texts, deadline_s=0.5)
    scored = [item.index for item in ranking if item.scored]
    late = [item.index for item in ranking if not item.scored]
    assert 0 < len(scored) < 200
    assert sorted(scored) == list(range(len(scored)))
    assert [item.index for item in ranking] == scored + late
    assert late == sorted(late)
    assert len({*scored, *late}) == 200
    assert ranking.fallback == f"time was up: {len(late)} of 200 candidates were not scored"
    done = backend.batches
    time.sleep(0.3)
    assert backend.batches == done, "nothing goes on behind the caller's back"


def test_a_deadline_that_suffices_changes_nothing() -> None:
    plain = Reranker(tiny("bert"))
    texts = ["red fox", "", "blue whale", "the sea at night"] * 5
    given = plain.rank("what of the sea", texts, deadline_s=60)
    assert given.fallback is None
    assert [item.index for item in given] == [item.index for item in plain.rank("what of the sea", texts)]


def test_thresholds_spare_what_was_not_scored_and_blanks_come_last() -> None:
    texts = ["", *(f"text {i}" for i in range(100))]
    ranking = Reranker(Slow(0.2)).rank("the sea", texts, min_score=1.0, deadline_s=1e-6)
    assert [item.index for item in ranking] == list(range(1, 101))
    everything = Reranker(Slow(0.2)).rank("the sea", texts, deadline_s=1e-6)
    assert everything[-1].index == 0
    assert everything[-1].scored


async def test_the_time_of_an_awaited_call_runs_from_the_call() -> None:
    reranker = Reranker(Slow(0.05))
    texts = [f"text number {i}" for i in range(400)]
    start = time.monotonic()
    rankings = await asyncio.gather(*(reranker.arank(f"query {n}", texts, deadline_s=1.0) for n in range(3)))
    assert time.monotonic() - start < 10
    assert all(ranking.fallback for ranking in rankings)
    assert all(len(ranking) == 400 for ranking in rankings)


def test_a_deadline_holds_for_all_queries_of_a_call_and_with_a_cache() -> None:
    reranker = Reranker(Slow(0.02), cache=1000)
    reranker.settings.model.fingerprint = "slow"
    requests = [("one", [f"text {i}" for i in range(50)]), ("two", [Candidate(f"text {i}") for i in range(50)])]
    first = reranker.rank_many(requests, deadline_s=0.3)
    assert [len(ranking) for ranking in first] == [50, 50]
    assert first[1].fallback is not None
    # What was scored is kept: asked again, the call gets further, until it has all.
    for _ in range(200):
        again = reranker.rank_many(requests, deadline_s=0.3)
        if again[0].fallback is None and again[1].fallback is None:
            break
    assert again[1].fallback is None


@pytest.mark.parametrize("bad", [0, -1, "1", True, float("nan"), float("inf")])
def test_a_deadline_that_is_no_time_is_refused(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="deadline_s must be a number of seconds above 0"):
        Reranker(FakeBackend()).rank("q", ["a"], deadline_s=bad)  # type: ignore[arg-type]


def test_a_backend_that_cannot_stop_is_asked_once() -> None:
    class Whole(Backend):
        def logits(self, pairs):  # type: ignore[no-untyped-def]
            time.sleep(0.05)
            return PairLogits(np.zeros((len(pairs), 1), dtype=np.float32), np.zeros(len(pairs), dtype=bool))

    assert Reranker(Whole()).rank("q", ["a", "b"], deadline_s=0.01).fallback is None
