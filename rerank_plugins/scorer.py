"""What is behind a `Reranker`: a model that is loaded at its first use, and the cache of its scores."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rerank_plugins._fork import fork_waits
from rerank_plugins._texts import is_blank
from rerank_plugins.backends import Backend, Pair, as_backend, load_backend
from rerank_plugins.cache import ScoreCache
from rerank_plugins.pipeline import TextLogits, cache_digest, class_column, score_pairs
from rerank_plugins.settings import Settings

__all__ = ["Scorer"]


class Scorer:
    """A model by its settings: loads it, scores pairs with it, and lets it go.

    Attributes:
        settings: What decides the scores.
    """

    settings: Settings

    def _start(self, settings: Settings, cache: ScoreCache | None = None) -> None:
        self.settings = settings
        if cache is None and settings.cache is not None:
            cache = ScoreCache(settings.cache)
        self._cache = cache
        self._lock = threading.Lock()
        self._backend: Backend | None = None
        self._shared: Backend | None = None
        self._digest: tuple[Backend, bytes] | None = None

    def prepare(self) -> Self:
        """Load the model now rather than at the first use.

        Returns:
            Itself.

        Raises:
            ModelLoadError: The model is missing, incomplete or unreadable.
            MissingDependencyError: The backend that was asked for is not installed.
            ConfigurationError: A keyword that this model cannot do, or a file as cache that is something else. A cache
                that cannot be used is told by a warning: scoring goes on without it.
        """
        self._cache_digest(self._loaded())
        if self._cache is not None:
            self._cache.prepare()
        return self

    def close(self) -> None:
        """Let go of the model. Its memory is freed once no other reranker uses it; the next use loads it again."""
        if self._cache is not None:
            self._cache.close()
        with fork_waits(), self._lock:
            self._backend = self._shared = self._digest = None

    def __enter__(self) -> Self:
        return self.prepare()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _loaded(self) -> Backend:
        backend = self._backend
        if backend is not None:
            return backend
        with fork_waits(), self._lock:
            if self._backend is None:
                settings = self.settings
                # Held as it was loaded, so that the next reranker of this model finds it.
                self._shared = as_backend(settings.model) if settings.ready else load_backend(settings)
                backend = self._shared.configured(
                    max_length=settings.max_length,
                    instruction=settings.instruction,
                    truncate_query=settings.truncate_query,
                )
                if backend.labels:
                    class_column(settings, len(backend.labels), backend.labels)
                self._backend = backend
            return self._backend

    def _cache_digest(self, backend: Backend) -> bytes:
        """What the cache knows this backend and these settings by; empty without a cache."""
        if self._cache is None:
            return b""
        known = self._digest
        # Kept with its backend: after `close`, another one may be loaded.
        if known is None or known[0] is not backend:
            self._digest = known = (backend, cache_digest(backend, self.settings))
        return known[1]

    def _pair_logits(
        self, pairs: Sequence[Pair], until: float | None = None, headers: Sequence[int] = ()
    ) -> TextLogits:
        # Nothing to score, nothing to load.
        if all(is_blank(text) for _, text in pairs):
            return TextLogits.blank(len(pairs))
        backend = self._loaded()
        return score_pairs(backend, self._cache, self._cache_digest(backend), self.settings, pairs, until, headers)

    def _token_counts(self, texts: Sequence[str]) -> list[int]:
        return [len(offsets) for offsets in self._loaded().token_offsets(texts)]
