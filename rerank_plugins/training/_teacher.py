"""Distillation: training targets from a teacher model's scores."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins.backends.load import open_weights
from rerank_plugins.errors import ModelLoadError
from rerank_plugins.evaluation import score_texts
from rerank_plugins.reranker import Reranker
from rerank_plugins.training._data import Group, normalised
from rerank_plugins.training._mining import COSINE_TEMPERATURE, BiEncoder, Vectors, softmax
from rerank_plugins.training.settings import Model, Progress

MINER = "miner"
"""As ``teacher``: the bi-encoder that mines the negatives."""

LOGIT_TEMPERATURE = 1.0
_CHUNK = 256

Scores = list[NDArray[np.float64]]
"""Scores of each group's passages."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """Teacher model.

    Attributes:
        name: Identifies the teacher.
        score: Logits or cosines of the passages of groups.
        temperature: Default temperature of the softmax over its scores.
    """

    name: str
    score: Callable[[Sequence[Group]], Scores]
    temperature: float


def as_reranker(model: Model | None, device: str | None = None) -> Reranker:
    """A loaded reranker: the given one, or one of the named model; None is the bundled model."""
    if isinstance(model, Reranker):
        return model.prepare()
    # The bundled model is a graph for the CPU, whatever the training runs on.
    return Reranker(model, device=None if model is None else device).prepare()


def open_teacher(model: Model, miner: Path | None, device: str | None = None) -> Teacher:
    """Loads a teacher.

    Args:
        model: A cross-encoder, as anything that `Reranker` takes, or a `Reranker`; a bi-encoder, recognised by the
            configuration that sentence-transformers saves; or ``"miner"``.
        miner: The bi-encoder meant by ``"miner"``; None where nothing is mined.
        device: A torch device; None chooses.

    Raises:
        ModelLoadError: If it cannot be loaded.
    """
    if model == MINER and miner is not None:
        encoder = BiEncoder(miner, device=device)
        return Teacher(f"miner {miner}", _cosines(encoder.encode, encoder.encode), COSINE_TEMPERATURE)
    if not isinstance(model, Reranker):
        name = os.fspath(model)
        folder = Path(name).expanduser()
        if not folder.is_dir():
            folder = open_weights(name).files.path
        if is_bi_encoder(folder):
            return Teacher(f"cosines of {name}", _cosines(*sentence_encoders(folder, device)), COSINE_TEMPERATURE)
    reranker = as_reranker(model, device)

    def score(groups: Sequence[Group]) -> Scores:
        return [score_texts(reranker, group.query, group.passages) for group in groups]

    return Teacher(f"logits of {reranker!r}", score, LOGIT_TEMPERATURE)


def is_bi_encoder(folder: Path) -> bool:
    """Whether a directory holds a sentence-transformers bi-encoder rather than a cross-encoder."""
    settings = folder / "config_sentence_transformers.json"
    if settings.is_file():
        kind = json.loads(settings.read_text(encoding="utf-8")).get("model_type")
        if kind is not None:
            return str(kind) != "CrossEncoder"
    # Older folders do not name their type; only a bi-encoder pools.
    listing = folder / "modules.json"
    modules = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else []
    return any(str(module.get("type", "")).endswith("Pooling") for module in modules)


def sentence_encoders(
    model: str | os.PathLike[str], device: str | None = None
) -> tuple[Callable[[Sequence[str]], Vectors], Callable[[Sequence[str]], Vectors]]:
    """Encoders of queries and passages with the model's own prompts: unit vectors, float32 (n, dim).

    Raises:
        ModelLoadError: If the model cannot be loaded.
    """
    library: Any = import_extra("sentence_transformers", "train")
    try:
        encoder = library.SentenceTransformer(os.fspath(model), device=device, model_kwargs={"use_safetensors": True})
    except Exception as error:
        raise ModelLoadError(f"{os.fspath(model)!r} could not be loaded as a bi-encoder: {error}") from error
    settings = {"normalize_embeddings": True, "show_progress_bar": False}

    def queries(texts: Sequence[str]) -> Vectors:
        return np.asarray(encoder.encode_query(list(texts), **settings), dtype=np.float32)

    def passages(texts: Sequence[str]) -> Vectors:
        return np.asarray(encoder.encode_document(list(texts), **settings), dtype=np.float32)

    return queries, passages


def _cosines(
    queries: Callable[[Sequence[str]], Vectors], passages: Callable[[Sequence[str]], Vectors]
) -> Callable[[Sequence[Group]], Scores]:
    def score(groups: Sequence[Group]) -> Scores:
        texts = list(dict.fromkeys(text for group in groups for text in group.passages))
        place = {text: row for row, text in enumerate(texts)}
        vectors = passages(texts).astype(np.float64)
        asked = queries([group.query for group in groups]).astype(np.float64)
        return [vectors[[place[t] for t in group.passages]] @ asked[row] for row, group in enumerate(groups)]

    return score


def teacher_scores(
    teacher: Teacher, groups: Sequence[Group], folder: Path, progress: Progress | None = None
) -> list[NDArray[np.float64]]:
    """Teacher scores of all passages of all groups, resumed from an earlier run's file in ``folder``.

    Args:
        teacher: The teacher.
        groups: The groups.
        folder: Directory of kept scores: a file for each teacher and set of groups.
        progress: Called with a line of news and the share done.

    Returns:
        float64, shape (n_passages,), for each group.
    """
    key = hashlib.sha256(json.dumps([teacher.name, [(g.query, g.passages) for g in groups]]).encode()).hexdigest()
    kept = folder / f"teacher-{key[:24]}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    flat = np.load(kept) if kept.is_file() else np.zeros(0)
    ends = np.cumsum([len(group.passages) for group in groups])
    done = int(np.searchsorted(ends, len(flat), side="right"))
    parts = [flat]
    while done < len(groups):
        chunk = groups[done : done + _CHUNK]
        parts += teacher.score(chunk)
        done += len(chunk)
        # Saved chunk by chunk: a teacher can take longer than the training.
        with (part := kept.with_suffix(".part")).open("wb") as out:
            np.save(out, np.concatenate(parts))
        part.replace(kept)
        if progress is not None:
            progress(f"teacher: {done} of {len(groups)} lists", done / len(groups))
    return list(np.split(np.concatenate(parts), ends[:-1]))


def distilled(
    groups: Sequence[Group], scores: Sequence[NDArray[np.float64]], share: float, temperature: float
) -> list[Group]:
    """The groups with the targets ``(1 - share) * gains / sum(gains) + share * softmax(scores / temperature)``."""
    made = []
    for group, values in zip(groups, scores, strict=True):
        target = (1 - share) * np.array(normalised(group.gains)) + share * softmax(values, temperature)
        made.append(replace(group, target=tuple(target.tolist())))
    return made
