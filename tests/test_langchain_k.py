"""`RerankRetriever(k=...)` over first stages of every kind: k candidates are reranked, or a warning says why not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from langchain_classic.retrievers import (
    ContextualCompressionRetriever,
    EnsembleRetriever,
    MergerRetriever,
    MultiQueryRetriever,
    ParentDocumentRetriever,
    RePhraseQueryRetriever,
    TimeWeightedVectorStoreRetriever,
)
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline, EmbeddingsFilter
from langchain_classic.storage import InMemoryStore
from langchain_community.vectorstores import FAISS
from langchain_community.vectorstores.azuresearch import AzureSearchVectorStoreRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableBranch, RunnableLambda
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_core.vectorstores import VectorStoreRetriever
from langchain_text_splitters import CharacterTextSplitter
from pydantic import Field
from test_langchain import WordEmbeddings

from rerank_plugins.errors import ConfigurationError
from rerank_plugins.langchain import CrossEncoderRerank, RerankRetriever, create_rerank_tool
from rerank_plugins.testing import FakeBackend

TEXTS = [f"passage {i} of the handbook, chapter {i % 7}" for i in range(60)]
DOCUMENTS = [Document(text, metadata={"number": i}) for i, text in enumerate(TEXTS)]
QUERY = "passage of the handbook"


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def store() -> FAISS:
    return FAISS.from_documents(DOCUMENTS, WordEmbeddings())


def seen(retriever: Any, k: Any = 20, **keywords: Any) -> int:
    """How many candidates the cross-encoder gets."""
    backend = FakeBackend()
    RerankRetriever(retriever=retriever, model=backend, k=k, **keywords).invoke(QUERY)
    return len(backend.calls[0])


async def seen_async(retriever: Any, k: Any = 20) -> int:
    backend = FakeBackend()
    await RerankRetriever(retriever=retriever, model=backend, k=k).ainvoke(QUERY)
    return len(backend.calls[0])


class Field_(BaseRetriever):
    """BM25 and many others: a field, of which the subclasses say the name."""

    def _count(self) -> int:
        return int(next(getattr(self, name) for name in ("top_k", "max_documents", "k") if hasattr(self, name)))

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return DOCUMENTS[: self._count()]


class WithK(Field_):
    k: int = 4


class WithTopK(Field_):
    top_k: int | None = None

    def _count(self) -> int:
        return 3 if self.top_k is None else self.top_k


class WithMaxDocuments(Field_):
    max_documents: int = Field(default=5, ge=1, le=30)


class WithArgument(BaseRetriever):
    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int = 4
    ) -> list[Document]:
        return DOCUMENTS[:k]


class ClientRetriever(BaseRetriever):
    """Hands all keywords on to a client that does not take k."""

    hits: int = 4

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return self.client_search(query, **kwargs)

    def client_search(self, query: str, language: str = "en") -> list[Document]:
        return DOCUMENTS[: self.hits]


class AzureStore:
    """The methods that the retriever for Azure AI Search calls."""

    def hybrid_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        assert not kwargs, kwargs
        return DOCUMENTS[:k]

    async def ahybrid_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return self.hybrid_search(query, k, **kwargs)


def azure() -> AzureSearchVectorStoreRetriever:
    return AzureSearchVectorStoreRetriever.model_construct(vectorstore=AzureStore(), search_type="hybrid", k=4)


def time_weighted(store_k: int = 100) -> TimeWeightedVectorStoreRetriever:
    retriever = TimeWeightedVectorStoreRetriever(
        vectorstore=FAISS.from_texts(
            ["seed"], WordEmbeddings(), relevance_score_fn=lambda distance: 1 / (1 + distance)
        ),
        search_kwargs={"k": store_k},
        k=4,
    )
    retriever.add_documents(DOCUMENTS)
    return retriever


def queries(*texts: str) -> Any:
    return RunnableLambda(lambda question: list(texts))


def parents() -> ParentDocumentRetriever:
    retriever = ParentDocumentRetriever(
        vectorstore=FAISS.from_texts(["seed"], WordEmbeddings()),
        docstore=InMemoryStore(),
        child_splitter=CharacterTextSplitter(chunk_size=500, chunk_overlap=0),
    )
    retriever.add_documents(DOCUMENTS)
    return retriever


KINDS: dict[str, Any] = {
    "vector store": lambda store: store.as_retriever(),
    "vector store, k=2": lambda store: store.as_retriever(search_kwargs={"k": 2}),
    "threshold": lambda store: store.as_retriever(
        search_type="similarity_score_threshold", search_kwargs={"score_threshold": -9.0}
    ),
    "mmr": lambda store: store.as_retriever(search_type="mmr"),
    "field k": lambda store: WithK(),
    "field top_k": lambda store: WithTopK(),
    "field top_k=2": lambda store: WithTopK(top_k=2),
    "field max_documents": lambda store: WithMaxDocuments(),
    "argument k": lambda store: WithArgument(),
    "Azure": lambda store: azure(),
    "time-weighted": lambda store: time_weighted(),
    "time-weighted, search for fewer": lambda store: time_weighted(store_k=2),
    "parent documents": lambda store: parents(),
    "with_retry": lambda store: store.as_retriever().with_retry(),
    "field k with_retry": lambda store: WithK().with_retry(),
    "with_fallbacks": lambda store: store.as_retriever().with_fallbacks([WithK()]),
    "fallback is used": lambda store: Broken().with_fallbacks([WithK()]),
    "with_config": lambda store: store.as_retriever().with_config(tags=["mine"]),
    "with_config of with_retry": lambda store: WithK().with_retry().with_config(run_name="first"),
    "bind(k=3)": lambda store: store.as_retriever().bind(k=3),
    "configurable_fields": lambda store: store.as_retriever().configurable_fields(
        search_kwargs=ConfigurableField(id="search")
    ),
    "configurable_fields with_retry": lambda store: (
        WithK().configurable_fields(k=ConfigurableField(id="k")).with_retry()
    ),
    "configurable_alternatives": lambda store: WithK().configurable_alternatives(
        ConfigurableField(id="which"), other=store.as_retriever()
    ),
    "alternative chosen": lambda store: (
        WithK()
        .configurable_alternatives(ConfigurableField(id="which"), other=lambda: store.as_retriever())
        .with_config(configurable={"which": "other"})
    ),
    "chain": lambda store: RunnableLambda(str.lower) | store.as_retriever(),
    "branch": lambda store: RunnableBranch((lambda query: "passage" in query, WithK()), store.as_retriever()),
    "ensemble": lambda store: EnsembleRetriever(retrievers=[store.as_retriever(), WithK()]),
    "ensemble of runnables": lambda store: EnsembleRetriever(
        retrievers=[store.as_retriever().with_retry(), RunnableLambda(lambda query: DOCUMENTS[:2])]
    ),
    "merger": lambda store: MergerRetriever(retrievers=[store.as_retriever(), WithK()]),
    "multi query": lambda store: MultiQueryRetriever(
        retriever=store.as_retriever(), llm_chain=queries("chapter 3", "handbook")
    ),
    "rephrase": lambda store: RePhraseQueryRetriever(
        retriever=store.as_retriever(), llm_chain=RunnableLambda(lambda question: "handbook")
    ),
    "compression": lambda store: ContextualCompressionRetriever(
        base_retriever=store.as_retriever(), base_compressor=CrossEncoderRerank(model=FakeBackend(), top_n=3)
    ),
    "compression pipeline": lambda store: ContextualCompressionRetriever(
        base_retriever=WithK().with_retry(),
        base_compressor=DocumentCompressorPipeline(
            transformers=[
                EmbeddingsFilter(embeddings=WordEmbeddings(), k=5),
                CrossEncoderRerank(model=FakeBackend(), top_n=None),
            ]
        ),
    ),
    "reranker": lambda store: RerankRetriever(retriever=store.as_retriever(), model=FakeBackend()),
    "reranker with k": lambda store: RerankRetriever(retriever=WithK(), model=FakeBackend(), k=10, top_n=5),
    "reranker that keeps all": lambda store: RerankRetriever(retriever=WithK(), model=FakeBackend(), top_n=None),
}


class Broken(WithK):
    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        raise OSError("the index is away")


@pytest.mark.parametrize("kind", KINDS)
def test_the_cross_encoder_sees_k_candidates(kind: str, store: FAISS) -> None:
    inner = KINDS[kind](store)
    before = repr(inner)
    assert seen(inner) == 20
    # A time-weighted retriever writes down itself when a document was last read.
    assert repr(inner) == before or kind.startswith("time-weighted")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("argument k", "rephrase")])
async def test_the_cross_encoder_sees_k_candidates_in_async(kind: str, store: FAISS) -> None:
    # Left out: LangChain's async default passes no keywords, and RePhraseQueryRetriever has no async.
    assert await seen_async(KINDS[kind](store)) == 20


def test_mmr_fetches_at_least_what_it_returns(store: FAISS) -> None:
    assert seen(store.as_retriever(search_type="mmr"), k=40) == 40
    assert seen(store.as_retriever(search_type="mmr", search_kwargs={"k": 5, "fetch_k": 10}), k=40) == 40
    # FAISS filters what it has fetched.
    assert seen(store.as_retriever(search_kwargs={"filter": lambda metadata: True}), k=40) == 40


def test_a_filter_of_the_call_reaches_a_wrapped_vector_store(store: FAISS) -> None:
    retriever = RerankRetriever(retriever=store.as_retriever().with_retry(), model=FakeBackend(), k=20, top_n=None)
    found = retriever.invoke(QUERY, filter={"number": 7})
    assert [document.metadata["number"] for document in found] == [7]


class Recording(WithK):
    """Remembers what it was asked for, across copies."""

    k: int = 30
    asked: Any

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        self.asked.append(self.k)
        return DOCUMENTS[: self.k]


def test_nothing_is_asked_for_fewer_than_it_returns_by_itself() -> None:
    asked: list[int] = []
    assert seen(Recording(asked=asked), k=20) == 20
    assert seen(Recording(asked=asked).with_retry(), k=20) == 20
    assert seen(EnsembleRetriever(retrievers=[Recording(asked=asked)]), k=20) == 20
    assert asked == [30, 30, 30]


@pytest.mark.parametrize("wrap", ["reranker", "compression"])
def test_of_two_stages_the_first_still_reads_all_of_its_candidates(wrap: str) -> None:
    cheap, dear = FakeBackend(), FakeBackend()
    inner: BaseRetriever
    if wrap == "reranker":
        inner = RerankRetriever(retriever=WithK(), model=cheap, k=50, top_n=20)
    else:
        inner = ContextualCompressionRetriever(
            base_retriever=WithK(k=50), base_compressor=CrossEncoderRerank(model=cheap, top_n=20)
        )
    outer = RerankRetriever(retriever=inner, model=dear, k=20)
    outer.invoke(QUERY)
    outer.invoke(QUERY, k=10)
    outer.invoke(QUERY, k=30)
    assert [len(call) for call in cheap.calls] == [50, 50, 50]
    assert [len(call) for call in dear.calls] == [20, 10, 30]


def test_a_configurable_number_of_the_call_is_raised_and_never_lowered() -> None:
    asked: list[int] = []
    inner = Recording(asked=asked, k=4).configurable_fields(k=ConfigurableField(id="fetch"))
    retriever = RerankRetriever(retriever=inner, model=FakeBackend(), k=20)
    retriever.invoke(QUERY, {"configurable": {"fetch": 2}})
    retriever.invoke(QUERY, {"configurable": {"fetch": 45}})
    assert asked == [20, 45]


def test_numpy_integers_are_numbers() -> None:
    assert seen(WithK(), k=np.int64(20), top_n=np.int64(2)) == 20
    for wrong in (np.float64(20), 20.0, "20", True, 0):
        with pytest.raises(ConfigurationError, match="k must be an int"):
            RerankRetriever(retriever=WithK(), k=wrong)


class Hits(BaseRetriever):
    """A retriever whose setting has a name of its own."""

    hits: int = 4

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return DOCUMENTS[: self.hits]


UNKNOWN: dict[str, Any] = {
    "a field of another name": Hits(),
    "a client without k": ClientRetriever(),
    "a wrapped one": Hits().with_retry(),
    "a function": RunnableLambda(lambda query: DOCUMENTS[:4]),
    "a rewriter of one": RePhraseQueryRetriever(retriever=Hits(), llm_chain=RunnableLambda(lambda question: QUERY)),
    "an ensemble of two": EnsembleRetriever(retrievers=[Hits(), ClientRetriever()]),
    "a reranker of one": RerankRetriever(retriever=Hits(), model=FakeBackend(), top_n=None),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_first_stage_that_cannot_be_asked_is_told_of_once_and_in_the_trace(kind: str) -> None:
    retriever = RerankRetriever(retriever=UNKNOWN[kind], model=FakeBackend(), k=20)
    tracer = RunCollectorCallbackHandler()
    with pytest.warns(UserWarning, match=r"Fewer than k=20 candidates.*k_setter="):
        found = retriever.invoke(QUERY, {"callbacks": [tracer]})
    assert len(found) == 3
    retriever.invoke(QUERY)
    (root,) = tracer.traced_runs
    rerank = root.child_runs[-1]
    assert rerank.inputs["n_documents"] == 4
    assert "k=20" in rerank.inputs["first_stage"]


async def test_an_async_call_that_takes_no_keyword_says_so() -> None:
    retriever = RerankRetriever(retriever=WithArgument(), model=FakeBackend(), k=20)
    with pytest.warns(UserWarning, match="Fewer than k=20"):
        assert len(await retriever.ainvoke(QUERY)) == 3


def test_a_largest_number_is_kept_to_and_told_of() -> None:
    with pytest.warns(UserWarning, match="max_documents of WithMaxDocuments is 30 at most"):
        assert seen(WithMaxDocuments(), k=40) == 30


def test_one_that_cannot_be_asked_but_returns_enough_needs_no_warning() -> None:
    assert seen(Hits(hits=25)) == 20
    assert seen(RunnableLambda(lambda query: DOCUMENTS)) == 20


def test_fewer_documents_than_k_need_no_warning_where_the_setting_is_known() -> None:
    few = FAISS.from_texts(TEXTS[:5], WordEmbeddings())
    assert seen(few.as_retriever()) == 5


def test_k_setter_says_how_to_ask() -> None:
    def ask(retriever: Any, k: int) -> Any:
        return retriever.model_copy(update={"hits": k})

    inner = Hits()
    assert seen(inner, k_setter=ask) == 20
    assert inner.hits == 4
    backend = FakeBackend()
    tool = create_rerank_tool(Hits(), k=10, k_setter=ask, model=backend)
    tool.invoke({"query": QUERY})
    assert len(backend.calls[0]) == 10
    with pytest.raises(ConfigurationError, match=r"k_setter must return a retriever.*NoneType"):
        seen(Hits(), k_setter=lambda retriever, k: None)


def test_without_k_the_first_stage_is_called_as_it_is() -> None:
    calls: list[dict[str, Any]] = []

    class Spy(VectorStoreRetriever):
        def _get_relevant_documents(
            self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
        ) -> list[Document]:
            calls.append({**self.search_kwargs, **kwargs})
            return DOCUMENTS[:4]

    spy = Spy(vectorstore=FAISS.from_texts(["a"], WordEmbeddings()))
    RerankRetriever(retriever=spy, model=FakeBackend()).invoke(QUERY)
    RerankRetriever(retriever=spy, model=FakeBackend(), k=20).invoke(QUERY)
    assert calls == [{}, {"k": 20}]
