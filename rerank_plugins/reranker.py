"""The whole pipeline behind `Reranker`: load, score, rank; for one query or many, sync and async."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Concatenate, ParamSpec

import numpy as np
from numpy.typing import NDArray

from rerank_plugins import selection
from rerank_plugins._fork import fork_waits
from rerank_plugins._requests import Request, checked_candidates, checked_query, until
from rerank_plugins._secrets import without_passwords
from rerank_plugins._texts import is_blank
from rerank_plugins._threads import in_thread
from rerank_plugins.backends import Backend, Pair, as_backend, load_backend
from rerank_plugins.cache import ScoreCache
from rerank_plugins.errors import is_passing
from rerank_plugins.pipeline import TextLogits, cache_digest, class_column, score_pairs
from rerank_plugins.ranking import make_ranking, scores
from rerank_plugins.settings import Settings, documentation
from rerank_plugins.types import Candidate, Limits, Ranking

__all__ = ["Reranker"]

P = ParamSpec("P")


def _takes(
    settings: Callable[P, Settings],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Reranker, P], None]]:
    """Gives an `__init__` the keywords of `Settings`, for type checkers and for `inspect.signature`."""

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Reranker, P], None]:
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        given = inspect.signature(settings).parameters.values()
        init.__signature__ = inspect.Signature([own, *given], return_annotation=None)  # type: ignore[attr-defined]
        return init

    return decorate


class Reranker:
    """Scores (query, text) pairs with a cross-encoder and ranks by the score.

    Making one loads and downloads nothing; the first use does, or `prepare`. Rerankers of the same model share one
    loaded copy. All methods are safe to call from many threads and tasks at once.

    Raises:
        ConfigurationError: A keyword that cannot work, whatever the model.

    Example:
        >>> from rerank_plugins import Reranker
        >>> ranking = Reranker().rank("how do I undo a commit", ["git add stages files", "git revert undoes a commit"])
        >>> ranking[0].text
        'git revert undoes a commit'
    """

    @_takes(Settings)
    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._start(Settings(*args, **keywords))

    def _start(self, settings: Settings, cache: ScoreCache | None = None) -> None:
        self.settings = settings
        if cache is None and settings.cache is not None:
            cache = ScoreCache(settings.cache)
        self._cache = cache
        self._lock = threading.Lock()
        self._backend: Backend | None = None
        self._shared: Backend | None = None
        self._digest: tuple[Backend, bytes] | None = None

    # -- settings -----------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The keywords this reranker was made with: ``Reranker(**reranker.config)`` makes another one like it."""
        return self.settings.keywords()

    @property
    def scale(self) -> str:
        """What the scores mean: ``"probability"`` or ``"logit"``."""
        return self.settings.scale

    @property
    def model_name(self) -> str:
        """Name of the model, for rankings, traces and logs. Loads nothing."""
        return self.settings.model_name

    @property
    def backend_name(self) -> str:
        """The engine that was chosen: ``"onnx"``, ``"openvino"``, ``"torch"`` or a ready backend's name.

        Loads the model if it is not.
        """
        return self._loaded().name

    @property
    def precision(self) -> str:
        """The number format that was chosen, e.g. ``"fp32"``. Loads the model if it is not."""
        return self._loaded().precision

    @property
    def max_length(self) -> int | None:
        """Most tokens of a pair; None where the backend does not tell. Loads the model if it is not."""
        return self._loaded().max_length

    @property
    def fingerprint(self) -> str | None:
        """Equal for two rerankers only if they give every pair the same logits; None where the backend does not tell.

        Loads the model if it is not.
        """
        backend = self._loaded()
        return cache_digest(backend, self.settings).hex() if backend.fingerprint else None

    def __repr__(self) -> str:
        given = {**self.settings.changed(), "model": self.model_name}
        if (backend := self._backend) is not None:
            # What was chosen, where "auto" was asked for.
            given |= {"backend": backend.name, "precision": backend.precision}
        shown = (f"{key}={given[key]!r}" for key in sorted(given, key=_KEYWORDS.index))
        # A store's own repr may have the address it is connected to.
        return without_passwords(f"Reranker({', '.join(shown)})")

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], Reranker], tuple[dict[str, Any]]]:
        # Configuration alone: a copy in another process loads the model itself.
        return _from_config, (self.config,)

    def __copy__(self) -> Reranker:
        copied = Reranker.__new__(Reranker)
        copied._start(self.settings, self._cache)
        return copied

    def _relative(self, settings: Settings) -> Reranker:
        """Another one with other settings, and with the same cache where that setting is the same."""
        other = Reranker.__new__(Reranker)
        other._start(settings, self._cache if settings.cache == self.settings.cache else None)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Reranker:
        # A ready backend and a cache are shared, as loaded weights are.
        return self.__copy__()

    # -- life ---------------------------------------------------------------------------------------------------

    def prepare(self) -> Reranker:
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

    def __enter__(self) -> Reranker:
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

    # -- scoring ------------------------------------------------------------------------------------------------

    def score(self, query: str, texts: Sequence[str]) -> NDArray[np.float64]:
        """Scores of texts for a query, in the scale of this reranker.

        Args:
            query: The query.
            texts: The texts, in any order.

        Returns:
            float64, shape (n_texts,), input order. A blank text has probability 0.0, or `selection.BLANK_LOGIT`.

        Raises:
            InputError: The query is blank or too long, or something is no string.
            ScoringError: The engine failed, or a logit is not finite.
        """
        return scores(self.settings, self._text_logits(query, texts).logits)

    def logits(self, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
        """Raw logits of texts for a query, or the log-odds of the chosen class.

        Args:
            query: The query.
            texts: The texts, in any order.

        Returns:
            float32, shape (n_texts,), input order. A blank text has `selection.BLANK_LOGIT`: no model has seen it.

        Raises:
            InputError: The query is blank or too long, or something is no string.
            ScoringError: The engine failed, or a logit is not finite.
        """
        return self._text_logits(query, texts).logits.astype(np.float32)

    def rank(
        self,
        query: str,
        candidates: Iterable[str | Candidate],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
        deadline_s: float | None = None,
    ) -> Ranking:
        """Rank candidates by relevance to a query.

        Args:
            query: The query.
            candidates: Strings or `Candidate`s, in the order of the first stage.
            top_n: Keep the best this many; None keeps all.
            min_score: Keep those that score at least this, in the scale of this reranker; None keeps all.
            max_tokens: Keep the best ones until their tokens exceed this; None keeps all.
            deadline_s: Seconds after which scoring stops. Texts are then scored in the order of the first stage, and
                those that were not scored follow in that order, exempt from `min_score`. Loading the model counts:
                `prepare` does it before. None waits for all.

        Returns:
            The kept candidates, best first. Equal logits keep the order of the first stage; what was not scored
            follows, and blank texts come last.

        Raises:
            ConfigurationError: `top_n` or `max_tokens` is below 1, or `min_score` is no number.
            InputError: The query is blank or too long, or a candidate is no text.
            ScoringError: The engine failed, or a logit is not finite.
            ServerError: A server failed, and ``on_error`` says to raise it.
        """
        return self.rank_many([(query, candidates)], top_n, min_score, max_tokens=max_tokens, deadline_s=deadline_s)[0]

    def rank_many(
        self,
        requests: Iterable[Request],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
        deadline_s: float | None = None,
    ) -> list[Ranking]:
        """Rank the candidates of several queries; the pairs of all queries share batches.

        Args:
            requests: (query, candidates) pairs, each as `rank` takes them.
            top_n: Keep the best this many of each query; None keeps all.
            min_score: Keep those that score at least this; None keeps all.
            max_tokens: Keep the best ones of each query until their tokens exceed this; None keeps all.
            deadline_s: Seconds after which scoring stops, for all requests together; see `rank`.

        Returns:
            One ranking a request, in their order.

        Raises:
            ConfigurationError: As for `rank`.
            InputError: As for `rank`.
            ScoringError: As for `rank`.
        """
        return self._rank_until(until(deadline_s), requests, Limits(top_n, min_score, max_tokens))

    async def ascore(self, query: str, texts: Sequence[str]) -> NDArray[np.float64]:
        """As `score`, without blocking the event loop. Cancelling it ends the work after the batch that runs."""
        return await in_thread(self.score, query, texts)

    async def alogits(self, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `logits`, without blocking the event loop. Cancelling it ends the work after the batch that runs."""
        return await in_thread(self.logits, query, texts)

    async def arank(
        self,
        query: str,
        candidates: Iterable[str | Candidate],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
        deadline_s: float | None = None,
    ) -> Ranking:
        """As `rank`, without blocking the event loop. Cancelling it ends the work after the batch that runs."""
        requests = [(query, candidates)]
        return (await self.arank_many(requests, top_n, min_score, max_tokens=max_tokens, deadline_s=deadline_s))[0]

    async def arank_many(
        self,
        requests: Iterable[Request],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
        deadline_s: float | None = None,
    ) -> list[Ranking]:
        """As `rank_many`, without blocking the event loop. Cancelling it ends the work after the batch that runs."""
        # From now, not from when a thread is free.
        return await in_thread(self._rank_until, until(deadline_s), requests, Limits(top_n, min_score, max_tokens))

    def _rank_until(self, until: float | None, requests: Iterable[Request], limits: Limits) -> list[Ranking]:
        selection.check_limits(*limits)
        jobs = [(checked_query(query), checked_candidates(candidates)) for query, candidates in requests]
        pairs = [(query, item.scored_text) for query, items in jobs for item in items]
        headers = [len(item.header) for _, items in jobs for item in items]
        fallback = None
        try:
            scored = self._pair_logits(pairs, until, headers)
        except Exception as error:
            other = self.settings.on_error
            if other == "raise" or not is_passing(error):
                raise
            fallback = f"{self.model_name} failed ({type(error).__name__}: {error})"
            _say(fallback)
            if other != "keep_order":
                left = None if until is None else max(1e-3, until - time.monotonic())
                ranked = other.rank_many(jobs, *limits[:2], max_tokens=limits.max_tokens, deadline_s=left)
                return [
                    replace(one, fallback=f"{fallback}; {one.fallback or 'ranked by ' + one.model}") for one in ranked
                ]
            scored = TextLogits.blank(len(pairs))
            scored.scored[[not is_blank(text) for _, text in pairs]] = False
        rankings = []
        start = 0
        for query, items in jobs:
            own = slice(start, start + len(items))
            start += len(items)
            part = TextLogits(scored.logits[own], scored.truncated[own], scored.scored[own])
            late = int((~part.scored).sum())
            reason = fallback or f"time was up: {late} of {len(items)} candidates were not scored"
            count = functools.partial(self._token_counts, items)
            rankings.append(make_ranking(self.settings, query, items, part, limits, count, reason if late else None))
        return rankings

    def _text_logits(self, query: str, texts: Sequence[str]) -> TextLogits:
        query = checked_query(query)
        return self._pair_logits([(query, item.scored_text) for item in checked_candidates(texts)])

    def _pair_logits(
        self, pairs: Sequence[Pair], until: float | None = None, headers: Sequence[int] = ()
    ) -> TextLogits:
        # Nothing to score, nothing to load.
        if all(is_blank(text) for _, text in pairs):
            return TextLogits.blank(len(pairs))
        backend = self._loaded()
        return score_pairs(backend, self._cache, self._cache_digest(backend), self.settings, pairs, until, headers)

    def _token_counts(self, items: Sequence[Candidate], some: Sequence[int]) -> list[int]:
        return [len(offsets) for offsets in self._loaded().token_offsets([items[i].scored_text for i in some])]


_last_said = -math.inf


def _say(fallback: str) -> None:
    """One warning a minute: a server that is down is no news with every call."""
    global _last_said
    if time.monotonic() - _last_said > 60:
        _last_said = time.monotonic()
        logging.getLogger("rerank_plugins").warning("Not reranked: %s", fallback)


_KEYWORDS = [option.name for option in fields(Settings)]


def _from_config(config: dict[str, Any]) -> Reranker:
    return Reranker(**config)


Reranker.__doc__ = (Reranker.__doc__ or "").replace(
    "    Raises:",
    "    Args:\n"
    + "\n".join(f"        {option.name}: {documentation(option)}" for option in fields(Settings))
    + "\n\n    Raises:",
    1,
)
