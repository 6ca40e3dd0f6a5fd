"""Batches that are split to save padding against as few as fit, in one run.

    python benchmarks/batching.py [--candidates 10] [--calls 8] [--rounds 5] [--backends onnx,openvino,torch] [--json]

The texts are paragraphs of CPython's manual, short and long as they come, the model is all-MiniLM-L6-v2 under a seeded
head unless `--model` names another, in fp32. `--costs` are what a batch is taken to cost besides its tokens, in tokens;
*few* takes it for a full batch more, and the engine's own cost stands beside its name. All take turns on the same calls
in every round; figures are medians, of a call and of the ratios to *few*.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from harness._model import prepare_model
from harness._work import QUESTIONS, many_texts

from rerank_plugins import Reranker
from rerank_plugins._machine import processor
from rerank_plugins.backends import LocalBackend

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--candidates", type=int, default=10)
parser.add_argument("--calls", type=int, default=8)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--model", default=None)
parser.add_argument("--backends", default="onnx,openvino,torch")
parser.add_argument("--costs", default="16,32,64,128")
parser.add_argument("--json", action="store_true")
QUERY = QUESTIONS[0]


def main() -> None:
    """Measure, and print a table or JSON."""
    arguments = parser.parse_args()
    texts = many_texts(arguments.calls * arguments.candidates)
    calls = [[(QUERY, text) for text in texts[start :: arguments.calls]] for start in range(arguments.calls)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as work:
        model = prepare_model(arguments.model, Path(work), int8=False, graph=True, progress=lambda *_: None)
        for name in arguments.backends.split(","):
            with Reranker(str(model.path), backend=name, precision="fp32") as reranker:
                backend = reranker.prepare()._backend
                assert isinstance(backend, LocalBackend)
                found[f"{name} ({backend.batch_cost})"] = measure(backend, calls, arguments)
    report = {
        "machine": processor()[0],
        "cpus": os.cpu_count(),
        "candidates": arguments.candidates,
        "engines": found,
    }
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    for name, rows in found.items():
        for cost, row in rows.items():
            print(f"{name:16} {cost:>5}  {1000 * row['seconds']:8.1f} ms a call  {row['times_as_fast']:.2f} x")


def measure(
    backend: LocalBackend, calls: list[list[tuple[str, str]]], arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Seconds of a call for each cost, and how many times as fast as with few batches."""
    variants = {}
    for name in ("few", *arguments.costs.split(",")):
        variants[name] = backend.configured(max_length=None, instruction=None)
        variants[name].batch_cost = backend.token_budget if name == "few" else int(name)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.rounds + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            for call in calls:
                variant.logits(call)
            # The first round warms up.
            if number:
                seconds[name].append((time.perf_counter() - start) / len(calls))
    return {
        name: {
            "seconds": statistics.median(values),
            "times_as_fast": statistics.median(few / own for few, own in zip(seconds["few"], values, strict=True)),
        }
        for name, values in seconds.items()
    }


if __name__ == "__main__":
    main()
