"""Measures a model on test sets and writes the table of its card.

    python scripts/evaluate_bundled.py DATA/eval --model rerank_plugins/models/minilm-l6 --trunk --json
    figures.json

The first stage is the candidate list of each set: its own or BM25. The trunk as a bi-encoder re-sorts the
same candidates; "fused" is the reciprocal rank fusion of these two.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from rerank_plugins import Reranker
from rerank_plugins.evaluation import BeirDataset, Run, first_stage_run, measure_run, read_beir, rerank_run

CARD = ("trec-dl20", "clapnq-dev", "selqa-test", "cranfield")
MEASURES = ("nDCG@10", "AP", "RR@10")


def bi_encoder_run(dataset: BeirDataset, top_k: int) -> Run:
    """The candidates sorted by the cosine of the trunk's own sentence vectors."""
    from rerank_plugins._minilm import minilm_directory
    from rerank_plugins.training._mining import BiEncoder

    encoder = BiEncoder(minilm_directory("train"), max_length=256)
    found = sorted({d for ranked in dataset.candidates.values() for d in ranked[:top_k]})
    place = {document: row for row, document in enumerate(found)}
    documents = encoder.encode([dataset.documents[d] for d in found])
    queries = dict(zip(dataset.queries, encoder.encode(list(dataset.queries.values())), strict=True))
    run: Run = {}
    for query, ranked in dataset.candidates.items():
        chosen = ranked[:top_k]
        order = np.argsort(-(documents[[place[d] for d in chosen]] @ queries[query]), kind="stable")
        run[query] = {chosen[row]: -float(rank) for rank, row in enumerate(order)}
    return run


def fused(*runs: Run) -> Run:
    """Reciprocal rank fusion with k = 60 (Cormack, Clarke and Buettcher, SIGIR 2009)."""
    result: Run = {}
    for query in runs[0]:
        scores: dict[str, float] = {}
        for run in runs:
            for rank, document in enumerate(sorted(run[query], key=lambda d, of=run[query]: -of[d]), 1):
                scores[document] = scores.get(document, 0.0) + 1 / (60 + rank)
        result[query] = scores
    return result


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of test sets in BEIR layout")
    parser.add_argument("--model", help="directory or Hub id; the bundled model if not given")
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--sets", nargs="*", default=list(CARD))
    parser.add_argument("--candidates", help="name of the candidates file in each folder")
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=None)
    parser.add_argument("--trunk", action="store_true", help="also measure all-MiniLM-L6-v2 as a bi-encoder")
    parser.add_argument("--json", type=Path, help="write all figures there, set by set")
    arguments = parser.parse_args()

    figures: dict[str, dict[str, dict[str, float]]] = {}
    if arguments.json and arguments.json.is_file():
        figures = json.loads(arguments.json.read_text())
    reranker = Reranker(
        model=arguments.model,
        backend=arguments.backend,
        precision=arguments.precision,
        max_length=arguments.max_length,
    )
    print("| set | measure | first stage | trunk as a bi-encoder | fused | reranked |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in arguments.sets:
        dataset = read_beir(arguments.data / name, arguments.candidates)
        found = figures.setdefault(name, {})
        first = first_stage_run(dataset, arguments.top_k)
        found["first stage"] = measure_run(dataset, first, MEASURES)
        if arguments.trunk:
            trunk = bi_encoder_run(dataset, arguments.top_k)
            found["trunk"] = measure_run(dataset, trunk, MEASURES)
            found["fused"] = measure_run(dataset, fused(first, trunk), MEASURES)
        began = time.perf_counter()
        run = rerank_run(reranker, dataset, arguments.top_k)
        seconds = time.perf_counter() - began
        found["reranked"] = measure_run(dataset, run, MEASURES)
        found["reranked"]["documents_per_s"] = sum(map(len, run.values())) / seconds
        for measure in MEASURES:
            rows = ("first stage", "trunk", "fused", "reranked")
            cells = [f"{found[row][measure]:.3f}" if row in found else "" for row in rows]
            print(f"| {name} | {measure} | {' | '.join(cells)} |", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
