"""What all adapters do with Documents: choose the text, rank in a traced run, copy the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import Document
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import (
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
)
from pydantic import SkipValidation
from pydantic.json_schema import SkipJsonSchema

from rerank_plugins._adapters import RerankerFields
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.selection import check_limits
from rerank_plugins.types import Candidate, Ranking

__all__ = ["DocumentRerankFields"]

RUN_NAME = "CrossEncoderRerank"


class DocumentRerankFields(RerankerFields):
    """The keywords of an adapter that ranks Documents, and the ranking itself."""

    # `check_limits` checks it: pydantic would take True for 1.
    top_n: Annotated[int | None, SkipValidation] = 3
    """Keep the best this many; None keeps all."""
    min_score: Annotated[float | None, SkipValidation] = None
    """Keep those that score at least this, in the chosen scale; None keeps all."""
    metadata_fields: tuple[str, ...] | None = None
    """Keys of the metadata whose values are scored too: one a line, in this order, before the page content.
    A key that a document does not have is left out."""
    document_text: SkipJsonSchema[Callable[[Document], str] | None] = None
    """Makes the text that is scored, instead of `metadata_fields`; None scores the page content."""

    def _check(self) -> None:
        super()._check()
        check_limits(self.top_n, self.min_score)
        if self.metadata_fields is not None and self.document_text is not None:
            raise ConfigurationError(
                "Give either metadata_fields or document_text, not both: document_text can read the metadata."
            )

    def _candidates(self, documents: Sequence[Document]) -> list[Candidate]:
        return [Candidate(self._text(document, i)) for i, document in enumerate(documents)]

    def _text(self, document: Document, position: int) -> str:
        if not isinstance(document, Document):
            raise InputError(
                f"documents must be LangChain Documents, got {type(document).__name__} at {position}. "
                "For plain texts use rerank_plugins.Reranker.rank."
            )
        if self.document_text is not None:
            text = self.document_text(document)
            if not isinstance(text, str):
                raise InputError(
                    f"document_text must return a str; for the document at position {position} it returned "
                    f"{type(text).__name__}."
                )
            return text
        values = [document.metadata.get(key) for key in self.metadata_fields or ()]
        lines = [str(value) for value in values if value is not None]
        return "\n".join([*(line for line in lines if line.strip()), document.page_content])

    def _inputs(self, query: str, n_documents: int, top_n: int | None, min_score: float | None) -> dict[str, Any]:
        return {
            "query": query,
            "model": self._own.model_name,
            "top_n": top_n,
            "min_score": min_score,
            "n_documents": n_documents,
        }

    def _rerank(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks,
        *,
        top_n: int | None,
        min_score: float | None,
    ) -> list[Document]:
        """Rank documents in a run of its own, a child of the caller's."""
        documents = list(documents)
        manager = get_callback_manager_for_config(_config(callbacks))
        inputs = self._inputs(query, len(documents), top_n, min_score)
        run = manager.on_chain_start(None, inputs, name=RUN_NAME)
        try:
            ranking = self._own.rank(query, self._candidates(documents), top_n, min_score)
            ranked = _ranked(documents, ranking)
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end(_outputs(ranked, ranking))
        return ranked

    async def _arerank(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks,
        *,
        top_n: int | None,
        min_score: float | None,
    ) -> list[Document]:
        """As `_rerank`, without blocking the event loop."""
        documents = list(documents)
        manager = get_async_callback_manager_for_config(_config(callbacks))
        inputs = self._inputs(query, len(documents), top_n, min_score)
        run = await manager.on_chain_start(None, inputs, name=RUN_NAME)
        try:
            ranking = await self._own.arank(query, self._candidates(documents), top_n, min_score)
            ranked = _ranked(documents, ranking)
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end(_outputs(ranked, ranking))
        return ranked


def _config(callbacks: Callbacks) -> RunnableConfig:
    """The caller's callbacks, otherwise those of the chain that is running."""
    return ensure_config(None if callbacks is None else {"callbacks": callbacks})


def _ranked(documents: Sequence[Document], ranking: Ranking) -> list[Document]:
    """Copies of the documents that were kept, best first, with their scores."""
    return [
        documents[item.index].model_copy(
            update={"metadata": {**_copied(documents[item.index].metadata), "relevance_score": item.score}}
        )
        for item in ranking
    ]


def _copied(value: Any) -> Any:
    # Containers only: a metadata value may be anything, also something that cannot be copied.
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_copied(item) for item in value)
    return value


def _outputs(ranked: Sequence[Document], ranking: Ranking) -> dict[str, Any]:
    return {"documents": list(ranked), "scores": [item.score for item in ranking]}
