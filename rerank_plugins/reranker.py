"""The whole pipeline behind `Reranker`: load, score, rank; for one query or many, sync and async."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, Concatenate, ParamSpec

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._requests import Request, checked_candidates, checked_query, until
from rerank_plugins._secrets import without_passwords
from rerank_plugins._threads import in_thread
from rerank_plugins.pipeline import TextLogits, cache_digest
from rerank_plugins.rank import rank_requests
from rerank_plugins.ranking import scores
from rerank_plugins.scorer import Scorer
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


class Reranker(Scorer):
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

    def pair_logits(self, pairs: Sequence[tuple[str, str]]) -> TextLogits:
        """Logits of (query, text) pairs of any queries, in shared batches, and which texts were cut.

        Args:
            pairs: The pairs, in any order.

        Returns:
            ``logits``, float64, shape (n_pairs,), as `logits` gives them; ``truncated``, bool, shape (n_pairs,).

        Raises:
            InputError: A query is blank or too long, or something is no string.
            ScoringError: The engine failed, or a logit is not finite.
        """
        checked_candidates([text for _, text in pairs])
        return self._pair_logits([(checked_query(query), text) for query, text in pairs])

    def rank(
        self,
        query: str,
        candidates: Iterable[str | Candidate],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
        deadline_s: float | None = None,
        compress: bool | float = False,
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
            compress: Keep of the texts their relevant spans alone, which are sentences, or the windows of
                ``passage_length``: True for those that are nearly as good as the best one, at most 35 % of all
                characters; a number for the best ones up to that share. A text without any is left out, one of a single
                span stays. `max_tokens` then holds for what is left: the best spans of all texts until it is full.
                `RankedCandidate.excerpt` is the text that is left.

        Returns:
            The kept candidates, best first. Equal logits keep the order of the first stage; what was not scored
            follows, and blank texts come last.

        Raises:
            ConfigurationError: `top_n` or `max_tokens` is below 1, `min_score` is no number, or `compress` no share.
            InputError: The query is blank or too long, or a candidate is no text.
            ScoringError: The engine failed, or a logit is not finite.
            ServerError: A server failed, and ``on_error`` says to raise it.
        """
        limits = Limits(top_n, min_score, max_tokens, compress)
        return self._rank_until(until(deadline_s), [(query, candidates)], limits)[0]

    def rank_many(
        self,
        requests: Iterable[Request],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
        deadline_s: float | None = None,
        compress: bool | float = False,
    ) -> list[Ranking]:
        """Rank the candidates of several queries; the pairs of all queries share batches.

        Args:
            requests: (query, candidates) pairs, each as `rank` takes them.
            top_n: Keep the best this many of each query; None keeps all.
            min_score: Keep those that score at least this; None keeps all.
            max_tokens: Keep the best ones of each query until their tokens exceed this; None keeps all.
            deadline_s: Seconds after which scoring stops, for all requests together; see `rank`.
            compress: Keep of each text its relevant spans alone; see `rank`.

        Returns:
            One ranking a request, in their order.

        Raises:
            ConfigurationError: As for `rank`.
            InputError: As for `rank`.
            ScoringError: As for `rank`.
        """
        return self._rank_until(until(deadline_s), requests, Limits(top_n, min_score, max_tokens, compress))

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
        compress: bool | float = False,
    ) -> Ranking:
        """As `rank`, without blocking the event loop. Cancelling it ends the work after the batch that runs."""
        limits = Limits(top_n, min_score, max_tokens, compress)
        return (await in_thread(self._rank_until, until(deadline_s), [(query, candidates)], limits))[0]

    async def arank_many(
        self,
        requests: Iterable[Request],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
        deadline_s: float | None = None,
        compress: bool | float = False,
    ) -> list[Ranking]:
        """As `rank_many`, without blocking the event loop. Cancelling it ends the work after the batch that runs."""
        # From now, not from when a thread is free.
        limits = Limits(top_n, min_score, max_tokens, compress)
        return await in_thread(self._rank_until, until(deadline_s), requests, limits)

    def _rank_until(self, until: float | None, requests: Iterable[Request], limits: Limits) -> list[Ranking]:
        # Every ranking comes by here, in the thread that does the work.
        return rank_requests(self, requests, limits, until)

    def _text_logits(self, query: str, texts: Sequence[str]) -> TextLogits:
        query = checked_query(query)
        return self._pair_logits([(query, item.scored_text) for item in checked_candidates(texts)])


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
