"""ONNX graphs of a model: which there are, and what stands in them. A file's name only says which to look at first."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rerank_plugins._paths import cache_directory
from rerank_plugins.backends import onnx_file
from rerank_plugins.backends._files import ModelFiles
from rerank_plugins.backends._schema import MAX_LABELS
from rerank_plugins.backends.weights import is_lfs_pointer
from rerank_plugins.errors import ModelLoadError

__all__ = ["Graph", "Value", "beside", "graph_names", "read_graph"]

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
DTYPES: dict[int, np.dtype[Any]] = {
    7: np.dtype(np.int64),
    6: np.dtype(np.int32),
    1: np.dtype(np.float32),
    9: np.dtype(np.bool_),
}
"""Of inputs, by ``TensorProto.DataType``."""
_FLOAT16, _BFLOAT16 = 10, 16
_EXTERNAL = 1
_EMBEDDINGS = ("embed", "hidden", "pooler", "pooled")
"""Parts of the names that exporters give to the outputs of encoders."""


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of a graph.

    Attributes:
        name: Its name.
        dtype: ``TensorProto.DataType``.
        shape: Sizes, None for one that is free; None altogether where the graph does not tell.
    """

    name: str
    dtype: int
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True, slots=True)
class Graph:
    """What an ONNX file holds.

    Attributes:
        name: Relative to the model's directory.
        path: The file.
        inputs: Its inputs.
        outputs: Its outputs.
        quantisation: See `rerank_plugins.backends.onnx_file.quantisation`.
        half: Whether its weights are stored in half precision.
        external: Names of the files beside it that hold its weights.
        positions: Rows of its table of positions; None where none was found.
        counts_positions: Whether it counts positions from the padding on, as RoBERTa does.
    """

    name: str
    path: Path
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    quantisation: onnx_file.Quantisation | None
    half: bool
    external: tuple[str, ...]
    positions: int | None
    counts_positions: bool

    @property
    def kind(self) -> str:
        """How it is stored, in words."""
        stored = {None: "fp32", "weights": "int8 weights", "static": "int8", "dynamic": "int8, scales of each batch"}
        return "fp16" if self.half and self.quantisation is None else stored[self.quantisation]

    def logits(self, width: int | None) -> str:
        """The name of the output with the logits.

        Args:
            width: The model's hidden size; None where it is not known.

        Raises:
            ModelLoadError: The graph is none of a cross-encoder.
        """
        names = [value.name for value in self.inputs]
        if "past_key_values" in "".join(names):
            raise self._no("the graph of a causal language model that writes text: it expects earlier states")
        if "input_ids" not in names or not set(names) <= set(INPUTS):
            raise self._no(f"no graph of a cross-encoder: expected inputs among {', '.join(INPUTS)}, found {names}")
        if odd := [value.name for value in self.inputs if value.dtype not in DTYPES]:
            raise self._no(f"no graph of a cross-encoder: its inputs {odd} are no numbers")
        return self._output(width).name

    def _output(self, width: int | None) -> Value:
        listing = [f"{value.name} {list(value.shape) if value.shape else ''}".strip() for value in self.outputs]
        named = [value for value in self.outputs if value.name == "logits"]
        # No shape, or one or two sizes: a column or several for each pair.
        flat = [value for value in self.outputs if value.shape is None or len(value.shape) in (1, 2)]
        chosen = [value for value in (named or flat) if value in flat and not _is_embedding(value.name)]
        if named and not chosen:
            raise self._no(f"the graph of a causal language model or a tagger, with logits for every token ({listing})")
        if not chosen and any(_is_embedding(value.name) for value in self.outputs):
            raise self._no(f"the graph of an encoder, without a classification head: an embedding model ({listing})")
        if len(chosen) != 1:
            raise self._no(
                f"no graph of a cross-encoder: expected an output 'logits' (pairs, classes), found {listing}"
            )
        columns = chosen[0].shape[1] if chosen[0].shape is not None and len(chosen[0].shape) == 2 else 1
        if columns is not None and (columns > MAX_LABELS or columns == width):
            raise self._no(f"the graph of an embedding model: it gives {columns} numbers a text ({listing})")
        return chosen[0]

    def _no(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path} is {what}.")


def _is_embedding(name: str) -> bool:
    return any(part in name.lower() for part in _EMBEDDINGS)


def read_graph(files: ModelFiles, name: str) -> Graph:
    """Read a graph of a model, fetching it and the files that it names from the Hub where they are not here.

    Raises:
        ModelLoadError: It is no graph, or files are missing that it names.
    """
    files.fetch([name])
    path = files.path / name
    if is_lfs_pointer(path):
        raise ModelLoadError(f"{path} is a Git LFS pointer, not the graph. Fetch it with: git lfs pull")
    model = onnx_file.read(path)
    body = model.graph
    external = _external(model, path)
    folder = PurePosixPath(name).parent
    files.fetch([(folder / item).as_posix() for item in external])
    for item in external:
        if not (path.parent / item).is_file():
            missing = f"{(folder / item).as_posix()}, which holds the weights of {name}"
            raise files.partial(missing) if files.partial else ModelLoadError(f"{files.name!r} lacks {missing}.")
        if is_lfs_pointer(path.parent / item):
            raise ModelLoadError(f"{path.parent / item} is a Git LFS pointer. Fetch the weights with: git lfs pull")
    weights = {item.name for item in body.initializer}
    floats = [item.data_type for item in body.initializer if item.data_type in (onnx_file.FLOAT, _FLOAT16, _BFLOAT16)]
    return Graph(
        name=name,
        path=path,
        # Old exporters list the weights among the inputs.
        inputs=tuple(_value(item) for item in body.input if item.name not in weights),
        outputs=tuple(_value(item) for item in body.output),
        quantisation=onnx_file.quantisation(model),
        half=2 * sum(kind != onnx_file.FLOAT for kind in floats) > len(floats),
        external=external,
        positions=_positions(body),
        counts_positions=any(node.op_type == "CumSum" for node in body.node),
    )


