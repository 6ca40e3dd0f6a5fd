"""The cross-encoder to train: loading, trainable parameters, and calibration folded into its last layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rerank_plugins._extras import import_extra
from rerank_plugins._minilm import minilm_directory
from rerank_plugins.backends.load import open_weights
from rerank_plugins.backends.weights import why_no_head
from rerank_plugins.calibration import Calibration
from rerank_plugins.errors import ConfigurationError, ModelLoadError
from rerank_plugins.training._bundled import bundled_checkpoint

__all__ = ["BUNDLED", "MINILM", "body_and_head", "fold", "miner_of", "start"]

BUNDLED = "bundled"
"""As ``trunk``: the bundled model."""

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
"""Name of the default trunk."""


def start(trunk: str | os.PathLike[str] | None, seed: int) -> Any:
    """A `CrossEncoder` of sentence-transformers with one logit: a cross-encoder, or an encoder under a fresh head.

    Args:
        trunk: A directory or Hub id; `BUNDLED` for the bundled model; None for all-MiniLM-L6-v2.
        seed: Of a fresh head.

    Raises:
        ConfigurationError: The model has several classes, or is a causal language model.
        ModelLoadError: It cannot be loaded.
    """
    torch = import_extra("torch", "train")
    from rerank_plugins.backends.cross_encoder import load_checked

    torch.manual_seed(seed)
    if trunk is None:
        trunk = minilm_directory("train")
    checkpoint = open_weights(str(bundled_checkpoint() if trunk == BUNDLED else trunk))
    if checkpoint.is_causal:
        raise ConfigurationError(
            f"{checkpoint.name!r} is a causal language model, which is not trained here. Take an encoder or a "
            "cross-encoder with one logit."
        )
    eager = {"attn_implementation": "eager"}
    if why_no_head(checkpoint) is not None:
        return _with_fresh_head(checkpoint.files.path, eager)
    model = load_checked(checkpoint, device="cpu", model_kwargs=eager)
    if model.num_labels != 1:
        raise ConfigurationError(
            f"{checkpoint.name!r} has {model.num_labels} classes; expected a cross-encoder with one logit, or an "
            "encoder."
        )
    return model


def _with_fresh_head(path: Path, model_kwargs: dict[str, Any]) -> Any:
    from sentence_transformers import CrossEncoder
    from transformers import AutoModelForSequenceClassification

    _, info = AutoModelForSequenceClassification.from_pretrained(
        str(path), num_labels=1, use_safetensors=True, output_loading_info=True
    )
    model = CrossEncoder(str(path), num_labels=1, device="cpu", model_kwargs={**model_kwargs, "use_safetensors": True})
    inside = f"{model[0].auto_model.base_model_prefix}."
    if lacking := sorted(name for name in info["missing_keys"] if name.startswith(inside) and ".pooler." not in name):
        raise ModelLoadError(f"{str(path)!r} lacks weights that its architecture needs: {', '.join(lacking[:5])}.")
    return model


def miner_of(trunk: str | os.PathLike[str] | None) -> Path:
    """Bi-encoder for mining: the trunk if it is an encoder without a head, otherwise all-MiniLM-L6-v2."""
    if trunk not in (None, BUNDLED):
        checkpoint = open_weights(str(trunk))
        if why_no_head(checkpoint) is not None and not checkpoint.is_causal:
            return checkpoint.files.path
    return minilm_directory("train")


def body_and_head(model: Any) -> tuple[list[Any], list[Any]]:
    """Trainable parameters of the encoder and of the head. Embeddings are frozen."""
    base = model[0].auto_model.base_model
    base.get_input_embeddings().requires_grad_(False)
    if hasattr(base, "embeddings"):
        base.embeddings.requires_grad_(False)
    inside = {id(parameter) for parameter in base.parameters()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (
        [parameter for parameter in learning if id(parameter) in inside],
        [parameter for parameter in learning if id(parameter) not in inside],
    )


def fold(model: Any, calibration: Calibration) -> bool:
    """Folds a calibration into the last linear layer.

    Returns:
        False, with nothing changed, where the last layer is not a linear one with one output.
    """
    torch = import_extra("torch", "train")
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part.out_features == 1]
    if not linear or linear[-1].bias is None:
        return False
    with torch.no_grad():
        linear[-1].weight.mul_(calibration.slope)
        linear[-1].bias.mul_(calibration.slope).add_(calibration.intercept)
    return True
