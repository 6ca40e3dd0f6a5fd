"""A retrieval tool for agents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

from rerank_plugins.llama_index._rerank import CrossEncoderRerank
from rerank_plugins.reranker import Reranker

__all__ = ["create_rerank_tool"]

_DESCRIPTION = (
    "Searches the documents and returns the passages that are most relevant to the query, best first, each "
    "with its relevance score (higher is better) and its source."
)
_NOTHING = "No relevant passages were found. Try another query."
_SOURCE_KEYS = ("source", "title", "file_path", "file_name", "url")


class _Arguments(BaseModel):
    query: str = Field(description="What to search for: a question or a statement in plain words.")


def create_rerank_tool(
    retriever: BaseRetriever,
    *,
    name: str = "search_documents",
    description: str = _DESCRIPTION,
    reranker: Reranker | None = None,
    top_n: int | None = 3,
    min_score: float | None = None,
    **keywords: Any,
) -> FunctionTool:
    """Make a tool that retrieves, reranks, and shows an agent the ranked passages with their scores.

    Args:
        retriever: The first stage. Let it find several times `top_n`.
        name: Name of the tool, as the language model sees it.
        description: What the tool is for, as the language model sees it: name your documents here.
        reranker: A `Reranker` to share; None makes one from the keywords.
        top_n: Show the best this many; None shows all.
        min_score: Show those that score at least this; None shows all.
        **keywords: Further keywords of `CrossEncoderRerank`, such as ``model`` or ``metadata_mode``.

    Returns:
        A tool with one argument, ``query``, sync and async. The content of its output is a text for the
        language model: the passages, best first, each with its rank, its score and its source. The raw output
        is the list of `NodeWithScore`.

    Raises:
        ConfigurationError: A setting cannot work.
    """
    rerank = CrossEncoderRerank(reranker=reranker, top_n=top_n, min_score=min_score, **keywords)

    def search(query: str) -> list[NodeWithScore]:
        return rerank.postprocess_nodes(retriever.retrieve(query), query_str=query)

    async def asearch(query: str) -> list[NodeWithScore]:
        return await rerank.apostprocess_nodes(await retriever.aretrieve(query), query_str=query)

    # Given as well: LlamaIndex runs a sync callback of an async call in the loop's default executor.
    async def ashow(nodes: Sequence[NodeWithScore]) -> str:
        return _shown(nodes)

    return FunctionTool.from_defaults(
        fn=search,
        async_fn=asearch,
        callback=_shown,
        async_callback=ashow,
        name=name,
        description=description,
        fn_schema=_Arguments,
    )


def _shown(nodes: Sequence[NodeWithScore]) -> str:
    """The passages as a language model reads them."""
    if not nodes:
        return _NOTHING
    return "\n\n".join(
        f"{_heading(rank, item)}\n{item.node.get_content(MetadataMode.LLM)}" for rank, item in enumerate(nodes, start=1)
    )


def _heading(rank: int, item: NodeWithScore) -> str:
    hidden = item.node.excluded_llm_metadata_keys
    named = (item.metadata[key] for key in _SOURCE_KEYS if item.metadata.get(key) and key not in hidden)
    source = " ".join(str(next(named, item.node.ref_doc_id or item.node_id)).split())
    return f"[{rank}] relevance score {item.get_score():.3f}, source: {source}"
