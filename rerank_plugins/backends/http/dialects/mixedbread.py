"""Mixedbread's API: probabilities."""

from __future__ import annotations

from typing import Any

from rerank_plugins.backends._remote import Limits
from rerank_plugins.backends.http.dialects._dialect import Ask, Dialect

__all__ = ["MIXEDBREAD"]


def _body(ask: Ask) -> dict[str, Any]:
    # Its own default returns ten.
    body = {"query": ask.query, "input": list(ask.texts), "top_k": len(ask.texts), "return_input": False}
    return body if ask.model is None else {"model": ask.model, **body}


MIXEDBREAD = Dialect(
    name="mixedbread",
    path="/v1/reranking",
    body=_body,
    rows="data",
    score="score",
    limits=Limits(texts=1000),
    default_url="https://api.mixedbread.com",
)
