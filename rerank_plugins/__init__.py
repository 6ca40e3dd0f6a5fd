"""Cross-encoder reranking for LangChain and LlamaIndex, from one shared scoring core.

`rerank_plugins.langchain` and `rerank_plugins.llama_index` hold the adapters; `Reranker` works without a framework.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rerank_plugins.reranker import Reranker
    from rerank_plugins.types import Candidate, RankedCandidate, Ranking

__all__ = ["Candidate", "RankedCandidate", "Ranking", "Reranker", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # At first use: NumPy alone takes most of the time that an eager import would.
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("rerank_plugins.reranker" if name == "Reranker" else "rerank_plugins.types"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
