"""Infinity: logits by ``raw_scores``."""

from __future__ import annotations

from typing import Any

from rerank_plugins.backends._remote import Limits
from rerank_plugins.backends.http.dialects._dialect import Ask, Dialect, documents

__all__ = ["INFINITY"]


def _body(ask: Ask) -> dict[str, Any]:
    return documents(ask, raw_scores=True, return_documents=False)


INFINITY = Dialect(name="infinity", path="/rerank", body=_body, emits="logit", limits=Limits(texts=2048))
