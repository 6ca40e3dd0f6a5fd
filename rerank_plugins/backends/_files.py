"""The files of one model: which there are, on disk and on the Hub, and a digest of those that decide a score."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from rerank_plugins._paths import cache_directory
from rerank_plugins.errors import ModelLoadError

__all__ = ["ModelFiles", "converted_directory", "torch_reads"]

_SETTINGS = {
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "chat_template.jinja",
    "chat_template.json",
}
"""What decides the score of a graph beside the graph itself."""
_NOT_TORCH = ("onnx/*", "openvino/*", "*.onnx", "runs/*", "checkpoint*/*")
_TORCH_READS = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin", ".py")
_NO_WEIGHTS = (".json", ".jinja", ".md", ".txt", ".py", ".safetensors", ".onnx")
"""Beside a graph, anything else may hold its weights: the format lets their files have any name."""
_DEEPEST = 3
_MOST_FILES = 5000
_READ_WHOLE = 16 << 20
"""Bytes up to which a file is compared by its content where it is only looked for, and not scored with."""


class ModelFiles:
    """The files of a model's directory and, for a model of the Hub, those that can be fetched into it.

    Attributes:
        path: The directory, in the Hub's disk cache for a model of the Hub.
        name: What the user asked for.
        remote: Whether files can be fetched from the Hub.
        names: Names of all files, relative to the directory, with ``/``: those there, and those that the Hub lists.

    Args:
        path: The directory.
        name: What the user asked for.
        listed: Names that the Hub lists; None for a local directory.
        fetch: Downloads files into the directory.
        partial: Makes the error for what the Hub's cache lacks, given its description; None where nothing can lack.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        listed: Iterable[str] | None = None,
        fetch: Callable[[list[str]], None] | None = None,
        partial: Callable[[str], ModelLoadError] | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.partial = partial
        self.remote = fetch is not None
        # Before anything is read: a file that changes while it is loaded, or later, is told by it.
        self._stamps = _stamps(path)
        self._fingerprints: dict[Path | None, str] = {}
        self._fetch = fetch
        self.names = set(self._stamps) | set(listed or ())

    def fetch(self, names: Iterable[str]) -> None:
        """Make sure that files are on disk.

        Raises:
            ModelLoadError: The Hub lists one that cannot be had now.
        """
        missing = sorted(name for name in names if name in self.names and name not in self._stamps)
        if not missing or self._fetch is None:
            return
        self._fetch(missing)
        for name, stamp in _stamps(self.path).items():
            self._stamps.setdefault(name, stamp)

    def there(self, name: str) -> bool:
        """Whether a file is on disk."""
        return name in self._stamps

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
            if not (torch_reads(name) if graph is None else _graph_reads(file, graph, self.path)):
                continue
            content = ""
            with contextlib.suppress(OSError):
                content = _sha256(file, stamp)
            if _stamp(file) != stamp:
                return f"changed-{uuid.uuid4().hex}"
            facts.append((name, content))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def identity(self) -> str:
        """Digest of all that PyTorch would read, without reading its large files: those count by place, size and time.

        On the Hub's disk cache a file is a link to one that is named by its hash.
        """
        facts = []
        for name, stamp in sorted(self._stamps.items()):
            if not torch_reads(name):
                continue
            file = self.path / name
            if file.is_symlink():
                facts.append((name, file.resolve().name, stamp[0]))
            elif stamp[0] <= _READ_WHOLE:
                facts.append((name, _sha256(file, stamp), stamp[0]))
            else:
                facts.append((name, f"{file.resolve()} {stamp[1]}", stamp[0]))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def converted_directory(files: ModelFiles) -> Path:
    """Where ``rerank-plugins convert MODEL`` puts a graph so that ``backend="auto"`` finds it.

    The name is a digest of all that decides a score: weights, configuration, tokenizer, prompts, template, heads. A
    graph that was made from other files is never found.
    """
    base = cache_directory() or Path(os.devnull)
    return base / "converted" / files.identity()[:24]


_Stamp = tuple[int, int, int]
"""Size, time of the last change in ns, and inode."""


def _stamp(file: Path) -> _Stamp | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _stamps(root: Path) -> dict[str, _Stamp]:
    """Of the files in a directory and some levels below, by their relative names."""
    stamps: dict[str, _Stamp] = {}
    for folder, folders, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(relative.parts) >= _DEEPEST - 1:
            folders.clear()
        for name in sorted(names):
            if (found := _stamp(Path(folder, name))) is not None:
                stamps[(relative / name).as_posix()] = found
        if len(stamps) > _MOST_FILES:
            break
    return stamps


def torch_reads(name: str) -> bool:
    """Whether PyTorch's libraries may read a file, by its relative name."""
    return name.endswith(_TORCH_READS) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _NOT_TORCH)


def _graph_reads(file: Path, graph: Path, root: Path) -> bool:
    if file == graph or (file.parent == root and file.name in _SETTINGS):
        return True
    return file.parent == graph.parent and not file.name.endswith(_NO_WEIGHTS)


@functools.lru_cache(maxsize=1024)
def _sha256(file: Path, stamp: _Stamp) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
