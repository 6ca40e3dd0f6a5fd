"""What tells one kind of rerank server from another: a table of facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rerank_plugins.backends._remote import Limits

__all__ = ["Ask", "Dialect", "documents"]


class Ask(NamedTuple):
    """What one request asks for."""

    query: str
    texts: Sequence[str]
    model: str | None
    max_length: int | None
    instruction: str | None


@dataclass(frozen=True, slots=True)
class Dialect:
    """A kind of rerank server.

    Attributes:
        name: What `HttpBackend(dialect=...)` calls it.
        path: Put after the server's address, where that is not the whole address of its rerank endpoint.
        body: The request.
        score: Name of the score in each row of the answer, beside ``index``.
        rows: Name of the list of rows in the answer; None where the answer is that list.
        emits: What a score is.
        limits: Of one request.
        default_url: Address of the hosted service, where there is one.
        key_header: Header that takes the key.
        key_prefix: Put before the key.
        headers: Other headers.
        takes_max_length: Whether a request can say how many tokens are read.
        takes_instruction: Whether a request has a field for it; otherwise it is put before the query.
        tells_limits: Whether ``/info`` tells limits and model, as text-embeddings-inference does.
        lasting: Parts of the messages of statuses from 500 on that are no passing failures.
    """

    name: str
    path: str
    body: Callable[[Ask], dict[str, Any]]
    score: str = "relevance_score"
    rows: str | None = "results"
    emits: Literal["logit", "probability"] = "probability"
    limits: Limits = field(default_factory=Limits)
    default_url: str | None = None
    key_header: str = "Authorization"
    key_prefix: str = "Bearer "
    headers: Mapping[str, str] = field(default_factory=dict)
    takes_max_length: bool = False
    takes_instruction: bool = False
    tells_limits: bool = False
    lasting: tuple[str, ...] = ()


def documents(ask: Ask, **others: Any) -> dict[str, Any]:
    """The body that most servers share. All scores are asked for: `Reranker` cuts."""
    body = {"query": ask.query, "documents": list(ask.texts), "top_n": len(ask.texts), **others}
    return body if ask.model is None else {"model": ask.model, **body}
