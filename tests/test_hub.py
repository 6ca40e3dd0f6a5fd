"""Hub ids through the real huggingface_hub, from a hub on loopback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import QUERY, TEXTS, tiny
from hub import Hub
from loader import Loader
from test_backends import converted

from rerank_plugins import Reranker

SCRIPT = """
import json, sys
from rerank_plugins import Reranker
from rerank_plugins.errors import RerankError
model, query, texts, keywords = json.loads(sys.argv[1])
try:
    reranker = Reranker(model, **keywords).prepare()
    print(json.dumps([reranker.backend_name, reranker.logits(query, texts).tolist()]))
except RerankError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    graph = tmp_path / "graph"
    shutil.copytree(tiny("bert"), graph)
    (graph / "onnx").mkdir()
    shutil.copy(Path(converted("bert")) / "model.onnx", graph / "onnx" / "model.onnx")
    (graph / "onnx" / "model_qint8_avx512.onnx").write_bytes(b"not needed")
    (graph / "pytorch_model.bin").write_bytes(b"not needed")
    plain = tmp_path / "plain"
    shutil.copytree(tiny("roberta"), plain)
    (plain / "pytorch_model.bin").write_bytes(b"not needed")
    (plain / "tf_model.h5").write_bytes(b"not needed")
    repositories = {
        "test/graph": {"main": graph},
        "test/plain": {"main": plain, "v2": Path(tiny("electra"))},
    }
    with Hub(repositories) as running:
        yield running


def ask(home: Path, endpoint: str, model: str, offline: bool = False, **keywords: object) -> tuple[list[object], str]:
    import json

    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([model, QUERY, TEXTS, keywords])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