def _value(item: Any) -> Value:
    kind = item.type.tensor_type
    shape = None
    if kind.HasField("shape"):
        shape = tuple(int(size.dim_value) if size.HasField("dim_value") else None for size in kind.shape.dim)
    return Value(item.name, int(kind.elem_type), shape)


def _external(model: Any, path: Path) -> tuple[str, ...]:
    """Names of the files that hold weights of a graph."""
    bodies = [model.graph, *model.functions]
    constants = (
        attribute.t for body in bodies for node in body.node for attribute in node.attribute if attribute.HasField("t")
    )
    found = set()
    for tensor in itertools.chain(model.graph.initializer, constants):
        if tensor.data_location != _EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        place = PurePosixPath(location.replace("\\", "/"))
        if not location or place.is_absolute() or ".." in place.parts or ":" in location:
            raise ModelLoadError(f"{path} names weights outside of its own directory: {location[:200]!r}.")
        found.add(place.as_posix())
    return tuple(sorted(found))


def _positions(body: Any) -> int | None:
    tables = [
        int(item.dims[0]) for item in body.initializer if "position_embedding" in item.name and len(item.dims) == 2
    ]
    return min(tables) if tables else None


# -- which one to take --------------------------------------------------------------------------------------------


def graph_names(files: ModelFiles, precision: str) -> list[str]:
    """Graphs of a model, in the order in which they are looked at for a precision.

    Args:
        files: The model.
        precision: What was asked for. ``"int8"`` and ``"fp16"`` begin with the graphs that are named so, everything
            else with the plain ones.

    Returns:
        Names relative to the model's directory.
    """
    names = sorted(name for name in files.names if name.endswith(".onnx") and _is_place(name))
    groups: dict[str, list[str]] = {"plain": [], "other": [], "int8": [], "fp16": [], "4bit": []}
    for name in names:
        stem = PurePosixPath(name).stem.lower()
        if stem == "model":
            groups["plain"].append(name)
        elif re.search(r"q4|bnb4|4bit|int4", stem):
            groups["4bit"].append(name)
        elif "int8" in stem or "quant" in stem:
            groups["int8"].append(name)
        elif "fp16" in stem or "float16" in stem or stem.endswith("_o4"):
            groups["fp16"].append(name)
        else:
            groups["other"].append(name)
    groups["plain"].sort(key=lambda name: name != "onnx/model.onnx")
    groups["int8"].sort(key=_int8_order)
    order = {"int8": ("int8", "plain", "other"), "fp16": ("fp16", "plain", "other")}
    default = ("plain", "other", "fp16", "int8", "4bit")
    return [name for group in order.get(precision, default) for name in groups[group]]


def _is_place(name: str) -> bool:
    return "/" not in name or (name.startswith("onnx/") and name.count("/") == 1)


def _int8_order(name: str) -> tuple[int, str]:
    """Those for every processor first, then those for this kind, then the others."""
    stem = PurePosixPath(name).stem.lower()
    if stem in ("model_int8", "model_quantized"):
        return 0, name
    arm = platform.machine().lower() in ("arm64", "aarch64")
    if not any(kind in stem for kind in ("avx", "arm64")):
        return 1, name
    # The kernels of AVX2 run on every x86 processor of the last ten years.
    return (2 if ("arm64" in stem) == arm and ("avx2" in stem or arm) else 3), name


# -- links --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def beside(graph: Graph) -> Iterator[Path]:
    """A path of the graph with all its files really beside it, while the context is open.

    In the Hub's disk cache they are links to files elsewhere, which engines refuse to follow.
    """
    folder = graph.path.parent
    names = [graph.path.name, *graph.external]
    if not graph.external or not any((folder / name).is_symlink() for name in names):
        yield graph.path
        return
    targets = {name: (folder / name).resolve() for name in names}
    # Hard links need no room, where they can be had: on the file system of the targets.
    with contextlib.ExitStack() as stack:
        place = _scratch(next(iter(targets.values())).parent, stack)
        for name, target in targets.items():
            copy = place / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(target, copy)
            except OSError:
                shutil.copyfile(target, copy)
        yield place / graph.path.name


def _scratch(beside_files: Path, stack: contextlib.ExitStack) -> Path:
    for base in (cache_directory(), beside_files, None):
        with contextlib.suppress(OSError):
            if base is not None:
                base.mkdir(parents=True, exist_ok=True)
                if base.stat().st_dev != beside_files.stat().st_dev:
                    continue
            # An engine may still have the files open, which Windows does not let go.
            made = tempfile.TemporaryDirectory(prefix=".graph-", dir=base, ignore_cleanup_errors=True)
            return Path(stack.enter_context(made))
    raise ModelLoadError("There is no directory to write temporary files to. Set TMPDIR to one.")
