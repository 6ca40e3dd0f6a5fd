"""int8 graphs: matrix products with weights in integers, with constant scales, for every engine.

`quantised` turns a float32 graph into one whose large products take both factors as integers: ``QuantizeLinear`` with
constants, ``DequantizeLinear``, and a ``MatMul`` with int8 weights that have one scale for each output channel. ONNX
Runtime and OpenVINO each run that pattern as one integer product. The constants are found once, over the texts beside
this module or over the user's, so a score depends neither on its batch nor on the machine.

Only products with weights are rounded, which are nine tenths of the work of a cross-encoder. Attention, normalisation
and head stay in float32, being small and sensitive, and so do the few channels with large activations of products that
would be coarse with them. Embeddings, and weights of products that stay in float32, are stored in int8.

Weights are rounded so that the products of two neighbours add up within 16 bits: x86 processors without VNNI add them
there, and would clip the sum. All processors give the same integers, and the file is the same for all.

Why not NNCF, OpenVINO's library for this: with the same texts its error was twice as large and it took 3.4 times as
long (measured for OpenVINO on a 6-layer MiniLM), and what it writes is made for OpenVINO.

References:
    Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023
    (https://arxiv.org/abs/2211.10438).
    Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022
    (https://arxiv.org/abs/2208.07339), for the outliers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rerank_plugins import _engines
from rerank_plugins.backends import onnx_file
from rerank_plugins.errors import ConfigurationError, ModelLoadError

__all__ = ["calibration_pairs", "quantised"]

SMOOTHING = (0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the outliers' range that may move from the activations to the weights (alpha of SmoothQuant)."""
N_OUTLIERS = 4
"""Channels that a product keeps in float32 where the rest would be too coarse with them."""
COARSE = 0.022
"""Expected relative error of a product from which it is worth to keep outliers, at 1 to 2 ms a thousand tokens."""
TOO_COARSE = 0.05
"""Expected relative error from which a product is not rounded at all."""
FEWEST_ROWS = 1000
"""Least activations seen for their range to be known: a layer that only [CLS] goes through is small, and stays."""
SMALLEST = 16
"""Least rows and columns of a weight matrix for it to be worth rounding."""
LARGEST_FILE = 2**31 - 2**20
"""Bytes of a protobuf message."""

_TEXTS = Path(__file__).with_name("calibration.jsonl")
_AXIS_SINCE = 13
"""Operator set from which DequantizeLinear takes one scale for each channel."""


def calibration_pairs(path: str | os.PathLike[str] | None = None) -> list[tuple[str, str]]:
    """Queries and texts to find the ranges of activations with.

    Args:
        path: A JSON Lines file; each line an object with ``"query"`` and ``"text"``. None takes the texts of this
            package: questions, documentation, code, news, tables, narrative and other languages, matching and not.

    Raises:
        ConfigurationError: The file cannot be read, or a line is something else.
    """
    file = _TEXTS if path is None else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The calibration texts {file} cannot be read: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError:
            item = None
        if not isinstance(item, dict) or not all(
            isinstance(item.get(key), str) and item[key].strip() for key in ("query", "text")
        ):
            raise ConfigurationError(
                f'Line {number} of {file}: expected {{"query": "...", "text": "..."}}, found {line[:80]!r}.'
            )
        pairs.append((item["query"], item["text"]))
    if not pairs:
        raise ConfigurationError(f"{file} has no calibration texts: one JSON object a line, with query and text.")
    return pairs


