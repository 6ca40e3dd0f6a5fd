"""ONNX files read and written without the ``onnx`` package, which the base install does not have.

The messages are described to protobuf here, as far as they are used; fields that are not described are kept as they
are. protobuf itself comes with ONNX Runtime.

References:
    The format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rerank_plugins.errors import ModelLoadError

__all__ = [
    "FLOAT",
    "Quantisation",
    "add_output",
    "array",
    "attributes",
    "constants",
    "external",
    "node",
    "quantisation",
    "read",
    "read_by",
    "replace",
    "tensor",
]

Quantisation = Literal["static", "dynamic", "weights"]

FLOAT = 1
"""``TensorProto.FLOAT``."""

_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
}
"""By ``TensorProto.DataType``, of the types that a cross-encoder's weights have."""
_EXTERNAL = 1
"""``TensorProto.DataLocation.EXTERNAL``."""
_INT = 2
"""``AttributeProto.AttributeType.INT``."""

_FIELDS = {
    # Of each message: name, number, type, and whether it repeats. A type in capitals is another message.
    "Entry": [("key", 1, "string", False), ("value", 2, "string", False)],
    "OperatorSet": [("domain", 1, "string", False), ("version", 2, "int64", False)],
    "Dimension": [("dim_value", 1, "int64", False), ("dim_param", 2, "string", False)],
    "Shape": [("dim", 1, "Dimension", True)],
    "TensorType": [("elem_type", 1, "int32", False), ("shape", 2, "Shape", False)],
    "Type": [("tensor_type", 1, "TensorType", False)],
    "ValueInfo": [("name", 1, "string", False), ("type", 2, "Type", False)],
    "Tensor": [
        ("dims", 1, "int64", True),
        ("data_type", 2, "int32", False),
        ("float_data", 4, "float", True),
        ("int32_data", 5, "int32", True),
        ("int64_data", 7, "int64", True),
        ("name", 8, "string", False),
        ("raw_data", 9, "bytes", False),
        ("double_data", 10, "double", True),
        ("external_data", 13, "Entry", True),
        ("data_location", 14, "int32", False),
    ],
    "Attribute": [
        ("name", 1, "string", False),
        ("f", 2, "float", False),
        ("i", 3, "int64", False),
        ("s", 4, "bytes", False),
        ("t", 5, "Tensor", False),
        ("g", 6, "Graph", False),
        ("floats", 7, "float", True),
        ("ints", 8, "int64", True),
        ("graphs", 11, "Graph", True),
        ("type", 20, "int32", False),
    ],
    "Node": [
        ("input", 1, "string", True),
        ("output", 2, "string", True),
        ("name", 3, "string", False),
        ("op_type", 4, "string", False),
        ("attribute", 5, "Attribute", True),
        ("domain", 7, "string", False),
    ],
    "Graph": [
        ("node", 1, "Node", True),
        ("name", 2, "string", False),
        ("initializer", 5, "Tensor", True),
        ("input", 11, "ValueInfo", True),
        ("output", 12, "ValueInfo", True),
    ],
    "Function": [("name", 1, "string", False), ("node", 7, "Node", True)],
    "Model": [
        ("ir_version", 1, "int64", False),
        ("graph", 7, "Graph", False),
        ("opset_import", 8, "OperatorSet", True),
        ("metadata_props", 14, "Entry", True),
        ("functions", 25, "Function", True),
    ],
}

_ROUNDS_WHILE_SCORING = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
_ROUNDED_WEIGHTS = {"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"}


@functools.cache
def _messages() -> dict[str, Any]:
    """Message classes by name, in a pool of their own: the ``onnx`` package may be loaded beside them."""
    descriptor = importlib.import_module("google.protobuf.descriptor_pb2")
    pool = importlib.import_module("google.protobuf.descriptor_pool").DescriptorPool()
    factory = importlib.import_module("google.protobuf.message_factory")
    field = descriptor.FieldDescriptorProto
    file = descriptor.FileDescriptorProto(name="graph.proto", package="graph", syntax="proto2")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for key, number, kind, repeats in fields:
            made = message.field.add(
                name=key, number=number, label=field.LABEL_REPEATED if repeats else field.LABEL_OPTIONAL
            )
            if kind in _FIELDS:
                made.type, made.type_name = field.TYPE_MESSAGE, f".graph.{kind}"
            else:
                made.type = getattr(field, f"TYPE_{kind.upper()}")
    pool.Add(file)
    return {name: factory.GetMessageClass(pool.FindMessageTypeByName(f"graph.{name}")) for name in _FIELDS}


