"""The matrix products of a model: a bound on its speed that the machine sets, whatever else the engine does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rerank_plugins.backends._onnx import BATCH_COST, TOKEN_BUDGET, OpenVinoBackend
from rerank_plugins.backends._torch import CPU_BATCH_COST, CPU_TOKEN_BUDGET
from rerank_plugins.batching import BatchCost, token_budget_batches

__all__ = ["product_shapes"]

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
"""Encoders whose layers are the ones of the original BERT."""


def product_shapes(config: Mapping[str, Any], lengths: Sequence[Sequence[int]], library: str) -> list[list[int]]:
    """The products of scoring some calls, in the batches that our engine on this library makes of them.

    Each layer multiplies the tokens by four square matrices (query, key, value, output) and the two of the feed-forward
    block, and each head its queries by its keys and the weights by its values. Head and pooler, one token a pair, are
    left out.

    Args:
        config: The model's ``config.json``.
        lengths: Tokens of each pair, call by call.
        library: ``"torch"``, ``"onnx"`` or ``"openvino"``.

    Returns:
        Rows *batch, m, k, n, count*; empty for models of other families.
    """
    if config.get("model_type") not in FAMILIES:
        return []
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    cost = {
        "torch": BatchCost(CPU_TOKEN_BUDGET, CPU_BATCH_COST),
        "onnx": BatchCost(TOKEN_BUDGET, BATCH_COST),
        "openvino": BatchCost(TOKEN_BUDGET, BATCH_COST, OpenVinoBackend.width_step),
    }[library]
    counts: Counter[tuple[int, int, int, int]] = Counter()
    for call in lengths:
        for batch in token_budget_batches(call, cost):
            size, longest = len(batch), int(cost.widths(np.asarray(call)[batch]).max())
            tokens = size * longest
            counts[1, tokens, width, width] += 4 * layers
            counts[1, tokens, width, inner] += layers
            counts[1, tokens, inner, width] += layers
            counts[size * heads, longest, width // heads, longest] += layers
            counts[size * heads, longest, longest, width // heads] += layers
    return [[*shape, count] for shape, count in counts.items()]
