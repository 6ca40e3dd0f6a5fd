"""Pinecone's inference API: probabilities."""

from __future__ import annotations

from typing import Any

from rerank_plugins.backends._remote import Limits
from rerank_plugins.backends.http.dialects._dialect import Ask, Dialect

__all__ = ["PINECONE"]


def _body(ask: Ask) -> dict[str, Any]:
    return {
        "model": ask.model,
        "query": ask.query,
        "documents": [{"text": text} for text in ask.texts],
        "rank_fields": ["text"],
        "top_n": len(ask.texts),
        "return_documents": False,
    }


PINECONE = Dialect(
    name="pinecone",
    path="/rerank",
    body=_body,
    rows="data",
    score="score",
    # What its smallest model takes.
    limits=Limits(texts=100),
    default_url="https://api.pinecone.io",
    key_header="Api-Key",
    key_prefix="",
    headers={"X-Pinecone-Api-Version": "2026-07"},
)
