"""Cross-encoder reranking in LlamaIndex: a node postprocessor, and a retrieval tool for agents."""

from rerank_plugins._extras import import_extra

import_extra("llama_index.core", "llama-index")

from rerank_plugins.llama_index._rerank import CrossEncoderRerank  # noqa: E402
from rerank_plugins.llama_index._tool import create_rerank_tool  # noqa: E402

__all__ = ["CrossEncoderRerank", "create_rerank_tool"]
