"""ONNX graphs on disk, and their weights in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rerank_plugins._extras import import_extra

__all__ = ["int8_weights", "store"]

_MAX_BYTES = 2**31 - 2**20
"""Size of a protobuf message; weights beyond it go to a file beside the graph."""


def store(loaded: Any, graph: Path) -> None:
    """Writes a graph, its weights beside it where one protobuf message cannot hold them."""
    onnx = import_extra("onnx", "train")
    if loaded.ByteSize() < _MAX_BYTES:
        onnx.save(loaded, str(graph))
    else:
        onnx.save(loaded, str(graph), save_as_external_data=True, location="model.onnx_data")


def int8_weights(graph: Path) -> None:
    """Weights of matrix products and embedding tables to int8, symmetric, one scale for each output channel
    or row."""
    onnx = import_extra("onnx", "train")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    loaded = onnx.load(str(graph))
    body = loaded.graph
    weights = {item.name: item for item in body.initializer if item.data_type == onnx.TensorProto.FLOAT}
    made: dict[tuple[str, int], str] = {}
    nodes: list[Any] = []
    fresh: list[Any] = []
    used: set[str] = set()

    def quantised(name: str, axis: int) -> tuple[str, str]:
        values = numpy_helper.to_array(weights[name])
        other = tuple(i for i in range(values.ndim) if i != axis)
        scale = np.maximum(np.abs(values).max(axis=other), 1e-12).astype(np.float32) / np.float32(127)
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        integers = np.clip(np.rint(values / scale.reshape(shape)), -127, 127).astype(np.int8)
        stem = f"{name}_int8_{axis}"
        fresh.append(numpy_helper.from_array(integers, stem))
        fresh.append(numpy_helper.from_array(scale, f"{stem}_scale"))
        return stem, f"{stem}_scale"

    for node in body.node:
        weight = (
            node.input[1] if node.op_type in {"MatMul", "Gemm"} else node.input[0] if node.op_type == "Gather" else ""
        )
        tensor = weights.get(weight)
        if tensor is None or len(tensor.dims) != 2 or min(tensor.dims) < 16:
            nodes.append(node)
            continue
        if node.op_type == "Gather":
            if any(a.name == "axis" and a.i != 0 for a in node.attribute):
                nodes.append(node)
                continue
            # Rows are picked while still int8: the table itself is never float, neither on disk nor in
            # memory.
            if (weight, 0) not in made:
                made[weight, 0], _ = quantised(weight, 0)
                width = numpy_helper.from_array(np.array([-1], dtype=np.int64), f"{made[weight, 0]}_last")
                fresh.append(width)
            stem, out = made[weight, 0], node.output[0]
            nodes += [
                helper.make_node("Gather", [stem, node.input[1]], [f"{out}_rows"], axis=0),
                helper.make_node("Cast", [f"{out}_rows"], [f"{out}_float"], to=onnx.TensorProto.FLOAT),
                helper.make_node("Gather", [f"{stem}_scale", node.input[1]], [f"{out}_scale"], axis=0),
                helper.make_node("Unsqueeze", [f"{out}_scale", f"{stem}_last"], [f"{out}_scales"]),
                helper.make_node("Mul", [f"{out}_float", f"{out}_scales"], [out]),
            ]
        else:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            axis = 0 if transposed else 1
            if (weight, axis) not in made:
                stem, scale = quantised(weight, axis)
                made[weight, axis] = f"{stem}_float"
                nodes.append(helper.make_node("DequantizeLinear", [stem, scale], [f"{stem}_float"], axis=axis))
            node.input[1] = made[weight, axis]
            nodes.append(node)
    del body.node[:]
    body.node.extend(nodes)
    for node in body.node:
        used.update(node.input)
    kept = [item for item in body.initializer if item.name in used]
    del body.initializer[:]
    body.initializer.extend(kept + fresh)
    store(loaded, graph)
