"""A retrieval tool for agents."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index.core.tools import FunctionTool, ToolOutput
from pydantic import BaseModel, Field

from rerank_plugins._adapters import FALLBACK, checked_query
from rerank_plugins._agent_texts import NOTHING_FOUND, heading, refusal
from rerank_plugins.errors import QueryError
from rerank_plugins.llama_index._rerank import CrossEncoderRerank, content
from rerank_plugins.reranker import Reranker

__all__ = ["create_rerank_tool"]

_DESCRIPTION = (
    "Searches the documents and returns the passages that are most relevant to the query, best first, each "
    "with its relevance score (higher is better) and its source."
)


class _Arguments(BaseModel):
    query: str = Field(description="What to search for: a question or a statement in plain words.")


class _Found(list[NodeWithScore]):
    """The ranked nodes. LlamaIndex takes the text of what a tool returns: here it is what a language model reads."""

    refused: QueryError | None = None
    """Why nothing was searched."""
    query: Any = None

    def __str__(self) -> str:
        if self.refused is not None:
            return refusal(self.query)
        return "\n\n".join(_passage(rank, item) for rank, item in enumerate(self, start=1)) or NOTHING_FOUND


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

    A query that is blank or too long is answered with a message that says so: an agent goes on.

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
        language model: the passages, best first, each with its rank and score, with title, source, page and URL (those
        that the metadata has, otherwise the name of the document), and with its text. The raw output is the list of
        `NodeWithScore`.

    Raises:
        ConfigurationError: A setting cannot work.
    """
    rerank = CrossEncoderRerank(reranker=reranker, top_n=top_n, min_score=min_score, **keywords)

    # A model may write arguments of other names; LlamaIndex passes on whatever it wrote.
    def search(query: Any = "", **_: Any) -> _Found:
        found = _Found()
        try:
            found += rerank.postprocess_nodes(retriever.retrieve(checked_query(query)), query_str=query)
        except QueryError as error:
            found.refused, found.query = error, query
        return found

    async def asearch(query: Any = "", **_: Any) -> _Found:
        found = _Found()
        try:
            found += await rerank.apostprocess_nodes(await retriever.aretrieve(checked_query(query)), query_str=query)
        except QueryError as error:
            found.refused, found.query = error, query
        return found

    def show(found: _Found) -> str | ToolOutput:
        if found.refused is None:
            return str(found)
        return ToolOutput(
            content=str(found),
            tool_name=name,
            raw_input={"args": (), "kwargs": {"query": found.query}},
            raw_output=[],
            is_error=True,
            exception=found.refused,
        )

    # Given as well: LlamaIndex runs a sync callback of an async call in the loop's default executor.
    async def ashow(found: _Found) -> str | ToolOutput:
        return show(found)

    return FunctionTool.from_defaults(
        fn=search,
        async_fn=asearch,
        callback=show,
        async_callback=ashow,
        name=name,
        description=description,
        fn_schema=_Arguments,
    )


def _passage(rank: int, item: NodeWithScore) -> str:
    """A passage as a language model reads it."""
    node = item.node
    visible = {key: value for key, value in node.metadata.items() if key not in node.excluded_llm_metadata_keys}
    line = heading(rank, None if FALLBACK in node.metadata else item.score, visible, node.ref_doc_id or item.node_id)
    return f"{line}\n{content(node, MetadataMode.LLM)}"
