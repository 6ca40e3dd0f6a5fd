"""For tests of code that reranks: a backend without a model, and the contract that every backend keeps."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from rerank_plugins.backends.base import Backend, Pair, PairLogits, as_backend

__all__ = ["FakeBackend", "check_backend_contract", "word_overlap"]


def word_overlap(query: str, text: str) -> float:
    """A logit that a reader can predict: words in common, minus a hundredth of the words of the text."""
    words = text.lower().split()
    return float(len(set(query.lower().split()) & set(words))) - 0.01 * len(words)


class FakeBackend(Backend):
    """Scores by a function instead of a model, and remembers what it was asked.

    Args:
        logit: Called with (query, text); returns a logit, or one for each class.
        labels: Names of the classes, where `logit` returns several.
        emits: ``"probability"`` where `logit` returns probabilities.
        fingerprint: What a score cache knows it by; None makes one that no other backend has.

    Attributes:
        calls: The pairs of each call, in order.

    Example:
        >>> from rerank_plugins import Reranker
        >>> Reranker(FakeBackend()).rank("red fox", ["blue whale", "a red fox"])[0].text
        'a red fox'
    """

    name = "fake"

    def __init__(
        self,
        logit: Callable[[str, str], float | Sequence[float]] = word_overlap,
        *,
        labels: Sequence[str] = (),
        emits: Literal["logit", "probability"] = "logit",
        fingerprint: str | None = None,
    ) -> None:
        self.logit = logit
        self.labels = tuple(labels)
        self.emits = emits
        self.fingerprint = uuid.uuid4().hex if fingerprint is None else fingerprint
        self.calls: list[list[Pair]] = []

    def logits(self, pairs: Sequence[Pair]) -> PairLogits:
        """Score pairs with the function."""
        self.calls.append(list(pairs))
        scores = np.asarray([self.logit(query, text) for query, text in pairs], dtype=np.float32)
        width = max(1, len(self.labels)) if scores.ndim == 1 else scores.shape[1]
        return PairLogits(scores.reshape(len(pairs), width), np.zeros(len(pairs), dtype=np.bool_))


_PAIRS: list[Pair] = [
    ("what is a panda?", "The giant panda is a bear that lives in China."),
    ("what is a panda?", "Paris is the capital of France."),
    ("什么是大熊猫？", "大熊猫是一种生活在中国的熊。"),
    ("emoji \U0001f43c?", "A panda \U0001f43c eats bamboo \U0001f38b, \u00e9t\u00e9 comme hiver."),
    ("what is a panda?", "bamboo " * 60),
    ("x", "y"),
]


def check_backend_contract(backend: object, *, tolerance: float = 1e-4) -> None:
    """Assert what `Reranker` relies on. Call it from a test with a ready backend of your own.

    Checks that no pairs give no scores, that scores are finite float32 in input order, that a pair scores the same
    alone, in any company and in any order, and that calls from several threads do not disturb each other.

    Args:
        backend: A `Backend`, or an object with ``score_pairs``.
        tolerance: Largest difference between two scores of the same pair.

    Raises:
        AssertionError: The contract is broken; the message says where.
    """
    from concurrent.futures import ThreadPoolExecutor

    scorer = as_backend(backend)
    assert len(scorer.logits([]).logits) == 0, "no pairs must give no logits"
    together, truncated = scorer.logits(_PAIRS)
    assert together.dtype == np.float32, f"expected float32, got {together.dtype}"
    assert together.ndim == 2, f"expected shape (n, n_labels), got {together.shape}"
    assert len(together) == len(_PAIRS), f"expected {len(_PAIRS)} rows, got {len(together)}"
    assert truncated.shape == (len(_PAIRS),), f"expected one mark a pair, got shape {truncated.shape}"
    assert np.isfinite(together).all(), "scores must be finite"
    assert scorer.emits in ("logit", "probability"), f"emits must be 'logit' or 'probability', got {scorer.emits!r}"
    if scorer.emits == "probability":
        assert ((together >= 0) & (together <= 1)).all(), "emits='probability', but a score is not in 0..1"
    for i, pair in enumerate(_PAIRS):
        alone = scorer.logits([pair]).logits[0]
        same = np.allclose(alone, together[i], atol=tolerance)
        assert same, f"pair {i} scores {alone} alone, {together[i]} in a batch"
    backwards = scorer.logits(_PAIRS[::-1]).logits[::-1]
    assert np.allclose(backwards, together, atol=tolerance), "scores must follow the input order"
    twice = scorer.logits([*_PAIRS, *_PAIRS]).logits
    assert np.allclose(twice[: len(_PAIRS)], twice[len(_PAIRS) :], atol=tolerance), "equal pairs must score equally"
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(scorer.logits, [_PAIRS] * 16):
            assert np.allclose(result.logits, together, atol=tolerance), "threads disturb each other"
