from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from checkpoints import QUERY, TEXTS, tiny
from test_backends import converted

from rerank_plugins import Reranker
from rerank_plugins.testing import FakeBackend

JOBS = [(f"{QUERY} {i % 5}", TEXTS[i % 3 : 8] + TEXTS[: i % 4] * 2) for i in range(32)]


def engines() -> list[Reranker]:
    return [
        Reranker(tiny("bert"), backend="torch"),
        Reranker(tiny("causal-qwen3"), backend="torch"),
        Reranker(converted("bert"), backend="onnx"),
        Reranker(converted("bert"), backend="openvino"),
    ]


@pytest.mark.parametrize("engine", range(4))
@pytest.mark.parametrize("threads", [8, 32])
def test_threads_give_the_serial_result(engine: int, threads: int) -> None:
    reranker = engines()[engine]
    serial = [[item.index for item in reranker.rank(*job)] for job in JOBS]
    scores = [reranker.score(*job) for job in JOBS]
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
    expected = [float(r.score("panda", [long])[0]) for r in rerankers]
    assert len(set(expected)) == 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: float(rerankers[i % 4].score("panda", [long])[0]), range(400)))
    assert all(score == pytest.approx(expected[i % 4], abs=1e-5) for i, score in enumerate(found))


def test_many_threads_load_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import rerank_plugins.backends as backends

    loads = []
    real = backends._load

    def counting(spec):  # type: ignore[no-untyped-def]
        loads.append(spec)
        return real(spec)

    monkeypatch.setattr(backends, "_load", counting)
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
    assert reranker.score("q", ["a"]).shape == (1,)


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


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_async_works_in_a_forked_child() -> None:
    import os

    asyncio.run(Reranker(FakeBackend()).arank("q", ["a"]))
    child = os.fork()
    if child == 0:
        ok = False
        try:
            ok = len(asyncio.run(asyncio.wait_for(Reranker(FakeBackend()).arank("q", ["a"]), 10))) == 1
        finally:
            os._exit(0 if ok else 1)
    deadline = time.monotonic() + 30
    while (result := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert result[0] == child
    assert os.waitstatus_to_exitcode(result[1]) == 0
