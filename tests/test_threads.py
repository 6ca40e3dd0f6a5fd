"""``threads=`` reaches every engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import QUERY, TEXTS, tiny

from rerank_plugins import Reranker

COUNT = """
import json, os
from rerank_plugins import Reranker

def started(engine, threads):
    before = len(os.listdir("/proc/self/task"))
    reranker = Reranker(backend=engine, threads=threads)
    reranker.rank("how do I undo a commit", ["git revert undoes a commit", "git add stages files"])
    kept.append(reranker)
    return len(os.listdir("/proc/self/task")) - before

kept = []
print(json.dumps([started(engine, threads) for engine in ("onnx", "openvino") for threads in (1, 3)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_onnx_runtime_and_openvino_start_as_many_threads_as_asked_for() -> None:
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "2"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", COUNT], env=env, cwd=root, capture_output=True, text=True, check=True)
    onnx_1, onnx_3, _, openvino_3 = json.loads(done.stdout)
    # One of them is the caller's own.
    assert (onnx_1, onnx_3) == (0, 2)
    # OpenVINO has threads of its own beside those that compute, and no more of these than there are cores.
    assert openvino_3 >= min(3, len(os.sched_getaffinity(0))) - 1


def test_openvino_is_told_the_number_of_threads() -> None:
    openvino = pytest.importorskip("openvino")
    given: list[object] = []
    real = openvino.Core.compile_model

    def noted(core: object, model: object, device: str, settings: dict[str, object]) -> object:
        given.append(settings.get("INFERENCE_NUM_THREADS"))
        compiled = real(core, model, device, settings)
        given.append(compiled.get_property("INFERENCE_NUM_THREADS"))
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino.Core, "compile_model", noted)
        Reranker(backend="openvino", threads=1).prepare()
    assert given == [1, 1]


@pytest.mark.parametrize("threads", [1, 3])
def test_torch_computes_with_as_many_threads_as_asked_for_and_leaves_the_callers_alone(threads: int) -> None:
    import torch

    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        reranker = Reranker(tiny("bert"), backend="torch", threads=threads).prepare()
        model = reranker._loaded().model  # type: ignore[attr-defined]
        hook = model.register_forward_pre_hook(lambda *given: seen.append(torch.get_num_threads()))
        reranker.rank(QUERY, TEXTS)
        hook.remove()
        assert set(seen) == {threads}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_other_numbers_of_threads_give_the_same_scores() -> None:
    scores = [Reranker(tiny("bert"), backend="torch", threads=n).logits(QUERY, TEXTS) for n in (None, 1, 2)]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-4)
