"""Reranking for LangChain: a document compressor, a cross-encoder, a retriever and a tool.

Install it with ``pip install "rerank-plugins[langchain]"``; it needs langchain-core alone.
"""

from __future__ import annotations

from rerank_plugins._extras import import_extra

import_extra("langchain_core.cross_encoders", "langchain")

# After the line above, which says what to install.
from rerank_plugins.langchain._cross_encoder import CrossEncoderScorer  # noqa: E402
from rerank_plugins.langchain._rerank import CrossEncoderRerank, RerankRetriever  # noqa: E402
from rerank_plugins.langchain._tool import create_rerank_tool  # noqa: E402

__all__ = ["CrossEncoderRerank", "CrossEncoderScorer", "RerankRetriever", "create_rerank_tool"]
