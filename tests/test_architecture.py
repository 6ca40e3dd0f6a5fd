"""The rooms of the house: who may import whom, read from the source."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rerank_plugins

PACKAGE = Path(rerank_plugins.__file__).parent

_FRAMEWORK = {
    "_adapters",
    "_agent_texts",
    "_extras",
    "_texts",
    "_threads",
    "errors",
    "reranker",
    "results",
    "selection",
    "tools",
    "types",
}
"""What the adapters of a framework may import of this package."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "_extras": {"errors"},
    "_fork": {"errors"},
    "_engines": {"_extras", "_fork"},
    "_minilm": {"_extras", "errors"},
    "_machine": {"_extras"},
    "_texts": set(),
    "_paths": {"errors"},
    "_printable": set(),
    "_secrets": set(),
    "_lines": {"_printable", "errors"},
    "_judgements": {"_lines", "errors"},
    "_quiet": set(),
    "types": {"errors"},
    "passages": {"types", "errors"},
    "batching": set(),
    "selection": {"types", "errors"},
    "models": set(),
    "calibration": {"_paths", "_printable", "selection", "errors"},
    "settings": {"_secrets", "models", "calibration", "errors", "passages", "types"},
    "backends": {
        "_cancellation",
        "_deadline",
        "_engines",
        "_extras",
        "_fork",
        "_machine",
        "_paths",
        "_quiet",
        "_texts",
        "batching",
        "errors",
        "models",
        "selection",
        "settings",
    },
    "cache": {"_secrets", "errors"},
    "_deadline": set(),
    "fusion": set(),
    "sentences": {"_texts"},
    "spans": {"_texts", "passages", "selection", "sentences", "types"},
    "scorer": {"_fork", "_texts", "backends", "cache", "pipeline", "settings"},
    "rank": {
        "_requests",
        "_texts",
        "errors",
        "pipeline",
        "ranking",
        "scorer",
        "selection",
        "settings",
        "spans",
        "telemetry",
        "types",
    },
    "telemetry": {"__version__", "settings", "types"},
    "ranking": {"errors", "fusion", "pipeline", "selection", "settings", "types"},
    "_requests": {"_texts", "errors", "types"},
    "pipeline": {"_deadline", "_texts", "backends", "cache", "errors", "passages", "selection", "settings"},
    "reranker": {
        "_secrets",
        "_requests",
        "_threads",
        "types",
        "settings",
        "pipeline",
        "rank",
        "ranking",
        "scorer",
    },
    "_threads": {"_cancellation"},
    "bulk": {
        "_extras",
        "_judgements",
        "_lines",
        "_paths",
        "_printable",
        "_requests",
        "backends",
        "errors",
        "pipeline",
        "ranking",
        "reranker",
        "settings",
    },
    "ray": {"_extras", "bulk", "errors", "reranker", "settings"},
    "_cancellation": set(),
    "testing": {"backends"},
    "server": {"_extras", "_texts", "_threads", "backends", "errors", "reranker", "selection", "types"},
    "_adapters": {"_requests", "_texts", "reranker", "settings", "selection", "spans", "types", "errors"},
    "tools": {"_requests", "_texts", "_threads", "errors", "fusion", "reranker", "selection"},
    "results": {"errors", "reranker", "sentences", "tools", "types"},
    "_agent_texts": {"_adapters", "errors"},
    "langchain": _FRAMEWORK,
    "llama_index": _FRAMEWORK,
    "conversion": {"_engines", "_extras", "_paths", "_quiet", "errors", "backends"},
    "evaluation": {
        "_extras",
        "_judgements",
        "_lines",
        "_minilm",
        "_paths",
        "_printable",
        "_quiet",
        "_secrets",
        "__version__",
        "errors",
        "fusion",
        "reranker",
        "selection",
        "settings",
        "types",
    },
    "training": {
        "_judgements",
        "_paths",
        "_printable",
        "_quiet",
        "calibration",
        "_machine",
        "_minilm",
        "reranker",
        "types",
        "errors",
        "_extras",
        "backends",
        "conversion",
        "evaluation",
        "models",
    },
}
"""What each room may import of this package; `cli` may import anything."""

