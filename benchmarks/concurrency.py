"""Callers at the same time: merged into shared batches against uncoordinated threads on the same engine, in one run.

    python benchmarks/concurrency.py [--callers 32] [--candidates 10] [--calls 4] [--rounds 5] [--backend openvino]

The texts are paragraphs of CPython's manual, the model is all-MiniLM-L6-v2 under a seeded head unless `--model` names
another. *Uncoordinated* is the same loaded engine, called by every thread for itself; *sentence-transformers*, where
the model has a checkpoint, is one `CrossEncoder` that all threads call, as the frameworks' own rerankers do. All take
turns in every round, and the figures are medians of the rounds:

- throughput, and the 50th and 95th percentile of the latency, of `--callers` threads that each make `--calls` calls;
- the latency of a call of `--candidates` alone, beside a call of 1,000 candidates, and that of the large one;
- the largest lag of an event loop while `--callers` tasks score, and while one task scores 1,000 candidates.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from harness._engines import sentence_transformers
from harness._model import prepare_model
from harness._work import QUESTIONS, shuffled_paragraphs

from rerank_plugins import Reranker
from rerank_plugins._machine import processor
from rerank_plugins.backends import LocalBackend
from rerank_plugins.backends._merge import SharedBatches

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--callers", type=int, default=32)
parser.add_argument("--candidates", type=int, default=10)
parser.add_argument("--calls", type=int, default=4)
parser.add_argument("--large", type=int, default=1000)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--model", default=None)
parser.add_argument("--backend", default="auto")
parser.add_argument("--device", default=None)
parser.add_argument("--precision", default="auto")
parser.add_argument("--json", action="store_true")
QUERY = QUESTIONS[0]

Score = Callable[[str, list[str]], Any]


class Uncoordinated:
    """The engine of a reranker without merging: every call has its own queue."""

    def __init__(self, reranker: Reranker) -> None:
        backend = reranker.prepare()._backend
        assert isinstance(backend, LocalBackend)
        self.backend = backend

    def score_pairs(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Score pairs at once, whoever else is scoring."""
        alone = self.backend.configured(max_length=None, instruction=None)
        alone._batches = SharedBatches()
        return alone.logits(pairs).logits[:, 0]


def timed(score: Score, query: str, documents: list[str]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    score(query, documents)
    return time.perf_counter() - start


def many_callers(score: Score, jobs: list[list[tuple[str, list[str]]]]) -> dict[str, float]:
    """Each caller makes its calls one after the other, all callers at once."""
    ready = threading.Barrier(len(jobs) + 1)

    def caller(calls: list[tuple[str, list[str]]]) -> list[float]:
        ready.wait()
        return [timed(score, *call) for call in calls]

    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(caller, calls) for calls in jobs]
        ready.wait()
        start = time.perf_counter()
        latencies = [seconds for future in running for seconds in future.result()]
        total = time.perf_counter() - start
    pairs = sum(len(documents) for calls in jobs for _, documents in calls)
    return {
        "pairs_per_second": pairs / total,
        "p50_s": float(np.percentile(latencies, 50)),
        "p95_s": float(np.percentile(latencies, 95)),
    }


def beside_a_large_call(score: Score, small: list[str], large: list[str]) -> dict[str, float]:
    """A small call that comes while a large one runs."""
    alone = timed(score, QUERY, small)
    large_alone = timed(score, QUERY, large)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(timed, score, QUERY, large)
        # A third of the way, so that the large call is past its tokenising.
        time.sleep(large_alone / 3)
        beside = timed(score, QUERY, small)
        overtook = not running.done()
        large_beside = running.result()
    return {
        "small_alone_s": alone,
        "small_beside_large_s": beside,
        "small_overtook_large": float(overtook),
        "large_alone_s": large_alone,
        "large_beside_small_s": large_beside,
    }


async def loop_lag(reranker: Reranker, jobs: list[tuple[str, list[str]]]) -> float:
    """The longest that a sleep of a millisecond overslept while the jobs were scored, in seconds."""
    worst, done = 0.0, False

    async def watch() -> None:
        nonlocal worst
        while not done:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - start - 0.001)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(reranker.alogits(*job) for job in jobs))
    done = True
    await watching
    return worst


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def main() -> None:
    """Run it."""
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        measure(arguments, Path(work))


def measure(arguments: argparse.Namespace, work: Path) -> None:
    """Make the model in `work`, let the contestants take turns, and print the figures."""
    model = prepare_model(arguments.model, work, int8=False, graph=True, progress=lambda *_: None)
    merged = Reranker(
        str(model.path), backend=arguments.backend, device=arguments.device, precision=arguments.precision
    )
    contestants: dict[str, Score] = {"uncoordinated": Reranker(Uncoordinated(merged)).score, "merged": merged.score}
    if model.has_checkpoint:
        engine = sentence_transformers(str(model.path), dtype="float32", device=arguments.device or "cpu")
        contestants["sentence-transformers"] = engine.rerank
    documents = shuffled_paragraphs()
    jobs = []
    for caller in range(arguments.callers):
        starts = [(caller * arguments.calls + call) * arguments.candidates for call in range(arguments.calls)]
        jobs.append(
            [
                (
                    f"{QUERY} {caller}",
                    [documents[i % len(documents)] for i in range(start, start + arguments.candidates)],
                )
                for start in starts
            ]
        )
    small, large = documents[: arguments.candidates], documents[arguments.candidates :][: arguments.large]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    lags: list[dict[str, float]] = []
    for score in contestants.values():
        score(QUERY, small)
    for _ in range(arguments.rounds):
        for name, score in contestants.items():
            found[name].append({**many_callers(score, jobs), **beside_a_large_call(score, small, large)})
        lags.append(
            {
                "many_tasks_s": asyncio.run(loop_lag(merged, [job for calls in jobs for job in calls[:1]])),
                "one_large_task_s": asyncio.run(loop_lag(merged, [(QUERY, large)])),
            }
        )
    rows = {name: medians(rounds) for name, rounds in found.items()}
    report = {
        "machine": processor()[0],
        "cpus": os.cpu_count(),
        "model": model.name,
        "backend": merged.backend_name,
        "precision": merged.precision,
        "callers": arguments.callers,
        "candidates": arguments.candidates,
        "large": len(large),
        "rows": rows,
        "merged_against": {
            name: medians(
                [
                    {figure: ours[figure] / other[figure] for figure in ("pairs_per_second", "p95_s")}
                    for ours, other in zip(found["merged"], rounds, strict=True)
                ]
            )
            for name, rounds in found.items()
            if name != "merged"
        },
        "event_loop_lag": {**medians(lags), "worst_s": max(max(lag.values()) for lag in lags)},
    }
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{report['model']} on {report['backend']} ({report['precision']}), {report['cpus']} CPUs")
    print(f"{arguments.callers} callers of {arguments.candidates} candidates, {arguments.rounds} rounds")
    for figure in rows["merged"]:
        print(f"{figure:<24}" + "".join(f"{name} {row[figure]:>10.4f}   " for name, row in rows.items()))
    for name, ratios in report["merged_against"].items():
        print(f"merged against {name}: throughput {ratios['pairs_per_second']:.2f} x, p95 {ratios['p95_s']:.2f} x")
    print("event-loop lag " + ", ".join(f"{name} {lag:.4f}" for name, lag in report["event_loop_lag"].items()))


if __name__ == "__main__":
    main()
