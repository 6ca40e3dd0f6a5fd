"""The bundled cross-encoder, and the table of published ones."""

from __future__ import annotations

from pathlib import Path

from rerank_plugins.models._published import PublishedModel, published

__all__ = ["BUNDLED_NAME", "PublishedModel", "bundled_directory", "published"]

BUNDLED_NAME = "rerank-plugins/minilm-l6"
"""What a ranking of the bundled model names as its model."""


def bundled_directory() -> Path:
    """The directory of the bundled model: its ONNX graph, tokenizer, configuration and card."""
    return Path(__file__).parent / "minilm-l6"
