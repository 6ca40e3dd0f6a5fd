from __future__ import annotations

import asyncio
import contextvars
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from checkpoints import QUERY, TEXTS, tiny
from test_backends import converted
from tokenizers import Tokenizer, models, pre_tokenizers

from rerank_plugins import Reranker, _threads
from rerank_plugins._cancellation import Cancellation, Cancelled, cancellation
from rerank_plugins.backends._merge import SharedBatches
from rerank_plugins.backends.base import Batch, LocalBackend
from rerank_plugins.backends.pairs import EncodedPair, PairEncoder
from rerank_plugins.batching import BatchCost
from rerank_plugins.errors import InputError, ScoringError
from rerank_plugins.testing import FakeBackend

WAIT = 20
"""Seconds after which a test that hangs fails."""

JOBS = [(f"{QUERY} {i % 5}", TEXTS[i % 3 : 8] + TEXTS[: i % 4] * 2) for i in range(32)]


def engines() -> list[Reranker]:
    return [
        Reranker(tiny("bert"), backend="torch"),
        Reranker(tiny("causal-qwen3"), backend="torch"),
        Reranker(converted("bert"), backend="onnx"),
        # "auto" may be bf16, where a last digit that padding changes can decide how a value is rounded.
        Reranker(converted("bert"), backend="openvino", precision="fp32"),
    ]


@pytest.mark.parametrize("engine", range(4))
@pytest.mark.parametrize("threads", [8, 32])
def test_threads_give_the_serial_result(engine: int, threads: int) -> None:
    reranker = engines()[engine]
    serial = [[item.index for item in reranker.rank(*job)] for job in JOBS]
    scores = [reranker.logits(*job) for job in JOBS]
    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(lambda job: reranker.rank(*job), JOBS))
    assert [[item.index for item in ranking] for ranking in together] == serial
    for ranking, expected in zip(together, scores, strict=True):
        for item in ranking:
            assert item.logit == pytest.approx(float(expected[item.index]), abs=1e-4)


@pytest.mark.parametrize("engine", range(4))
@pytest.mark.parametrize("tasks", [8, 32])
async def test_tasks_give_the_serial_result(engine: int, tasks: int) -> None:
    reranker = engines()[engine]
    serial = [[item.index for item in reranker.rank(*job)] for job in JOBS]
    gate = asyncio.Semaphore(tasks)

    async def one(job: tuple[str, list[str]]) -> list[int]:
        async with gate:
            return [item.index for item in await reranker.arank(*job)]

    assert await asyncio.gather(*map(one, JOBS)) == serial


def test_threads_with_different_maximum_lengths_do_not_disturb_each_other() -> None:
    """One shared tokenizer whose truncation is switched back and forth gives texts of the wrong length."""
    long = "panda bamboo china " * 100
    rerankers = [Reranker(tiny("bert"), max_length=length) for length in (16, 64, 200, None)]
    expected = [float(r.logits("panda", [long])[0]) for r in rerankers]
    assert len(set(expected)) == 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: float(rerankers[i % 4].logits("panda", [long])[0]), range(400)))
    assert all(score == pytest.approx(expected[i % 4], abs=1e-5) for i, score in enumerate(found))


def test_many_threads_load_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rerank_plugins.backends import load as loading

    loads = []
    real = loading._load

    def counting(spec):  # type: ignore[no-untyped-def]
        loads.append(spec)
        return real(spec)

    monkeypatch.setattr(loading, "_load", counting)
    rerankers = [Reranker(tiny("electra"), device="cpu", precision="fp32") for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda r: r.prepare(), rerankers))
    assert len(loads) == 1


def test_a_failed_load_can_be_tried_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import shutil

    from rerank_plugins.errors import ModelLoadError

    reranker = Reranker(tmp_path / "late")
    with pytest.raises(ModelLoadError):
        reranker.prepare()
    shutil.copytree(tiny("bert"), tmp_path / "late")
    assert reranker.logits("q", ["a"]).shape == (1,)


