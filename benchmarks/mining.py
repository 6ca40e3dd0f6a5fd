"""Hard negatives: `rerank_plugins.training.mine` and sentence-transformers' `mine_hard_negatives`, in one run.

    python benchmarks/mining.py DATA/train/nq-open-oracle [--model CROSS-ENCODER] [--queries 20] [--rounds 3]

Both take the same cross-encoder in torch, the bundled model's weights where none is named; all-MiniLM-L6-v2 as the
bi-encoder; the same questions and passages; up to four negatives each; and leave out what the cross-encoder gives a
probability of a half. The third row is `mine` as it comes, with the bundled graph. Figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from rerank_plugins import Reranker
from rerank_plugins._machine import processor
from rerank_plugins._minilm import minilm_directory
from rerank_plugins.training import mine
from rerank_plugins.training._bundled import bundled_checkpoint
from rerank_plugins.training._data import answered, read_pairs

NEGATIVES = 4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", type=Path, help="folder with pairs.jsonl.gz")
parser.add_argument(
    "--model", default=None, help="a cross-encoder checkpoint; the bundled model's weights if not given"
)
parser.add_argument("--queries", type=int, default=20)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--json", action="store_true")


def main() -> None:
    """Measure, and print a table or JSON."""
    arguments = parser.parse_args()
    questions = answered(read_pairs(arguments.data))
    questions = random.Random(0).sample(questions, min(arguments.queries, len(questions)))
    passages = list(dict.fromkeys(text for _, labels in questions for text in labels))
    scored = {"pairs": 0}

    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        # Both look for negatives among all passages: of the judgements, only the relevant ones are given.
        relevant = [
            (number, query, text)
            for number, (query, labels) in enumerate(questions)
            for text, label in labels.items()
            if label > 0
        ]
        place = {text: number for number, text in enumerate(passages)}
        for name, texts in (("queries", [query for query, _ in questions]), ("corpus", passages)):
            lines = (json.dumps({"_id": str(number), "text": text}) + "\n" for number, text in enumerate(texts))
            (work / f"{name}.jsonl").write_text("".join(lines))
        judged = "".join(f"{number}\t{place[text]}\t1\n" for number, _, text in relevant)
        (work / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
        cross_encoder: Any = CrossEncoder(arguments.model or str(bundled_checkpoint()), device="cpu")
        cross_encoder.save_pretrained(str(work / "model"), create_model_card=False)
        predict = cross_encoder.predict

        def counted(pairs: Any, *rest: Any, **named: Any) -> Any:
            scored["pairs"] += len(pairs)
            return predict(pairs, *rest, **named)

        cross_encoder.predict = counted
        encoder = SentenceTransformer(str(minilm_directory("train")))
        columns = {"query": [query for _, query, _ in relevant], "positive": [text for _, _, text in relevant]}

        def theirs() -> tuple[int, int]:
            scored["pairs"] = 0
            found = mine_hard_negatives(
                Dataset.from_dict(columns),
                encoder,
                corpus=passages,
                cross_encoder=cross_encoder,
                max_score=0.5,
                num_negatives=NEGATIVES,
                verbose=False,
            )
            return len(found), scored["pairs"]

        def ours(filter: Reranker) -> Callable[[], tuple[int, int]]:
            def run() -> tuple[int, int]:
                found = mine(work, work / "mined.jsonl", filter=filter, negatives=NEGATIVES, margin=-2, overwrite=True)
                return found.triples, found.scored

            return run

        contenders: dict[str, Callable[[], tuple[int, int]]] = {
            "mine_hard_negatives": theirs,
            "mine, same cross-encoder in torch": ours(Reranker(str(work / "model"), backend="torch")),
            "mine as it comes": ours(Reranker()),
        }
        found = {name: run() for name, run in contenders.items()}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slowest = medians["mine_hard_negatives"]
    if arguments.json:
        report = {
            name: {"seconds": medians[name], "times_as_fast": slowest / medians[name], "triples": n, "scored": pairs}
            for name, (n, pairs) in found.items()
        }
        print(json.dumps({**report, "machine": {"processor": processor()[0], "cpus": os.cpu_count()}}, indent=2))
        return
    for name, (triples, pairs) in found.items():
        speed = f"{medians[name]:7.1f} s {slowest / medians[name]:5.1f} x"
        print(f"{name:34} {speed} {triples:6} triples {pairs:7} pairs scored")


if __name__ == "__main__":
    main()
