"""What there is to rerank: candidates from a file, or BM25 or FAISS over the corpus."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins._judgements import CANDIDATES, find_file
from rerank_plugins._minilm import minilm_directory
from rerank_plugins._paths import writable_directory, write_file
from rerank_plugins._printable import parse_json
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.evaluation._beir import BeirDataset, read_candidates
from rerank_plugins.evaluation._store import cannot_keep

Progress = Callable[[str, float], None]
Embed = Callable[[list[str]], Any]
"""Texts in, vectors out, shape (n, dim); similar texts have a large dot product."""

_EMBED_BATCH = 256


def with_first_stage(
    dataset: BeirDataset,
    folder: Path,
    first_stage: str,
    top_k: int,
    *,
    embed: Embed | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> tuple[BeirDataset, str]:
    """The data set with candidates, and what they come from.

    Args:
        dataset: The collection.
        folder: Where it was read from.
        first_stage: See `rerank_plugins.evaluation.evaluate`.
        top_k: Candidates of each query.
        embed: Embeds texts, for ``"faiss"``; None takes all-MiniLM-L6-v2 of the ``demo`` extra.
        cache: Directory that keeps what BM25 and FAISS have found; None keeps nothing.
        progress: Takes a line of news and the share done.

    Raises:
        ConfigurationError: There is no such file.
        InputError: A line of the file is not valid.
    """
    present = [name for name in CANDIDATES if (folder / name).is_file()]
    if first_stage == "auto":
        first_stage = "candidates" if present else "bm25"
    if first_stage == "candidates":
        path = find_file(folder, *CANDIDATES)
        return read_candidates(path, dataset), path.name
    tell = progress or (lambda news, share: None)
    if first_stage == "bm25":
        found = _kept(cache, dataset, f"bm25 {top_k}", lambda: _bm25(dataset, top_k, tell))
        return _with(dataset, found), "BM25"
    if first_stage == "faiss":
        if embed is not None:
            # What a caller's own function gives cannot be told from its name, so nothing is kept.
            return _with(dataset, _faiss(dataset, top_k, embed, tell)), "FAISS"
        found = _kept(cache, dataset, f"faiss {top_k}", lambda: _faiss(dataset, top_k, _minilm(), tell))
        return _with(dataset, found), "FAISS, all-MiniLM-L6-v2"
    beside = folder if folder.is_dir() else folder.parent
    for path in (beside / first_stage, Path(first_stage).expanduser()):
        if path.is_file():
            return read_candidates(path, dataset), path.name
    raise ConfigurationError(
        f"The first stage {first_stage!r} is neither auto, candidates, bm25 or faiss nor a file, in {folder} or "
        f"elsewhere. {folder} has {' and '.join(present) or 'no candidates.tsv'}."
    )


_Found = dict[str, list[tuple[str, float]]]
"""Document ids and scores by query id, best first."""


def _with(dataset: BeirDataset, found: _Found) -> BeirDataset:
    return replace(
        dataset,
        candidates={query: [document for document, _ in best] for query, best in found.items()},
        scores={query: [score for _, score in best] for query, best in found.items()},
    )


def _kept(cache: Path | None, dataset: BeirDataset, settings: str, search: Callable[[], _Found]) -> _Found:
    if cache is None:
        return search()
    digest = hashlib.sha256(settings.encode())
    for texts in (dataset.documents, {query: dataset.queries[query] for query in dataset.usable}):
        for name, text in texts.items():
            digest.update(json.dumps([name, text]).encode())
    path = cache / f"first-stage-{digest.hexdigest()[:32]}.json"
    try:
        kept = parse_json(path.read_bytes())
    except (OSError, ValueError):
        kept = None
    if _is_search(kept, dataset):
        return {query: [(document, score) for document, score in best] for query, best in kept.items()}
    # Told before the search, which may take minutes.
    try:
        writable_directory(cache)
    except ConfigurationError as error:
        raise cannot_keep(cache, error) from error
    found = search()
    write_file(path, json.dumps(found))
    return found


def _is_search(kept: Any, dataset: BeirDataset) -> bool:
    """Whether a file holds what a search of this data set can give: each document of a query once, and known."""
    return isinstance(kept, dict) and all(
        query in dataset.queries
        and isinstance(best, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in best)
        and all(isinstance(document, str) and document in dataset.documents for document, _ in best)
        and all(type(score) is float and math.isfinite(score) for _, score in best)
        and len({document for document, _ in best}) == len(best)
        for query, best in kept.items()
    )


def _bm25(dataset: BeirDataset, top_k: int, progress: Progress) -> _Found:
    """BM25 with the parameters that Pyserini and Anserini use for passages, k1 = 0.9 and b = 0.4.

    Words are runs of two letters or digits and more, so this is for languages that put blanks between words.

    References:
        X. H. Lù. BM25S: Orders of magnitude faster lexical search via eager sparse scoring. 2024.
    """
    bm25s: Any = import_extra("bm25s", "eval")
    progress("BM25: indexing", 0.0)
    names = list(dataset.documents)

    def tokens(texts: list[str]) -> list[list[str]]:
        found: list[list[str]] = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
        return found

    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(tokens(list(dataset.documents.values())), show_progress=False)
    found: _Found = {}
    queries = dataset.usable
    for number, query in enumerate(queries, 1):
        scores = index.get_scores_from_ids(index.get_tokens_ids(tokens([dataset.queries[query]])[0]))
        best = np.argsort(-scores, kind="stable")[:top_k]
        found[query] = [(names[row], float(scores[row])) for row in best if scores[row] > 0]
        progress("BM25: searching", number / len(queries))
    return found


def _faiss(dataset: BeirDataset, top_k: int, embed: Embed, progress: Progress) -> _Found:
    faiss: Any = import_extra("faiss", "faiss")
    names, queries = list(dataset.documents), dataset.usable
    texts = list(dataset.documents.values())

    def tell(share: float) -> None:
        progress(f"FAISS: embedding {len(texts):,} documents", share)

    documents = _embedded(texts, embed, tell)
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)
    asked = _embedded([dataset.queries[query] for query in queries], embed, lambda share: None)
    products, rows = index.search(asked, min(top_k, len(names)))
    return {
        query: [(names[row], float(score)) for row, score in zip(best, scores, strict=True)]
        for query, best, scores in zip(queries, rows, products, strict=True)
    }


def _embedded(texts: Sequence[str], embed: Embed, progress: Callable[[float], None]) -> NDArray[np.float32]:
    parts = []
    for start in range(0, len(texts), _EMBED_BATCH):
        batch = list(texts[start : start + _EMBED_BATCH])
        vectors = np.asarray(embed(batch), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(batch):
            raise ConfigurationError(f"embed must return shape ({len(batch)}, dim); it returned {vectors.shape}.")
        parts.append(vectors)
        progress((start + len(batch)) / len(texts))
    return np.ascontiguousarray(np.concatenate(parts))


def _minilm() -> Embed:
    library: Any = import_extra("sentence_transformers", "demo")
    with no_progress_bars():
        model = library.SentenceTransformer(str(minilm_directory("demo")))
    return lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
