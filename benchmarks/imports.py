"""What `import rerank_plugins` costs a fresh process, and what it loads.

    python benchmarks/imports.py [--rounds 15] [--json]

Every round starts an interpreter, which times the one statement itself. The figure is the median; the first round,
which may compile and read from disk, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from rerank_plugins._machine import processor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--json", action="store_true")
HEAVY = ("torch", "transformers", "sentence_transformers", "onnxruntime", "openvino", "langchain_core", "llama_index")
CODE = f"""
import json, sys, time
start = time.perf_counter()
import rerank_plugins
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in {HEAVY} if name in sys.modules]]))
"""


def main() -> None:
    """Measure, and print a line or JSON."""
    arguments = parser.parse_args()
    rounds = [
        json.loads(subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True).stdout)
        for _ in range(arguments.rounds + 1)
    ][1:]
    seconds = statistics.median(found for found, _ in rounds)
    loaded = sorted({name for _, names in rounds for name in names})
    if arguments.json:
        machine = {"processor": processor()[0], "cpus": os.cpu_count()}
        print(json.dumps({"seconds": seconds, "loaded": loaded, "machine": machine}, indent=2))
        return
    print(f"import rerank_plugins: {1000 * seconds:.0f} ms")
    print(f"of {', '.join(HEAVY)} it loads {', '.join(loaded) or 'none'}")


if __name__ == "__main__":
    main()
