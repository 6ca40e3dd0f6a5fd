"""The seam between the pipeline and the engines: pairs in, logits out."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rerank_plugins.backends._merge import SharedBatches
from rerank_plugins.backends.pairs import EncodedPair, PairEncoder
from rerank_plugins.batching import BatchCost
from rerank_plugins.errors import InputError, ScoringError

__all__ = ["Backend", "Batch", "LocalBackend", "Pair", "PairLogits", "PairScorer", "as_backend", "collate"]

Pair = tuple[str, str]
"""A query and a text."""


@runtime_checkable
class PairScorer(Protocol):
    """The least that `Reranker(model=...)` takes as a ready backend: any object with this method.

    It may have the attributes of `Backend` too: ``emits``, ``labels``, ``fingerprint`` and so on.
    """

    def score_pairs(self, pairs: Sequence[Pair]) -> NDArray[np.float32]:
        """Score (query, text) pairs.

        Args:
            pairs: (query, text) pairs; may be empty.

        Returns:
            float32, shape (n_pairs,) or (n_pairs, n_labels), input order: raw logits, or probabilities where the
            object has ``emits = "probability"``.
        """
        ...


class PairLogits(NamedTuple):
    """What an engine says of (query, text) pairs, input order."""

    logits: NDArray[np.float32]
    """Shape (n_pairs, n_labels): raw logits, or probabilities where `Backend.emits` says so."""
    truncated: NDArray[np.bool_]
    """Shape (n_pairs,): which texts or queries were cut. All False where the engine cannot tell."""


class Backend(ABC):
    """Scores pairs. Implementations are safe to call from many threads at once.

    Attributes:
        name: What `Reranker.backend_name` reports.
        precision: Number format of the arithmetic, e.g. ``"fp32"``.
        emits: ``"logit"``, or ``"probability"`` where an engine gives no logits. Declared, never guessed.
        labels: Names of the classes by column; empty where there is one score a pair or none is known.
        max_length: Longest pair in tokens; None where the backend does not tell.
        pairs_at_a_time: With a deadline, how many pairs are scored before the clock is looked at again; None for all,
            where the backend looks at `rerank_plugins._deadline.remaining_s` itself, or cannot stop.
        fingerprint: For the score cache: equal for two backends only if both give every pair the same logits under the
            same `name`, `precision`, maximum length and instruction. None where the backend does not tell.
    """

    name: str = "custom"
    precision: str = "fp32"
    emits: Literal["logit", "probability"] = "logit"
    labels: tuple[str, ...] = ()
    max_length: int | None = None
    fingerprint: str | None = None
    pairs_at_a_time: int | None = None

    @abstractmethod
    def logits(self, pairs: Sequence[Pair]) -> PairLogits:
        """Score pairs.

        Args:
            pairs: (query, text) pairs; may be empty.

        Returns:
            Logits and cuts of the pairs.

        Raises:
            InputError: A query leaves no room for the text.
            ScoringError: The engine failed.
        """

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Start and end character of each token of each text, without special tokens.

        Raises:
            InputError: The backend has no tokenizer here.
        """
        raise InputError(
            f"Token windows and token budgets need a local tokenizer, which the {self.name!r} backend does not have. "
            "Leave passage_length and max_tokens at None."
        )

    def configured(self, *, max_length: int | None, instruction: str | None, truncate_query: bool = False) -> Backend:
        """This backend with other settings and the same loaded weights."""
        return self


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded token ids of several pairs, int64, shape (n_pairs, n_tokens)."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]


