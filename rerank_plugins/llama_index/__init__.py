"""Cross-encoder reranking in LlamaIndex: a node postprocessor, a retrieval tool, and help for agents."""

from rerank_plugins._extras import import_extra

import_extra("llama_index.core", "llama-index")

from rerank_plugins.llama_index._agents import RelevantToolRetriever, with_relevant_results  # noqa: E402
from rerank_plugins.llama_index._rerank import CrossEncoderRerank  # noqa: E402
from rerank_plugins.llama_index._tool import create_rerank_tool  # noqa: E402

__all__ = ["CrossEncoderRerank", "RelevantToolRetriever", "create_rerank_tool", "with_relevant_results"]