def quantised(graph: str | os.PathLike[str], feeds: Iterable[Mapping[str, NDArray[np.int64]]]) -> bytes:
    """An int8 graph made of a float32 one.

    Args:
        graph: The ONNX file; its weights may be in other files beside it.
        feeds: Inputs to find the ranges of the activations with; without padding, which would count.

    Returns:
        The content of an ONNX file that holds all its weights: the same bytes for the same input.

    Raises:
        ConfigurationError: The feeds are too few to know any range.
        ModelLoadError: The graph has no large matrix product with float32 weights, or is too large for one file.
    """
    model = onnx_file.read(graph)
    folder = Path(graph).parent
    none = ModelLoadError(
        f"{graph} has no matrix product with float32 weights that int8 could speed up. Give the float32 graph."
    )
    products = _products(model)
    if not products:
        raise none
    observed = _observe(model, folder, products, feeds)
    products = [item for item in products if _is_large(observed.weights[item.weights])]
    if not products:
        raise none
    seen = max(found.n_rows for found in observed.ranges.values())
    if seen < FEWEST_ROWS:
        raise ConfigurationError(
            f"The calibration texts are too short: expected at least {FEWEST_ROWS} tokens in all, found {seen}."
        )
    _Writer(model, folder, observed).write(products)
    content: bytes = b""
    if model.ByteSize() <= LARGEST_FILE:
        content = model.SerializeToString(deterministic=True)
    if not content:
        raise ModelLoadError(f"{graph} is too large: in int8 it has {model.ByteSize() / 1e9:.1f} GB, 2.1 are the most.")
    return content


class _Product(NamedTuple):
    """A matrix product with weights: a node ``MatMul`` or ``Gemm``."""

    node: Any
    source: str
    weights: str
    transposed: bool
    bias: str


def _products(model: Any) -> list[_Product]:
    fixed = onnx_file.constants(model)
    halves = {item.name for item in model.graph.initializer if item.data_type != onnx_file.FLOAT}
    found = []
    for node in model.graph.node:
        settings = onnx_file.attributes(node)
        if node.op_type not in ("MatMul", "Gemm") or node.domain or settings.get("transA"):
            continue
        if settings.get("alpha", 1) != 1 or settings.get("beta", 1) != 1:
            continue
        source, weights, bias = (*node.input, "")[:3]
        if source not in fixed and weights in fixed and weights not in halves:
            found.append(_Product(node, source, weights, bool(settings.get("transB")), bias))
    return found


def _is_large(matrix: NDArray[Any]) -> bool:
    return matrix.dtype == np.float32 and matrix.ndim == 2 and min(matrix.shape) >= SMALLEST


