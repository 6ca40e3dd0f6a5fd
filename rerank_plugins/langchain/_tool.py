"""`create_rerank_tool`: retrieval with reranking as a tool for agents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate, aformat_document, format_document
from langchain_core.retrievers import RetrieverLike
from langchain_core.tools import StructuredTool, ToolException
from pydantic import AfterValidator, BaseModel, Field

from rerank_plugins._adapters import checked_query
from rerank_plugins._agent_texts import NOTHING_FOUND, heading, refusal
from rerank_plugins.errors import QueryError
from rerank_plugins.langchain._rerank import RerankRetriever

__all__ = ["create_rerank_tool"]


def create_rerank_tool(
    retriever: RetrieverLike,
    name: str = "search_documents",
    description: str = "Searches the documents and returns the passages that are most relevant to the query.",
    *,
    top_n: int | None = 3,
    min_score: float | None = None,
    k: int | None = None,
    document_prompt: BasePromptTemplate[str] | None = None,
    document_separator: str = "\n\n",
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact",
    **keywords: Any,
) -> StructuredTool:
    """Make a tool that retrieves, reranks and answers with ranked passages.

    It takes the place of ``create_retriever_tool``, which shows the model no scores. A query that is blank or too long
    is answered with a message that says so: an agent goes on.

    Args:
        retriever: The first stage.
        name: Name that the language model calls.
        description: Tells the language model what can be found here.
        top_n: Passages to return; None returns all.
        min_score: Return passages that score at least this; None returns all.
        k: How many candidates to rerank; see `RerankRetriever`.
        document_prompt: Makes the text of a passage out of ``page_content`` and the keys of its metadata,
            ``relevance_score`` among them; None writes a line with rank, score, title, source, page and URL (those that
            the metadata has), and the text below it.
        document_separator: Stands between passages.
        response_format: ``"content"`` leaves out the artifact.
        **keywords: All else that `RerankRetriever` takes: ``reranker=`` or the keywords of
            `rerank_plugins.Reranker`, ``metadata_fields``, ``document_text``.

    Returns:
        A tool with one argument, ``query``, sync and async. Its content is a text for the language model: the
        passages, best first. Its artifact is the list of Documents, with ``metadata["relevance_score"]``.

    Raises:
        ConfigurationError: A setting cannot work.
    """
    reranked = RerankRetriever(retriever=retriever, top_n=top_n, min_score=min_score, k=k, **keywords)

    def answer(passages: Sequence[str], documents: list[Document]) -> Any:
        content = document_separator.join(passages) or NOTHING_FOUND
        return (content, documents) if response_format == "content_and_artifact" else content

    def search(query: str, callbacks: Callbacks = None) -> Any:
        try:
            documents = reranked.invoke(query, config={"callbacks": callbacks})
        except QueryError as error:
            raise ToolException(refusal(query)) from error
        if document_prompt is None:
            return answer(_passages(documents), documents)
        return answer([format_document(document, document_prompt) for document in documents], documents)

    async def asearch(query: str, callbacks: Callbacks = None) -> Any:
        try:
            documents = await reranked.ainvoke(query, config={"callbacks": callbacks})
        except QueryError as error:
            raise ToolException(refusal(query)) from error
        if document_prompt is None:
            return answer(_passages(documents), documents)
        return answer([await aformat_document(document, document_prompt) for document in documents], documents)

    return StructuredTool(
        name=name,
        description=description,
        func=search,
        coroutine=asearch,
        args_schema=RerankInput,
        response_format=response_format,
        handle_tool_error=True,
    )


class RerankInput(BaseModel):
    """Arguments of the tool."""

    query: Annotated[str, AfterValidator(checked_query)] = Field(
        description="What to search for: a question or a statement in plain words."
    )


def _passages(documents: Sequence[Document]) -> list[str]:
    return [
        f"{heading(rank, document.metadata.get('relevance_score'), document.metadata)}\n{document.page_content}"
        for rank, document in enumerate(documents, start=1)
    ]
