"""Leave out what nobody reads: of the last layer, all tokens but the first.

A classification head of the BERT family looks at the first token alone. The last layer then needs keys and values of
all tokens, but query, attention and feed-forward block of one: a seventh less work for six layers, and the same logits.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["first_token_only"]

_READ_THE_FIRST = {
    "BertForSequenceClassification",
    "CamembertForSequenceClassification",
    "ElectraForSequenceClassification",
    "RobertaForSequenceClassification",
    "XLMRobertaForSequenceClassification",
}
"""Models whose head takes the first token of the last layer and nothing else."""


@contextmanager
def first_token_only(source: Any) -> Iterator[None]:
    """While it is open, the last layer of a cross-encoder computes its first token alone, where its head allows it.

    Args:
        source: A `CrossEncoder`; changed for the time being.
    """
    model = source[0].auto_model
    if type(model).__name__ not in _READ_THE_FIRST or getattr(model.config, "is_decoder", False):
        yield
        return
    attention = model.base_model.encoder.layer[-1].attention
    attention.self.forward = types.MethodType(_attend_from_first, attention.self)
    residual = attention.output.register_forward_pre_hook(lambda module, given: (given[0], given[1][:, :1]))
    try:
        yield
    finally:
        residual.remove()
        del attention.self.forward


def _attend_from_first(self: Any, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> tuple[Any, None]:
    shape = (hidden_states.shape[0], -1, self.num_attention_heads, self.attention_head_size)
    query = self.query(hidden_states[:, :1]).view(shape).transpose(1, 2)
    key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.key, self.value))
    weights = query @ key.transpose(2, 3) * self.attention_head_size**-0.5
    if attention_mask is not None:
        weights = weights + attention_mask[:, :, :1]
    context = weights.softmax(-1) @ value
    return context.transpose(1, 2).reshape(hidden_states.shape[0], 1, -1), None
