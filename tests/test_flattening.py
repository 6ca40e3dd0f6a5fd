"""Batches without padding, where sentence-transformers makes them: attention over sequences of different lengths."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import QUERY, TEXTS, tiny
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import modeling_flash_attention_utils as flash

from rerank_plugins import Reranker
from rerank_plugins.backends.torch import TorchBackend

FAMILIES = ("bert", "xlm-roberta", "modernbert")
"""Token types; positions that do not start at 0; rotary positions and local attention."""


@cache
def headed(family: str) -> str:
    """A cross-encoder whose head is modules of its own over an encoder."""
    torch.manual_seed(3)
    out = Path(tiny(family)).parent / f"{family}-headed"
    body = Transformer(tiny(family), transformer_task="feature-extraction")
    modules = [body, Pooling(32, "mean"), Dense(32, 1, activation_function=None, module_output_name="scores")]
    CrossEncoder(modules=modules).save_pretrained(str(out), create_model_card=False)
    return str(out)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """What flash-attn's function of this signature computes, sequence by sequence: (n_tokens, n_heads, width)."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert not causal
    found = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        assert end - start <= max_seqlen_q == max_seqlen_k
        one, other, values = (part[start:end].transpose(0, 1) for part in (q, k, v))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (window_size[0] < 0) | (distance.abs() <= window_size[0])
        attended = torch.nn.functional.scaled_dot_product_attention(
            one, other, values, attn_mask=seen.expand(end - start, -1), scale=softmax_scale
        )
        found.append(attended.transpose(0, 1))
    return torch.cat(found)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **keywords: Any) -> torch.Tensor:
    """The same for sequences of one length: (n_sequences, n_tokens, n_heads, width)."""
    n_sequences, length = q.shape[:2]
    ends = torch.arange(n_sequences + 1) * length
    flat = (part.flatten(0, 1) for part in (q, k, v))
    return varlen_attention(*flat, ends, ends, length, length, *rest, **keywords).view_as(q)


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with flash-attn, whose function runs on the CPU."""
    parts = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": dense_attention,
        "_flash_varlen_fn": varlen_attention,
        "_pad_fn": flash._pad_input,
        "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(varlen_attention),
    }
    for name, value in parts.items():
        monkeypatch.setattr(flash, name, value)
    monkeypatch.setattr(transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    monkeypatch.setitem(
        flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "general_availability_check", lambda *_, **__: True
    )


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, model: str, precision: str) -> Reranker:
    """A reranker whose backend decided as on a GPU."""
    reranker = Reranker(model, backend="torch").prepare()
    backend = reranker._backend
    assert isinstance(backend, TorchBackend)
    backend.precision = precision
    # There a batch is taken to cost a full one more.
    backend.batch_cost = backend.token_budget
    with monkeypatch.context() as patched:
        patched.setattr(CrossEncoder, "device", property(lambda _: torch.device("cuda")))
        backend._flattens = backend._can_flatten()
    return reranker


def shapes(monkeypatch: pytest.MonkeyPatch, reranker: Reranker) -> list[tuple[int, ...]]:
    """The shapes of the batches that the model sees from now on."""
    backend = reranker._backend
    assert isinstance(backend, TorchBackend)
    seen: list[tuple[int, ...]] = []
    whole = type(backend.model).forward

    def forward(self: Any, features: dict[str, Any], **keywords: Any) -> Any:
        seen.append(tuple(features["input_ids"].shape))
        return whole(self, features, **keywords)

    monkeypatch.setattr(type(backend.model), "forward", forward)
    return seen


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize("family", FAMILIES)
def test_flattened_batches_have_no_padding_and_change_no_score(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = CrossEncoder(headed(family))
    expected = theirs.predict([(QUERY, text) for text in TEXTS], activation_fn=torch.nn.Identity())
    assert np.diff(np.sort(expected)).min() > 1e-4
    lengths = [len(theirs.tokenizer(QUERY, text, truncation=True)["input_ids"]) for text in TEXTS]

    padded = Reranker(headed(family), backend="torch").prepare()
    seen = shapes(monkeypatch, padded)
    assert np.abs(padded.logits(QUERY, TEXTS) - expected).max() < 1e-4
    assert sum(rows * width for rows, width in seen) > sum(lengths)

    flattened = on_a_gpu(monkeypatch, headed(family), "bf16")
    seen = shapes(monkeypatch, flattened)
    assert np.abs(flattened.logits(QUERY, TEXTS) - expected).max() < 1e-4
    assert {rows for rows, _ in seen} == {1}
    assert sum(width for _, width in seen) == sum(lengths)


@pytest.mark.usefixtures("flash_attention")
def test_a_flattened_batch_that_the_memory_cannot_hold_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = on_a_gpu(monkeypatch, headed("bert"), "fp16")
    before = reranker.logits(QUERY, TEXTS)
    sizes: list[int] = []

    def of_two(*arguments: Any, **keywords: Any) -> torch.Tensor:
        sizes.append(len(keywords["cu_seqlens_q"]) - 1)
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return varlen_attention(*arguments, **keywords)

    monkeypatch.setattr(flash, "_flash_varlen_fn", of_two)
    assert np.abs(reranker.logits(QUERY, TEXTS) - before).max() < 1e-5
    assert max(sizes) > 2 >= sizes[-1]


@pytest.mark.usefixtures("flash_attention")
def test_what_cannot_be_flattened_stays_padded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refusing = CrossEncoder(headed("bert"))
    refusing[0].unpad_inputs = False
    refusing.save_pretrained(str(tmp_path / "refusing"), create_model_card=False)
    cases = [
        (tiny("bert"), "bf16"),  # its head reads the first token of each row
        (str(tmp_path / "refusing"), "bf16"),
        (headed("bert"), "fp32"),  # flash attention knows half precision alone
    ]
    for model, precision in cases:
        reranker = on_a_gpu(monkeypatch, model, precision)
        assert isinstance(reranker._backend, TorchBackend)
        assert not reranker._backend._flattens, model
        assert np.isfinite(reranker.logits(QUERY, TEXTS)).all()


def test_nothing_is_asked_for_without_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = on_a_gpu(monkeypatch, headed("bert"), "bf16")
    backend = reranker._backend
    assert isinstance(backend, TorchBackend)
    assert not backend._flattens
    assert backend.model[0].auto_model.config._attn_implementation == "sdpa"
