"""Calibrated int8 on OpenVINO: both factors of the large matrix products become integers.

Only products with weights are rounded, which are nine tenths of the work of a cross-encoder. Attention, normalisation
and head stay in float32, being small and sensitive, and so do the few channels with large activations of products that
would be coarse with them. The scales are constants, found once over built-in texts while loading: a score never depends
on what else is in its batch, as it would with scales that are taken while scoring.

References:
    Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023
    (https://arxiv.org/abs/2211.10438).
    Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022
    (https://arxiv.org/abs/2208.07339), for the outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins.errors import ModelLoadError

__all__ = ["calibration_pairs", "quantise"]

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
PAIRS = 48


def calibration_pairs() -> list[tuple[str, str]]:
    """Questions and paragraphs of CPython's manual, short and long, matching and not."""
    import pydoc_data.topics

    topics = sorted(pydoc_data.topics.topics)
    paragraphs = [
        (topic, " ".join(part.split()))
        for topic in topics
        for part in pydoc_data.topics.topics[topic].split("\n\n")
        if len(part.split()) > 10
    ]
    step = len(paragraphs) // PAIRS
    chosen = [paragraphs[i * step] for i in range(PAIRS)]
    forms = ("what is {}", "{}", "how do I use {} in a program, and when does it fail?")
    return [
        # Every third question belongs to another paragraph.
        (forms[i % 3].format(chosen[(i + i % 3 // 2) % PAIRS][0].replace("-", " ")), text)
        for i, (_, text) in enumerate(chosen)
    ]


def quantise(model: Any, feeds: Iterable[Mapping[str, NDArray[np.int64]]], compile_: Callable[[Any], Any]) -> None:
    """Rewrites a model so that OpenVINO multiplies its weights in int8.

    Args:
        model: An ``openvino.Model``; changed in place.
        feeds: Inputs to find the ranges of the activations with; without padding, which would count.
        compile_: Compiles a model in float32.

    Raises:
        ModelLoadError: The model has no large matrix product with weights.
    """
    ov: Any = import_extra("openvino", "openvino")
    opset: Any = import_extra("openvino.opset13", "openvino")
    products = [node for node in model.get_ordered_ops() if _is_weighted(node)]
    if not products:
        raise ModelLoadError("This graph has no matrix product with weights that int8 could speed up.")
    # Query, key and value multiply the same activations: one rounding for them all.
    groups: dict[tuple[str, int], list[Any]] = {}
    for node in products:
        source = node.input_value(0)
        groups.setdefault((source.get_node().get_friendly_name(), source.get_index()), []).append(node)

    # Weights of seven bits keep the sums of two products within sixteen, for processors that saturate there.
    reach = 2.0 if _saturates(ov, opset, compile_) else 1.0
    weights = _weights(ov, products, compile_)
    ranges = _ranges(ov, model, [nodes[0].input_value(0) for nodes in groups.values()], feeds, compile_)
    for nodes, (low, high, squares, n_rows) in zip(groups.values(), ranges, strict=True):
        if n_rows < FEWEST_ROWS:
            continue
        matrices = [weights[node.get_friendly_name()] for node in nodes]
        plan = _plan(low, high, squares, np.concatenate(matrices, axis=1), reach)
        if plan is None:
            continue
        source = nodes[0].input_value(0)
        activations = opset.multiply(source, opset.constant(1 / plan.smooth))
        rounded = opset.fake_quantize(activations, *_ends(opset, plan.least, plan.most), 256)
        for node, matrix in zip(nodes, matrices, strict=True):
            smoothed = matrix * plan.smooth[:, None]
            smoothed[plan.outliers] = 0
            product = _times_integers(opset, rounded, smoothed, reach)
            if len(plan.outliers):
                few = opset.gather(source, opset.constant(plan.outliers), opset.constant(-1))
                product = opset.add(product, opset.matmul(few, opset.constant(matrix[plan.outliers]), False, False))
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(product.output(0))
    model.validate_nodes_and_infer_types()


def _saturates(ov: Any, opset: Any, compile_: Callable[[Any], Any]) -> bool:
    """Whether products of int8 clip: x86 processors without VNNI add the products of two bytes in 16 bits."""
    n = 64
    values = opset.parameter([n, n], np.float32)
    rounded = opset.fake_quantize(values, *_ends(opset, np.float32(0), np.float32(255)), 256)
    product = _times_integers(opset, rounded, np.full((n, n), 127, np.float32), 1.0)
    found = compile_(ov.Model([product.output(0)], [values]))([np.full((n, n), 255, np.float32)])[0]
    return bool(np.abs(found / (n * 127 * 255) - 1).max() > 0.01)


def _is_weighted(node: Any) -> bool:
    if node.get_type_name() != "MatMul":
        return False
    shape = node.get_input_partial_shape(1)
    if shape.is_dynamic or len(shape) != 2 or min(shape.get_shape()) < SMALLEST:
        return False
    return _is_constant(node.input_value(1).get_node()) and not node.get_attributes()["transpose_a"]


def _is_constant(node: Any) -> bool:
    if node.get_type_name() == "Constant":
        return True
    inputs = [value.get_node() for value in node.input_values()]
    return bool(inputs) and all(_is_constant(item) for item in inputs)


def _ends(opset: Any, low: Any, high: Any) -> list[Any]:
    """The four ends of a rounding that keeps its scale: of the input, and of the output."""
    return [opset.constant(low), opset.constant(high)] * 2


def _times_integers(opset: Any, rounded: Any, matrix: NDArray[np.float32], reach: float) -> Any:
    """The product with a matrix of shape (n_in, n_out), rounded to 255 steps that span `reach` times each column."""
    ends = reach * np.maximum(np.abs(matrix).max(axis=0), 1e-8)[:, None]
    integers = opset.fake_quantize(opset.constant(np.ascontiguousarray(matrix.T)), *_ends(opset, -ends, ends), 255)
    return opset.matmul(rounded, integers, False, True)


class _Plan(NamedTuple):
    """How to round one activation: divided by ``smooth``, to 256 steps from ``least`` to ``most``, less outliers."""

    smooth: NDArray[np.float32]
    least: np.float32
    most: np.float32
    outliers: NDArray[np.int64]


def _plan(
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    squares: NDArray[np.float32],
    weights: NDArray[np.float32],
    reach: float,
) -> _Plan | None:
    """The rounding with the least expected error, without outliers if that will do; None if nothing will.

    Args:
        low: Smallest value of each channel, shape (n_in,).
        high: Largest value of each channel, shape (n_in,).
        squares: Mean square of each channel, shape (n_in,).
        weights: What the activations are multiplied with, shape (n_in, n_out).
        reach: Range of the integers over that of the weights.
    """
    seen = np.maximum(np.maximum(-low, high), 1e-5)
    # Channels that seldom fire may do so in other texts: each gets the range of a common one, signs as in the group.
    grow = np.maximum(1.0, np.median(seen) / seen)
    low, high = np.maximum(low * grow, low.min()), np.minimum(high * grow, high.max())
    largest = np.maximum(np.maximum(-low, high), 1e-5)
    rows = np.maximum(np.abs(weights).max(axis=1), 1e-8)
    power = float(squares @ np.square(weights).sum(axis=1))
    for n_outliers, most_error in ((0, COARSE), (N_OUTLIERS, TOO_COARSE)):
        plans = []
        for smoothing in SMOOTHING:
            smooth = np.clip(largest**smoothing / rows ** (1 - smoothing), 1e-5, 1e5).astype(np.float32)
            order = np.argsort(-largest / smooth, kind="stable")
            outliers, rest = np.sort(order[:n_outliers]), order[n_outliers:]
            least, most = _with_zero((low / smooth)[rest], (high / smooth)[rest])
            smoothed = (weights * smooth[:, None])[rest]
            # Rounding to steps of d has the variance d**2 / 12.
            of_activations = ((most - least) / 255) ** 2 * float(np.square(smoothed).sum())
            steps = reach * np.abs(smoothed).max(axis=0) / 127
            of_weights = float((squares / smooth**2)[rest].sum()) * float(np.square(steps).sum())
            plans.append(((of_activations + of_weights) / 12 / power, _Plan(smooth, least, most, outliers)))
        error, plan = min(plans, key=lambda item: item[0])
        if error < most_error**2:
            return plan
    return None


def _with_zero(low: NDArray[np.float32], high: NDArray[np.float32]) -> tuple[np.float32, np.float32]:
    """One range for all channels, in which zero is one of 256 steps: padding and silent channels stay exact."""
    least, most = min(float(low.min()), 0.0), max(float(high.max()), 1e-5)
    step = (most - least) / 255
    below = round(-least / step)
    return np.float32(-below * step), np.float32((255 - below) * step)


def _weights(ov: Any, products: list[Any], compile_: Callable[[Any], Any]) -> dict[str, NDArray[np.float32]]:
    """Weight matrices in float32, shape (n_in, n_out), by the names of their products."""
    results = [node.input_value(1) for node in products]
    values = compile_(ov.Model(results, []))([])
    return {
        node.get_friendly_name(): np.array(values[i].T if node.get_attributes()["transpose_b"] else values[i])
        for i, node in enumerate(products)
    }


def _ranges(
    ov: Any,
    model: Any,
    sources: list[Any],
    feeds: Iterable[Mapping[str, NDArray[np.int64]]],
    compile_: Callable[[Any], Any],
) -> list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], int]]:
    """Smallest, largest and mean square value of each channel, each of shape (n_channels,), and how many were seen."""
    observed = compile_(ov.Model(sources, model.get_parameters()))
    low: list[NDArray[np.float32]] = []
    high: list[NDArray[np.float32]] = []
    squares: list[list[NDArray[np.float32]]] = [[] for _ in sources]
    n_rows = [0] * len(sources)
    for feed in feeds:
        found = observed(feed)
        flat = [found[i].reshape(-1, found[i].shape[-1]) for i in range(len(sources))]
        least, most = [values.min(axis=0) for values in flat], [values.max(axis=0) for values in flat]
        low = [np.minimum(a, b) for a, b in zip(low, least, strict=True)] if low else least
        high = [np.maximum(a, b) for a, b in zip(high, most, strict=True)] if high else most
        n_rows = [n + len(values) for n, values in zip(n_rows, flat, strict=True)]
        for kept, values in zip(squares, flat, strict=True):
            kept.append(np.square(values).mean(axis=0))
    return [(a, b, np.mean(c, axis=0), n) for a, b, c, n in zip(low, high, squares, n_rows, strict=True)]
