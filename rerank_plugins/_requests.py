"""What a caller asks for, checked."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rerank_plugins._texts import is_blank
from rerank_plugins.errors import ConfigurationError, InputError, QueryError
from rerank_plugins.types import Candidate

__all__ = ["Request", "checked_candidates", "checked_query", "until"]

Request = tuple[str, Iterable[str | Candidate]]
"""A query and its candidates, in the order of the first stage."""


def checked_query(query: object) -> str:
    """A query that a model can read."""
    if not isinstance(query, str):
        raise QueryError(f"query must be a str, got {type(query).__name__}.")
    if is_blank(query):
        raise QueryError(f"query must have at least one visible character; got a blank one: {query[:80]!r}.")
    return query


def checked_candidates(candidates: Iterable[str | Candidate]) -> list[Candidate]:
    """The candidates, each as a `Candidate`."""
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


def until(deadline_s: Any) -> float | None:
    """The time of `time.monotonic` that a number of seconds from now is; None for no limit."""
    if deadline_s is None:
        return None
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, int | float) or not 0 < deadline_s < math.inf:
        raise ConfigurationError(f"deadline_s must be a number of seconds above 0, or None; got {deadline_s!r}.")
    return time.monotonic() + deadline_s
