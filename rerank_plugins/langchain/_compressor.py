"""`CrossEncoderRerank`, the document compressor."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict

from rerank_plugins.langchain._documents import DocumentRerankFields

__all__ = ["CrossEncoderRerank"]


class CrossEncoderRerank(DocumentRerankFields, BaseDocumentCompressor):
    """Keeps the documents that a cross-encoder finds most relevant, best first, with their scores.

    For ``ContextualCompressionRetriever``, ``DocumentCompressorPipeline``, or to be called. Takes every
    keyword of `rerank_plugins.Reranker`, or ``reranker=`` for one that is shared. Construction loads nothing.
    A dump or a pickle carries the settings alone.

    Raises:
        ConfigurationError: A setting cannot work, or `metadata_fields` and `document_text` are both given.

    Example:
        >>> from langchain_core.documents import Document
        >>> from rerank_plugins.langchain import CrossEncoderRerank
        >>> texts = ["git add stages files", "git revert undoes a commit"]
        >>> documents = [Document(text) for text in texts]
        >>> best = CrossEncoderRerank(top_n=1).compress_documents(documents, "how do I undo a commit")
        >>> best[0].page_content
        'git revert undoes a commit'
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rank documents and keep the best.

        Args:
            documents: In the order of the first stage. They are not changed.
            query: The query.
            callbacks: Of the caller's run, of which the ranking becomes a child; None takes those of the
                running chain.

        Returns:
            Copies, best first, with the score (a float) in ``metadata["relevance_score"]``.

        Raises:
            InputError: The query is blank or too long, or something is no Document.
            ModelLoadError: The model is missing, incomplete or unreadable.
            ScoringError: The engine failed, or a logit is not finite.
        """
        return self._rerank(documents, query, callbacks, top_n=self.top_n, min_score=self.min_score)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """As `compress_documents`, without blocking the event loop."""
        return await self._arerank(documents, query, callbacks, top_n=self.top_n, min_score=self.min_score)
