"""Measures a model on test sets and writes the table of its card.

    python scripts/evaluate_bundled.py DATA/eval --model rerank_plugins/models/minilm-l6 --trunk --json
    figures.json

The first stage is the candidate list of each set: its own or BM25. The trunk as a bi-encoder re-sorts the
same candidates.
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


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of test sets in BEIR layout")
    parser.add_argument("--model", help="directory or Hub id; the bundled model if not given")
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--sets", nargs="*", default=list(CARD))
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=None)
    parser.add_argument("--trunk", action="store_true", help="also measure all-MiniLM-L6-v2 as a bi-encoder")
    parser.add_argument("--json", type=Path, help="write all figures there, set by set")
    arguments = parser.parse_args()

    figures: dict[str, dict[str, dict[str, float]]] = {}
    if arguments.json and arguments.json.is_file():
        figures = json.loads(arguments.json.read_text())
    reranker = Reranker(model=arguments.model, backend=arguments.backend, max_length=arguments.max_length)
    print("| set | measure | first stage | trunk as a bi-encoder | reranked |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for name in arguments.sets:
        dataset = read_beir(arguments.data / name)
        found = figures.setdefault(name, {})
        found["first stage"] = measure_run(dataset, first_stage_run(dataset, arguments.top_k), MEASURES)
        if arguments.trunk:
            found["trunk"] = measure_run(dataset, bi_encoder_run(dataset, arguments.top_k), MEASURES)
        began = time.perf_counter()
        run = rerank_run(reranker, dataset, arguments.top_k)
        seconds = time.perf_counter() - began
        found["reranked"] = measure_run(dataset, run, MEASURES)
        found["reranked"]["documents_per_s"] = sum(map(len, run.values())) / seconds
        for measure in MEASURES:
            cells = [
                f"{found[row][measure]:.3f}" if row in found else "" for row in ("first stage", "trunk", "reranked")
            ]
            print(f"| {name} | {measure} | {' | '.join(cells)} |", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
