"""Cohere's v2 API: Cohere, Azure, OpenRouter, LiteLLM's proxy, ``rerank-plugins serve``."""

from __future__ import annotations

from typing import Any

from rerank_plugins.backends._remote import Limits
from rerank_plugins.backends.http.dialects._dialect import Ask, Dialect, documents

__all__ = ["COHERE"]


def _body(ask: Ask) -> dict[str, Any]:
    return documents(ask) if ask.max_length is None else documents(ask, max_tokens_per_doc=ask.max_length)


COHERE = Dialect(
    name="cohere",
    path="/v2/rerank",
    body=_body,
    # 10,000 is the most, 1,000 what Cohere advises.
    limits=Limits(texts=1000),
    default_url="https://api.cohere.com",
    takes_max_length=True,
)
