"""Rows to logits: a row that cannot be scored has its reason, and costs no other row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._requests import checked_query
from rerank_plugins.backends import Pair
from rerank_plugins.errors import ConfigurationError, MissingDependencyError, ModelLoadError, QueryError, is_passing
from rerank_plugins.pipeline import TextLogits
from rerank_plugins.reranker import Reranker

__all__ = ["RowScores", "isolating", "joined", "score_rows", "windows"]

_FOR_ALL = (ConfigurationError, MissingDependencyError, ModelLoadError)
"""Errors that are no row's."""
_STRIKES = 3
"""Single pairs in a row that fail for a reason that passes before the run fails for it."""
_WINDOW_PAIRS = 4096
_WINDOW_CHARACTERS = 1 << 23


class RowScores(NamedTuple):
    """What is known of each row, input order."""

    logits: NDArray[np.float64]
    """Shape (n_rows,): as `Reranker.logits` gives them; NaN where a row has an error."""
    truncated: NDArray[np.bool_]
    """Shape (n_rows,): whether the model has not seen the end of the text."""
    errors: list[str | None]
    """Why a row has no logit; None where it has one."""


def windows(queries: Sequence[Any], texts: Sequence[Any]) -> Iterator[slice]:
    """Parts of rows that are scored in one call: enough for full batches of like lengths, and a bounded memory."""
    start = characters = 0
    for row, pair in enumerate(zip(queries, texts, strict=True)):
        characters += sum(len(part) for part in pair if isinstance(part, str))
        if row + 1 - start == _WINDOW_PAIRS or characters >= _WINDOW_CHARACTERS:
            yield slice(start, row + 1)
            start, characters = row + 1, 0
    if start < len(texts):
        yield slice(start, len(texts))


def joined(parts: Sequence[RowScores]) -> RowScores:
    """The scores of consecutive parts as one."""
    return RowScores(
        np.concatenate([np.empty(0), *(part.logits for part in parts)]),
        np.concatenate([np.empty(0, dtype=np.bool_), *(part.truncated for part in parts)]),
        [error for part in parts for error in part.errors],
    )


def score_rows(reranker: Reranker, queries: Sequence[Any], texts: Sequence[Any]) -> RowScores:
    """Score a query and a text a row, all in shared batches.

    Args:
        reranker: Scores them.
        queries: A query for each row. What is no string, or blank, is that row's error.
        texts: A text for each row, likewise; a blank one has `selection.BLANK_LOGIT`, as everywhere.

    Raises:
        ConfigurationError: A setting that cannot work with this model.
        ModelLoadError: The model cannot be loaded.
        ServerError: A rerank server fails whatever it is asked.
    """
    return isolating(reranker.pair_logits, queries, texts)


def isolating(
    score: Callable[[Sequence[Pair]], TextLogits | RowScores], queries: Sequence[Any], texts: Sequence[Any]
) -> RowScores:
    """Score rows with a function that fails as a whole where one pair fails: the pair is found by halving.

    Args:
        score: Scores pairs of strings; what it raises is the error of a pair that is alone.
        queries: A query for each row.
        texts: A text for each row.
    """
    n = len(texts)
    found = RowScores(np.full(n, np.nan), np.zeros(n, dtype=np.bool_), list(map(_unscorable, queries, texts)))
    todo = [[row for row in range(n) if found.errors[row] is None]]
    # A query that is too long is too long for all its texts.
    refused: dict[str, str] = {}
    strikes = 0
    while todo:
        part = todo.pop()
        for row in part:
            found.errors[row] = refused.get(queries[row])
        part = [row for row in part if found.errors[row] is None]
        if not part:
            continue
        try:
            scored = score([(queries[row], texts[row]) for row in part])
        except _FOR_ALL:
            raise
        except Exception as error:
            if len(part) > 1:
                half = len(part) // 2
                todo += [part[half:], part[:half]]
                continue
            why = found.errors[part[0]] = f"{type(error).__name__}: {error}"
            if isinstance(error, QueryError):
                refused[queries[part[0]]] = why
            strikes += is_passing(error)
            if strikes == _STRIKES:
                raise
        else:
            strikes = 0
            found.logits[part] = scored.logits
            found.truncated[part] = scored.truncated
            if isinstance(scored, RowScores):
                for row, reason in zip(part, scored.errors, strict=True):
                    found.errors[row] = reason
    return found


def _unscorable(query: Any, text: Any) -> str | None:
    try:
        checked_query(query)
    except QueryError as error:
        return f"QueryError: {error}"
    return None if isinstance(text, str) else f"InputError: text must be a str, got {type(text).__name__}."
