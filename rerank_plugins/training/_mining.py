"""Mining with a bi-encoder: nearest passages, and groups with hard negatives and soft targets."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins._machine import native_bf16
from rerank_plugins.training._data import Group, normalise
from rerank_plugins.training.settings import Progress

Vectors = NDArray[np.float32]

MARGIN = 0.05
"""Least difference in cosine between the positive and an unjudged negative."""

COSINE_TEMPERATURE = 0.05
"""Temperature of the softmax over cosines."""


def torch_device(device: str | None) -> str:
    """The torch device to use: the given one; for None a GPU where there is one, otherwise the CPU."""
    torch: Any = import_extra("torch", "train")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


class BiEncoder:
    """A sentence encoder with mean pooling, in bfloat16 where the device is faster in it.

    Args:
        path: Directory or Hub id of the encoder.
        max_length: Tokens read of each text.
        device: A torch device; None chooses.
    """

    def __init__(self, path: str | os.PathLike[str], max_length: int = 160, device: str | None = None) -> None:
        self._torch: Any = import_extra("torch", "train")
        transformers: Any = import_extra("transformers", "train")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(os.fspath(path))
        self._device = torch_device(device)
        model = transformers.AutoModel.from_pretrained(os.fspath(path), attn_implementation="eager")
        self._model = model.eval().to(self._device)
        self._bf16 = native_bf16(self._device, "train")
        self._max_length = max_length

    def encode(self, texts: Sequence[str], progress: Progress | None = None, batch_tokens: int = 8192) -> Vectors:
        """Unit vectors, float32 (n, dim), in input order."""
        torch = self._torch
        if not texts:
            return np.zeros((0, self._model.config.hidden_size), dtype=np.float32)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self._max_length)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
        vectors = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        start = 0
        while start < len(order):
            # Widths are multiples of 32: each new shape compiles a kernel.
            width, end = 32, start
            while end < len(order):
                wider = -(-len(encoded[order[end]]) // 32) * 32
                if end > start and max(width, wider) * (end - start + 1) > batch_tokens:
                    break
                width, end = max(width, wider), end + 1
            rows = order[start:end]
            ids = torch.zeros((len(rows), width), dtype=torch.long)
            mask = torch.zeros((len(rows), width), dtype=torch.long)
            for position, row in enumerate(rows):
                ids[position, : len(encoded[row])] = torch.tensor(encoded[row])
                mask[position, : len(encoded[row])] = 1
            ids, mask = ids.to(self._device), mask.to(self._device)
            with (
                torch.inference_mode(),
                torch.autocast(self._device.split(":")[0], dtype=torch.bfloat16, enabled=self._bf16),
            ):
                hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            weight = mask.unsqueeze(-1).float()
            pooled = (hidden * weight).sum(1) / weight.sum(1)
            vectors[rows] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
            start = end
            if progress is not None:
                progress("encode", start / len(order))
        return vectors


def top(queries: Vectors, passages: Vectors, k: int) -> tuple[NDArray[np.int64], Vectors]:
    """The ``k`` nearest passages of each query by dot product, best first.

    Returns:
        Indices, int64, and similarities, float32, both of shape (n_queries, k).
    """
    torch: Any = import_extra("torch", "train")
    k = min(k, len(passages))
    # In parts: the similarities of all queries at once may not fit into memory.
    starts = range(0, max(len(queries), 1), 512)
    found = [torch.topk(torch.from_numpy(queries[at : at + 512] @ passages.T), k) for at in starts]
    values, indices = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return indices, values


def softmax(values: Sequence[float] | NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Softmax of ``values / temperature``."""
    special: Any = import_extra("scipy.special", "train")
    shares: NDArray[np.float64] = special.softmax(np.asarray(values, dtype=np.float64) / temperature)
    return shares


def labelled_groups(
    questions: Sequence[tuple[str, dict[str, float]]],
    query_vectors: Vectors,
    passages: Sequence[str],
    vectors: Vectors,
    *,
    size: int = 8,
    teacher_share: float = 0.4,
    seed: int = 0,
    barred: Sequence[set[str]] | None = None,
) -> list[Group]:
    """One positive and ``size - 1`` hard negatives for each judged query.

    Negatives are judged passages with lower labels, which keep their labels as gains, and the nearest unjudged ones.
    An unjudged passage must be at least `MARGIN` less similar than the positive. A more similar one is likely to be
    another answer, and a false negative teaches the wrong order.

    Args:
        questions: Queries with their judged passages; each query needs a positive.
        query_vectors: Their unit vectors, float32 (n_queries, dim).
        passages: All passages, judged ones included.
        vectors: Their unit vectors, float32 (n_passages, dim).
        size: Passages in a group.
        teacher_share: Weight in the target of the softmax of the encoder's cosines.
        seed: Seed of the sampling.
        barred: For each question, normalised texts that are not to become its negatives.

    Returns:
        The groups. Queries with fewer than ``size - 1`` negatives have none.
    """
    rng = random.Random(seed)
    place = {text: index for index, text in enumerate(passages)}
    near, near_values = top(query_vectors, vectors, 60)
    groups = []
    for row, (query, labels) in enumerate(questions):
        positives = sorted((t for t, label in labels.items() if label > 0), key=lambda t: -labels[t])
        positive = positives[0] if labels[positives[0]] > labels[positives[-1]] else rng.choice(positives)
        at = float(query_vectors[row] @ vectors[place[positive]])
        best = labels[positives[0]]
        taken = {normalise(t) for t in positives if labels[t] >= best} | (barred[row] if barred else set())
        judged = [(t, float(query_vectors[row] @ vectors[place[t]])) for t in labels if labels[t] < best]
        judged.sort(key=lambda item: -item[1])
        nearest = [(passages[i], float(v)) for i, v in zip(near[row], near_values[row], strict=True)]
        unjudged = [(text, cosine) for text, cosine in nearest if text not in labels and cosine < at - MARGIN]
        chosen: list[tuple[str, float]] = []
        _take(rng, judged, (size - 1) // 2, size, taken, chosen)
        _take(rng, unjudged, (size - len(chosen)) // 2, 16, taken, chosen)
        for source in (unjudged, judged):
            _take(rng, source, size - 1 - len(chosen), 60, taken, chosen)
        if len(chosen) < size - 1:
            # The encoder ranks the answer below nearly everything: random passages instead of its nearest.
            drawn = rng.sample(range(len(passages)), min(len(passages), 4 * size))
            others = [(passages[i], float(query_vectors[row] @ vectors[i])) for i in drawn if passages[i] not in labels]
            _take(rng, others, size - 1 - len(chosen), len(others), taken, chosen)
        if len(chosen) < size - 1:
            continue
        soft = softmax([at, *(value for _, value in chosen)], COSINE_TEMPERATURE)
        texts = (positive, *(t for t, _ in chosen))
        gains = tuple(labels.get(t, 0.0) for t in texts)
        target = teacher_share * soft + (1 - teacher_share) * np.array(gains) / sum(gains)
        groups.append(Group(query, texts, tuple(target.round(5).tolist()), gains))
    return groups


def _take(
    rng: random.Random,
    source: Sequence[tuple[str, float]],
    count: int,
    window: int,
    taken: set[str],
    chosen: list[tuple[str, float]],
) -> None:
    """Moves up to ``count`` random items of the first ``window`` new ones to ``chosen``."""
    pool = [item for item in source if normalise(item[0]) not in taken][:window]
    for item in rng.sample(pool, max(0, min(count, len(pool)))):
        if normalise(item[0]) not in taken:
            taken.add(normalise(item[0]))
            chosen.append(item)