def test_a_graph_is_downloaded_without_what_is_not_needed_and_then_works_offline(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (backend, scores), stderr = ask(home, hub.url, "test/graph", precision="fp32")
    assert backend == "openvino"
    assert scores == pytest.approx(Reranker(tiny("bert")).logits(QUERY, TEXTS).tolist(), abs=1e-4)
    assert hub.downloaded() == {"config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model.onnx"}
    assert "it/s" not in stderr
    before = len(hub.requests)
    assert ask(home, hub.url, "test/graph", offline=True, precision="fp32")[0] == [backend, scores]
    assert len(hub.requests) == before
    # The Hub cannot be reached, and nobody has said "offline".
    assert ask(home, "http://127.0.0.1:9", "test/graph", precision="fp32")[0] == [backend, scores]


def test_a_checkpoint_is_downloaded_as_safetensors_alone(hub: Hub, tmp_path: Path) -> None:
    (backend, scores), _ = ask(tmp_path / "home", hub.url, "test/plain")
    assert backend == "torch"
    assert scores == pytest.approx(Reranker(tiny("roberta")).logits(QUERY, TEXTS).tolist(), abs=1e-4)
    assert "model.safetensors" in hub.downloaded()
    assert not {"pytorch_model.bin", "tf_model.h5"} & hub.downloaded()


def test_revision_chooses_the_commit(hub: Hub, tmp_path: Path) -> None:
    (_, scores), _ = ask(tmp_path / "home", hub.url, "test/plain", revision="v2")
    assert scores == pytest.approx(Reranker(tiny("electra")).logits(QUERY, TEXTS).tolist(), abs=1e-4)
    answer, _ = ask(tmp_path / "home", hub.url, "test/plain", revision="v9")
    assert answer[0] == "ModelLoadError"
    assert "no revision 'v9'" in str(answer[1])


def test_offline_and_not_cached_says_how_to_get_it(hub: Hub, tmp_path: Path) -> None:
    answer, _ = ask(tmp_path / "home", hub.url, "test/plain", offline=True, revision="v2")
    assert answer[0] == "ModelLoadError"
    assert "hf download test/plain --revision v2" in str(answer[1])
    assert hub.requests == []


def test_offline_with_half_a_model_says_how_to_get_the_rest(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    ask(home, hub.url, "test/graph")
    answer, _ = ask(home, hub.url, "test/graph", offline=True, backend="torch")
    assert answer[0] == "ModelLoadError"
    assert "hf download test/graph" in str(answer[1])


def test_an_unknown_repository_is_named(hub: Hub, tmp_path: Path) -> None:
    answer, _ = ask(tmp_path / "home", hub.url, "test/nowhere")
    assert answer[0] == "ModelLoadError"
    assert "'test/nowhere' is neither a local directory nor a repository" in str(answer[1])


# -- what goes wrong on the way -----------------------------------------------------------------------------------


class FaultyHub(Hub):
    """A hub that answers as `fault` says instead of what was asked for."""

    fault: str | None = None

    def _find(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        if self.fault is None or (self.fault == "breaks off" and not path.endswith(".safetensors")):
            return super()._find(path)
        if self.fault == "a login page":
            return 200, b"<html>Please log in</html>", {"Content-Type": "text/html"}
        if self.fault == "breaks off":
            status, content, headers = super()._find(path)
            # Half of what was announced.
            return (
                status,
                content[: len(content) // 2],
                {**headers, "Content-Length": str(len(content)), "Connection": "close"},
            )
        return int(self.fault), b"{}", {}


@pytest.fixture(scope="module")
def faulty() -> Iterator[FaultyHub]:
    with FaultyHub({"test/plain": {"main": Path(tiny("electra"))}}) as running:
        yield running


FAULTS = {
    "401": "does not accept the access token",
    "403": "access is refused",
    "407": "the proxy wants a login",
    "429": "too many requests",
    "503": "status 503",
    "a login page": "what answered is not the Hub",
    "breaks off": "the connection to the Hub broke off",
}


def test_errors_of_the_hub_are_told_and_a_copy_in_the_cache_is_used(faulty: FaultyHub, tmp_path: Path) -> None:
    loader = Loader(tmp_path / "home", faulty.url)
    loader.environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}
    try:
        for fault, message in FAULTS.items():
            faulty.fault = fault
            found = loader.ask("test/plain", QUERY, TEXTS[:1], backend="torch")
            assert found["error"] == "ModelLoadError", (fault, found)
            assert message in found["message"], (fault, found)
            assert "'test/plain'" in found["message"]
        faulty.fault = None
        right = loader.ask("test/plain", QUERY, TEXTS[:1], backend="torch", precision="fp32")
        for threads, fault in enumerate(FAULTS, start=2):
            faulty.fault = fault
            # Another number of threads is another load.
            found = loader.ask("test/plain", QUERY, TEXTS[:1], backend="torch", precision="fp32", threads=threads)
            assert found.get("logits") == pytest.approx(right["logits"], abs=1e-6), (fault, found)
    finally:
        loader.close()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HTTPS_PROXY": "http://127.0.0.1:{port}"}, "the proxy refuses"),
        ({"HTTPS_PROXY": "socks5://127.0.0.1:{port}"}, "socksio|cannot be reached"),
        ({"HF_HOME": "{file}/below"}, "the Hub's cache cannot be written"),
    ],
)
def test_faults_of_this_machine_are_told(
    environment: dict[str, str], message: str, faulty: FaultyHub, tmp_path: Path
) -> None:
    faulty.fault = None
    file = tmp_path / "file"
    file.touch()
    proxied = "HTTPS_PROXY" in environment
    loader = Loader(tmp_path / "home", "https://hub.invalid" if proxied else faulty.url)
    port = faulty.url.rpartition(":")[2]
    loader.environment |= {name: value.format(port=port, file=file) for name, value in environment.items()}
    loader.environment.pop("NO_PROXY", None)
    loader.environment.pop("no_proxy", None)
    try:
        found = loader.ask("test/plain", QUERY, TEXTS[:1], backend="torch")
    finally:
        loader.close()
    assert found["error"] == "ModelLoadError", found
    assert re.search(message, found["message"]), found
