"""Groups to learn from: hard negatives, pseudo queries, and soft targets, all by one bi-encoder."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins._machine import bf16_is_slow
from rerank_plugins.training._data import Group, normalise

Progress = Callable[[str, float], None]
Vectors = NDArray[np.float32]

_WORD = re.compile(r"[^\W\d_][\w'-]+")


def torch_device(device: str | None) -> str:
    """The torch device that is meant: None is a GPU where there is one."""
    torch: Any = import_extra("torch", "train")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def native_bf16(device: str) -> bool:
    """Whether a torch device multiplies bfloat16 natively, and faster than float32; emulated, it is several times
    slower."""
    torch: Any = import_extra("torch", "train")
    kind = device.split(":")[0]
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    has = kind == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return has and not bf16_is_slow()


class BiEncoder:
    """A mean-pooled sentence encoder, in bf16 where the processor is faster in it.

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
        self._bf16 = native_bf16(self._device)
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
            # The longest of the batch decides its width, in steps of 32: each new shape costs a kernel
            # compilation.
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
    """The ``k`` nearest passages of each query by dot product, best first: indices and similarities, both (n,
    k)."""
    k = min(k, len(passages))
    if k == 0:
        return np.zeros((len(queries), 0), dtype=np.int64), np.zeros((len(queries), 0), dtype=np.float32)
    indices = np.zeros((len(queries), k), dtype=np.int64)
    values = np.zeros((len(queries), k), dtype=np.float32)
    for start in range(0, len(queries), 512):
        scores = queries[start : start + 512] @ passages.T
        part = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        found = np.take_along_axis(scores, part, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        indices[start : start + 512] = np.take_along_axis(part, order, axis=1)
        values[start : start + 512] = np.take_along_axis(found, order, axis=1)
    return indices, values


def softmax(values: Sequence[float] | NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Softmax of ``values / temperature``."""
    scaled = np.asarray(values, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    shares: NDArray[np.float64] = powers / powers.sum()
    return shares


def labelled_groups(
    questions: Sequence[tuple[str, dict[str, float]]],
    query_vectors: Vectors,
    own: Sequence[str],
    own_vectors: Vectors,
    pooled: Sequence[str],
    pooled_vectors: Vectors,
    *,
    size: int = 8,
    margin: float = 0.05,
    teacher_share: float = 0.4,
    temperature: float = 0.05,
    seed: int = 0,
    kind: str = "",
    graded: bool = False,
    barred: Sequence[set[str]] | None = None,
) -> list[Group]:
    """One positive and ``size - 1`` hard negatives for each judged query.

    Negatives are those judged, the nearest of the set's own passages and the nearest of a pooled corpus. A
    passage that nobody judged and that the encoder puts within ``margin`` of the positive, or above it, is
    likely to be another answer and is left out: false negatives teach the wrong lesson.

    Args:
        questions: Queries with their judged passages; every one needs a positive.
        query_vectors: Their unit vectors, (n, dim).
        own: The set's own passages, which hold every judged one.
        own_vectors: Their unit vectors.
        pooled: Passages of other sets.
        pooled_vectors: Their unit vectors.
        size: Passages in a group.
        margin: Smallest distance in cosine below the positive.
        teacher_share: Share of the target that follows the encoder's own cosines.
        temperature: Of the softmax over those cosines.
        seed: Seed of the sampling.
        kind: Recorded with each group.
        graded: Let passages of lower labels stand beside the positive, with their labels as gains and in the target.
        barred: Texts, as `normalise` gives them, that each question must not get as negatives.
    """
    rng = random.Random(seed)
    place = {text: index for index, text in enumerate(own)}
    near, near_values = top(query_vectors, own_vectors, 60)
    far, far_values = top(query_vectors, pooled_vectors, 40)
    groups = []
    for row, (query, labels) in enumerate(questions):
        positives = sorted((t for t, label in labels.items() if label > 0), key=lambda t: -labels[t])
        positive = positives[0] if labels[positives[0]] > labels[positives[-1]] else rng.choice(positives)
        at = float(query_vectors[row] @ own_vectors[place[positive]])
        below = labels[positives[0 if graded else -1]]
        taken = {normalise(t) for t in positives if labels[t] >= below} | (barred[row] if barred else set())
        judged = [(t, float(query_vectors[row] @ own_vectors[place[t]])) for t in labels if labels[t] < below]
        judged.sort(key=lambda item: -item[1])
        nearest = [(own[i], float(v)) for i, v in zip(near[row], near_values[row], strict=True)]
        other = [(pooled[i], float(v)) for i, v in zip(far[row], far_values[row], strict=True)]
        unjudged = [[x for x in source if x[0] not in labels and x[1] < at - margin] for source in (nearest, other)]
        chosen: list[tuple[str, float]] = []
        _take(rng, judged, (size - 1) // 2, size, taken, chosen)
        _take(rng, unjudged[0], (size - len(chosen)) // 2, 16, taken, chosen)
        _take(rng, unjudged[1], 2, 16, taken, chosen)
        for source in (unjudged[0], judged, unjudged[1]):
            _take(rng, source, size - 1 - len(chosen), 60, taken, chosen)
        if len(chosen) < size - 1:
            # Where the encoder puts the answer behind nearly everything, its nearest are no guide: any others.
            rest = [i for i in rng.sample(range(len(own)), min(len(own), 4 * size)) if own[i] not in labels]
            cosines = [(own[i], float(query_vectors[row] @ own_vectors[i])) for i in rest]
            _take(rng, cosines, size - 1 - len(chosen), len(cosines), taken, chosen)
        if len(chosen) < size - 1:
            continue
        soft = softmax([at, *(value for _, value in chosen)], temperature)
        texts = (positive, *(t for t, _ in chosen))
        gains = tuple(labels.get(t, 0.0) for t in texts) if graded else (1.0, *(0.0 for _ in chosen))
        target = teacher_share * soft + (1 - teacher_share) * np.array(gains) / sum(gains)
        groups.append(Group(query, texts, tuple(target.round(5).tolist()), gains, kind))
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
