"""`RerankRetriever`: a retriever and a reranker as one retriever, on langchain-core alone."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Annotated, Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from pydantic import ConfigDict, SkipValidation

from rerank_plugins.errors import ConfigurationError
from rerank_plugins.langchain._documents import DocumentRerankFields
from rerank_plugins.selection import check_limits

__all__ = ["RerankRetriever"]


class RerankRetriever(DocumentRerankFields, BaseRetriever):
    """Retrieves candidates with another retriever and returns the best of them, with their scores.

    What ``ContextualCompressionRetriever`` with a `CrossEncoderRerank` does, without langchain-classic. Takes
    every keyword of `rerank_plugins.Reranker`, or ``reranker=`` for one that is shared.

    ``invoke(query, top_n=..., min_score=..., k=...)`` and its relatives override the settings for one call;
    all other keywords of a call go to the inner retriever.

    Raises:
        ConfigurationError: A setting cannot work, or `metadata_fields` and `document_text` are both given.

    Example:
        >>> from rerank_plugins.langchain import RerankRetriever
        >>> retriever = RerankRetriever(retriever=store.as_retriever(), k=20, top_n=3)  # doctest: +SKIP
        >>> retriever.invoke("how do I undo a commit")[0].metadata["relevance_score"]  # doctest: +SKIP
        0.97
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    retriever: RetrieverLike
    """The first stage: a retriever, or any Runnable from a query to Documents. It is never changed."""
    k: Annotated[int | None, SkipValidation] = None
    """How many candidates to rerank. The first stage is asked for this many where it has a setting for it
    (``search_kwargs``, ``k``), and of what it returns the first `k` are taken. None takes what it returns."""

    def _check(self) -> None:
        super()._check()
        _check_k(self.k)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        k, cuts, kwargs = self._settings(kwargs)
        retriever, kwargs = _asking_for(self.retriever, k, kwargs)
        documents = retriever.invoke(query, config={"callbacks": run_manager.get_child()}, **kwargs)
        return self._rerank(documents[:k], query, run_manager.get_child(), **cuts)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        k, cuts, kwargs = self._settings(kwargs)
        retriever, kwargs = _asking_for(self.retriever, k, kwargs)
        documents = await retriever.ainvoke(query, config={"callbacks": run_manager.get_child()}, **kwargs)
        return await self._arerank(documents[:k], query, run_manager.get_child(), **cuts)

    def _settings(self, kwargs: dict[str, Any]) -> tuple[int | None, dict[str, Any], dict[str, Any]]:
        """The settings of one call: `k`, the cuts, and what is left for the inner retriever."""
        rest = dict(kwargs)
        k = rest.pop("k", self.k)
        cuts = {name: rest.pop(name, getattr(self, name)) for name in ("top_n", "min_score")}
        _check_k(k)
        check_limits(**cuts)
        return k, cuts, rest


def _asking_for(
    retriever: RetrieverLike, k: int | None, kwargs: dict[str, Any]
) -> tuple[RetrieverLike, dict[str, Any]]:
    """A retriever and the keywords of a call that make it return `k` documents, as far as it has a way to."""
    if k is None or not isinstance(retriever, BaseRetriever):
        return retriever, kwargs
    fields = type(retriever).model_fields
    if "search_kwargs" in fields:
        search = {**(getattr(retriever, "search_kwargs", None) or {}), "k": k}
        return retriever.model_copy(update={"search_kwargs": search}), kwargs
    if "k" in fields:
        return retriever.model_copy(update={"k": k}), kwargs
    parameters = signature(retriever._get_relevant_documents).parameters.values()
    if any(parameter.name == "k" or parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        return retriever, {**kwargs, "k": k}
    return retriever, kwargs


def _check_k(k: int | None) -> None:
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ConfigurationError(f"k must be an int of at least 1, or None for the retriever's own; got {k!r}.")
