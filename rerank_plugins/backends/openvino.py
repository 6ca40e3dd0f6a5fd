"""ONNX graphs on OpenVINO, the faster engine on most CPUs."""

from __future__ import annotations

import functools
import io
import queue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins import _engines
from rerank_plugins._fork import PerProcess
from rerank_plugins._machine import bf16_is_slow
from rerank_plugins.backends._graph_engine import Feeds, GraphBackend, check_device, graph_error, source, take_graph
from rerank_plugins.backends.checkpoint import Checkpoint
from rerank_plugins.backends.graphs import Graph
from rerank_plugins.errors import ConfigurationError, ModelLoadError, RerankError
from rerank_plugins.settings import Settings

__all__ = ["OpenVinoBackend", "load", "plan"]

SHAPE_CACHE = 256
"""Kernels of each kind that OpenVINO keeps for shapes of batches that it has seen: about 64 shapes. By itself it keeps
5,000 kernels, and a process grows by 1 to 3 MB with each new shape."""


def plan(checkpoint: Checkpoint, settings: Settings) -> tuple[Checkpoint, Graph, str]:
    """Which graph OpenVINO would run, and in which precision.

    Returns:
        What describes the graph, the graph, and the precision.

    Raises:
        RerankError: It cannot run this model; the message says why.
    """
    openvino: Any = _engines.openvino()
    check_device(settings)
    asked = settings.precision
    # int8 is made here, of exact weights where there are any.
    source, graphs = take_graph(checkpoint, "fp32" if asked == "int8" else asked)
    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if asked == "bf16" and not has_bf16:
        raise ConfigurationError(
            "precision='bf16' needs a processor with bf16 arithmetic (AVX512_BF16 or AMX), which this one lacks. "
            "Use precision='fp32' or 'auto'."
        )
    for graph in graphs:
        if (found := _precision(graph, asked, has_bf16)) is None:
            continue
        if settings.backend == "auto" and graph.quantisation == "dynamic":
            raise ModelLoadError(f"{graph.path} is quantised dynamically, which ONNX Runtime is faster in.")
        return source, graph, found
    kinds = ", ".join(f"{graph.name} is stored as {graph.kind}" for graph in graphs)
    raise ConfigurationError(
        f"precision={asked!r} is not available on OpenVINO for this model ({kinds}): use backend='torch' for it, or "
        "precision='auto'."
    )


def _precision(graph: Graph, asked: str, has_bf16: bool) -> str | None:
    """In which precision a graph runs where one is asked for; None where it cannot."""
    if graph.quantisation in ("static", "dynamic"):
        return "int8" if asked in ("auto", "int8") else None
    if asked == "auto" and not graph.half:
        return "bf16" if has_bf16 and not bf16_is_slow() else "fp32"
    if graph.half:
        return "fp16" if asked in ("auto", "fp16") else asked if asked == "bf16" else None
    return None if asked == "fp16" else asked


def load(checkpoint: Checkpoint, settings: Settings) -> OpenVinoBackend:
    """Load the model on OpenVINO; see `plan`."""
    source, graph, precision = plan(checkpoint, settings)
    return OpenVinoBackend(source, graph, precision=precision, threads=settings.threads)


class OpenVinoBackend(GraphBackend):
    """OpenVINO on the CPU.

    Args:
        checkpoint: The model.
        graph: Its graph.
        precision: ``"fp32"``; ``"bf16"`` where the processor has it; ``"int8"``, see
            `rerank_plugins.backends.quantisation`, or as the graph has it; ``"fp16"`` for a graph that is stored so.
        threads: Threads of one call; None leaves it to the engine.
    """

    name = "openvino"
    # A width seen for the first time costs about a quarter of a short call.
    width_step = 8

    def __init__(
        self, checkpoint: Checkpoint, graph: Graph, *, precision: str = "fp32", threads: int | None = None
    ) -> None:
        super().__init__(checkpoint, graph, precision)
        self._open = functools.partial(
            _open, graph, self.calibration(), precision=precision, threads=threads, model=checkpoint.name
        )
        self._opened: PerProcess[tuple[Any, queue.SimpleQueue[Any], str]] = PerProcess()
        with self._opened.use(self._open) as (compiled, _, made):
            self.made = made
            named = (self.output in value.get_names() for value in compiled.outputs)
            self._position = next((i for i, found in enumerate(named) if found), 0)
        self.try_out()

    def run(self, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The logits of one batch, as the graph gives them."""
        with self._opened.use(self._open) as (compiled, idle, _):
            try:
                request = idle.get_nowait()
            except queue.Empty:
                request = compiled.create_infer_request()
            result = request.infer(feeds, share_inputs=True)
            logits = np.array(result[self._position], dtype=np.float32)
            idle.put(request)
        return logits


def _open(
    graph: Graph, calibration: Feeds | None, *, precision: str, threads: int | None, model: str
) -> tuple[Any, queue.SimpleQueue[Any], str]:
    """A compiled model, its idle requests, and the digest of the graph that was made for it.

    A request serves one call at a time; idle ones wait in the queue for the next caller.
    """
    openvino: Any = _engines.openvino()
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
    core = openvino.Core()
    try:
        with source(graph, calibration) as (content, digest):
            read = core.read_model(content if isinstance(content, str) else io.BytesIO(content))
            return core.compile_model(read, "CPU", settings), queue.SimpleQueue(), digest
    except RerankError:
        raise
    except Exception as error:
        raise graph_error("OpenVINO", graph.path, model, error) from error
