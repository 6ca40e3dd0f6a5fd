"""ONNX graphs on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rerank_plugins._extras import import_extra

__all__ = ["store"]

_MAX_BYTES = 2**31 - 2**20
"""Size of a protobuf message; weights beyond it go to a file beside the graph."""


def store(loaded: Any, graph: Path) -> None:
    """Writes a graph, its weights beside it where one protobuf message cannot hold them."""
    onnx = import_extra("onnx", "train")
    if loaded.ByteSize() < _MAX_BYTES:
        onnx.save(loaded, str(graph))
    else:
        onnx.save(loaded, str(graph), save_as_external_data=True, location="model.onnx_data")
