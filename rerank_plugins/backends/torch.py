"""Any cross-encoder checkpoint on PyTorch, through sentence-transformers."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins._fork import with_a_team
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.backends.base import Batch, LocalBackend
from rerank_plugins.backends.checkpoint import Checkpoint
from rerank_plugins.backends.load import fetch_weights
from rerank_plugins.backends.weights import check_says
from rerank_plugins.errors import ConfigurationError, MissingDependencyError, ModelLoadError, ScoringError
from rerank_plugins.settings import Settings

__all__ = ["TorchBackend", "default_device", "load", "plan"]

CPU_TOKEN_BUDGET = 2048
CPU_BATCH_COST = 128
"""What a batch costs on a CPU besides its tokens, in tokens: every module is called from Python."""
GPU_TOKEN_BUDGETS = (8_192, 262_144)
"""Smallest and largest batch on a GPU, in tokens."""

_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def plan(checkpoint: Checkpoint, settings: Settings) -> tuple[Checkpoint, None, str]:
    """Whether PyTorch can run a model, as far as its files and the installed packages tell.

    Returns:
        The model, None for there is no graph, and the precision.

    Raises:
        RerankError: It cannot; the message says why.
    """
    if settings.precision not in _DTYPES:
        raise ConfigurationError(
            f"precision={settings.precision!r} does not exist on the torch backend: expected 'fp32', 'bf16', 'fp16' or "
            "'auto'. For int8, convert the model (rerank-plugins convert MODEL OUT --int8) and use backend='onnx'."
        )
    check_says(checkpoint, trust_remote_code=settings.trust_remote_code)
    import_extra("sentence_transformers", "torch")
    if (kind := checkpoint.adapter_config.text("base_model_name_or_path")) and importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(
            f"{checkpoint.name!r} is an adapter (LoRA) of {kind!r}, which needs peft. Install it with: pip install peft"
            "   or merge it once where that is installed: merge_and_unload(), then save_pretrained(DIR).",
            name="peft",
        )
    _check_own_code(checkpoint, settings)
    sentencepiece = [name for name in checkpoint.files.names if name.endswith((".model", ".vocab"))]
    has_fast = checkpoint.folder_has("tokenizer.json")
    if sentencepiece and not has_fast and importlib.util.find_spec("sentencepiece") is None:
        raise MissingDependencyError(
            f"{checkpoint.name!r} has its tokenizer as {sentencepiece[0]} alone, which needs sentencepiece. Install it "
            "with: pip install sentencepiece protobuf",
            name="sentencepiece",
        )
    if has_fast:
        checkpoint.prompt(checkpoint.tokenizer())
    return checkpoint, None, "fp32" if settings.precision == "auto" else settings.precision


def _check_own_code(checkpoint: Checkpoint, settings: Settings) -> None:
    """Refuse a model that only its own code can make, before its weights are fetched."""
    import transformers

    if settings.trust_remote_code or not checkpoint.config.mapping("auto_map"):
        return
    if checkpoint.model_type is None or not hasattr(transformers, checkpoint.architecture or "AutoModel"):
        raise ModelLoadError(
            f"{checkpoint.name!r} ({checkpoint.architecture or 'no architecture'}) brings its own code: read it, then "
            "pass trust_remote_code=True."
        )


def load(checkpoint: Checkpoint, settings: Settings) -> TorchBackend:
    """Load the model on PyTorch; see `plan`."""
    plan(checkpoint, settings)
    fetch_weights(checkpoint, trust_remote_code=settings.trust_remote_code)
    return TorchBackend(
        checkpoint,
        device=settings.device,
        precision=settings.precision,
        trust_remote_code=settings.trust_remote_code,
        threads=settings.threads,
    )


class TorchBackend(LocalBackend):
    """A sentence-transformers `CrossEncoder`, with our own tokenising, batching and order.

    Args:
        checkpoint: The model; its files are on disk.
        device: torch device; None takes a GPU where there is one.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: fp32 on a CPU, the checkpoint's own on a GPU.
        trust_remote_code: Run Python code of the repository.
        threads: Threads of one call on a CPU; None leaves it to torch.
    """

    name = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | None = None,
        precision: str = "auto",
        trust_remote_code: bool = False,
        threads: int | None = None,
    ) -> None:
        import_extra("sentence_transformers", "torch")
        import torch

        from rerank_plugins.backends.cross_encoder import can_pad, load_checked, reading

        self._torch = torch
        self._threads = threads
        target = device or default_device()
        on_cpu = torch.device(target).type == "cpu"
        if precision == "auto" and on_cpu:
            precision = "fp32"
        dtype = _DTYPES[precision]
        with no_progress_bars():
            self.model = load_checked(
                checkpoint,
                device=target,
                trust_remote_code=trust_remote_code,
                model_kwargs={"dtype": dtype if dtype == "auto" else getattr(torch, dtype)},
            )
        self.model.eval()
        self.precision = _precision_name(self.model, precision)
        if precision == "fp32":
            # Weights of a head that the caller's checkpoint keeps in half precision follow the choice.
            self.model.float()
        self._transformer: Any = self.model[0]
        tokenizer, prompt = reading(checkpoint, self.model)
        told, n_labels = checkpoint.labels or (), int(self.model.num_labels)
        super().__init__(
            checkpoint.encoder(tokenizer, prompt=prompt),
            token_budget=CPU_TOKEN_BUDGET if on_cpu else self._gpu_budget(),
            batch_cost=CPU_BATCH_COST if on_cpu else None,
            labels=told if len(told) == n_labels else [f"LABEL_{i}" for i in range(n_labels)],
        )
        self._files, self._base = checkpoint.files, checkpoint.base
        self._uses_types = "token_type_ids" in self.model.tokenizer.model_input_names
        self._is_causal = checkpoint.is_causal
        if not can_pad(self.model) or checkpoint.sees_padding:
            self.token_budget = self.batch_cost = 1
        self._flattens = self._can_flatten()

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Digest of the weights, the tokenizer, the configuration and the code. Reads them at the first use."""
        base = f"-{self._base.files.fingerprint()}" if self._base is not None else ""
        return f"{self._files.fingerprint()}{base}"

    def _gpu_budget(self) -> int:
        """Tokens of a batch that take about half of the GPU's free memory; `forward` copes where that is wrong."""
        if self.model.device.type != "cuda":
            return GPU_TOKEN_BUDGETS[0]
        free, _ = self._torch.cuda.mem_get_info(self.model.device)
        weight, config = next(self.model.parameters()), self._transformer.auto_model.config
        width = int(getattr(config, "hidden_size", 1024))
        # Of one layer at a time: its input and output, query, key, value and attention, and the feed-forward block.
        values = 8 * width + 2 * int(getattr(config, "intermediate_size", 4 * width))
        return min(max(int(free // (2 * values * weight.element_size())), GPU_TOKEN_BUDGETS[0]), GPU_TOKEN_BUDGETS[1])

    def _can_flatten(self) -> bool:
        """Whether batches are one sequence without padding, as sentence-transformers makes them.

        It does so for encoders whose head is a module of its own, with flash attention over sequences of different
        lengths. Where flash-attn is installed, that is asked for on a GPU in half precision.
        """
        from sentence_transformers.base.modules import Transformer
        from transformers.utils import is_flash_attn_2_available

        part = self._transformer
        # Heads from elsewhere, our own too, read the padded batch.
        if not isinstance(part, Transformer) or not all(
            type(module).__module__.startswith("sentence_transformers.") for module in self.model
        ):
            return False
        if (
            self.model.device.type == "cuda"
            and self.precision in ("bf16", "fp16")
            and part.transformer_task == "feature-extraction"
            and part.auto_model._supports_flash_attn
            and is_flash_attn_2_available()
        ):
            part.auto_model.set_attn_implementation("flash_attention_2")
            # The setter looks again at what can be done; a model that was saved with False stays padded.
            part.unpad_inputs = part.unpad_inputs
        return bool(part.can_flatten_inputs)

    def _padded(self, batch: Batch) -> dict[str, Any]:
        torch = self._torch
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.input_ids),
            "attention_mask": torch.from_numpy(batch.attention_mask),
        }
        if self._uses_types:
            features["token_type_ids"] = torch.from_numpy(batch.token_type_ids)
        if self.encoder.pad_left:
            # Positions that start after the padding: a pair scores the same beside any other.
            features["position_ids"] = (features["attention_mask"].cumsum(-1) - 1).clamp_(min=0)
        if self._is_causal:
            features["logits_to_keep"] = 1
        return features

    def _flattened(self, batch: Batch) -> dict[str, Any]:
        """All pairs one after the other, shape (1, n_tokens), and where each begins."""
        real = batch.attention_mask.astype(bool)
        rows = [{"input_ids": ids[kept]} for ids, kept in zip(batch.input_ids, real, strict=True)]
        features: dict[str, Any] = self._transformer.data_collator(rows)
        del features["labels"]
        features["position_ids"] = features["position_ids"] + self._transformer._flatten_position_offset
        if self._uses_types:
            # sentence-transformers loses them here, and with them which token is the query's.
            features["token_type_ids"] = self._torch.from_numpy(batch.token_type_ids[real])[None]
        return features

    @contextlib.contextmanager
    def _limited_threads(self) -> Iterator[None]:
        """The caller's own number of threads is torch's again afterwards."""
        if self._threads is None:
            yield
            return
        before = self._torch.get_num_threads()
        self._torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            self._torch.set_num_threads(before)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits of one batch, shape (n_pairs, n_labels). A batch that the GPU cannot hold is run in halves."""
        return with_a_team(lambda: self._forward(batch))

    def _forward(self, batch: Batch) -> NDArray[np.float32]:
        from sentence_transformers.util import batch_to_device

        torch = self._torch
        device = self.model.device
        features = batch_to_device(self._flattened(batch) if self._flattens else self._padded(batch), device)
        try:
            with torch.inference_mode(), self._limited_threads():
                scores = self.model(features)["scores"].float().cpu().numpy()
        except torch.cuda.OutOfMemoryError as error:
            if len(batch.input_ids) == 1:
                raise ScoringError(
                    f"One pair of {batch.input_ids.shape[1]} tokens is more than the memory of {device} holds. Take a "
                    "smaller max_length or model, or a lower precision."
                ) from error
        except Exception as error:
            raise ScoringError(f"PyTorch failed on a batch of shape {batch.input_ids.shape}: {error}") from error
        else:
            return np.asarray(scores[:, None] if scores.ndim == 1 else scores, dtype=np.float32)
        # Out here, where the error and with it what the failed pass held are gone.
        del features
        torch.cuda.empty_cache()
        half = len(batch.input_ids) // 2
        self.token_budget = max(1, min(self.token_budget, half * batch.input_ids.shape[1]))
        parts = [
            Batch(batch.input_ids[rows], batch.attention_mask[rows], batch.token_type_ids[rows])
            for rows in (slice(half), slice(half, None))
        ]
        return np.concatenate([self._forward(part) for part in parts])


def default_device() -> str:
    """The device that sentence-transformers would choose."""
    from sentence_transformers.util import get_device_name

    return str(get_device_name())


def _precision_name(model: Any, asked: str) -> str:
    if asked != "auto":
        return asked
    names = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
    return names.get(str(next(model.parameters()).dtype), "unknown")
