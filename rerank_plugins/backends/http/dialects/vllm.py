"""vLLM: logits by ``use_activation``, and a truncation choice, without which one long pair fails the whole request."""

from __future__ import annotations

from typing import Any

from rerank_plugins.backends._remote import Limits
from rerank_plugins.backends.http.dialects._dialect import Ask, Dialect, documents

__all__ = ["VLLM"]


def _body(ask: Ask) -> dict[str, Any]:
    longest = -1 if ask.max_length is None else ask.max_length
    body = documents(ask, use_activation=False, truncate_prompt_tokens=longest)
    return body if ask.instruction is None else {**body, "instruction": ask.instruction}


VLLM = Dialect(
    name="vllm",
    path="/rerank",
    body=_body,
    emits="logit",
    limits=Limits(texts=1000),
    takes_max_length=True,
    takes_instruction=True,
)
