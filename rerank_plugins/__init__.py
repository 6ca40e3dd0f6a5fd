"""Cross-encoder reranking for LangChain and LlamaIndex, from one shared scoring core.

`rerank_plugins.langchain` and `rerank_plugins.llama_index` hold the adapters; `Reranker` works without a framework.
"""

from rerank_plugins.reranker import Reranker
from rerank_plugins.types import Candidate, RankedCandidate, Ranking

__all__ = ["Candidate", "RankedCandidate", "Ranking", "Reranker", "__version__"]

__version__ = "0.1.0"
