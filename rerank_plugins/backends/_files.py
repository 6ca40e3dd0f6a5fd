"""Where a model's files are: a local directory, the Hub's cache, or the Hub. Never a pickle."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rerank_plugins.errors import ConfigurationError, ModelLoadError

__all__ = ["ModelFiles", "converted_directory", "find_graph", "resolve"]

# Beyond this a tokenizer's limit is a placeholder for "none": transformers writes int(1e30).
_NO_LIMIT = 10**9
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text", "longformer"}
"""Families whose first position is ``pad_token_id + 1``: of 514 positions, 512 can be used."""

_COMMON = ["config.json", "tokenizer.json", "tokenizer_config.json", "config_sentence_transformers.json"]
_TORCH = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors", "*/config.json", "*/model.safetensors"]
_NOT_TORCH = ["onnx/*", "openvino/*", "*.onnx", "runs/*", "checkpoint*/*"]
_TORCH_READS = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin", ".py")
_NO_WEIGHTS = (".json", ".jinja", ".md", ".txt", ".py", ".safetensors", ".onnx")
"""Beside a graph, anything else may hold its weights: the format lets their files have any name."""
_GRAPHS: Mapping[str, Sequence[str]] = {
    "fp32": ("onnx/model.onnx", "model.onnx"),
    "fp16": ("onnx/model_fp16.onnx", "model_fp16.onnx"),
    "int8": ("onnx/model_int8.onnx", "model_int8.onnx", "onnx/model_quantized.onnx", "model_quantized.onnx"),
}


class ModelFiles:
    """A directory with a model's configuration, tokenizer and, where there is one, its graph.

    Args:
        path: The directory.
        name: What the user asked for.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        # Before anything is read: a file that changes while it is loaded, or later, is told by it.
        self._stamps = _stamps(path)
        self._fingerprints: dict[Path | None, str] = {}
        self.config = self._json("config.json")
        self.tokenizer_config = self._json("tokenizer_config.json", missing_ok=True)

    def _json(self, file: str, *, missing_ok: bool = False) -> dict[str, Any]:
        try:
            value = json.loads((self.path / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if missing_ok:
                return {}
            raise ModelLoadError(
                f"{self.name!r} is no model directory: expected {file} in {self.path}, found "
                f"{sorted(p.name for p in self.path.iterdir())[:20] if self.path.is_dir() else 'no directory'}. "
                "Give a Hub id, or a directory with config.json, a tokenizer and weights."
            ) from None
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{self.path / file} of {self.name!r} cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise ModelLoadError(f"{self.path / file} of {self.name!r} must hold a JSON object.")
        return value

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by column, of ``id2label``."""
        id2label = self.config.get("id2label")
        if not isinstance(id2label, dict):
            return tuple(f"LABEL_{i}" for i in range(int(self.config.get("num_labels", 1))))
        return tuple(str(id2label[key]) for key in sorted(id2label, key=int))

    @property
    def is_causal(self) -> bool:
        """Whether this is a decoder: scored by its next token, not by a classification head."""
        architectures = self.config.get("architectures") or [""]
        return str(architectures[0]).endswith("ForCausalLM")

    @property
    def limit(self) -> int:
        """Most tokens that the model takes: the smaller of the tokenizer's and the positions' limit."""
        found = [int(self.tokenizer_config.get("model_max_length") or _NO_LIMIT)]
        if positions := self.config.get("max_position_embeddings"):
            offset = 0
            if self.config.get("model_type") in _OFFSET_POSITIONS:
                offset = int(self.config.get("pad_token_id") or 0) + 1
            found.append(int(positions) - offset)
        limit = min(found)
        return limit if 0 < limit < _NO_LIMIT else 512

    @property
    def default_prompt(self) -> str | None:
        """The prompt that sentence-transformers would put before the query."""
        settings = self._json("config_sentence_transformers.json", missing_ok=True)
        name = settings.get("default_prompt_name")
        prompt = (settings.get("prompts") or {}).get(name) if name else None
        return str(prompt) if prompt else None

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of its own, read from ``tokenizer.json``.

        Raises:
            ModelLoadError: The file is missing or broken.
        """
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise ModelLoadError(
                f"{self.name!r} has no tokenizer.json, which the onnx and openvino backends need. Use backend='torch', "
                "or convert the model once: rerank-plugins convert MODEL OUT"
            )
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:
            raise ModelLoadError(f"{file} of {self.name!r} cannot be read: {error}") from error

    def fingerprint(self, graph: Path | None = None) -> str:
        """SHA-256 over the files that decide a score, as they were when this object was made.

        Files that have changed since cannot tell what was loaded: then the fingerprint is one that no other has.

        Args:
            graph: The ONNX graph that was loaded; None for PyTorch's weights.
        """
        if graph not in self._fingerprints:
            self._fingerprints.setdefault(graph, self._digest(graph))
        return self._fingerprints[graph]

    def _digest(self, graph: Path | None) -> str:
        facts = []
        for name, stamp in sorted(self._stamps.items()):
            file = self.path / name
            if not (_torch_reads(name) if graph is None else _graph_reads(file, graph, self.path)):
                continue
            content = ""
            with contextlib.suppress(OSError):
                content = _sha256(file, stamp)
            if _stamp(file) != stamp:
                return f"changed-{uuid.uuid4().hex}"
            facts.append((name, content))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def pad_id(self, tokenizer: Tokenizer) -> int:
        """Token id of padding. Padding is masked, so any id works where a model names none."""
        token = self.tokenizer_config.get("pad_token")
        content = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.token_to_id(content) if isinstance(content, str) else None
        return int(found if found is not None else self.config.get("pad_token_id") or 0)


_Stamp = tuple[int, int, int]
"""Size, time of the last change in ns, and inode."""


def _stamp(file: Path) -> _Stamp | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _stamps(root: Path) -> dict[str, _Stamp]:
    """Of the files in a directory and one level below, by their relative names."""
    files = (*root.glob("*"), *root.glob("*/*"))
    return {file.relative_to(root).as_posix(): found for file in files if (found := _stamp(file)) is not None}


def _torch_reads(name: str) -> bool:
    return name.endswith(_TORCH_READS) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _NOT_TORCH)


def _graph_reads(file: Path, graph: Path, root: Path) -> bool:
    if file == graph or (file.parent == root and file.name in _COMMON):
        return True
    return file.parent == graph.parent and not file.name.endswith(_NO_WEIGHTS)


@functools.lru_cache(maxsize=1024)
def _sha256(file: Path, stamp: _Stamp) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_graph(path: Path, precision: str) -> Path | None:
    """The ONNX graph of a directory, or None.

    Args:
        path: The model directory.
        precision: ``"int8"`` and ``"fp16"`` prefer the graphs that are named so; all else takes the plain one.
    """
    names = [*_GRAPHS.get(precision, ()), *_GRAPHS["fp32"]] if precision != "fp32" else _GRAPHS["fp32"]
    return next((path / name for name in names if (path / name).is_file()), None)


def converted_directory(files: ModelFiles) -> Path:
    """Where ``rerank-plugins convert MODEL`` puts a graph so that ``backend="auto"`` finds it.

    The name is a hash of the configuration and of the weights' names, sizes and times, or of the Hub's commit.
    """
    weights = sorted(files.path.glob("*.safetensors"))
    facts = [json.dumps(files.config, sort_keys=True), *(_identity(weight) for weight in weights)]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
    base = os.environ.get("RERANK_PLUGINS_CACHE") or os.path.join(_cache_home(), "rerank-plugins")
    return Path(base) / "converted" / key


def _identity(file: Path) -> str:
    # In the Hub's cache a file is a link to a blob that is named by its hash.
    if file.is_symlink():
        return file.resolve().name
    stat = file.stat()
    return f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _cache_home() -> str:
    if os.name == "nt":
        return os.environ.get("LOCALAPPDATA") or os.path.expanduser("~")
    return os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")


def resolve(model: str, *, revision: str | None, torch: bool, precision: str, code: bool = False) -> ModelFiles:
    """Find a model's files, downloading only those that are needed.

    Args:
        model: A local directory or a Hub id.
        revision: Branch, tag or commit on the Hub; None is the default branch.
        torch: Fetch weights for the torch backend; otherwise configuration, tokenizer and graph.
        precision: Chooses among graphs.
        code: Fetch the repository's Python files as well (`trust_remote_code`).

    Raises:
        ConfigurationError: `revision` beside a local directory.
        ModelLoadError: No such directory or repository, or it is not cached and the Hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigurationError(
                f"revision={revision!r} only means something for a Hub id, but {model!r} is a local directory. "
                "Leave revision at None."
            )
        files = ModelFiles(path, model)
    elif torch:
        allow = [*_TORCH, *(["*.py"] if code else [])]
        files = ModelFiles(_download(model, revision, allow, _NOT_TORCH), model)
    else:
        for graphs in (_GRAPHS.get(precision, _GRAPHS["fp32"]), _GRAPHS["fp32"]):
            allow = [*_COMMON, *graphs, *(f"{graph}_data" for graph in graphs)]
            files = ModelFiles(_download(model, revision, allow, None), model)
            if any((files.path / graph).is_file() for graph in graphs):
                break
    if torch:
        _check_weights(files, _fetch_command(model, revision))
    return files


def _check_weights(files: ModelFiles, fetch: str) -> None:
    if any(files.path.rglob("*.safetensors")):
        return
    if any(files.path.glob("*.bin")):
        raise ModelLoadError(
            f"{files.name!r} has its weights in a pickle (.bin), which can run code when it is read. Expected "
            "safetensors: load it once where you trust it, with transformers, and save_pretrained() it to a directory."
        )
    raise ModelLoadError(
        f"{files.name!r} has no weights: expected model.safetensors in {files.path}. "
        f"If it is a Hub model that was only partly downloaded, fetch the rest where there is a network: {fetch}"
    )


def _fetch_command(model: str, revision: str | None) -> str:
    return f"hf download {model}" + (f" --revision {revision}" if revision else "")


def _download(model: str, revision: str | None, allow: list[str], ignore: list[str] | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=allow, ignore_patterns=ignore, tqdm_class=Silent)
        )
    except HFValidationError as error:
        raise ModelLoadError(
            f"{model!r} is neither a local directory nor a Hub id of the form 'organisation/name': {error}"
        ) from error
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{model!r} is gated: accept its terms on the Hub and log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"{model!r} has no revision {revision!r} on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{model!r} is neither a local directory nor a repository on the Hub that you may read{at}. Check the "
            "name; for a private one log in with `hf auth login`. `rerank-plugins models` lists published ones."
        ) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, OSError, RuntimeError) as error:
        raise ModelLoadError(
            f"{model!r}{at} is not a local directory, is not in the local cache, and the Hub cannot be reached "
            f"({type(error).__name__}). Fetch it once where there is a network: {_fetch_command(model, revision)}\n"
            "Or use Reranker(model=None): the bundled model needs no download."
        ) from error
