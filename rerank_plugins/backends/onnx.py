"""ONNX graphs on ONNX Runtime, the engine of the base install."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins import _engines
from rerank_plugins._fork import PerProcess
from rerank_plugins.backends._graph_engine import Feeds, GraphBackend, check_device, graph_error, source, take_graph
from rerank_plugins.backends.checkpoint import Checkpoint
from rerank_plugins.backends.graphs import Graph
from rerank_plugins.errors import ConfigurationError, RerankError
from rerank_plugins.settings import Settings

__all__ = ["OnnxBackend", "load", "plan"]


def plan(checkpoint: Checkpoint, settings: Settings) -> tuple[Checkpoint, Graph, str]:
    """Which graph ONNX Runtime would run, and in which precision.

    Returns:
        What describes the graph, the graph, and the precision.

    Raises:
        RerankError: It cannot run this model; the message says why.
    """
    _engines.onnxruntime()
    check_device(settings)
    asked = settings.precision
    source, graphs = take_graph(checkpoint, asked)
    for graph in graphs:
        if (found := _precision(graph, asked)) is not None:
            return source, graph, found
    kinds = ", ".join(f"{graph.name} is stored as {graph.kind}" for graph in graphs)
    other = "backend='openvino' or 'torch'" if asked == "bf16" else "backend='torch'"
    raise ConfigurationError(
        f"precision={asked!r} is not available on ONNX Runtime for this model ({kinds}): use {other} for it, or "
        "precision='auto'."
    )


def _precision(graph: Graph, asked: str) -> str | None:
    """In which precision a graph runs where one is asked for; None where it cannot."""
    rounded = graph.quantisation in ("static", "dynamic")
    own = "int8" if rounded else "fp16" if graph.half else "fp32"
    if asked in ("auto", own):
        return own
    return "int8" if asked == "int8" and not graph.half else None


def load(checkpoint: Checkpoint, settings: Settings) -> OnnxBackend:
    """Load the model on ONNX Runtime; see `plan`."""
    source, graph, precision = plan(checkpoint, settings)
    return OnnxBackend(source, graph, precision=precision, threads=settings.threads)


class OnnxBackend(GraphBackend):
    """ONNX Runtime on the CPU, in the number format of the graph.

    Args:
        checkpoint: The model.
        graph: Its graph.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``, as the graph has it; or ``"int8"``, made of a float32 graph.
        threads: Threads of one call; None leaves it to the engine: one for each core.
    """

    name = "onnx"

    def __init__(
        self, checkpoint: Checkpoint, graph: Graph, *, precision: str = "fp32", threads: int | None = None
    ) -> None:
        super().__init__(checkpoint, graph, precision)
        self._open = functools.partial(_open, graph, self.calibration(), threads, checkpoint.name)
        self._opened: PerProcess[tuple[Any, str]] = PerProcess()
        with self._opened.use(self._open) as (_, made):
            self.made = made
        self.try_out()

    def run(self, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The logits of one batch, as the graph gives them."""
        with self._opened.use(self._open) as (session, _):
            (logits,) = session.run([self.output], feeds)
        return np.asarray(logits)


def _open(graph: Graph, calibration: Feeds | None, threads: int | None, model: str) -> tuple[Any, str]:
    """A session, and the digest of the graph that was made for it."""
    ort: Any = _engines.onnxruntime()
    options = ort.SessionOptions()
    # Errors alone: a library prints nothing, and ONNX Runtime warns on standard error.
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # Plans of memory are for inputs of one shape: with ever other ones they take more of it, and save no time.
    options.enable_mem_pattern = False
    if graph.quantisation == "weights" and calibration is None:
        # Weights that are stored as int8 become float once, while loading, and not again in every call.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        with source(graph, calibration) as (content, digest):
            return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"]), digest
    except RerankError:
        raise
    except Exception as error:
        raise graph_error("ONNX Runtime", graph.path, model, error) from error
