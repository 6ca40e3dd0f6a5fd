"""The bundled model as a checkpoint: its int8 graph turned back into float weights that PyTorch trains."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins import models
from rerank_plugins._extras import import_extra
from rerank_plugins._paths import cache_directory
from rerank_plugins.backends import onnx_file
from rerank_plugins.errors import ModelLoadError

__all__ = ["bundled_checkpoint", "float_weights"]

Floats = NDArray[np.float32]
_PREFIX = "parts.0.model."
"""What the exporter puts before the names of a checkpoint's weights."""


def bundled_checkpoint() -> Path:
    """A directory with the bundled model in safetensors, made once and kept in the cache directory.

    Raises:
        ModelLoadError: The bundled graph is no int8 graph of a BERT-like model.
    """
    source = models.bundled_directory()
    graph = source / "model.onnx"
    digest = hashlib.sha256(graph.read_bytes()).hexdigest()[:16]
    cache = cache_directory()
    kept = None if cache is None else cache / "bundled" / digest
    if kept is not None and (kept / "model.safetensors").is_file():
        return kept
    try:
        weights = float_weights(graph)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"The bundled model cannot be trained further: {error} Start from a checkpoint, such as "
            "trunk='cross-encoder/ms-marco-MiniLM-L6-v2', or leave trunk out."
        ) from error
    made = Path(tempfile.mkdtemp(prefix="rerank-plugins-bundled-"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("rerank_plugins", None)
    (made / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, made / name)
    save_file = import_extra("safetensors.numpy", "train").save_file
    save_file(weights, str(made / "model.safetensors"), metadata={"format": "pt"})
    if kept is None:
        return made
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made, kept, dirs_exist_ok=True)
    except OSError:
        # A read-only cache: the temporary directory serves this process.
        return made
    shutil.rmtree(made, ignore_errors=True)
    return kept


def float_weights(graph: Path) -> dict[str, Floats]:
    """The float weights of a BERT-like graph that `rerank_plugins.conversion.convert` wrote in int8.

    What was rounded stays rounded; what was moved from activations to weights (SmoothQuant) moves back.

    Args:
        graph: The ONNX file.

    Returns:
        Weights by their name in the checkpoint.

    Raises:
        ModelLoadError: It is no such graph.
    """
    try:
        return _Weights(graph).all()
    except (KeyError, IndexError, ValueError) as error:
        raise ModelLoadError(
            f"The weights of {graph} cannot be read back: expected a graph that rerank-plugins convert --int8 made of "
            f"a BERT-like model ({type(error).__name__}: {error})."
        ) from error


class _Weights:
    def __init__(self, graph: Path) -> None:
        model = onnx_file.read(graph)
        self.stored = {item.name: onnx_file.array(item, graph.parent) for item in model.graph.initializer}
        self.nodes = []
        for node in model.graph.node:
            # The exporter stores equal weights, such as biases of zeros, once.
            if node.op_type == "Identity" and node.input[0] in self.stored:
                self.stored[node.output[0]] = self.stored[node.input[0]]
            else:
                self.nodes.append(node)
        self.made_by = {output: node for node in self.nodes for output in node.output}

    def all(self) -> dict[str, Floats]:
        found: dict[str, Floats] = {}
        for name, values in self.stored.items():
            if name.startswith(_PREFIX):
                found[name.removeprefix(_PREFIX)] = np.ascontiguousarray(values, dtype=np.float32)
        for node in self.nodes:
            for bias in node.input:
                weight = f"{bias.removesuffix('.bias')}.weight"
                if bias.startswith(_PREFIX) and bias.endswith(".bias") and weight not in self.stored:
                    matrix = self._linear(node, bias)
                    found[weight.removeprefix(_PREFIX)] = np.ascontiguousarray(matrix.T, dtype=np.float32)
            if node.op_type == "Mul" and "_embeddings/Gather" in node.output[0]:
                # /parts.0/bert/embeddings/word_embeddings/Gather_output_0
                module = ".".join(node.output[0].split("/")[2:-1])
                rows, steps = (self.made_by[name] for name in node.input)
                rows = self.made_by[rows.input[0]] if rows.op_type == "Cast" else rows
                table = self._value(rows.input[0]).astype(np.float32) * self._value(steps.input[0])
                found[f"{module}.weight"] = np.ascontiguousarray(table, dtype=np.float32)
        return found

    def _value(self, name: str) -> NDArray[Any]:
        """A constant of the graph, with what is done to it while loading."""
        if name in self.stored:
            return self.stored[name]
        node = self.made_by[name]
        inputs = [self._value(item) for item in node.input]
        if node.op_type == "Cast":
            return inputs[0].astype(np.float32)
        if node.op_type == "Mul":
            return np.asarray(inputs[0] * inputs[1])
        if node.op_type == "Transpose":
            return inputs[0].T
        if node.op_type == "DequantizeLinear":
            return np.asarray(inputs[0].astype(np.float32) * inputs[1])
        raise ValueError(f"{node.op_type} makes weights")

    def _linear(self, node: Any, bias: str) -> Floats:
        """Of a linear layer with this bias the matrix, shape (n_in, n_out)."""
        if node.op_type == "Gemm":
            weights = self._value(node.input[1])
            return np.asarray(weights.T if onnx_file.attributes(node).get("transB", 0) else weights, dtype=np.float32)
        (term,) = (self.made_by[name] for name in node.input if name != bias)
        parts = [self.made_by[name] for name in term.input] if term.op_type == "Add" else [term]
        matrices = [self._product(part) for part in parts]
        whole = next(matrix for rows, matrix in matrices if rows is None).copy()
        for rows, matrix in matrices:
            if rows is not None:
                whole[rows] += matrix
        return np.asarray(whole, dtype=np.float32)

    def _product(self, node: Any) -> tuple[NDArray[Any] | None, Floats]:
        """Of one product the rows that it has (None for all) and its matrix."""
        if node.op_type != "MatMul":
            raise ValueError(f"{node.op_type} stands where a product was expected")
        left, right = node.input
        matrix = self._value(right).astype(np.float32)
        source = self.made_by.get(left)
        if source is not None and source.op_type == "Gather" and source.input[1] in self.stored:
            return self.stored[source.input[1]], matrix
        if source is not None and source.op_type == "DequantizeLinear":
            rounded = self.made_by[source.input[0]]
            smoothed = self.made_by[rounded.input[0]]
            return None, np.asarray(self._value(smoothed.input[1])[:, None] * matrix, dtype=np.float32)
        return None, matrix