OUTSIDE: dict[str, set[str]] = {
    "batching": {"numpy"},
    "selection": {"numpy"},
    "settings": set(),
    "fusion": {"numpy"},
    "ranking": {"numpy"},
    "pipeline": {"numpy"},
    "sentences": set(),
    "spans": {"numpy"},
    "rank": set(),
    "results": set(),
    "telemetry": set(),
    "tools": {"numpy"},
    "scorer": set(),
    "_texts": set(),
    "_deadline": set(),
    "_requests": set(),
    "_paths": set(),
    "_printable": set(),
    "_secrets": set(),
    "_lines": set(),
    "_judgements": set(),
    "_quiet": {"transformers"},
    "passages": {"numpy"},
    "types": set(),
    "errors": set(),
    "_extras": set(),
    "_machine": set(),
    "_threads": set(),
    "calibration": {"numpy"},
    "cache": {"numpy"},
    "reranker": {"numpy"},
    "testing": {"numpy"},
    "models": set(),
    "_adapters": {"pydantic"},
    "_agent_texts": set(),
}
"""What the rooms of the base install may import from outside the standard library."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "rerank_plugins" else {module}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_each_room_imports_only_what_it_may(path: Path) -> None:
    here = room(path)
    if here in ("__init__", "__main__", "cli"):
        return
    used = {name.split(".")[1] for name in imports(path) if name.startswith("rerank_plugins.")}
    assert used - {here} <= MAY_IMPORT[here]


def private_names(path: Path) -> list[str]:
    """What a module takes of other rooms' private modules, and of their private names.

    Modules beside the rooms that begin with an underscore, such as `_paths`, are for all of the package.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("import_module"):
            names = [str(getattr(node.args[0], "value", ""))]
        for name in names:
            package, _, rest = name.partition(".")
            owner, *inner = rest.split(".")
            if package == "rerank_plugins" and owner != room(path):
                found += [name for part in inner if part.startswith("_")]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_room_reaches_into_another_ones_private_modules(path: Path) -> None:
    assert private_names(path) == []


def test_reaching_into_private_modules_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "cli" / "_some.py"
    path.parent.mkdir()
    for code in (
        "from rerank_plugins.training._data import read_pairs",
        "from rerank_plugins.backends import _merge",
        "from rerank_plugins.reranker import _last_said",
        "import rerank_plugins.backends.http._client",
        "def f():\n    importlib.import_module('rerank_plugins.backends._files')",
    ):
        path.write_text(code)
        assert len(private_names(path)) == 1, code
    path.write_text("from rerank_plugins.cli._app import app\nfrom rerank_plugins._paths import new_file\n"
                    "from rerank_plugins import _paths\nfrom rerank_plugins.training import train\n")  # fmt: skip
    assert private_names(path) == []


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_the_base_needs_no_more_than_the_base_install(path: Path) -> None:
    here = room(path)
    if here not in OUTSIDE:
        return
    outside = {name.split(".")[0] for name in imports(path)} - {"rerank_plugins"} - set(sys.stdlib_module_names)
    assert outside <= OUTSIDE[here]


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 550


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_functions_stay_readable(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 100, f"{node.name}: {lines} lines"
            assert len([*given.posonlyargs, *given.args, *given.kwonlyargs]) <= 16, node.name


def test_importing_the_package_loads_no_framework_no_engine_and_no_model() -> None:
    heavy = ["torch", "transformers", "sentence_transformers", "langchain_core", "llama_index", "openvino",
             "onnxruntime", "huggingface_hub", "pydantic", "typer", "faiss"]  # fmt: skip
    code = f"import sys, json, rerank_plugins.reranker; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_version_is_written_once_in_two_places() -> None:
    assert f'\nversion = "{rerank_plugins.__version__}"\n' in (PACKAGE.parent / "pyproject.toml").read_text()


def changes_of_the_environment(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in {"os.putenv", "os.unsetenv"} or (
                name.startswith("os.environ.") and name.split(".")[2] in {"update", "setdefault", "pop", "clear"}
            ):
                found.append(name)
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            found += [name] if (name := ast.unparse(node)).startswith("os.environ[") else []
    return found


def test_library_code_prints_nothing_and_sets_no_environment() -> None:
    for path in modules():
        if room(path) == "cli":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not {"print", "logging.basicConfig"} & calls, path
        # The one exception sets a variable for the time of an import, and restores it.
        assert room(path) == "_engines" or not changes_of_the_environment(tree), path


def test_changes_of_the_environment_are_seen() -> None:
    for code in ("os.environ['A'] = 'b'", "del os.environ['A']", "os.environ.pop('A')", "os.putenv('A', 'b')"):
        assert changes_of_the_environment(ast.parse(code)), code
    assert not changes_of_the_environment(ast.parse("x = os.environ['A']; os.environ.get('A')"))


def test_commands_show_foreign_texts_in_one_way_only() -> None:
    for path in (PACKAGE / "cli").glob("*.py"):
        if path.name == "_screen.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"typer.echo", "typer.secho", "print", "Console", "Text", "Text.from_markup"}, path
        assert "sys.stdout.write" not in calls, path
