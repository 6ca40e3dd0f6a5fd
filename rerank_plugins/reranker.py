"""The whole pipeline behind `Reranker`: load, score, rank; for one query or many, sync and async."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any, Concatenate, ParamSpec

import numpy as np
from numpy.typing import NDArray

from rerank_plugins import selection
from rerank_plugins._texts import is_blank
from rerank_plugins._threads import in_thread
from rerank_plugins.backends import Backend, Pair, as_backend, load_backend
from rerank_plugins.cache import ScoreCache
from rerank_plugins.errors import InputError
from rerank_plugins.pipeline import TextLogits, cache_digest, class_column, score_pairs
from rerank_plugins.settings import Settings, documentation
from rerank_plugins.types import Candidate, RankedCandidate, Ranking

__all__ = ["Reranker"]

P = ParamSpec("P")
Request = tuple[str, Iterable[str | Candidate]]
"""A query and its candidates, in the order of the first stage."""


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

    def __repr__(self) -> str:
        given = {**self.settings.changed(), "model": self.model_name}
        if (backend := self._backend) is not None:
            # What was chosen, where "auto" was asked for.
            given |= {"backend": backend.name, "precision": backend.precision}
        return f"Reranker({', '.join(f'{key}={given[key]!r}' for key in sorted(given, key=_KEYWORDS.index))})"

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], Reranker], tuple[dict[str, Any]]]:
        # Configuration alone: a copy in another process loads the model itself.
        return _from_config, (self.config,)

    def __copy__(self) -> Reranker:
        copied = Reranker.__new__(Reranker)
        copied._start(self.settings, self._cache)
        return copied

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
            ConfigurationError: A keyword that this model cannot do.
        """
        self._cache_digest(self._loaded())
        return self

    def close(self) -> None:
        """Let go of the model. Its memory is freed once no other reranker uses it; the next use loads it again."""
        if self._cache is not None:
            self._cache.close()
        with self._lock:
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
        with self._lock:
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
        return self._scores(self._text_logits(query, texts).logits)

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
    ) -> Ranking:
        """Rank candidates by relevance to a query.

        Args:
            query: The query.
            candidates: Strings or `Candidate`s, in the order of the first stage.
            top_n: Keep the best this many; None keeps all.
            min_score: Keep those that score at least this, in the scale of this reranker; None keeps all.
            max_tokens: Keep the best ones until their tokens exceed this; None keeps all.

        Returns:
            The kept candidates, best first. Equal logits keep the order of the first stage; blank texts come last.

        Raises:
            ConfigurationError: `top_n` or `max_tokens` is below 1, or `min_score` is no number.
            InputError: The query is blank or too long, or a candidate is no text.
            ScoringError: The engine failed, or a logit is not finite.
        """
        return self.rank_many([(query, candidates)], top_n, min_score, max_tokens=max_tokens)[0]

    def rank_many(
        self,
        requests: Iterable[Request],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
    ) -> list[Ranking]:
        """Rank the candidates of several queries; the pairs of all queries share batches.

        Args:
            requests: (query, candidates) pairs, each as `rank` takes them.
            top_n: Keep the best this many of each query; None keeps all.
            min_score: Keep those that score at least this; None keeps all.
            max_tokens: Keep the best ones of each query until their tokens exceed this; None keeps all.

        Returns:
            One ranking a request, in their order.

        Raises:
            ConfigurationError: As for `rank`.
            InputError: As for `rank`.
            ScoringError: As for `rank`.
        """
        selection.check_limits(top_n, min_score, max_tokens)
        jobs = [(_checked_query(query), _checked_candidates(candidates)) for query, candidates in requests]
        scored = self._pair_logits([(query, item.text) for query, items in jobs for item in items])
        rankings = []
        start = 0
        for query, items in jobs:
            own = slice(start, start + len(items))
            start += len(items)
            part = TextLogits(scored.logits[own], scored.truncated[own])
            rankings.append(self._ranking(query, items, part, top_n, min_score, max_tokens))
        return rankings

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
    ) -> Ranking:
        """As `rank`, without blocking the event loop. Cancelling it ends the work after the batch that runs."""
        return await in_thread(self.rank, query, candidates, top_n, min_score, max_tokens=max_tokens)

    async def arank_many(
        self,
        requests: Iterable[Request],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
    ) -> list[Ranking]:
        """As `rank_many`, without blocking the event loop. Cancelling it ends the work after the batch that runs."""
        return await in_thread(self.rank_many, requests, top_n, min_score, max_tokens=max_tokens)

    def _text_logits(self, query: str, texts: Sequence[str]) -> TextLogits:
        query = _checked_query(query)
        return self._pair_logits([(query, item.text) for item in _checked_candidates(texts)])

    def _pair_logits(self, pairs: Sequence[Pair]) -> TextLogits:
        # Nothing to score, nothing to load.
        if all(is_blank(text) for _, text in pairs):
            blank = np.full(len(pairs), selection.BLANK_LOGIT)
            return TextLogits(blank, np.zeros(len(pairs), dtype=np.bool_))
        backend = self._loaded()
        return score_pairs(backend, self._cache, self._cache_digest(backend), self.settings, pairs)

    def _scores(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        calibration = self.settings.calibration
        if calibration is not None:
            logits = np.where(logits > selection.BLANK_LOGIT, calibration(logits), logits)
        return selection.to_scale(logits, self.settings.scale)

    def _ranking(
        self,
        query: str,
        items: Sequence[Candidate],
        scored: TextLogits,
        top_n: int | None,
        min_score: float | None,
        max_tokens: int | None,
    ) -> Ranking:
        scores = self._scores(scored.logits)
        kept = selection.select(selection.order(scored.logits), scores, min_score=min_score, top_n=top_n)
        if max_tokens is not None and kept:
            kept = selection.within_tokens(
                kept, lambda some: self._token_counts([items[i].text for i in some]), max_tokens
            )
        return Ranking(
            query=query,
            items=tuple(
                RankedCandidate(
                    candidate=items[i],
                    score=float(scores[i]),
                    logit=float(scored.logits[i]),
                    index=i,
                    rank=rank,
                    truncated=bool(scored.truncated[i]),
                )
                for rank, i in enumerate(kept, start=1)
            ),
            model=self.model_name,
            scale=self.settings.scale,
        )

    def _token_counts(self, texts: Sequence[str]) -> list[int]:
        return [len(offsets) for offsets in self._loaded().token_offsets(texts)]


def _checked_query(query: object) -> str:
    if not isinstance(query, str):
        raise InputError(f"query must be a str, got {type(query).__name__}.")
    if is_blank(query):
        raise InputError(f"query must have at least one visible character; got a blank one: {query[:80]!r}.")
    return query


def _checked_candidates(candidates: Iterable[str | Candidate]) -> list[Candidate]:
    if isinstance(candidates, str | bytes | Candidate):
        raise InputError(
            f"Expected several candidates, got one {type(candidates).__name__}. Put it into a list: [candidate]."
        )
    if isinstance(candidates, Mapping | set | frozenset) or not isinstance(candidates, Iterable):
        raise InputError(
            "candidates must be a list, or another iterable in the order of the first stage; got "
            f"{type(candidates).__name__}. For a mapping: [Candidate(text, id=key) for key, text in mapping.items()]."
        )
    result = []
    for i, item in enumerate(candidates):
        if isinstance(item, Candidate):
            result.append(item)
        elif isinstance(item, str):
            result.append(Candidate(item))
        else:
            raise InputError(
                f"Candidate {i} must be a str or a Candidate, got {type(item).__name__}. For LangChain Documents and "
                "LlamaIndex nodes use rerank_plugins.langchain and rerank_plugins.llama_index."
            )
    return result


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
