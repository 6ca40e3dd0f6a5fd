"""Which tools fit a request: recall of the right ones in the first 5, 8 and 16, and the time that it takes.

    python benchmarks/tools.py DATA/eval/metatool [--model MODEL] [--queries 100] [--json]

The folder has a test set in BEIR layout whose documents are tools: their identifiers are the names, their texts the
descriptions. Requests are drawn with a fixed seed. Each way of ranking sees all tools of the set:

- BM25, all-MiniLM-L6-v2 as a bi-encoder, and the cross-encoder, each alone;
- the first 50 of the bi-encoder, put into the order of the cross-encoder;
- sums of two or three of them, each brought to 0..1 within the list.

"rank_tools" is what `rerank_plugins.tools.rank_tools` does by default. Times are medians of ten calls with 60 tools: of
new requests, and of requests that were asked before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from rerank_plugins import Reranker
from rerank_plugins._machine import processor
from rerank_plugins._minilm import minilm_directory
from rerank_plugins.evaluation import BeirDataset, read_beir
from rerank_plugins.fusion import min_max
from rerank_plugins.tools import WEIGHT, bm25, embedding_similarity, rank_tools, tool_text

CUTS = (5, 8, 16)
FIRST = 50
N_TOOLS = 60
Scores = NDArray[np.float64]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", type=Path)
parser.add_argument("--model", default=None, help="a Hub id, a directory or a URL; the bundled model if not given")
parser.add_argument("--queries", type=int, default=100, help="how many requests are drawn; 0 takes all")
parser.add_argument("--json", action="store_true")


def main() -> None:
    """Measure, and print a table or JSON."""
    arguments = parser.parse_args()
    dataset = read_beir(arguments.data)
    drawn = sorted(dataset.qrels)
    if arguments.queries:
        drawn = sorted(random.Random(0).sample(drawn, min(arguments.queries, len(drawn))))
    tools = [(name, text.removeprefix(name).strip()) for name, text in dataset.documents.items()]
    embed = SentenceTransformer(str(minilm_directory("demo"))).encode
    reranker = Reranker(arguments.model).prepare()

    ways = ranked(dataset, drawn, tools, reranker, embedding_similarity(embed))
    recalls = {name: [recall(dataset, drawn, tools, scores, cut) for cut in CUTS] for name, scores in ways.items()}
    requests = [dataset.queries[query] for query in drawn]
    times = seconds(Reranker(**{**reranker.config, "cache": 20_000}), requests, tools[:N_TOOLS])
    if arguments.json:
        machine = {"processor": processor()[0], "cpus": os.cpu_count()}
        measured = {"model": repr(reranker), "requests": len(drawn), "tools": len(tools), "cuts": CUTS}
        print(json.dumps({**measured, "recall": recalls, "seconds": times, "machine": machine}, indent=2))
        return
    print(f"{len(drawn)} requests, {len(tools)} tools; {reranker!r}")
    print(f"{'':34}" + "".join(f"  recall@{cut:<3}" for cut in CUTS))
    for name, values in recalls.items():
        print(f"{name:34}" + "".join(f"  {value:10.3f}" for value in values))
    for name, value in times.items():
        print(f"{name:34}  {1000 * value:8.2f} ms")


def ranked(
    dataset: BeirDataset, drawn: Sequence[str], tools: Sequence[tuple[str, str]], reranker: Reranker, embedded: Any
) -> dict[str, list[Scores]]:
    """The scores of all tools for each request, by each way."""
    texts = [tool_text(tool) for tool in tools]
    requests = [dataset.queries[query] for query in drawn]
    words = [min_max(bm25(request, texts)) for request in requests]
    vectors = [min_max(embedded(request, texts)) for request in requests]
    logits = []
    for ranking in reranker.rank_many([(request, texts) for request in requests]):
        found = np.empty(len(texts))
        found[[item.index for item in ranking]] = [item.logit for item in ranking]
        logits.append(min_max(found))
    all_three = list(zip(words, vectors, logits, strict=True))
    return {
        "BM25": words,
        "bi-encoder": vectors,
        "cross-encoder": logits,
        f"bi-encoder's {FIRST}, reranked": [np.where(first(v), c, v - 1) for _, v, c in all_three],
        f"rank_tools (BM25 {WEIGHT})": [WEIGHT * w + (1 - WEIGHT) * c for w, _, c in all_three],
        "bi-encoder 0.5, cross-encoder": [0.5 * v + 0.5 * c for _, v, c in all_three],
        f"bi-encoder, BM25 {WEIGHT}": [WEIGHT * w + (1 - WEIGHT) * v for w, v, _ in all_three],
        "bi-encoder, BM25, cross-encoder": [0.3 * w + 0.35 * v + 0.35 * c for w, v, c in all_three],
    }


def first(scores: Scores) -> NDArray[np.bool_]:
    """Which are among the first `FIRST`."""
    marks = np.zeros(len(scores), dtype=np.bool_)
    marks[np.argsort(-scores, kind="stable")[:FIRST]] = True
    return marks


def recall(
    dataset: BeirDataset, drawn: Sequence[str], tools: Sequence[tuple[str, str]], scores: Sequence[Scores], cut: int
) -> float:
    """The mean share of a request's right tools that are among the first ones."""
    shares = []
    for query, values in zip(drawn, scores, strict=True):
        right = {name for name, label in dataset.qrels[query].items() if label > 0}
        best = {tools[i][0] for i in np.argsort(-values, kind="stable")[:cut]}
        shares.append(len(right & best) / len(right))
    return statistics.mean(shares)


def seconds(reranker: Reranker, requests: Sequence[str], tools: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Of one call: the first time that a request is asked, and again."""
    rank_tools(requests[-1], tools, reranker=reranker)
    times: dict[str, list[float]] = {f"{len(tools)} tools, a new request": [], "the same request again": []}
    for request in requests[:10]:
        for name in times:
            start = time.perf_counter()
            rank_tools(request, tools, 8, reranker)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
