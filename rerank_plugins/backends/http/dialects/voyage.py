"""Voyage AI, now also MongoDB's: probabilities; an instruction is part of the query."""

from __future__ import annotations

from typing import Any

from rerank_plugins.backends._remote import Limits
from rerank_plugins.backends.http.dialects._dialect import Ask, Dialect

__all__ = ["VOYAGE"]


def _body(ask: Ask) -> dict[str, Any]:
    return {
        "query": ask.query,
        "documents": list(ask.texts),
        "model": ask.model,
        "top_k": len(ask.texts),
        "truncation": True,
        "return_documents": False,
    }


VOYAGE = Dialect(
    name="voyage",
    path="/v1/rerank",
    body=_body,
    rows="data",
    limits=Limits(texts=1000),
    # Keys that begin with "al-" belong to https://ai.mongodb.com.
    default_url="https://api.voyageai.com",
)