class _Range(NamedTuple):
    """Of each channel the smallest, largest and mean square value, each of shape (n_channels,), and the rows seen."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    squares: NDArray[np.float32]
    n_rows: int

    @classmethod
    def joined(cls, parts: Sequence[_Range]) -> _Range:
        """Of several kinds of activations, each counting alike."""
        low, high, squares, n_rows = zip(*parts, strict=True)
        return cls(np.min(low, axis=0), np.max(high, axis=0), np.mean(squares, axis=0), min(n_rows))


class _Observed(NamedTuple):
    ranges: dict[str, _Range]
    weights: dict[str, NDArray[np.float32]]


def _observe(
    model: Any, folder: Path, products: Sequence[_Product], feeds: Iterable[Mapping[str, NDArray[np.int64]]]
) -> _Observed:
    """Runs the float32 graph: ranges by source, and matrices of weights by name, as they are stored."""
    runtime: Any = _engines.onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    outside = {item.name: onnx_file.array(item, folder) for item in model.graph.initializer if onnx_file.external(item)}
    if outside:
        values = [runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(item)) for item in outside.values()]
        options.add_external_initializers(list(outside), values)
    stored = {item.name: item for item in model.graph.initializer}
    weights = dict.fromkeys(item.weights for item in products)
    made = [name for name in weights if name not in stored]
    sources = list(dict.fromkeys(item.source for item in products))
    watched = type(model).FromString(model.SerializeToString())
    for name in (*sources, *made):
        onnx_file.add_output(watched, name)
    session = runtime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])

    matrices: dict[str, Any] = {
        name: outside[name] if name in outside else onnx_file.array(stored[name], folder)
        for name in weights
        if name in stored
    }
    parts: dict[str, list[_Range]] = {name: [] for name in sources}
    for feed in feeds:
        missing = [name for name in made if name not in matrices]
        found = session.run([*sources, *missing], dict(feed))
        matrices.update(zip(missing, found[len(sources) :], strict=True))
        for name, values in zip(sources, found, strict=False):
            rows = values.reshape(-1, values.shape[-1])
            parts[name].append(_Range(rows.min(axis=0), rows.max(axis=0), np.square(rows).mean(axis=0), len(rows)))
    ranges = {
        name: _Range.joined(found)._replace(n_rows=sum(part.n_rows for part in found)) for name, found in parts.items()
    }
    return _Observed(ranges, matrices)


class _Plan(NamedTuple):
    """How to round one activation: divided by ``smooth``, to steps of ``step`` around ``zero``, less outliers."""

    smooth: NDArray[np.float32]
    step: np.float32
    zero: np.uint8
    outliers: NDArray[np.int64]


def _plan(found: _Range, weights: NDArray[np.float32]) -> _Plan | None:
    """The rounding with the least expected error, without outliers if that will do; None if nothing will.

    Args:
        found: Ranges of the activations.
        weights: What they are multiplied with, shape (n_in, n_out).
    """
    low, high, squares, _ = found
    seen = np.maximum(np.maximum(-low, high), 1e-5)
    # Channels that seldom fire may do so in other texts: each gets the range of a common one, signs as in the group.
    grow = np.maximum(1.0, np.median(seen) / seen)
    low, high = np.maximum(low * grow, low.min()), np.minimum(high * grow, high.max())
    largest = np.maximum(np.maximum(-low, high), 1e-5)
    rows = np.maximum(np.abs(weights).max(axis=1), 1e-8)
    row_squares = np.square(weights).sum(axis=1)
    power = max(float(squares @ row_squares), 1e-30)
    for n_outliers, most_error in ((0, COARSE), (N_OUTLIERS, TOO_COARSE)):
        plans = []
        for smoothing in SMOOTHING:
            smooth = _few_digits(np.clip(largest**smoothing / rows ** (1 - smoothing), 1e-5, 1e5))
            order = np.argsort(-largest / smooth, kind="stable")
            outliers, rest = np.sort(order[:n_outliers]), np.sort(order[n_outliers:])
            step, zero = _steps_of_activations((low / smooth)[rest], (high / smooth)[rest])
            # Rounding to steps of d has the variance d**2 / 12.
            of_activations = float(step) ** 2 * float((row_squares * smooth**2)[rest].sum())
            steps = _steps_of_weights(_smoothed(weights, smooth, outliers))
            of_weights = float((squares / smooth**2)[rest].sum()) * float(np.square(steps).sum())
            plans.append(((of_activations + of_weights) / 12 / power, _Plan(smooth, step, zero, outliers)))
        error, plan = min(plans, key=lambda item: item[0])
        if error < most_error**2:
            return plan
    return None


def _few_digits(values: NDArray[Any]) -> NDArray[np.float32]:
    """Rounded to three bits after the leading one: the last digit in which two machines differ does not matter."""
    mantissa, exponent = np.frexp(values)
    rounded: NDArray[np.float32] = np.ldexp(np.rint(mantissa * 16) / 16, exponent).astype(np.float32)
    return rounded


def _steps_of_activations(low: NDArray[np.float32], high: NDArray[np.float32]) -> tuple[np.float32, np.uint8]:
    """Step and zero point of 256 steps that cover all channels: zero is one of them, so that silent channels stay."""
    least, most = min(float(low.min()), 0.0), max(float(high.max()), 1e-5)
    # Of 255 steps, as zero may fall between two.
    mantissa, exponent = np.frexp((most - least) / 254)
    step = float(np.ldexp(np.ceil(mantissa * 256) / 256, exponent))
    return np.float32(step), np.uint8(min(round(-least / step), 255))


def _steps_of_weights(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Step of each column, shape (n_out,): 127 steps for its largest weight, 128 for the sum of two neighbours.

    Kernels for processors without VNNI multiply rows 2i and 2i + 1 with bytes up to 255 and add in 16 bits:
    255 * 128 < 2**15.
    """
    even = len(matrix) // 2 * 2
    most = np.maximum(np.abs(matrix).max(axis=0), np.abs(matrix[:even:2] + matrix[1:even:2]).max(axis=0, initial=0.0))
    steps: NDArray[np.float32] = (np.maximum(most, 1e-8) / 127).astype(np.float32)
    return steps


