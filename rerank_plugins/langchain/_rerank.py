"""The document compressor and the retriever."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Annotated, Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
    Callbacks,
)
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config, patch_config
from langchain_core.runnables.utils import ConfigurableFieldSpec, get_unique_config_specs
from pydantic import ConfigDict, PrivateAttr, SkipValidation
from pydantic.json_schema import SkipJsonSchema

from rerank_plugins._adapters import (
    FALLBACK,
    RELEVANT_SPANS,
    RankFields,
    copied,
    details,
    listed,
    number,
    spans_of,
    value_text,
)
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.langchain._cross_encoder import with_cross_encoder
from rerank_plugins.langchain._first_stage import asking_for
from rerank_plugins.langchain._runs import arun, run
from rerank_plugins.selection import check_limits
from rerank_plugins.types import Candidate, Limits, RankedCandidate, Ranking, excerpt

__all__ = ["CrossEncoderRerank", "RerankRetriever"]

_RUN_NAME = "CrossEncoderRerank"
_RARE = ("max_tokens", "deadline_s", "compress")
_START_INDEX = "start_index"
"""Key of the metadata where LangChain's text splitters put the place of a text in its source."""
_CONFIG = "rerank_runnable_config"
"""The keyword that hands the configuration of a call through langchain-core's `BaseRetriever.invoke`."""


class _DocumentRerank(RankFields):
    """The keywords of an adapter that ranks Documents, and the ranking itself."""

    metadata_fields: Annotated[tuple[str, ...] | None, SkipValidation] = None
    """Keys of the metadata whose values are scored too: one a line, in this order, before the page content and before
    each window of it. A value that is missing, NaN or blank is left out; the parts of a list are joined."""
    first_stage_score_key: Annotated[str | None, SkipValidation] = None
    """Key of the metadata that has the first stage's score, for ``fusion`` and `add_details`. None takes
    ``relevance_score``, as an earlier reranker writes it, otherwise ``score``."""
    document_text: SkipJsonSchema[Callable[[Document], str] | None] = None
    """Makes the text that is scored, instead of `metadata_fields`; None scores the page content. A document whose page
    content is not in it has no ``relevant_spans``, and stays whole with `compress`."""

    def __init__(self, **data: Any) -> None:
        super().__init__(**with_cross_encoder(data))

    def _check(self) -> None:
        super()._check()
        keys: Any = self.metadata_fields
        if keys is not None:
            if not isinstance(keys, list | tuple) or not all(isinstance(key, str) for key in keys):
                raise ConfigurationError(f"metadata_fields must be a list of keys, such as ['title']; got {keys!r}.")
            self.metadata_fields = tuple(keys)
        if not isinstance(self.first_stage_score_key, str | None):
            raise ConfigurationError(
                f"first_stage_score_key must be a key of the metadata, or None; got {self.first_stage_score_key!r}."
            )
        if keys is not None and self.document_text is not None:
            raise ConfigurationError(
                "Give either metadata_fields or document_text, not both: document_text can read the metadata."
            )

    def _candidates(self, documents: Sequence[Document]) -> list[Candidate]:
        return [self._candidate(document, i) for i, document in enumerate(documents)]

    def _candidate(self, document: Document, position: int) -> Candidate:
        named = self.first_stage_score_key
        found = [document.metadata.get(key) for key in (("relevance_score", "score") if named is None else (named,))]
        header, text = "", document.page_content
        if self.document_text is not None:
            text = self.document_text(document)
            if not isinstance(text, str):
                raise InputError(
                    f"document_text must return a str; for the document at position {position} it returned "
                    f"{type(text).__name__}."
                )
        else:
            lines = [value_text(document.metadata.get(key)) for key in self.metadata_fields or ()]
            header = "".join(f"{line}\n" for line in lines if line)
        return Candidate(text, document.id, document.metadata, number(*found), header)

    def _inputs(self, candidates: Sequence[Candidate], query: str, cuts: dict[str, Any], note: str | None) -> Any:
        """What a trace says of the call; a setting that is rarely used only where it is."""
        inputs = {"query": query, "model": self._own.model_name, **cuts, "n_documents": len(candidates)}
        inputs = {key: value for key, value in inputs.items() if key not in _RARE or value not in (None, False)}
        return inputs if note is None else {**inputs, "first_stage": note}

    def _rerank(
        self,
        documents: Sequence[Document],
        candidates: Sequence[Candidate],
        query: str,
        callbacks: Callbacks,
        cuts: dict[str, Any],
        note: str | None = None,
    ) -> list[Document]:
        """Rank candidates, the first ones of the documents, in a run of its own, a child of the caller's."""
        with run(_RUN_NAME, self._inputs(candidates, query, cuts, note), callbacks) as outputs:
            ranking = self._own.rank(query, candidates, **cuts)
            ranked = self._ranked(documents, ranking, compress=bool(cuts["compress"]))
            outputs |= _outputs(ranked, ranking)
        return ranked

    async def _arerank(
        self,
        documents: Sequence[Document],
        candidates: Sequence[Candidate],
        query: str,
        callbacks: Callbacks,
        cuts: dict[str, Any],
        note: str | None = None,
    ) -> list[Document]:
        """As `_rerank`, without blocking the event loop."""
        async with arun(_RUN_NAME, self._inputs(candidates, query, cuts, note), callbacks) as outputs:
            ranking = await self._own.arank(query, candidates, **cuts)
            ranked = self._ranked(documents, ranking, compress=bool(cuts["compress"]))
            outputs |= _outputs(ranked, ranking)
        return ranked

    def _ranked(self, documents: Sequence[Document], ranking: Ranking, *, compress: bool) -> list[Document]:
        """Copies of the documents that were kept, best first, with their scores."""
        return [self._result(documents[item.index], item, ranking.fallback, compress) for item in ranking]

    def _result(self, document: Document, item: RankedCandidate, fallback: str | None, compress: bool) -> Document:
        stale = ("relevance_score", FALLBACK, RELEVANT_SPANS)
        metadata = {key: value for key, value in copied(document.metadata).items() if key not in stale}
        metadata |= {"relevance_score": item.score} if item.scored else {FALLBACK: fallback}
        if self.add_details:
            metadata |= details(item)
        text, spans = document.page_content, spans_of(item, document.page_content)
        if spans:
            metadata[RELEVANT_SPANS] = spans
        if spans and compress:
            text, start = excerpt(text, spans), metadata.get(_START_INDEX)
            if type(start) is int and start >= 0:
                metadata[_START_INDEX] = start + min(span[0] for span in spans)
        return document.model_copy(update={"page_content": text, "metadata": metadata})


