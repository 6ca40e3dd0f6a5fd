"""The engines that report home by themselves do not when they are used through this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from rerank_plugins import _engines
from rerank_plugins.errors import MissingDependencyError

ROOT = Path(__file__).parent.parent

RANK = """
import json, os, sys
from rerank_plugins import Reranker
before = dict(os.environ)
ranking = Reranker(backend={engine!r}).rank("how do I undo a commit", ["git add stages", "git revert undoes a commit"])
assert ranking[0].index == 1
assert dict(os.environ) == before
print(json.dumps(sorted(name for name in sys.modules if name.startswith("openvino_telemetry"))))
"""


def clean(home: Path, **variables: str) -> dict[str, str]:
    """An environment in which nothing has switched telemetry off: CI does, as does a variable."""
    names = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return {**kept, "HOME": str(home), "USERPROFILE": str(home), "PYTHONPATH": str(ROOT), **variables}


def python(code: str, env: dict[str, str], *before: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*before, sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_nothing_is_written_at_home(engine: str, tmp_path: Path) -> None:
    done = python(RANK.format(engine=engine), clean(tmp_path))
    assert json.loads(done.stdout) == []
    assert done.stderr == ""
    assert list(tmp_path.rglob("*")) == []


def test_what_is_looked_for_is_there_without_us(tmp_path: Path) -> None:
    """The two tests beside this one would pass for ever if the engines changed their files."""
    python("import openvino; import onnxruntime", clean(tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_no_name_is_looked_up(engine: str, tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    trace = tmp_path / "trace"
    home = tmp_path / "home"
    home.mkdir()
    python(
        RANK.format(engine=engine) + "\nimport time; time.sleep(1)",
        clean(home),
        *(strace, "-f", "-qq", "-e", "trace=connect,execve,openat", "-o", str(trace)),
    )
    calls = trace.read_text(errors="replace")
    assert calls.count("execve(") == 1
    assert "AF_INET" not in calls
    assert "resolv.conf" not in calls


NO_HOME = """
import os, pathlib
def unknown(*given, **keywords):
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = pathlib.Path.expanduser = unknown
os.path.expanduser = lambda path: path
"""
"""A user without an entry in the list of users, as containers give it, and without HOME."""


@pytest.mark.parametrize("engine", ["auto", "onnx", "openvino"])
def test_the_bundled_model_ranks_without_a_home_directory(engine: str, tmp_path: Path) -> None:
    env = {name: value for name, value in clean(tmp_path).items() if name not in ("HOME", "USERPROFILE")}
    done = python(NO_HOME + RANK.format(engine=engine), env)
    assert done.stderr == ""


# OpenVINO's own import needs the working directory; "auto" passes it over.
@pytest.mark.parametrize("engine", ["auto", "onnx"])
def test_the_bundled_model_ranks_in_a_directory_that_is_gone(engine: str, tmp_path: Path) -> None:
    gone = f"import os\nos.chdir({str(tmp_path)!r})\nos.mkdir('gone')\nos.chdir('gone')\nos.rmdir('../gone')\n"
    done = python(gone + RANK.format(engine=engine), clean(tmp_path), cwd=tmp_path)
    assert done.stderr == ""


def test_nothing_but_the_import_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller set or imported stays, and other threads see a change for the time of the import alone."""
    seen: list[object] = []

    def looks(module: str, extra: str | None = None) -> ModuleType:
        seen.append((os.environ.get("ORT_DISABLE_TELEMETRY"), sys.modules.get("openvino_telemetry", "absent")))
        return ModuleType(module)

    monkeypatch.setattr(_engines, "import_extra", looks)
    for name in ("onnxruntime", "openvino", "openvino_telemetry"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    _engines.onnxruntime()
    _engines.openvino()
    assert seen == [("1", "absent"), (None, None)]
    assert "ORT_DISABLE_TELEMETRY" not in os.environ
    assert "openvino_telemetry" not in sys.modules

    seen.clear()
    own = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", own)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    _engines.onnxruntime()
    _engines.openvino()
    assert seen == [("0", own), ("0", None)]
    assert sys.modules["openvino_telemetry"] is own
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"

    seen.clear()
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    _engines.onnxruntime()
    _engines.openvino()
    assert seen == [(None, own), (None, own)]


def test_threads_that_import_at_once_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4)
    found: list[str | None] = []

    def slow(module: str, extra: str | None = None) -> ModuleType:
        found.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
        return ModuleType(module)

    def call() -> None:
        together.wait()
        _engines.onnxruntime()

    monkeypatch.setattr(_engines, "import_extra", slow)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["1"] * 4
    assert "ORT_DISABLE_TELEMETRY" not in os.environ


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Could not determine home directory."), "is installed, but its import failed"),
        (OSError("libgomp.so.1: cannot open shared object file"), "libgomp.so.1"),
        (FileNotFoundError("[Errno 2] No such file or directory"), "its import failed"),
        (ModuleNotFoundError("No module named 'openvino'"), 'pip install "rerank-plugins[openvino]"'),
    ],
)
def test_whatever_an_import_raises_is_one_error(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr("importlib.import_module", fails)
    with pytest.raises(MissingDependencyError) as caught:
        _engines.openvino()
    assert said in str(caught.value).replace("which is", "is")
    assert caught.value.__cause__ is error
    assert caught.value.name == "openvino"
