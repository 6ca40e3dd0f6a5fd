"""Measures models on the held-out queries of the bundled model's training data.

    python scripts/evaluate_held_out.py DATA OUT --model rerank_plugins/models/minilm-l6 --backend openvino

They are what the recipe chooses by: nDCG@10 of lists with hard negatives, the mean over kinds, and the expected
calibration error of the judged pairs. The lists are drawn and mined first, about eight minutes on two cores, and kept
in OUT for the next call.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from rerank_plugins import Reranker
from rerank_plugins.calibration import expected_calibration_error
from rerank_plugins.training._bundled import prepare
from rerank_plugins.training._data import Group
from rerank_plugins.training._loop import ndcg_by_kind


def measure(reranker: Reranker, groups: list[Group]) -> dict[str, float]:
    """nDCG@10 of each kind, their mean, and the calibration error."""
    scores = [reranker.logits(group.query, list(group.passages)) for group in groups]
    mean, by_kind = ndcg_by_kind(groups, scores)
    judged = [(found, group.gains) for found, group in zip(scores, groups, strict=True) if group.judged]
    logits, gains = (np.concatenate(part) for part in zip(*judged, strict=True))
    return {**by_kind, "mean": mean, "calibration error": expected_calibration_error(logits, gains >= 0.5)}


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/, corpus/ and eval/")
    parser.add_argument("out", type=Path, help="where the lists are kept")
    parser.add_argument("--model", action="append", help="directory or Hub id, may be repeated; the bundled if none")
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--max-length", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0, help="which draw of the lists")
    parser.add_argument("--json", type=Path, help="write all figures there, model by model")
    arguments = parser.parse_args()

    _, groups = prepare(arguments.data, arguments.out, seed=arguments.seed)
    names = arguments.model or [None]
    found = {}
    for name in names:
        with Reranker(
            model=name,
            backend=arguments.backend,
            precision=arguments.precision,
            max_length=arguments.max_length,
        ) as reranker:
            found[name or "bundled"] = measure(reranker, groups)
    print(f"| {len(groups)} lists | {' | '.join(found)} |")
    print(f"| --- |{' --- |' * len(found)}")
    for row in next(iter(found.values())):
        print(f"| {row} | {' | '.join(f'{figures[row]:.4f}' for figures in found.values())} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
