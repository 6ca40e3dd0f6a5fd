"""Jina's v1 API: Jina, LiteLLM's proxy, Xinference, SiliconFlow, llama.cpp (whose scores are logits)."""

from __future__ import annotations

from typing import Any

from rerank_plugins.backends._remote import Limits
from rerank_plugins.backends.http.dialects._dialect import Ask, Dialect, documents

__all__ = ["JINA", "LLAMA_CPP_TOO_LARGE"]

LLAMA_CPP_TOO_LARGE = "too large to process"
"""llama.cpp answers 500 where a pair has more tokens than ``--ubatch-size``: the same pair fails again."""


def _body(ask: Ask) -> dict[str, Any]:
    return documents(ask, return_documents=False)


JINA = Dialect(
    name="jina",
    path="/v1/rerank",
    body=_body,
    limits=Limits(texts=1000),
    default_url="https://api.jina.ai",
    lasting=(LLAMA_CPP_TOO_LARGE,),
)
