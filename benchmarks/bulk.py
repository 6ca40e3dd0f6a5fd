"""Bulk scoring: files on one machine, and the same on Ray with two actors, against `Reranker.score`.

    python benchmarks/bulk.py [--pairs 200000] [--model MODEL] [--actors 2] [--no-ray] [--json]

The pairs are passages of 20 to 120 words out of Python's own documentation, and 20 queries. All have the same threads
in all: with Ray, each actor has its part of them. The model is loaded before the clock starts; with Ray, the time has
the start of Ray and its actors in it, and is given without that too: from the first scored shard on.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from rerank_plugins import Reranker
from rerank_plugins._machine import processor
from rerank_plugins.bulk import score_files

QUERIES = 20

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pairs", type=int, default=200_000)
parser.add_argument("--model", default=None, help="the bundled model if not given")
parser.add_argument("--backend", default="auto")
parser.add_argument("--actors", type=int, default=2)
parser.add_argument("--no-ray", action="store_true")
parser.add_argument("--json", action="store_true")


def main() -> None:
    """Measure, and print a table or JSON."""
    arguments = parser.parse_args()
    reranker = Reranker(arguments.model, backend=arguments.backend)
    pairs = make_pairs(arguments.pairs)
    # The texts of a query together, as one call has them.
    by_query: dict[str, list[str]] = {}
    for query, text in pairs:
        by_query.setdefault(query, []).append(text)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        file = work / "pairs.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"query": query, "text": text}) + "\n" for query, text in pairs)
        reranker.score(*pairs[0][:1], [pairs[0][1]])
        start = time.perf_counter()
        for query, texts in by_query.items():
            reranker.score(query, texts)
        rows["Reranker.score"] = figures(len(pairs), time.perf_counter() - start)
        start = time.perf_counter()
        score_files(file, work / "plain", reranker=reranker)
        rows["one machine"] = figures(len(pairs), time.perf_counter() - start)
        if not arguments.no_ray:
            rows |= on_ray(file, work / "ray", reranker, arguments.actors, len(pairs))
    for row in rows.values():
        row["rate"] = row["pairs_per_s"] / rows["Reranker.score"]["pairs_per_s"]
    found = {"processor": processor()[0], "cpus": os.cpu_count(), "pairs": len(pairs), "rows": rows}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['processor']}, {found['cpus']} CPUs; {len(pairs)} pairs\n")
    print(f"{'':32}{'s':>8}{'pairs/s':>10}{'of Reranker.score':>20}{'core-hours a million':>24}")
    for name, row in rows.items():
        print(
            f"{name:32}{row['seconds']:8.1f}{row['pairs_per_s']:10.0f}{row['rate']:19.0%} "
            f"{row['core_hours_a_million']:23.2f}"
        )


def make_pairs(n: int) -> list[tuple[str, str]]:
    """Pairs of different texts."""
    rng = random.Random(0)
    words = " ".join(pydoc_data.topics.topics.values()).split()
    queries = [" ".join(words[at : at + 8]) for at in rng.sample(range(len(words) - 8), QUERIES)]
    pairs = []
    for number in range(n):
        at = rng.randrange(len(words) - 120)
        pairs.append((queries[number % QUERIES], " ".join(words[at : at + rng.randint(20, 120)]) + f" {number}"))
    return pairs


def figures(pairs: int, seconds: float) -> dict[str, float]:
    """What a time means."""
    core_hours = seconds * (os.cpu_count() or 1) / 3600 * 1e6 / pairs
    return {"seconds": seconds, "pairs_per_s": pairs / seconds, "core_hours_a_million": core_hours}


def on_ray(file: Path, out: Path, reranker: Reranker, actors: int, pairs: int) -> dict[str, dict[str, float]]:
    """Rows of Ray: all in all, and without its start."""
    # Here, so that the rest runs without Ray.
    from rerank_plugins.ray import score_files as score_on_ray

    times: list[float] = []
    counts: list[int] = []

    def tell(news: str, share: float) -> None:
        times.append(time.perf_counter())
        counts.append(int(news.split(" ")[0].replace(",", "")))

    start = time.perf_counter()
    found: Any = score_on_ray(file, out, reranker=reranker, actors=actors, progress=tell)
    whole = time.perf_counter() - start
    assert found.rows == pairs
    assert not found.problems, found.problems
    name = f"Ray, {actors} actors"
    return {
        f"{name}, with their start": figures(pairs, whole),
        name: figures(max(1, counts[-1] - counts[0]), max(1e-9, times[-1] - times[0])),
    }


if __name__ == "__main__":
    main()
