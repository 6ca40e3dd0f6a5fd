"""The wheel, built from this tree and installed where nothing but the declared dependencies can be imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Import path of an environment that has the wheel and the closure of its own requirements, and no more."""
    target, links = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("links")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
        capture_output=True,
    )
    for name in _closure(wheel):
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (links / top).exists():
                (links / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    return [str(target), str(links)]


def _closure(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    todo = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)]
    found: set[str] = set()
    while todo:
        requirement = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name not in found:
            found.add(requirement.name)
            todo += [Requirement(line) for line in distribution(requirement.name).requires or []]
    return found


def run(base: list[str], code: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PYTHONPATH": os.pathsep.join(base),
        "PATH": os.environ["PATH"],
        "HOME": base[0],
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, env=environment, cwd=base[0], capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_the_package_and_the_model_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"rerank_plugins/py.typed", "rerank_plugins/models/minilm-l6/model.onnx"} <= set(names)
    assert "rerank_plugins/models/minilm-l6/README.md" in names
    assert {name.split("/")[0] for name in names} == {"rerank_plugins", names[-1].split("/")[0]}
    assert wheel.stat().st_size < 25 * 2**20


def test_the_base_install_has_no_torch_and_no_framework(base: list[str]) -> None:
    done = run(base, "import torch")
    assert "No module named 'torch'" in done.stderr


@pytest.mark.bundled
def test_the_base_install_reranks_with_the_bundled_model(base: list[str]) -> None:
    code = """
import json
from rerank_plugins import Reranker
reranker = Reranker()
ranking = reranker.rank("what do pandas eat?", ["Paris is the capital of France.", "Giant pandas eat bamboo.", ""])
print(json.dumps([reranker.backend_name, [item.index for item in ranking], ranking[0].score]))
"""
    done = run(base, code)
    assert done.stderr == ""
    backend, order, score = json.loads(done.stdout)
    assert backend == "onnx"
    assert order == [1, 0, 2]
    assert score > 0.5


@pytest.mark.parametrize(
    ("statement", "extra"),
    [
        ("import rerank_plugins.langchain", "langchain"),
        ("import rerank_plugins.llama_index", "llama-index"),
        ("from rerank_plugins import Reranker; Reranker(backend='openvino').prepare()", "openvino"),
        ("from rerank_plugins.conversion import convert; convert('x', 'out')", "train"),
        ("from rerank_plugins.cli import main; main()", "cli"),
    ],
)
def test_a_missing_extra_is_explained(base: list[str], statement: str, extra: str) -> None:
    done = run(base, statement)
    assert done.returncode != 0
    assert f'pip install "rerank-plugins[{extra}]"' in done.stderr


def test_a_checkpoint_without_torch_is_explained(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForSequenceClassification"]}')
    header = json.dumps({"classifier.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    done = run(base, f"from rerank_plugins import Reranker; Reranker({str(tmp_path)!r}).prepare()")
    assert 'pip install "rerank-plugins[torch]"' in done.stderr
