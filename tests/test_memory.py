"""What a process holds: little for many texts, and little for ever other shapes of batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tiny
from harness import _engines

from rerank_plugins.backends import openvino as engines
from rerank_plugins.conversion import convert

pytestmark = pytest.mark.skipif(_engines.peak_bytes() is None, reason="this system does not tell a process's memory")


def growth(first: str, then: str) -> int:
    """By how many bytes the most memory of a process grows when, after one piece of code, it runs another."""
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    peak = f"import sys\nsys.path.insert(0, {str(benchmarks)!r})\nfrom harness._engines import peak_bytes\n"
    code = f"{peak}{first}\nbefore = peak_bytes()\n{then}\nprint(peak_bytes() - before)\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout)


def test_the_tokens_of_many_texts_take_little_memory() -> None:
    """4,000 texts of 100 tokens: 3 MB of ids, and over 40 MB of what the tokenizer gives, were it kept."""
    first = (
        "from rerank_plugins import Reranker\n"
        "encoder = Reranker(backend='onnx').prepare()._backend.encoder\n"
        "pairs = [('query', f'{i} ' + 'word ' * 95) for i in range(4000)]\n"
        "encoder.encode(pairs[:256])\n"
    )
    assert growth(first, "encoder.encode(pairs)") < 20e6


def test_another_width_takes_no_more_memory_on_onnx_runtime() -> None:
    """A plan of memory for each shape would take as much as the first batch does: 60 MB."""
    first = (
        "from rerank_plugins import Reranker\n"
        "reranker = Reranker(backend='onnx')\n"
        "score = lambda words: reranker.logits('query', ['word ' * words] * 2)\n"
        "score(500)\n"
    )
    assert growth(first, "score(480), score(460)") < 20e6


def test_ever_other_shapes_take_less_memory_on_openvino_than_it_takes_by_itself(tmp_path: Path) -> None:
    convert(tiny("bert"), tmp_path)

    def grown(kernels: int) -> int:
        first = (
            "import numpy as np\n"
            "import rerank_plugins.backends.openvino as engines\n"
            "from rerank_plugins import Reranker\n"
            "from rerank_plugins.backends.base import Batch\n"
            f"engines.SHAPE_CACHE = {kernels}\n"
            f"backend = Reranker({str(tmp_path)!r}, backend='openvino', precision='fp32').prepare()._backend\n"
            "ones = lambda shape: np.ones(shape, np.int64)\n"
            "run = lambda *shape: backend.forward(Batch(*[ones(shape)] * 3))\n"
            "shapes = [(rows, width) for rows in range(20, 0, -1) for width in range(120, 0, -8)]\n"
            "[run(*shape) for shape in shapes[:100]]\n"
        )
        return growth(first, "[run(*shape) for shape in shapes[100:]]")

    assert grown(engines.SHAPE_CACHE) < 0.7 * grown(5000)