class CrossEncoderRerank(_DocumentRerank, BaseDocumentCompressor):
    """Keeps the documents that a cross-encoder finds most relevant, best first, with their scores.

    For ``ContextualCompressionRetriever``, ``DocumentCompressorPipeline``, or to be called. Takes every
    keyword of `rerank_plugins.Reranker`, or ``reranker=`` for one that is shared. ``model`` can also be a
    ``BaseCrossEncoder`` of LangChain, such as a ``HuggingFaceCrossEncoder``. Construction loads nothing.
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
            Copies, best first, with the score (a float) in ``metadata["relevance_score"]``, and with ``spans``,
            ``passage_length`` or ``compress`` the places (start, end, score) in the page content that was given in
            ``metadata["relevant_spans"]``, best first. With ``compress`` the page content is what is left, and
            ``metadata["start_index"]`` the place of its first character. What ``deadline_s`` or
            ``on_error`` left without a score has the reason in ``metadata["rerank_fallback"]`` instead.

        Raises:
            QueryError: The query is blank or too long.
            InputError: Something is no Document, or has no text.
            ModelLoadError: The model is missing, incomplete or unreadable.
            ScoringError: The engine failed, or a logit is not finite.
        """
        documents = _documents(documents, "documents")
        return self._rerank(documents, self._candidates(documents), query, callbacks, self._cuts())

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """As `compress_documents`, without blocking the event loop."""
        documents = _documents(documents, "documents")
        return await self._arerank(documents, self._candidates(documents), query, callbacks, self._cuts())


