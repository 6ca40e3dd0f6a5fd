"""Engines that turn (query, text) pairs into logits, and the rule by which one is chosen."""

from rerank_plugins.backends._files import converted_directory
from rerank_plugins.backends.base import Backend, LocalBackend, Pair, PairLogits, PairScorer, as_backend
from rerank_plugins.backends.load import _torch_on_gpu, load_backend

__all__ = [
    "Backend",
    "LocalBackend",
    "Pair",
    "PairLogits",
    "PairScorer",
    "_torch_on_gpu",
    "as_backend",
    "converted_directory",
    "load_backend",
]