def _smoothed(
    weights: NDArray[np.float32], smooth: NDArray[np.float32], outliers: NDArray[np.int64]
) -> NDArray[np.float32]:
    matrix: NDArray[np.float32] = weights * smooth[:, None]
    matrix[outliers] = 0
    return matrix


def _integers(matrix: NDArray[np.float32], steps: NDArray[np.float32]) -> NDArray[np.int8]:
    integers: NDArray[np.int8] = np.clip(np.rint(matrix / steps), -127, 127).astype(np.int8)
    return integers


class _Writer:
    """Rewrites a graph in place: products in integers, tables of embeddings and other weights stored as integers."""

    def __init__(self, model: Any, folder: Path, observed: _Observed) -> None:
        self.graph = model.graph
        self.folder = folder
        self.observed = observed
        self.stored = {item.name: item for item in self.graph.initializer}
        opset = next((item.version for item in model.opset_import if not item.domain), 1)
        self.domain = "" if opset >= _AXIS_SINCE else "com.microsoft"
        if self.domain and all(item.domain != self.domain for item in model.opset_import):
            model.opset_import.add(domain=self.domain, version=1)
        self.nodes: list[Any] = []
        self.made: dict[str, str] = {}
        self.n_made = 0

    def write(self, products: Sequence[_Product]) -> None:
        plans = self._plans(products)
        by_output = {item.node.output[0]: item for item in products}
        for node in self.graph.node:
            product = by_output.get(node.output[0]) if node.output else None
            if product is not None and (plan := plans.get(product.source)) is not None:
                self._product(product, plan)
            elif product is not None:
                position = list(node.input).index(product.weights, 1)
                node.input[position] = self._stored_product(product)
                self.nodes.append(node)
            elif self._is_table(node):
                self._lookup(node)
            else:
                self.nodes.append(node)
        self._keep_what_is_used()

    def _matrix(self, product: _Product) -> NDArray[np.float32]:
        """Shape (n_in, n_out)."""
        matrix = self.observed.weights[product.weights]
        return matrix.T if product.transposed else matrix

    def _plans(self, products: Sequence[_Product]) -> dict[str, _Plan]:
        """Plans by source. Products of one source round it once, and what shares weights shares the plan."""
        groups: list[tuple[set[str], list[_Product]]] = []
        for product in products:
            names = {f"source {product.source}", f"weights {product.weights}"}
            own = [product]
            for group in [group for group in groups if group[0] & names]:
                groups.remove(group)
                names, own = names | group[0], group[1] + own
            groups.append((names, own))
        plans = {}
        for _, members in groups:
            sources = list(dict.fromkeys(item.source for item in members))
            found = _Range.joined([self.observed.ranges[name] for name in sources])
            if found.n_rows < FEWEST_ROWS:
                continue
            unique = {item.weights: item for item in members}
            plan = _plan(found, np.concatenate([self._matrix(item) for item in unique.values()], axis=1))
            if plan is not None:
                plans.update(dict.fromkeys(sources, plan))
        return plans

    def _product(self, product: _Product, plan: _Plan) -> None:
        output = product.node.output[0]
        parts = [self._once(f"integers of {product.source}", lambda: self._rounded(product.source, plan))]
        parts.append(
            self._once(f"weights {product.weights} {product.transposed}", lambda: self._rounded_weights(product, plan))
        )
        terms = [self._add("MatMul", parts)]
        if len(plan.outliers):
            few = self._once(f"outliers of {product.source}", lambda: self._outliers(product.source, plan))
            exact = self._constant(self._matrix(product)[plan.outliers])
            terms.append(self._add("MatMul", [few, exact]))
        if product.bias:
            terms.append(product.bias)
        while len(terms) > 1:
            terms[:2] = [self._add("Add", terms[:2])]
        self.nodes[-1].output[0] = output

    def _rounded(self, source: str, plan: _Plan) -> str:
        smooth = self._add("Mul", [source, self._constant(1 / plan.smooth)])
        scale, zero = self._constant(np.array(plan.step)), self._constant(np.array(plan.zero))
        integers = self._add("QuantizeLinear", [smooth, scale, zero])
        return self._add("DequantizeLinear", [integers, scale, zero])

    def _rounded_weights(self, product: _Product, plan: _Plan) -> str:
        matrix = _smoothed(self._matrix(product), plan.smooth, plan.outliers)
        steps = _steps_of_weights(matrix)
        names = [self._constant(_integers(matrix, steps)), self._constant(steps)]
        names.append(self._constant(np.zeros(len(steps), np.int8)))
        return self._add("DequantizeLinear", names, domain=self.domain, axis=1)

    def _outliers(self, source: str, plan: _Plan) -> str:
        return self._add("Gather", [source, self._constant(plan.outliers)], axis=-1)

    def _stored_product(self, product: _Product) -> str:
        """Weights that are float again before anything is multiplied, as they are stored: maybe transposed."""

        def make() -> str:
            matrix = self.observed.weights[product.weights]
            axis = 1 if product.transposed else 0
            steps = np.maximum(np.abs(matrix).max(axis=axis, keepdims=True), 1e-8).astype(np.float32) / np.float32(127)
            # Engines compute it once while loading; a DequantizeLinear they would keep.
            integers = self._add("Cast", [self._constant(_integers(matrix, steps))], to=onnx_file.FLOAT)
            return self._add("Mul", [integers, self._constant(steps)])

        return self._once(f"floats {product.weights} {product.transposed}", make)

    def _is_table(self, node: Any) -> bool:
        table = self.stored.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.data_type != onnx_file.FLOAT or onnx_file.attributes(node).get("axis", 0):
            return False
        return len(table.dims) == 2 and min(table.dims) >= SMALLEST

    def _lookup(self, node: Any) -> None:
        """Rows are taken while still int8: the table itself is never float, neither on disk nor in memory."""
        table, indices = node.input

        def make(of_steps: bool) -> str:
            values = onnx_file.array(self.stored[table], self.folder)
            steps = np.maximum(np.abs(values).max(axis=1, keepdims=True), 1e-8).astype(np.float32) / np.float32(127)
            return self._constant(steps if of_steps else _integers(values, steps))

        rows = self._add("Gather", [self._once(f"rows {table}", lambda: make(False)), indices], axis=0)
        steps = self._add("Gather", [self._once(f"steps {table}", lambda: make(True)), indices], axis=0)
        self._add("Mul", [self._add("Cast", [rows], to=onnx_file.FLOAT), steps])
        self.nodes[-1].output[0] = node.output[0]

    def _name(self) -> str:
        self.n_made += 1
        return f"int8_{self.n_made}"

    def _once(self, what: str, make: Any) -> str:
        if what not in self.made:
            self.made[what] = make()
        return self.made[what]

    def _constant(self, values: NDArray[Any]) -> str:
        name = self._name()
        self.graph.initializer.append(onnx_file.tensor(name, values))
        return name

    def _add(self, kind: str, inputs: Sequence[str], *, domain: str = "", **attributes: int) -> str:
        name = self._name()
        self.nodes.append(onnx_file.node(kind, inputs, name, domain=domain, **attributes))
        return name

    def _keep_what_is_used(self) -> None:
        """Leaves out nodes and weights that nothing reads any more; weights in other files move into this one."""
        used = {item.name for item in self.graph.output}
        kept = []
        for node in reversed(self.nodes):
            if any(name in used for name in node.output):
                kept.append(node)
                used.update(onnx_file.read_by(node))
        initializers = [item for item in self.graph.initializer if item.name in used]
        tensors = [
            onnx_file.tensor(item.name, onnx_file.array(item, self.folder)) if onnx_file.external(item) else item
            for item in initializers
        ]
        onnx_file.replace(self.graph.node, kept[::-1])
        onnx_file.replace(self.graph.initializer, tensors)
