"""What a process holds that reranks texts of all lengths for a long time.

    python benchmarks/memory.py [--calls 120] [--engines onnx:fp32,openvino:fp32,openvino:int8] [--json]

Every call is a few texts, 5 to 40, cut from CPython's manual at random, of up to 30 to 400 words, with the bundled
model: ever other shapes of batches, for each of which OpenVINO and its oneDNN keep kernels. Each engine is a process of
its own; *as it comes* is OpenVINO with the number of kernels that it keeps of its own accord.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rerank_plugins._machine import processor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--calls", type=int, default=120)
parser.add_argument("--longest", type=int, default=400, help="words of the longest texts")
parser.add_argument("--engines", default="onnx:fp32,openvino:fp32,openvino:int8")
parser.add_argument("--json", action="store_true")
AS_IT_COMES = 5000
CODE = """
import json, random, sys, time
import rerank_plugins.backends.openvino as engines
from rerank_plugins import Reranker
from harness._engines import peak_bytes
from harness._work import many_texts

backend, precision, (calls, kernels, most) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
if kernels:
    engines.SHAPE_CACHE = kernels
words = " ".join(many_texts(300)).split()
chance = random.Random(0)
reranker = Reranker(backend=backend, precision=precision)
loaded = reranker.prepare()._backend
shapes, forward = set(), loaded.forward
loaded.forward = lambda batch: shapes.add(batch.input_ids.shape) or forward(batch)
start, found = time.perf_counter(), []
for number in range(1, calls + 1):
    longest = chance.choice([n for n in (30, 60, 120, 240, 400) if n <= most])
    begins = [chance.randrange(len(words) - longest) for _ in range(chance.choice([5, 10, 20, 40]))]
    reranker.logits("how does it work", [" ".join(words[at : at + chance.randint(5, longest)]) for at in begins])
    if number % max(1, calls // 4) == 0:
        seconds = time.perf_counter() - start
        found.append({"calls": number, "shapes": len(shapes), "peak_bytes": peak_bytes(), "seconds": seconds})
print(json.dumps(found))
"""


def main() -> None:
    """Measure, and print a table or JSON."""
    arguments = parser.parse_args()
    found = {}
    # A script that is given as text does not see the folder that this one is in.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    for engine in arguments.engines.split(","):
        name, precision = engine.split(":")
        for kernels in (0, AS_IT_COMES) if name == "openvino" else (0,):
            numbers = (arguments.calls, kernels, arguments.longest)
            command = [sys.executable, "-c", CODE, name, precision, *map(str, numbers)]
            run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[f"{name} {precision}{', as it comes' if kernels else ''}"] = json.loads(run.stdout)
    if arguments.json:
        machine = {"processor": processor()[0], "cpus": os.cpu_count()}
        print(json.dumps({"machine": machine, "engines": found}, indent=1))
        return
    for name, rows in found.items():
        for row in rows:
            print(
                f"{name:30} {row['calls']:>5} calls {row['shapes']:>5} shapes "
                f"{row['peak_bytes'] / 1e6:>6.0f} MB {row['seconds']:>6.1f} s"
            )


if __name__ == "__main__":
    main()