class RerankRetriever(_DocumentRerank, BaseRetriever):
    """Retrieves candidates with another retriever and returns the best of them, with their scores.

    What ``ContextualCompressionRetriever`` with a `CrossEncoderRerank` does, without langchain-classic, and with a
    configuration that reaches the inner retriever whole. Takes every keyword of `rerank_plugins.Reranker`, or
    ``reranker=`` for one that is shared.

    ``invoke(query, k=..., top_n=..., min_score=..., max_tokens=..., deadline_s=..., compress=...)`` and its relatives
    override the settings for one call; all other keywords of a call go to the inner retriever.

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
    """How many candidates to rerank: the first `k` different texts that the first stage returns; None takes all. A
    first stage that returns fewer by itself is asked for `k`, in a copy: by its ``search_kwargs``, ``k``, ``top_k``,
    ``max_documents`` and the like, through Runnables and retrievers around it, and never for fewer than it would
    return. One that cannot be asked, and returns fewer, is told of in a warning and in the trace."""
    k_setter: SkipJsonSchema[Callable[[Any, int], Any] | None] = None
    """Called with the first stage and `k`; returns a copy that finds `k` documents. For a first stage whose setting
    cannot be found out: ``lambda retriever, k: retriever.model_copy(update={"hits": k})``."""

    _told: set[str] = PrivateAttr(default_factory=set)

    def _check(self) -> None:
        super()._check()
        self.k = _checked_k(self.k)

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """What of the first stage can be configured in a call."""
        return get_unique_config_specs([*super().config_specs, *self.retriever.config_specs])

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Retrieve and rerank; see `BaseRetriever.invoke`. The first stage gets the configuration too."""
        return super().invoke(input, config, **{_CONFIG: ensure_config(config)}, **kwargs)

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """As `invoke`, without blocking the event loop."""
        return await super().ainvoke(input, config, **{_CONFIG: ensure_config(config)}, **kwargs)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        config = patch_config(kwargs.pop(_CONFIG, None), callbacks=run_manager.get_child())
        k, cuts, kwargs = self._settings(kwargs)
        retriever, doubt = self._first_stage(k, config, is_async=False)
        documents = self._found(retriever.invoke(query, config, **kwargs))
        candidates, note = self._first(self._candidates(documents), k, doubt)
        return self._rerank(documents, candidates, query, run_manager.get_child(), cuts, note)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        config = patch_config(kwargs.pop(_CONFIG, None), callbacks=run_manager.get_child())
        k, cuts, kwargs = self._settings(kwargs)
        retriever, doubt = self._first_stage(k, config, is_async=True)
        documents = self._found(await retriever.ainvoke(query, config, **kwargs))
        candidates, note = self._first(self._candidates(documents), k, doubt)
        return await self._arerank(documents, candidates, query, run_manager.get_child(), cuts, note)

    def _settings(self, kwargs: dict[str, Any]) -> tuple[int | None, dict[str, Any], dict[str, Any]]:
        """The settings of one call: `k`, the cuts, and what is left for the inner retriever."""
        rest = dict(kwargs)
        k = _checked_k(rest.pop("k", self.k))
        cuts = {name: rest.pop(name, value) for name, value in self._cuts().items()}
        check_limits(*(cuts[name] for name in Limits._fields))
        return k, cuts, rest

    def _first_stage(
        self, k: int | None, config: RunnableConfig, *, is_async: bool
    ) -> tuple[Runnable[str, list[Document]], str | None]:
        """The first stage, asked for `k`, and why it may return fewer although it could find more."""
        if k is None:
            return self.retriever, None
        if self.k_setter is None:
            return asking_for(self.retriever, k, config, is_async=is_async)
        changed = self.k_setter(self.retriever, k)
        if not isinstance(changed, Runnable):
            raise ConfigurationError(
                f"k_setter must return a retriever that finds k={k} documents, a copy of the one that it gets; it "
                f"returned {type(changed).__name__}."
            )
        return changed, None

    def _found(self, found: Any) -> list[Document]:
        return _documents(found, f"What {type(self.retriever).__name__} returns", iterators=False)

    def _first(
        self, candidates: list[Candidate], k: int | None, doubt: str | None
    ) -> tuple[list[Candidate], str | None]:
        """The first ones, until there are `k` different texts; and what the trace says of their number."""
        if k is None:
            return candidates, None
        texts: set[str] = set()
        for i, candidate in enumerate(candidates):
            texts.add(candidate.scored_text)
            if len(texts) > k:
                return candidates[:i], None
        if doubt is None or len(texts) == k:
            return candidates, None
        note = (
            f"Fewer than k={k} candidates were reranked, and the first stage could not be asked for more: {doubt}. Set "
            "its own number of results, or give k_setter=, a function of the retriever and k that returns a copy which "
            "finds k."
        )
        if note not in self._told:
            self._told.add(note)
            warnings.warn(note, stacklevel=2)
        return candidates, note


def _documents(found: Any, name: str, *, iterators: bool = True) -> list[Document]:
    """Documents that can be ranked.

    Raises:
        InputError: What came is no list, or something in it is no Document with a text and metadata.
    """
    documents = listed(found, name, iterators=iterators)
    for i, document in enumerate(documents):
        if not isinstance(document, Document):
            raise InputError(
                f"{name} must be LangChain Documents, got {type(document).__name__} at {i}. "
                "For plain texts use rerank_plugins.Reranker.rank."
            )
        for attribute, kind in (("page_content", str), ("metadata", dict)):
            value = getattr(document, attribute, None)
            if not isinstance(value, kind):
                raise InputError(
                    f"{name}: the {attribute} of the Document at {i} must be a {kind.__name__}, got "
                    f"{type(value).__name__}. Leave such documents out, or give them a text."
                )
    return documents


def _checked_k(k: Any) -> int | None:
    if k is None:
        return None
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise ConfigurationError(f"k must be an int of at least 1, or None for the retriever's own; got {k!r}.")
    return int(k)


def _outputs(ranked: Sequence[Document], ranking: Ranking) -> dict[str, Any]:
    outputs = {
        "documents": list(ranked),
        "scores": [item.score for item in ranking],
        "details": [details(item) for item in ranking],
    }
    return outputs if ranking.fallback is None else {**outputs, "fallback": ranking.fallback}
