"""Calibrated int8 on OpenVINO: both factors of the large matrix products become integers.

Only products with weights are rounded, which are nine tenths of the work of a cross-encoder. Attention, normalisation
and head stay in float32, being small and sensitive, and so do products whose activations would lose too much. The
scales are constants, found once over built-in texts while loading: a score never depends on what else is in its batch,
as it would with scales that are taken while scoring.

References:
    Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023
    (https://arxiv.org/abs/2211.10438).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins.errors import ModelLoadError

__all__ = ["calibration_pairs", "quantise"]

SMOOTHING = 0.8
"""Share of the outliers' range that moves from the activations to the weights (alpha of SmoothQuant)."""
SMALLEST = 16
"""Least rows and columns of a weight matrix for it to be worth rounding."""
FEWEST_STEPS = 10.0
"""Least root mean square of rounded activations, in steps: below, outliers leave too little resolution for the rest."""
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
    for nodes, (low, high, squares) in zip(groups.values(), ranges, strict=True):
        rows = np.maximum(
            np.max([np.abs(weights[node.get_friendly_name()]).max(axis=1) for node in nodes], axis=0), 1e-8
        )
        largest = np.maximum(np.maximum(-low, high), 1e-5)
        smooth = np.clip(largest**SMOOTHING / np.maximum(rows, 1e-8) ** (1 - SMOOTHING), 1e-5, 1e5).astype(np.float32)
        least, most = _with_zero(low / smooth, high / smooth)
        if np.sqrt((squares / smooth**2).mean()) < FEWEST_STEPS * (most - least) / 255:
            continue
        activations = opset.multiply(nodes[0].input_value(0), opset.constant(1 / smooth))
        rounded = opset.fake_quantize(activations, *_ends(opset, least, most), 256)
        for node in nodes:
            matrix = np.ascontiguousarray((weights[node.get_friendly_name()] * smooth[:, None]).T)
            ends = reach * np.maximum(np.abs(matrix).max(axis=1, keepdims=True), 1e-8)
            integers = opset.fake_quantize(opset.constant(matrix), *_ends(opset, -ends, ends), 255)
            product = opset.matmul(rounded, integers, False, True)
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(product.output(0))
    model.validate_nodes_and_infer_types()


def _saturates(ov: Any, opset: Any, compile_: Callable[[Any], Any]) -> bool:
    """Whether products of int8 clip: x86 processors without VNNI add the products of two bytes in 16 bits."""
    n = 64
    values = opset.parameter([n, n], np.float32)
    rounded = opset.fake_quantize(values, *_ends(opset, np.float32(0), np.float32(255)), 256)
    matrix = np.full((n, n), 127, np.float32)
    ends = np.full((n, 1), 127, np.float32)
    integers = opset.fake_quantize(opset.constant(matrix), *_ends(opset, -ends, ends), 255)
    product = opset.matmul(rounded, integers, False, True)
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
) -> list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]:
    """Smallest, largest and mean square value of each channel of some activations, each of shape (n_channels,)."""
    observed = compile_(ov.Model(sources, model.get_parameters()))
    low: list[NDArray[np.float32]] = []
    high: list[NDArray[np.float32]] = []
    squares: list[list[NDArray[np.float32]]] = [[] for _ in sources]
    for feed in feeds:
        found = observed(feed)
        flat = [found[i].reshape(-1, found[i].shape[-1]) for i in range(len(sources))]
        least, most = [values.min(axis=0) for values in flat], [values.max(axis=0) for values in flat]
        low = [np.minimum(a, b) for a, b in zip(low, least, strict=True)] if low else least
        high = [np.maximum(a, b) for a, b in zip(high, most, strict=True)] if high else most
        for kept, values in zip(squares, flat, strict=True):
            kept.append(np.square(values).mean(axis=0))
    return [(a, b, np.mean(c, axis=0)) for a, b, c in zip(low, high, squares, strict=True)]