async def test_async_does_not_block_the_loop_nor_use_its_executor() -> None:
    started, release, threads = threading.Event(), threading.Event(), []

    def slow(query: str, text: str) -> float:
        threads.append(threading.current_thread().name)
        started.set()
        assert release.wait(20)
        return 1.0

    loop = asyncio.get_running_loop()
    loop.set_default_executor(_Refusing())
    task = asyncio.create_task(Reranker(FakeBackend(slow)).arank("q", ["a"]))
    while not started.is_set():
        await asyncio.sleep(0)
    # The engine waits for this line, so the loop must be running meanwhile.
    release.set()
    assert len(await task) == 1
    assert all(name.startswith("rerank-plugins") for name in threads)


class _Refusing(ThreadPoolExecutor):
    def submit(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        raise AssertionError("the loop's default executor was used")


async def test_context_variables_reach_the_engine() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    variable.set("set")
    seen = []
    await Reranker(FakeBackend(lambda q, t: seen.append(variable.get()) or 0.0)).ascore("q", ["a"])
    assert seen == ["set"]


async def test_a_cancelled_caller_leaves_the_others_alone() -> None:
    release = threading.Event()

    def waiting(query: str, text: str) -> float:
        assert query != "slow" or release.wait(20)
        return float(len(text))

    reranker = Reranker(FakeBackend(waiting))
    slow = asyncio.create_task(reranker.arank("slow", ["a"]))
    await asyncio.sleep(0.01)
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert [item.index for item in await reranker.arank("quick", ["a", "bbb"])] == [1, 0]
    release.set()


async def test_one_reranker_serves_several_event_loops() -> None:
    reranker = Reranker(FakeBackend())
    here = await reranker.arank("red fox", ["blue", "red fox"])
    there = await asyncio.to_thread(lambda: asyncio.run(reranker.arank("red fox", ["blue", "red fox"])))
    assert here == there


def true_in_a_forked_child(check: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        ok = False
        try:
            ok = check()
        finally:
            os._exit(0 if ok else 1)
    deadline = time.monotonic() + WAIT
    while (result := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(result[1]) == 0


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_async_works_in_a_forked_child() -> None:
    asyncio.run(Reranker(FakeBackend()).arank("q", ["a"]))
    assert true_in_a_forked_child(
        lambda: len(asyncio.run(asyncio.wait_for(Reranker(FakeBackend()).arank("q", ["a"]), 10))) == 1
    )


# -- shared batches -----------------------------------------------------------------------------------------------


class Counting(LocalBackend):
    """Logit = sum of the words, which are numbers; the query's number tells the callers apart in a batch.

    Attributes:
        batches: The query and the length of each pair of each batch, in order.
        threads: Who ran them.
        fail: Called with the queries of a batch before it is scored.
    """

    name = "counting"

    def __init__(self, token_budget: int = 1000) -> None:
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{str(i): i for i in range(1, 3000)}}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        super().__init__(PairEncoder(tokenizer, limit=512), token_budget=token_budget)
        self.batches: list[list[tuple[int, int]]] = []
        self.threads: list[threading.Thread] = []
        self.fail: Callable[[list[int]], None] = lambda queries: None

    def forward(self, batch: Batch) -> np.ndarray:
        lengths = batch.attention_mask.sum(1)
        self.batches.append(list(zip(batch.input_ids[:, 0].tolist(), lengths.tolist(), strict=True)))
        self.threads.append(threading.current_thread())
        self.fail([query for query, _ in self.batches[-1]])
        return (batch.input_ids * batch.attention_mask).sum(1, keepdims=True).astype(np.float32)

    def queries(self) -> list[set[int]]:
        return [{query for query, _ in batch} for batch in self.batches]


class Gated(Counting):
    """The first batches wait until the test lets them go on, one by one; `opened` lets all go on."""

    def __init__(self, token_budget: int = 1000) -> None:
        super().__init__(token_budget)
        self.entered, self.permits = threading.Semaphore(0), threading.Semaphore(0)
        self.opened = threading.Event()

    def forward(self, batch: Batch) -> np.ndarray:
        logits = super().forward(batch)
        if not self.opened.is_set():
            self.entered.release()
            assert self.permits.acquire(timeout=WAIT)
        return logits

    def step(self) -> None:
        """Let the batch that waits go on, and wait until the next one does."""
        self.permits.release()
        assert self.entered.acquire(timeout=WAIT)

    def open(self) -> None:
        self.opened.set()
        self.permits.release()

    def wait_for_callers(self, n: int) -> None:
        deadline = time.monotonic() + WAIT
        while len(self._batches._calls) != n:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def texts_of(*lengths: int) -> list[str]:
    return [" ".join(str(1 + (7 * i + 3 * k) % 2000) for k in range(n - 1)) for i, n in enumerate(lengths)]


def logits_of(query: int, texts: list[str]) -> list[float]:
    return [query + sum(map(int, text.split())) for text in texts]


class Callers:
    """Threads that score on one gated backend, each with a query of its own."""

    def __init__(self, backend: Counting) -> None:
        self.reranker = Reranker(backend)
        self.backend = backend
        self.started = 0

    def call(
        self,
        query: int,
        *lengths: int,
        reranker: Reranker | None = None,
        context: contextvars.Context | None = None,
    ) -> Future[list[float]]:
        """Start a call, and wait until its pairs are in the queue."""
        texts = texts_of(*lengths)
        future: Future[list[float]] = Future()

        def run() -> None:
            try:
                future.set_result((reranker or self.reranker).logits(str(query), texts).tolist())
            except BaseException as error:
                future.set_exception(error)

        # A daemon: a caller that hangs must fail its test, not keep the tests from ending.
        threading.Thread(target=(context or contextvars.Context()).run, args=(run,), daemon=True).start()
        self.started += 1
        if isinstance(self.backend, Gated):
            self.backend.wait_for_callers(self.started)
        return future


@pytest.fixture
def gated():  # type: ignore[no-untyped-def]
    backend = Gated()
    callers = Callers(backend)
    yield backend, callers
    backend.open()


def test_callers_at_the_same_time_share_batches(gated: tuple[Gated, Callers]) -> None:
    backend, callers = gated
    first = callers.call(1, 10)
    assert backend.entered.acquire(timeout=WAIT)
    others = [callers.call(query, 10, 9, 8) for query in range(2, 34)]
    backend.open()
    assert first.result(WAIT) == logits_of(1, texts_of(10))
    assert [other.result(WAIT) for other in others] == [logits_of(q, texts_of(10, 9, 8)) for q in range(2, 34)]
    assert backend.queries() == [{1}, set(range(2, 34))]


def test_rerankers_of_one_model_with_other_settings_share_batches(gated: tuple[Gated, Callers]) -> None:
    backend, callers = gated
    first = callers.call(1, 10)
    assert backend.entered.acquire(timeout=WAIT)
    short = callers.call(2, 20, reranker=Reranker(backend, max_length=5))
    told = callers.call(3, 20, reranker=Reranker(backend, instruction="100 "))
    backend.open()
    words = [int(word) for word in texts_of(20)[0].split()]
    assert first.result(WAIT) == logits_of(1, texts_of(10))
    assert short.result(WAIT) == [2 + sum(words[:4])]
    assert told.result(WAIT) == [100 + 3 + sum(words)]
    assert sorted(backend.batches[1]) == [(2, 5), (100, 21)]


def test_a_caller_that_is_alone_runs_its_batches_in_its_own_thread() -> None:
    backend = Counting(token_budget=100)
    lengths = [30, 10, 50, 20, 10, 40]
    assert Reranker(backend).logits("1", texts_of(*lengths)).tolist() == logits_of(1, texts_of(*lengths))
    assert [[n for _, n in batch] for batch in backend.batches] == [[50, 40], [30, 20], [10, 10]]
    assert set(backend.threads) == {threading.current_thread()}


def test_a_small_call_goes_before_the_rest_of_a_large_one(gated: tuple[Gated, Callers]) -> None:
    backend, callers = gated
    large = callers.call(1, *[100] * 200)
    assert backend.entered.acquire(timeout=WAIT)
    small = callers.call(2, *range(60, 80, 2))
    backend.step()
    assert backend.queries()[1] == {2}
    backend.step()
    # It is back while 190 pairs of the large call wait.
    assert small.result(WAIT) == logits_of(2, texts_of(*range(60, 80, 2)))
    backend.open()
    assert large.result(WAIT) == logits_of(1, texts_of(*[100] * 200))


def test_a_leader_returns_as_soon_as_its_own_pairs_are_scored(gated: tuple[Gated, Callers]) -> None:
    backend, callers = gated
    leader = callers.call(1, 100)
    assert backend.entered.acquire(timeout=WAIT)
    heir = callers.call(2, *[100] * 30)
    backend.step()
    assert leader.result(WAIT) == logits_of(1, texts_of(100))
    assert backend.threads[0] is not backend.threads[1]
    backend.open()
    assert heir.result(WAIT) == logits_of(2, texts_of(*[100] * 30))


@pytest.mark.parametrize("guilty", [2, 3])
def test_an_error_reaches_the_caller_of_its_pairs_alone(gated: tuple[Gated, Callers], guilty: int) -> None:
    """Of the two that wait, one leads the shared batch; which one differs between the two cases."""
    backend, callers = gated

    def fail(queries: list[int]) -> None:
        if guilty in queries:
            raise ScoringError("these pairs")

    backend.fail = fail
    first = callers.call(1, 10)
    assert backend.entered.acquire(timeout=WAIT)
    others = {2: callers.call(2, 20, 5), 3: callers.call(3, 10, 5)}
    backend.open()
    assert first.result(WAIT) == logits_of(1, texts_of(10))
    with pytest.raises(ScoringError, match="these pairs"):
        others[guilty].result(WAIT)
    assert others[5 - guilty].result(WAIT) == logits_of(5 - guilty, texts_of(*{2: (20, 5), 3: (10, 5)}[5 - guilty]))
    assert {2, 3} in backend.queries()


def test_a_query_that_is_too_long_disturbs_no_shared_batch(gated: tuple[Gated, Callers]) -> None:
    backend, callers = gated
    first = callers.call(1, 10)
    assert backend.entered.acquire(timeout=WAIT)
    with pytest.raises(InputError, match="no room"):
        callers.reranker.logits("7 " * 600, ["1"])
    backend.open()
    assert first.result(WAIT) == logits_of(1, texts_of(10))


def test_an_engine_that_returns_the_wrong_number_of_rows_is_told_so() -> None:
    class Short(Counting):
        def forward(self, batch: Batch) -> np.ndarray:
            return super().forward(batch)[:1]

    with pytest.raises(ScoringError, match=r"forward must return shape \(2, n_labels\)"):
        Reranker(Short()).logits("1", ["2", "3"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_leader_that_dies_leaves_its_batch_to_the_others(
    gated: tuple[Gated, Callers], error: type[BaseException]
) -> None:
    backend, callers = gated
    deaths = []

    def fail(queries: list[int]) -> None:
        if len(queries) > 1 and not deaths:
            deaths.append(threading.current_thread())
            raise error

    backend.fail = fail
    first = callers.call(1, 10)
    assert backend.entered.acquire(timeout=WAIT)
    others = [callers.call(query, 10) for query in range(2, 10)]
    backend.open()
    assert first.result(WAIT) == logits_of(1, texts_of(10))
    found = [other.exception(WAIT) for other in others]
    assert [type(e) for e in found if e is not None] == [error]
    assert [o.result() for o in others if o.exception() is None] == [
        logits_of(q, texts_of(10)) for q, o in enumerate(others, start=2) if o.exception() is None
    ]
    assert backend._batches._leader is None


def test_a_caller_that_is_interrupted_while_it_waits_takes_its_pairs_along(
    gated: tuple[Gated, Callers], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, callers = gated
    first = callers.call(1, *[100] * 30)
    assert backend.entered.acquire(timeout=WAIT)

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            callers.reranker.logits("2", texts_of(100))
    backend.open()
    assert first.result(WAIT) == logits_of(1, texts_of(*[100] * 30))
    assert backend.queries() == [{1}] * 3


# -- cancelling ---------------------------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def test_the_pairs_of_a_cancelled_task_are_not_scored(gated: tuple[Gated, Callers]) -> None:
    backend, callers = gated
    reranker = callers.reranker
    tasks = []
    for query in (1, 2, 3):
        tasks.append(asyncio.create_task(reranker.alogits(str(query), texts_of(10))))
        await until(lambda n=query: len(backend._batches._calls) == n)  # type: ignore[misc]
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    # Its thread is free again although the engine has not moved.
    await until(lambda: len(backend._batches._calls) == 2)
    backend.open()
    assert (await tasks[0]).tolist() == logits_of(1, texts_of(10))
    assert (await tasks[2]).tolist() == logits_of(3, texts_of(10))
    assert backend.queries() == [{1}, {3}]


def test_the_leader_skips_a_cancelled_call_whose_thread_has_not_woken_yet(gated: tuple[Gated, Callers]) -> None:
    backend, callers = gated
    first = callers.call(1, 10)
    assert backend.entered.acquire(timeout=WAIT)
    stop = Cancellation()
    token = cancellation.set(stop)
    second = callers.call(2, 10, context=contextvars.copy_context())
    cancellation.reset(token)
    third = callers.call(3, 10)
    stop.cancelled = True
    backend.open()
    assert first.result(WAIT) == logits_of(1, texts_of(10))
    assert third.result(WAIT) == logits_of(3, texts_of(10))
    stop.cancel()
    assert isinstance(second.exception(WAIT), Cancelled)
    assert backend.queries() == [{1}, {3}]


async def test_a_cancelled_leader_stops_after_its_batch_and_hands_over(gated: tuple[Gated, Callers]) -> None:
    backend, callers = gated
    large = asyncio.create_task(callers.reranker.arank("1", texts_of(*[100 - i % 3 for i in range(500)])))
    await until(lambda: backend.entered.acquire(blocking=False))
    other = asyncio.create_task(callers.reranker.alogits("2", texts_of(*[100] * 500)))
    await until(lambda: len(backend._batches._calls) == 2)
    large.cancel()
    with pytest.raises(asyncio.CancelledError):
        await large
    backend.open()
    assert (await other).tolist() == logits_of(2, texts_of(*[100] * 500))
    assert backend.queries() == [{1}] + [{2}] * 50
    await until(lambda: backend._batches._leader is None and not backend._batches._calls)


async def test_a_call_that_times_out_is_not_scored_further(gated: tuple[Gated, Callers]) -> None:
    backend, callers = gated
    call = asyncio.create_task(callers.reranker.alogits("1", texts_of(*[100] * 500)))
    await until(lambda: backend.entered.acquire(blocking=False))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(call, 0.01)
    backend.open()
    await until(lambda: not backend._batches._calls)
    assert len(backend.batches) == 1


async def test_the_event_loop_starts_one_thread_at_most(gated: tuple[Gated, Callers]) -> None:
    """Starting a thread waits until it runs: a burst of callers would hold up the loop."""
    from rerank_plugins._threads import _executors

    backend, callers = gated
    starters = []
    start = threading.Thread.start

    def starting(self: threading.Thread) -> None:
        starters.append(threading.current_thread())
        start(self)

    _executors.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", starting)
        tasks = [asyncio.create_task(callers.reranker.alogits(str(query), texts_of(10))) for query in range(1, 33)]
        await until(lambda: len(backend._batches._calls) == 32)
    backend.open()
    await asyncio.gather(*tasks)
    assert starters.count(threading.current_thread()) == 1
    assert len(starters) == 33


# -- everything at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", ["rerank-plugins-start", "rerank-plugins_"])
async def test_a_thread_that_cannot_be_started_is_an_error_and_no_hang(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def no_more(thread: threading.Thread) -> None:
        if thread.name.startswith(refused):
            raise RuntimeError("can't start new thread")
        start(thread)

    _threads._executors.cache_clear()
    backend = FakeBackend()
    reranker = Reranker(backend)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await asyncio.wait_for(reranker.arank("panda", ["a panda", "a bear"]), WAIT)
    # Once there are threads again, nothing of the failed call is made.
    ranking = await asyncio.wait_for(reranker.arank("panda", ["the panda", "no bear"]), WAIT)
    assert ranking[0].text == "the panda"
    await asyncio.sleep(0.05)
    assert sum(map(len, backend.calls)) == 2
    _threads._executors.cache_clear()


def test_nothing_is_lost_among_errors_cancellations_and_deaths() -> None:
    """A lost wake-up or a lost leadership leaves a thread waiting for ever."""
    shared = SharedBatches()
    finished, wrong = [], []

    def run(pairs: list[EncodedPair]) -> np.ndarray:
        if random.random() < 0.05:
            time.sleep(0.0005)
        if any(int(pair.ids[0]) == 666 for pair in pairs):
            raise ScoringError("666")
        if random.random() < 0.02:
            raise SystemExit
        return np.array([[pair.ids.sum()] for pair in pairs], dtype=np.float32)

    def caller(number: int) -> None:
        own = random.Random(number)
        for _ in range(60):
            stop = Cancellation() if own.random() < 0.3 else None
            cancellation.set(stop)
            bad = own.random() < 0.1
            rows = [
                np.full(own.randrange(1, 60), own.randrange(1, 600), dtype=np.int32)
                for _ in range(own.choice((1, 9, 90)))
            ]
            if bad:
                rows[0][0] = 666
            if stop is not None:
                timer = threading.Timer(own.random() / 500, stop.cancel)
                timer.start()
            try:
                logits = shared.score([EncodedPair(row, row, False) for row in rows], run, BatchCost(500, 500))
                if bad or logits[:, 0].tolist() != [row.sum() for row in rows]:
                    wrong.append(rows)
            except ScoringError:
                if not bad:
                    wrong.append(rows)
            except (Cancelled, SystemExit):
                pass
        finished.append(number)

    threads = [threading.Thread(target=contextvars.Context().run, args=(caller, i), daemon=True) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert sorted(finished) == list(range(16))
    assert not wrong
    assert shared._leader is None
    assert not shared._calls


@needs_fork
def test_a_forked_child_does_not_wait_for_the_parents_leader(gated: tuple[Gated, Callers]) -> None:
    backend, callers = gated
    leader = callers.call(1, *[100] * 30)
    assert backend.entered.acquire(timeout=WAIT)

    def child() -> bool:
        backend.opened.set()
        return callers.reranker.logits("2", texts_of(10)).tolist() == logits_of(2, texts_of(10))

    assert true_in_a_forked_child(child)
    backend.open()
    assert leader.result(WAIT) == logits_of(1, texts_of(*[100] * 30))


def test_the_bundled_model_scores_the_same_in_company() -> None:
    settings: list[dict[str, Any]] = [{}, {"max_length": 64}, {"instruction": "animals: "}]
    rerankers = [Reranker(precision="fp32", **keywords) for keywords in settings]
    jobs = [(rerankers[i % 3], *JOBS[i]) for i in range(9)]
    alone = [reranker.logits(query, texts) for reranker, query, texts in jobs]
    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(lambda job: job[0].logits(job[1], job[2]), jobs))
    for expected, found in zip(alone, together, strict=True):
        assert np.abs(expected - found).max() < 1e-4
