"""What a forked child of a process with a loaded model can do: score, and end. Real engines, real forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from checkpoints import QUERY, TEXTS, tiny
from test_backends import converted

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

ENGINES = ("onnx", "openvino", "torch")

WAIT = 100
"""Seconds after which a child hangs."""

BEGINNING = f"""
import json, os, sys, threading, time
from rerank_plugins import Reranker, _fork

WAIT = {WAIT}
QUERY, TEXTS, model, engine = json.loads(sys.stdin.read())

def new():
    return Reranker(model, backend=engine, precision="fp32")

def fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except Exception as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
        # As a worker of gunicorn ends: with all that the end of an interpreter runs.
        sys.exit(0)
    return pid

def ended(pid):
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"

results = {{}}
"""

SCENARIOS = """
def check_in_a_child():
    assert ended(fork(lambda: check(reranker))) == 0

def check(reranker):
    scores = reranker.score(QUERY, TEXTS).tolist()
    assert all(abs(a - b) < 1e-5 for a, b in zip(scores, expected, strict=True)), scores

while_loading = new()
loader = threading.Thread(target=while_loading.prepare)
loader.start()
time.sleep(0.05)
pid = fork(lambda: globals().update(expected=while_loading.score(QUERY, TEXTS).tolist()))
results["while another thread loads"] = ended(pid)
loader.join()

reranker = while_loading
expected = reranker.score(QUERY, TEXTS).tolist()
results["loaded"] = ended(fork(lambda: check(reranker)))
if engine != "torch":
    # What concerns objects that only these engines have.
    results["closed by the child"] = ended(fork(lambda: (check(reranker), reranker.close())))
    results["not used by the child"] = ended(fork(lambda: None))
    results["another one in the child"] = ended(fork(lambda: (reranker.close(), check(new()))))
    results["a child of the child"] = ended(fork(lambda: (check(reranker), check_in_a_child())))

stop = threading.Event()
def score():
    while not stop.is_set():
        reranker.score(QUERY, TEXTS)
scorer = threading.Thread(target=score)
scorer.start()
for i in range(1 if engine == "torch" else 2):
    results[f"while another thread scores {i}"] = ended(fork(lambda: check(reranker)))
stop.set()
scorer.join()
check(reranker)
print(json.dumps(results))
"""


def run(code: str, model: str | None = None, engine: str = "auto", **variables: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING + textwrap.dedent(code)],
        input=json.dumps([QUERY, TEXTS, model, engine]),
        capture_output=True,
        text=True,
        timeout=10 * WAIT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(results.values()) <= {0}, (results, done.stderr[-2000:])
    return results


@pytest.mark.parametrize("engine", ENGINES)
def test_a_child_scores_and_ends(engine: str) -> None:
    # Several threads, as by default: one alone would not show what is lost in a child.
    results = run(
        SCENARIOS,
        tiny("bert") if engine == "torch" else converted("bert"),
        engine,
        OMP_NUM_THREADS="2",
        OMP_WAIT_POLICY="passive",
    )
    assert len(results) == (3 if engine == "torch" else 8)


def test_a_fork_waits_for_who_is_inside_and_lets_them_finish() -> None:
    run(
        """
        entered, ended_at = threading.Event(), []
        def inside():
            with _fork.fork_waits():
                entered.set()
                time.sleep(0.3)
                with _fork.fork_waits():
                    ended_at.append(time.monotonic())
        thread = threading.Thread(target=inside)
        thread.start()
        entered.wait()
        results["child"] = ended(fork(lambda: exec("assert ended_at and not _fork._state.inside")))
        with _fork.fork_waits():
            # One that forks while it is inside itself waits for nobody.
            results["own"] = ended(fork(lambda: exec("with _fork.fork_waits(): pass")))
        print(json.dumps(results))
        """
    )


def test_a_child_of_a_fork_that_could_not_wait_is_told_so() -> None:
    run(
        """
        from rerank_plugins.errors import ScoringError
        from rerank_plugins.testing import FakeBackend
        _fork.LIMIT_S = 0.1
        entered, leave = threading.Event(), threading.Event()
        def inside():
            with _fork.fork_waits():
                entered.set()
                leave.wait()
        thread = threading.Thread(target=inside)
        thread.start()
        entered.wait()
        def child():
            try:
                Reranker(FakeBackend()).rank("panda", ["a panda"])
            except ScoringError as error:
                assert "was forked while another thread" in str(error) and "spawn" in str(error), error
            else:
                raise AssertionError("no error")
        results["told"] = ended(fork(child))
        leave.set()
        thread.join()
        assert Reranker(FakeBackend()).rank("panda", ["a panda"])[0].scored
        print(json.dumps(results))
        """
    )
