"""One ONNX graph on two engines: ONNX Runtime of the base install, and OpenVINO."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins._machine import bf16_is_slow
from rerank_plugins.backends._files import ModelFiles
from rerank_plugins.backends._int8 import calibration_pairs, quantise
from rerank_plugins.backends._tokenize import PairEncoder
from rerank_plugins.backends.base import Batch, LocalBackend
from rerank_plugins.errors import ConfigurationError, ModelLoadError, RerankError, ScoringError

__all__ = ["OnnxBackend", "OpenVinoBackend"]

TOKEN_BUDGET = 1024
"""Padded tokens in a batch: enough to fill the cores, small enough for the activations to stay in cache."""
BATCH_COST = 32
"""What a batch costs besides its tokens, in tokens: its weights are read anew."""
SHAPE_CACHE = 256
"""Kernels of each kind that OpenVINO keeps for shapes of batches that it has seen: about 64 shapes. By itself it keeps
5,000 kernels, and a process grows by 1 to 3 MB with each new shape."""


def _encoder(files: ModelFiles) -> PairEncoder:
    tokenizer = files.tokenizer()
    return PairEncoder(
        tokenizer,
        limit=files.limit,
        pad_id=files.pad_id(tokenizer),
        pad_type_id=int(files.tokenizer_config.get("pad_token_type_id") or 0),
        instruction=files.default_prompt,
    )


def _feeds(batch: Batch, names: list[str]) -> dict[str, NDArray[np.int64]]:
    return {name: getattr(batch, name) for name in names}


def _check_inputs(names: list[str], graph: Path) -> list[str]:
    known = ("input_ids", "attention_mask", "token_type_ids")
    if "input_ids" not in names or not set(names) <= set(known):
        raise ModelLoadError(
            f"{graph} is no cross-encoder graph: expected inputs among {known}, found {names}. "
            "Make one with: rerank-plugins convert MODEL OUT"
        )
    return names


class OnnxBackend(LocalBackend):
    """ONNX Runtime on the CPU, in the number format of the graph.

    Args:
        files: The model's files.
        graph: Its graph.
        threads: Threads of one call; None leaves it to the engine: one for each core.
    """

    name = "onnx"

    def __init__(self, files: ModelFiles, graph: Path, *, threads: int | None = None) -> None:
        import onnxruntime as ort

        super().__init__(_encoder(files), token_budget=TOKEN_BUDGET, batch_cost=BATCH_COST, labels=files.labels)
        self._files, self._graph = files, graph
        options = ort.SessionOptions()
        # Errors alone: a library prints nothing, and ONNX Runtime warns on standard error.
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        # Plans of memory are for inputs of one shape: with ever other ones they take more of it, and save no time.
        options.enable_mem_pattern = False
        # Weights that are stored as int8 become float once, while loading, and not again in every call.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelLoadError(f"ONNX Runtime cannot load {graph} of {files.name!r}: {error}") from error
        self.inputs = _check_inputs([node.name for node in self.session.get_inputs()], graph)
        self.output = self.session.get_outputs()[0].name

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Digest of the graph, its weights, the tokenizer and the configuration. Reads them at the first use."""
        return self._files.fingerprint(self._graph)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits of one batch, shape (n_pairs, n_labels)."""
        try:
            (logits,) = self.session.run([self.output], _feeds(batch, self.inputs))
        except Exception as error:
            raise ScoringError(f"ONNX Runtime failed on a batch of shape {batch.input_ids.shape}: {error}") from error
        return _as_matrix(np.asarray(logits))


class OpenVinoBackend(LocalBackend):
    """The same graph on OpenVINO, the faster engine on most CPUs.

    Args:
        files: The model's files.
        graph: Its graph.
        precision: ``"fp32"``; ``"bf16"`` where the processor has it; ``"int8"``, see `rerank_plugins.backends._int8`;
            or ``"auto"``: bf16 where the processor is faster in it, since that leaves the order as good as untouched,
            else fp32.
        threads: Threads of one call; None leaves it to the engine.
    """

    name = "openvino"
    # A width seen for the first time costs about a quarter of a short call.
    width_step = 8

    def __init__(self, files: ModelFiles, graph: Path, *, precision: str = "fp32", threads: int | None = None) -> None:
        openvino = import_extra("openvino", "openvino")
        super().__init__(_encoder(files), token_budget=TOKEN_BUDGET, batch_cost=BATCH_COST, labels=files.labels)
        self._files, self._graph = files, graph
        core = openvino.Core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "auto":
            precision = "bf16" if has_bf16 and not bf16_is_slow() else "fp32"
        if precision == "bf16" and not has_bf16:
            raise ConfigurationError(
                "precision='bf16' needs a processor with bf16 arithmetic (AVX512_BF16 or AMX), which this one lacks. "
                "Use precision='fp32' or 'auto'."
            )
        self.precision = precision
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # Set on both sides: on processors with bf16 the engine would otherwise choose it by itself.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            # Otherwise activations of int8 weights are rounded to int8 as well.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "CPU_RUNTIME_CACHE_CAPACITY": str(SHAPE_CACHE),
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(str(graph))
            self.inputs = _check_inputs([node.get_any_name() for node in model.inputs], graph)
            if precision == "int8":
                pairs = self.encoder.encode(calibration_pairs())
                feeds = [_feeds(self.collate([pair]), self.inputs) for pair in pairs]
                quantise(model, feeds, lambda part: core.compile_model(part, "CPU", settings))
            self.compiled = core.compile_model(model, "CPU", settings)
        except RerankError:
            raise
        except Exception as error:
            raise ModelLoadError(f"OpenVINO cannot load {graph} of {files.name!r}: {error}") from error
        # A request serves one call at a time; idle ones wait here for the next caller.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Digest of the graph, its weights, the tokenizer and the configuration. Reads them at the first use."""
        return self._files.fingerprint(self._graph)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits of one batch, shape (n_pairs, n_labels)."""
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self.compiled.create_infer_request()
        try:
            result = request.infer(_feeds(batch, self.inputs), share_inputs=True)
            logits = np.array(result[0], dtype=np.float32)
        except Exception as error:
            raise ScoringError(f"OpenVINO failed on a batch of shape {batch.input_ids.shape}: {error}") from error
        self._idle.put(request)
        return _as_matrix(logits)


def _as_matrix(logits: NDArray[Any]) -> NDArray[np.float32]:
    matrix = logits.astype(np.float32, copy=False)
    return matrix[:, None] if matrix.ndim == 1 else matrix
