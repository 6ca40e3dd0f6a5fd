"""NVIDIA NIM, in a container of one's own or hosted: logits, never a ``top_n``, which it refuses."""

from __future__ import annotations

from typing import Any

from rerank_plugins.backends._remote import Limits
from rerank_plugins.backends.http.dialects._dialect import Ask, Dialect

__all__ = ["NIM"]


def _body(ask: Ask) -> dict[str, Any]:
    return {
        **({} if ask.model is None else {"model": ask.model}),
        "query": {"text": ask.query},
        "passages": [{"text": text} for text in ask.texts],
        "truncate": "END",
    }


NIM = Dialect(
    name="nim",
    path="/v1/ranking",
    body=_body,
    rows="rankings",
    score="logit",
    emits="logit",
    limits=Limits(texts=512),
)
