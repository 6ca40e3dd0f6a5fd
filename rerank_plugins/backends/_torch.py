"""Any cross-encoder checkpoint on PyTorch, through sentence-transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rerank_plugins._extras import import_extra
from rerank_plugins.backends._files import ModelFiles
from rerank_plugins.backends._tokenize import PairEncoder
from rerank_plugins.backends.base import Batch, LocalBackend
from rerank_plugins.errors import ConfigurationError, ModelLoadError, ScoringError

__all__ = ["TorchBackend"]

CPU_TOKEN_BUDGET = 2048
CPU_BATCH_COST = 128
"""What a batch costs on a CPU besides its tokens, in tokens: every module is called from Python."""
GPU_TOKEN_BUDGETS = (8_192, 262_144)
"""Smallest and largest batch on a GPU, in tokens."""

_QWEN3_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_GEMMA_INSTRUCTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)


def _render_qwen3(query: str, text: str, instruction: str | None) -> str:
    """The prompt of the Qwen3-Reranker model cards."""
    return (
        f"<|im_start|>system\n{_QWEN3_SYSTEM}<|im_end|>\n<|im_start|>user\n"
        f"<Instruct>: {instruction or _QWEN3_INSTRUCTION}\n<Query>: {query}\n<Document>: {text}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def _render_gemma(query: str, text: str, instruction: str | None) -> str:
    """The prompt of the bge-reranker-v2-gemma model card."""
    return f"<bos>A: {query}\nB: {text}\n{instruction or _GEMMA_INSTRUCTION}"


# Causal checkpoints whose own chat template knows no query and document: the family's published prompt is used.
_PROMPTS: dict[str, Callable[[str, str, str | None], str]] = {"qwen3": _render_qwen3, "gemma": _render_gemma}


class TorchBackend(LocalBackend):
    """A sentence-transformers `CrossEncoder`, with our own tokenising, batching and order.

    Args:
        files: The model's files.
        device: torch device; None takes a GPU where there is one.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: fp32 on a CPU, the checkpoint's own on a GPU.
        trust_remote_code: Run Python code of the repository.
        threads: Threads of one call on a CPU; None leaves it to torch.
    """

    name = "torch"

    def __init__(
        self,
        files: ModelFiles,
        *,
        device: str | None = None,
        precision: str = "auto",
        trust_remote_code: bool = False,
        threads: int | None = None,
    ) -> None:
        import_extra("sentence_transformers", "torch")
        import torch

        from rerank_plugins.backends._late_interaction import load_cross_encoder

        self._torch = torch
        self._threads = threads
        target = device or default_device()
        on_cpu = torch.device(target).type == "cpu"
        if precision == "auto":
            precision = "fp32" if on_cpu else "checkpoint"
        dtypes: dict[str, Any] = {
            "fp32": torch.float32,
            "bf16": torch.bfloat16,
            "fp16": torch.float16,
            "checkpoint": "auto",
        }
        if precision not in dtypes:
            raise ConfigurationError(
                f"precision={precision!r} does not exist on the torch backend: expected 'fp32', 'bf16', 'fp16' or "
                "'auto'. For int8, convert the model (rerank-plugins convert MODEL OUT --int8) and use backend='onnx'."
            )
        try:
            with _no_progress_bars():
                self.model = load_cross_encoder(
                    str(files.path),
                    device=target,
                    trust_remote_code=trust_remote_code,
                    model_kwargs={"dtype": dtypes[precision], "use_safetensors": True},
                )
        except (ConfigurationError, ModelLoadError):
            raise
        except Exception as error:
            hint = (
                " The repository brings its own code: read it, then pass trust_remote_code=True."
                if "trust_remote_code" in str(error)
                else ""
            )
            raise ModelLoadError(
                f"sentence-transformers cannot load {files.name!r} as a CrossEncoder: {error}{hint}"
            ) from error
        self.model.eval()
        self.precision = _precision_name(self.model, precision)
        if precision == "fp32":
            # Weights of a head that the caller's checkpoint keeps in half precision follow the choice.
            self.model.float()
        self._transformer: Any = self.model[0]
        super().__init__(
            self._encoder(files),
            token_budget=CPU_TOKEN_BUDGET if on_cpu else self._gpu_budget(),
            batch_cost=CPU_BATCH_COST if on_cpu else None,
            labels=files.labels if self.model.num_labels == len(files.labels) else (),
        )
        self._files = files
        self._uses_types = "token_type_ids" in self.model.tokenizer.model_input_names
        self._flattens = self._can_flatten()

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Digest of the weights, the tokenizer, the configuration and the code. Reads them at the first use."""
        return self._files.fingerprint()

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

    def _encoder(self, files: ModelFiles) -> PairEncoder:
        hf_tokenizer = self.model.tokenizer
        raw = getattr(hf_tokenizer, "backend_tokenizer", None)
        if raw is None:
            raise ModelLoadError(
                f"{files.name!r} has a tokenizer that is written in Python ({type(hf_tokenizer).__name__}); a "
                "tokenizer.json is needed. Save one with transformers' AutoTokenizer(...).save_pretrained(DIR)."
            )
        # A copy: nobody else's truncation or padding settings can reach it.
        tokenizer = Tokenizer.from_str(raw.to_str())
        limits = [files.limit, int(hf_tokenizer.model_max_length)]
        pad_id = hf_tokenizer.pad_token_id
        if not files.is_causal:
            return PairEncoder(
                tokenizer,
                limit=min(limits),
                pad_id=0 if pad_id is None else pad_id,
                pad_type_id=hf_tokenizer.pad_token_type_id,
                pad_left=hf_tokenizer.padding_side == "left",
                instruction=self.model._resolve_prompt(None, None),
            )
        render = self._render(files)
        return PairEncoder(
            tokenizer,
            limit=min(limits),
            pad_id=pad_id if pad_id is not None else hf_tokenizer.eos_token_id or 0,
            pad_left=True,
            render=render,
            suffix_ids=_common_suffix(tokenizer, render),
            instruction=self.model._resolve_prompt(None, None),
        )

    def _render(self, files: ModelFiles) -> Callable[[str, str, str | None], str]:
        formatter, hf_tokenizer = self._transformer.input_formatter, self.model.tokenizer
        template = (self._transformer.processing_kwargs or {}).get("chat_template", {})
        settings = {key: value for key, value in template.items() if key != "restore_suffix"}
        if getattr(hf_tokenizer, "chat_template", None) and formatter.pair_roles_failure(settings) is None:

            def render(query: str, text: str, instruction: str | None) -> str:
                messages = [formatter.pair_to_messages((query, text))]
                if instruction:
                    messages = formatter.prepend_prompt_to_messages(messages, instruction)
                return str(hf_tokenizer.apply_chat_template(messages[0], tokenize=False, **settings))

            return render
        family = str(files.config.get("model_type"))
        if family not in _PROMPTS:
            raise ModelLoadError(
                f"{files.name!r} is a causal language model ({family}) without a chat template for the roles 'query' "
                "and 'document', so its scores would mean nothing. Use a reranker checkpoint that has one, or put a "
                "chat_template.jinja into its directory."
            )
        if family == "gemma":
            from sentence_transformers.cross_encoder.modules.logit_score import LogitScore

            self.model[1] = LogitScore(true_token_id=hf_tokenizer.convert_tokens_to_ids("Yes"))
        return _PROMPTS[family]

    def _padded(self, batch: Batch) -> dict[str, Any]:
        torch = self._torch
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.input_ids),
            "attention_mask": torch.from_numpy(batch.attention_mask),
        }
        if self._uses_types:
            features["token_type_ids"] = torch.from_numpy(batch.token_type_ids)
        if self.encoder.render is not None:
            # Positions that start after the padding: a pair scores the same beside any other.
            features["position_ids"] = (features["attention_mask"].cumsum(-1) - 1).clamp_(min=0)
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
        return np.concatenate([self.forward(part) for part in parts])


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def default_device() -> str:
    """The device that sentence-transformers would choose."""
    from sentence_transformers.util import get_device_name

    return str(get_device_name())


def _precision_name(model: Any, asked: str) -> str:
    if asked != "checkpoint":
        return asked
    names = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
    return names.get(str(next(model.parameters()).dtype), "unknown")


def _common_suffix(tokenizer: Tokenizer, render: Callable[[str, str, str | None], str]) -> list[int]:
    """The tokens that end every prompt, whatever stands in it."""
    first, second = (
        tokenizer.encode(render(filler, filler, None), add_special_tokens=False).ids for filler in ("0", "1 2 3 4")
    )
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return list(first[len(first) - count :])
