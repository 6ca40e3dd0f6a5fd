"""A query that is asked again: without a cache, from memory and from a file, in one run.

    python benchmarks/cache.py [--candidates 100] [--rounds 5] [--backend auto] [--json]

The texts are paragraphs of CPython's manual, the model is the bundled one. Figures are medians of the rounds, of a
whole `Reranker.rank`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from harness._work import QUESTIONS, paragraphs

from rerank_plugins import Reranker
from rerank_plugins._machine import processor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--candidates", type=int, default=100)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--backend", default="auto")
parser.add_argument("--json", action="store_true")
QUERY = QUESTIONS[0]


def main() -> None:
    """Measure, and print a table or JSON."""
    arguments = parser.parse_args()
    texts = paragraphs()[: arguments.candidates]
    with tempfile.TemporaryDirectory() as directory:
        caches = {"no cache": None, "memory": 100_000, "file": str(Path(directory) / "scores.sqlite")}
        rerankers = {name: Reranker(backend=arguments.backend, cache=cache) for name, cache in caches.items()}
        orders = {name: [item.index for item in r.rank(QUERY, texts)] for name, r in rerankers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in caches}
        for _ in range(arguments.rounds):
            for name, reranker in rerankers.items():
                start = time.perf_counter()
                reranker.rank(QUERY, texts)
                seconds[name].append(time.perf_counter() - start)
        for reranker in rerankers.values():
            reranker.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: medians["no cache"] / value for name, value in medians.items()}
    same = all(order == orders["no cache"] for order in orders.values())
    if arguments.json:
        machine = {"processor": processor()[0], "cpus": os.cpu_count()}
        print(
            json.dumps({"seconds": medians, "times_as_fast": ratios, "same_order": same, "machine": machine}, indent=2)
        )
        return
    for name, value in medians.items():
        print(f"{name:10} {1000 * value:9.2f} ms  {ratios[name]:8.0f} x")
    print("the order is the same" if same else "THE ORDER DIFFERS")


if __name__ == "__main__":
    main()