class LocalBackend(Backend):
    """A backend that tokenises here: an engine adds only `forward`.

    Callers at the same time share batches, across all settings of one set of weights: a backend and what `configured`
    makes of it. `forward` is called by one thread at a time.

    Args:
        encoder: Tokenises pairs.
        token_budget: Largest padded batch, in tokens.
        batch_cost: What running a batch costs besides its tokens, in tokens; None is a full batch's, for which
            hardly any is split.
        labels: Names of the classes by column.
    """

    pairs_at_a_time = 8
    width_step = 1
    """Batches are padded to a multiple of so many tokens: more than 1 for engines that compile for each new shape."""

    def __init__(
        self,
        encoder: PairEncoder,
        *,
        token_budget: int,
        batch_cost: int | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        self.encoder = encoder
        self.token_budget = token_budget
        self.batch_cost = token_budget if batch_cost is None else batch_cost
        self.labels = tuple(labels)
        self._batches = SharedBatches()

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """Longest pair, in tokens."""
        return self.encoder.max_length

    @abstractmethod
    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits of one batch, shape (n_pairs, n_labels)."""

    def configured(
        self, *, max_length: int | None, instruction: str | None, truncate_query: bool = False
    ) -> LocalBackend:
        """This backend with another maximum length or instruction, sharing tokenizer and weights.

        Raises:
            ConfigurationError: `max_length` is more than the model takes, or leaves no room for a pair.
        """
        other = copy.copy(self)
        other.encoder = self.encoder.configured(
            max_length=max_length, instruction=instruction, truncate_query=truncate_query
        )
        return other

    def logits(self, pairs: Sequence[Pair]) -> PairLogits:
        """Score pairs; see `Backend.logits`."""
        encoded = self.encoder.encode(pairs)
        truncated = np.fromiter((pair.truncated for pair in encoded), dtype=np.bool_, count=len(encoded))
        if not encoded:
            return PairLogits(np.empty((0, max(1, len(self.labels))), dtype=np.float32), truncated)
        step = self.width_step
        cost = BatchCost(self.token_budget, self.batch_cost, step)
        logits = self._batches.score(encoded, lambda batch: self.forward(self.collate(batch, step)), cost)
        return PairLogits(logits, truncated)

    def collate(self, pairs: Sequence[EncodedPair], step: int = 1) -> Batch:
        """Pad pairs; see `collate`."""
        return collate(self.encoder, pairs, step)

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Start and end character of each token of each text, without special tokens."""
        return self.encoder.offsets(texts)


def collate(encoder: PairEncoder, pairs: Sequence[EncodedPair], step: int = 1) -> Batch:
    """Pad pairs to the longest one of them, and on to a multiple of `step` tokens if the model takes so many."""
    longest = max(len(pair.ids) for pair in pairs)
    width = max(longest, min(-(-longest // step) * step, encoder.max_length))
    shape = (len(pairs), width)
    ids = np.full(shape, encoder.pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    types = np.full(shape, encoder.pad_type_id, dtype=np.int64)
    for row, pair in enumerate(pairs):
        n = len(pair.ids)
        place = slice(width - n, width) if encoder.pad_left else slice(0, n)
        ids[row, place] = pair.ids
        mask[row, place] = 1
        types[row, place] = pair.type_ids
    return Batch(ids, mask, types)


def as_backend(scorer: Any) -> Backend:
    """A ready backend object as a `Backend`: itself, or a thin wrapper around its `score_pairs`."""
    return scorer if isinstance(scorer, Backend) else _Wrapped(scorer)


class _Wrapped(Backend):
    """Somebody's object: what it returns is brought to the shape of the seam here, and nowhere else."""

    def __init__(self, scorer: PairScorer) -> None:
        self.scorer = scorer
        self.name = str(getattr(scorer, "name", type(scorer).__name__))
        self.precision = str(getattr(scorer, "precision", "unknown"))
        self.emits = getattr(scorer, "emits", "logit")
        self.labels = tuple(getattr(scorer, "labels", ()))
        self.max_length = getattr(scorer, "max_length", None)
        self.fingerprint = getattr(scorer, "fingerprint", None)

    def logits(self, pairs: Sequence[Pair]) -> PairLogits:
        try:
            scores = np.asarray(self.scorer.score_pairs(pairs), dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ScoringError(
                f"score_pairs of the {self.name!r} backend must return numbers, shape ({len(pairs)},) or "
                f"({len(pairs)}, n_labels): {error}"
            ) from error
        if scores.ndim not in (1, 2) or len(scores) != len(pairs):
            raise ScoringError(
                f"score_pairs of the {self.name!r} backend must return shape ({len(pairs)},) or "
                f"({len(pairs)}, n_labels); it returned {scores.shape}."
            )
        matrix = scores if scores.ndim == 2 else scores[:, None]
        return PairLogits(matrix, np.zeros(len(pairs), dtype=np.bool_))
