"""Scoring in a process of its own: a pair that kills it, by a bug or by its memory, costs no other pair."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rerank_plugins.backends import Pair
from rerank_plugins.bulk.rows import RowScores, isolating, score_rows
from rerank_plugins.errors import ConfigurationError, ModelLoadError, ScoringError

__all__ = ["ScoringProcess", "pickled"]

_DEATHS = 32
"""Deaths in a row, without any pair scored between them, after which it is not the pairs: a block of 4,096 is halved
twelve times."""


class ScoringProcess:
    """A reranker in a process of its own. The model is loaded there at first use, and again after each death.

    Args:
        reranker: A `Reranker`, pickled: its settings.

    Example:
        >>> import pickle
        >>> from rerank_plugins import Reranker
        >>> from rerank_plugins.bulk import ScoringProcess
        >>> with ScoringProcess(pickle.dumps(Reranker())) as process:  # doctest: +SKIP
        ...     process.score_rows(["red fox"], ["a red fox"]).errors
        [None]
    """

    def __init__(self, reranker: bytes) -> None:
        self._reranker = reranker
        self._pool: ProcessPoolExecutor | None = None
        self._deaths = 0

    def score_rows(self, queries: Sequence[Any], texts: Sequence[Any]) -> RowScores:
        """As `rerank_plugins.bulk.score_rows`; a pair that ends the process has that as its error.

        Raises:
            ModelLoadError: The model cannot be loaded, or the process dies whatever it is given.
        """
        return isolating(self._score, queries, texts)

    def fingerprint(self) -> str | None:
        """`Reranker.fingerprint`, found out there.

        Raises:
            ModelLoadError: The model cannot be loaded.
        """
        try:
            return self._started().submit(_fingerprint).result()
        except BrokenProcessPool:
            self.close()
            raise ModelLoadError("The process that loads the model died. Is there memory for it?") from None

    def _score(self, pairs: Sequence[Pair]) -> RowScores:
        try:
            found = self._started().submit(_score, pairs).result()
        except BrokenProcessPool:
            self.close()
            self._deaths += 1
            if self._deaths == _DEATHS:
                raise ModelLoadError(
                    f"The process that scores died {_DEATHS} times in a row. Is there memory for the model? Score some "
                    "of the rows without a process of their own to see why."
                ) from None
            raise ScoringError("the process that scored this pair died: killed, out of memory or crashed") from None
        self._deaths = 0
        return found

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Not forked: engines have threads, and a GPU cannot be used in a forked process.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, _start, (self._reranker,))
        return self._pool

    def close(self) -> None:
        """End the process; the next use starts another one."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> ScoringProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pickled(reranker: Any) -> bytes:
    """A reranker for a `ScoringProcess`.

    Raises:
        ConfigurationError: It cannot be pickled.
    """
    try:
        return pickle.dumps(reranker)
    except Exception as error:
        raise ConfigurationError(
            f"{reranker!r} cannot be given to another process ({type(error).__name__}: {error}). Name its model "
            "instead of a ready backend, or leave isolate at False."
        ) from error


# -- in that process ----------------------------------------------------------------------------------------------

_pickled = b""
_reranker: Any = None


def _start(reranker: bytes) -> None:
    global _pickled
    _pickled = reranker
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed tells nobody, and its child would keep the model in memory for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _loaded() -> Any:
    global _reranker
    if _reranker is None:
        # Here rather than at the start, where an error would have no way back.
        _reranker = pickle.loads(_pickled)
    return _reranker


def _score(pairs: Sequence[Pair]) -> RowScores:
    return score_rows(_loaded(), [query for query, _ in pairs], [text for _, text in pairs])


def _fingerprint() -> str | None:
    fingerprint: str | None = _loaded().fingerprint
    return fingerprint
