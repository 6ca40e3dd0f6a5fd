"""`create_rerank_tool`: retrieval with reranking as a tool for agents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import Document
from langchain_core.retrievers import RetrieverLike
from langchain_core.tools import StructuredTool
from pydantic import AfterValidator, BaseModel, Field

from rerank_plugins.langchain._retriever import RerankRetriever

__all__ = ["create_rerank_tool"]

_LABELS = ("title", "source", "page")


def create_rerank_tool(
    retriever: RetrieverLike,
    name: str = "search_documents",
    description: str = "Searches the documents and returns the passages that are most relevant to the query.",
    *,
    top_n: int | None = 3,
    min_score: float | None = None,
    k: int | None = None,
    **keywords: Any,
) -> StructuredTool:
    """Make a tool that retrieves, reranks and answers with ranked passages.

    It takes the place of ``create_retriever_tool``, which shows the model no scores.

    Args:
        retriever: The first stage.
        name: Name that the language model calls.
        description: Tells the language model what can be found here.
        top_n: Passages to return; None returns all.
        min_score: Return passages that score at least this; None returns all.
        k: How many candidates to rerank; see `RerankRetriever`.
        **keywords: All else that `RerankRetriever` takes: ``reranker=`` or the keywords of
            `rerank_plugins.Reranker`, ``metadata_fields``, ``document_text``.

    Returns:
        A tool with one argument, ``query``, sync and async. Its content is a text for the language model: the
        passages, best first, each with its rank, its score and, where the metadata has them, title, source
        and page. Its artifact is the list of Documents, with ``metadata["relevance_score"]``.

    Raises:
        ConfigurationError: A setting cannot work.
    """
    reranked = RerankRetriever(retriever=retriever, top_n=top_n, min_score=min_score, k=k, **keywords)

    def search(query: str, callbacks: Callbacks = None) -> tuple[str, list[Document]]:
        documents = reranked.invoke(query, config={"callbacks": callbacks})
        return _content(query, documents), documents

    async def asearch(query: str, callbacks: Callbacks = None) -> tuple[str, list[Document]]:
        documents = await reranked.ainvoke(query, config={"callbacks": callbacks})
        return _content(query, documents), documents

    return StructuredTool(
        name=name,
        description=description,
        func=search,
        coroutine=asearch,
        args_schema=RerankInput,
        response_format="content_and_artifact",
    )


def _not_blank(query: str) -> str:
    if not query.strip():
        raise ValueError("the query is blank; say what to search for")
    return query


class RerankInput(BaseModel):
    """Arguments of the tool."""

    query: Annotated[str, AfterValidator(_not_blank)] = Field(
        description="What to search for: a question or a statement in plain words."
    )


def _content(query: str, documents: Sequence[Document]) -> str:
    """The passages as a text that a language model reads."""
    if not documents:
        return f"No relevant passages were found for: {query}"
    ranked = enumerate(documents, start=1)
    return "\n\n".join(f"{_heading(rank, document)}\n{document.page_content}" for rank, document in ranked)


def _heading(rank: int, document: Document) -> str:
    facts = [f"relevance score {document.metadata['relevance_score']:.3f}"]
    facts += [
        f"{label}: {' '.join(str(value).split())}"
        for label in _LABELS
        if (value := document.metadata.get(label)) not in (None, "")
    ]
    return f"[{rank}] {', '.join(facts)}"
