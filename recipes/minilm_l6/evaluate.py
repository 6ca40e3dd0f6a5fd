"""Measures models on test sets: nDCG@10 over the sets' own candidates, by ir-measures.

    python recipes/minilm_l6/evaluate.py DATA/eval OUT/figures --model student=OUT/onnx --model previous= --bi-encoder

Writes a JSON file a set, with the figures of each model, so that a run can be stopped and taken up again: what is in
OUT is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from rerank_plugins import Reranker
from rerank_plugins.evaluation import BeirDataset, Run, first_stage_run, measure_run, read_beir, rerank_run

SETS = {
    "trec-dl20": None,
    "wikiqa-test": None,
    "metatool": None,
    "selqa-test": None,
    "trecqa-test": "candidates-bm25.tsv",
    "clapnq-dev": None,
    "stackfaq": None,
    "mtrag-un": None,
    "npl": None,
    "medline": None,
    "cisi": None,
    "time": None,
    "cranfield": None,
}
"""Test sets, and the file of candidates where the folder has several."""
MEASURES = ("nDCG@10", "RR@10")


def bi_encoder_run(dataset: BeirDataset, top_k: int) -> Run:
    """The candidates by the cosine of all-MiniLM-L6-v2."""
    from pool import Encoder

    encode = Encoder(256)
    names = sorted({name for found in dataset.candidates.values() for name in found[:top_k]})
    vectors = dict(zip(names, encode([dataset.documents[name] for name in names]), strict=True))
    asked = dict(zip(dataset.candidates, encode([dataset.queries[q] for q in dataset.candidates]), strict=True))
    return {
        query: {name: float(vectors[name] @ asked[query]) for name in found[:top_k]}
        for query, found in dataset.candidates.items()
    }


def main() -> None:
    """Measures set by set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of test sets in BEIR layout")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=DIRECTORY", help="none is the bundled one"
    )
    parser.add_argument("--bi-encoder", action="store_true", help="also all-MiniLM-L6-v2")
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--queries", type=int, help="so many of each set, drawn at random; all if not given")
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    models = {}
    for item in arguments.model:
        name, _, folder = item.partition("=")
        models[name] = Reranker(folder or None, backend=arguments.backend, threads=arguments.threads)
    for name in arguments.sets:
        dataset = read_beir(arguments.data / name, SETS.get(name))
        usable = [query for query in dataset.usable if query in dataset.candidates]
        if arguments.queries and arguments.queries < len(usable):
            usable = random.Random(0).sample(usable, arguments.queries)
        dataset = replace(
            dataset,
            queries={query: dataset.queries[query] for query in usable},
            candidates={query: dataset.candidates[query] for query in usable},
        )
        path = arguments.out / f"{name}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        extent = [len(usable), arguments.top_k]
        if found.get("queries, candidates") != extent:
            found = {"queries, candidates": extent}
        found["first stage"] = measure_run(dataset, first_stage_run(dataset, arguments.top_k), MEASURES)
        if arguments.bi_encoder and "bi-encoder" not in found:
            found["bi-encoder"] = measure_run(dataset, bi_encoder_run(dataset, arguments.top_k), MEASURES)
        for model, reranker in models.items():
            if model in found:
                continue
            found[model] = measure_run(dataset, rerank_run(reranker, dataset, arguments.top_k), MEASURES)
            path.write_text(json.dumps(found, indent=2) + "\n")
            print(name, model, {measure: round(float(value), 4) for measure, value in found[model].items()}, flush=True)
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
