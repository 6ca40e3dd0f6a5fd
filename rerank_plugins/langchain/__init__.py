"""Reranking for LangChain: a document compressor, a cross-encoder, a retriever, a tool, and middleware for agents.

Install it with ``pip install "rerank-plugins[langchain]"``; it needs langchain-core alone. The middleware needs
langchain itself: ``pip install "rerank-plugins[langchain-agents]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rerank_plugins._extras import import_extra

import_extra("langchain_core.cross_encoders", "langchain")

# After the line above, which says what to install.
from rerank_plugins.langchain._cross_encoder import CrossEncoderScorer  # noqa: E402
from rerank_plugins.langchain._rerank import CrossEncoderRerank, RerankRetriever  # noqa: E402
from rerank_plugins.langchain._tool import create_rerank_tool  # noqa: E402

if TYPE_CHECKING:
    from rerank_plugins.langchain.agents import RelevantResultsMiddleware as RelevantResultsMiddleware
    from rerank_plugins.langchain.agents import RelevantToolsMiddleware as RelevantToolsMiddleware

__all__ = ["CrossEncoderRerank", "CrossEncoderScorer", "RerankRetriever", "create_rerank_tool"]


def __getattr__(name: str) -> Any:
    # Only who names the middleware needs langchain itself.
    if name in ("RelevantResultsMiddleware", "RelevantToolsMiddleware"):
        from rerank_plugins.langchain import agents

        return getattr(agents, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
