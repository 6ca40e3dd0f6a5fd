"""Text Embeddings Inference, and llama.cpp in the same shape: logits by ``raw_scores``, limits from ``/info``."""

from __future__ import annotations

from typing import Any

from rerank_plugins.backends._remote import Limits
from rerank_plugins.backends.http.dialects._dialect import Ask, Dialect
from rerank_plugins.backends.http.dialects.jina import LLAMA_CPP_TOO_LARGE

__all__ = ["TEI"]


def _body(ask: Ask) -> dict[str, Any]:
    # Without `truncate` the server's --auto-truncate decides, whose default has changed.
    return {
        "query": ask.query,
        "texts": list(ask.texts),
        "truncate": True,
        "raw_scores": True,
        "return_text": False,
    }


TEI = Dialect(
    name="tei",
    path="/rerank",
    body=_body,
    rows=None,
    score="score",
    emits="logit",
    # The defaults of --max-client-batch-size and --payload-limit.
    limits=Limits(texts=32, body_bytes=2_000_000),
    tells_limits=True,
    lasting=(LLAMA_CPP_TOO_LARGE,),
)