def read(path: str | os.PathLike[str]) -> Any:
    """The ``ModelProto`` of a file; weights in other files stay there.

    Raises:
        ModelLoadError: The file is missing, cut off or no ONNX graph.
    """
    try:
        model = _messages()["Model"].FromString(Path(path).read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        # protobuf's own class of error is another one in each of its implementations.
        raise ModelLoadError(f"{path} is no ONNX graph, or only a part of one: {error}") from error
    if not model.graph.node:
        raise ModelLoadError(f"{path} is no ONNX graph: it has no nodes.")
    return model


def _bodies(model: Any) -> Iterator[Any]:
    """What holds nodes: the graph, its functions, and the branches and loops inside of them, outer ones first."""
    waiting = [model.graph, *model.functions]
    while waiting:
        body = waiting.pop(0)
        yield body
        for node in body.node:
            for attribute in node.attribute:
                waiting += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def quantisation(model: Any) -> Quantisation | None:
    """How a graph is quantised, by what it computes.

    Args:
        model: A ``ModelProto`` of `read`, or a path to one.

    Returns:
        None if it is not; ``"weights"`` if weights are stored as integers and multiplied as floats; ``"static"`` if
        activations are rounded with constant scales; ``"dynamic"`` if some scale is taken over the batch, so that a
        score depends on what else is in it.

    Raises:
        ModelLoadError: The file cannot be read.
    """
    if isinstance(model, str | os.PathLike):
        model = read(model)
    fixed = constants(model)
    found: set[Quantisation] = set()
    for item in (node for body in _bodies(model) for node in body.node):
        kind = item.op_type
        if kind in _ROUNDS_WHILE_SCORING:
            return "dynamic"
        if kind == "QuantizeLinear" and item.input[0] not in fixed:
            if item.input[1] not in fixed:
                return "dynamic"
            found.add("static")
        elif "Integer" in kind or kind.startswith("QLinear") or kind in ("QAttention", "QGemm"):
            found.add("static")
        elif kind in _ROUNDED_WEIGHTS or (kind == "DequantizeLinear" and item.input[0] in fixed):
            found.add("weights")
    integers = {2, 3}
    if any(item.data_type in integers and len(item.dims) >= 2 for item in model.graph.initializer):
        found.add("weights")
    return "static" if "static" in found else "weights" if found else None


def constants(model: Any) -> set[str]:
    """Names of values that no input reaches: weights and what is made from them alone."""
    found: set[str] = set()
    for body in _bodies(model):
        found.update(item.name for item in getattr(body, "initializer", ()))
        for node in body.node:
            if not node.op_type.startswith("Random") and all(not name or name in found for name in node.input):
                found.update(node.output)
    return found


def external(item: Any) -> bool:
    """Whether the values of a ``TensorProto`` are in another file."""
    return bool(item.data_location == _EXTERNAL)


def array(item: Any, folder: Path) -> NDArray[Any]:
    """The values of a ``TensorProto``, whose file, where it has one of its own, is in a folder.

    Raises:
        ModelLoadError: The type is none of a cross-encoder's weights, or the file is missing or too short.
    """
    dtype = _DTYPES.get(item.data_type)
    if dtype is None:
        raise ModelLoadError(f"{item.name!r} has a data type that is not known here: {item.data_type}.")
    shape = tuple(int(size) for size in item.dims)
    values: NDArray[Any]
    if external(item):
        facts = {entry.key: entry.value for entry in item.external_data}
        file = folder / facts.get("location", "")
        try:
            values = np.memmap(file, dtype, "r", int(facts.get("offset", 0)), shape)
            return values
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"The weights {item.name!r} cannot be read from {file}: {error}") from error
    if item.HasField("raw_data"):
        values = np.frombuffer(item.raw_data, dtype)
    elif dtype == np.float16:
        values = np.array(item.int32_data, np.uint16).view(dtype)
    else:
        values = np.array(item.float_data or item.int32_data or item.int64_data or item.double_data, dtype)
    return values.reshape(shape)


def tensor(name: str, values: NDArray[Any]) -> Any:
    """A ``TensorProto`` that holds an array."""
    data_type = next(number for number, dtype in _DTYPES.items() if dtype == values.dtype)
    content = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    return _messages()["Tensor"](name=name, dims=values.shape, data_type=data_type, raw_data=content)


def node(kind: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes_: int) -> Any:
    """A ``NodeProto`` with one output."""
    made = _messages()["Node"](op_type=kind, input=inputs, output=[output], name=output, domain=domain)
    for name, value in attributes_.items():
        made.attribute.add(name=name, type=_INT, i=value)
    return made


def attributes(item: Any) -> dict[str, float | int]:
    """The numbers among the attributes of a ``NodeProto``."""
    return {entry.name: entry.f if entry.HasField("f") else entry.i for entry in item.attribute}


def read_by(item: Any) -> Iterator[str]:
    """Names that a ``NodeProto`` reads, those inside its branches included."""
    yield from item.input
    for entry in item.attribute:
        for body in (*entry.graphs, *([entry.g] if entry.HasField("g") else [])):
            yield from (value.name for value in body.output)
            for inner in body.node:
                yield from read_by(inner)


def replace(field: Any, items: Sequence[Any]) -> None:
    """Sets a field that repeats."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def add_output(model: Any, name: str) -> None:
    """Makes a value inside a graph one of its outputs; the engine finds its type."""
    if all(item.name != name for item in model.graph.output):
        model.graph.output.add(name=name)
