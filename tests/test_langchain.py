from __future__ import annotations

import asyncio
import copy
import json
import pickle
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tiny
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker, DocumentCompressorPipeline
from langchain_community.cross_encoders import HuggingFaceCrossEncoder
from langchain_community.vectorstores import FAISS
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_core.tracers.schemas import Run
from langchain_text_splitters import CharacterTextSplitter

from rerank_plugins import Reranker
from rerank_plugins.errors import ConfigurationError, InputError, ModelLoadError, ScoringError
from rerank_plugins.langchain import (
    CrossEncoderRerank,
    CrossEncoderScorer,
    RerankRetriever,
    create_rerank_tool,
)
from rerank_plugins.testing import FakeBackend, word_overlap

QUERY = "how do I undo a commit"
TEXTS = [
    "git log shows commits",
    "a commit is a snapshot of all files in git",
    "bake the bread for forty minutes",
    "to undo a commit use git revert",
    "undo the top button",
    "boil an egg for six minutes",
]
BEST = "to undo a commit use git revert"


class WordEmbeddings(Embeddings):
    """Counts words in 64 buckets: deterministic, and near texts share words."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(64)
        for word in text.lower().split():
            vector[zlib.crc32(word.encode()) % 64] += 1
        return list(vector / (np.linalg.norm(vector) or 1))


class KeywordRetriever(BaseRetriever):
    """A retriever without any setting for the number of results, like BM25 in many packages."""

    texts: list[str]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return documents(self.texts)


class Titled(Document):
    title: str = ""


def documents(texts: list[str] = TEXTS) -> list[Document]:
    return [Document(text, id=f"d{i}", metadata={"source": f"{i}.txt"}) for i, text in enumerate(texts)]


def fake(logit: Any = word_overlap) -> Reranker:
    return Reranker(FakeBackend(logit))


def expected(texts: list[str] = TEXTS, query: str = QUERY) -> list[str]:
    return sorted(texts, key=lambda text: -word_overlap(query, text))


def contents(found: Any) -> list[str]:
    return [document.page_content for document in found]


@pytest.fixture(scope="module")
def store() -> FAISS:
    return FAISS.from_documents(documents(), WordEmbeddings())


# -- the compressor ------------------------------------------------------------------------------------------


def test_ranks_and_returns_scores_as_python_floats() -> None:
    rerank = CrossEncoderRerank(reranker=fake(), top_n=3)
    found = rerank.compress_documents(documents(), QUERY)
    assert contents(found) == expected()[:3]
    scores = [document.metadata["relevance_score"] for document in found]
    assert [type(score) for score in scores] == [float] * 3
    logits = np.array([word_overlap(QUERY, text) for text in expected()[:3]], dtype=np.float32)
    assert scores == pytest.approx(1 / (1 + np.exp(-logits.astype(float))), rel=1e-12)
    assert found[0].metadata == {"source": "3.txt", "relevance_score": scores[0]}


async def test_async_gives_the_same() -> None:
    rerank = CrossEncoderRerank(reranker=fake(), top_n=None)
    assert await rerank.acompress_documents(documents(), QUERY) == rerank.compress_documents(documents(), QUERY)


def test_top_n_is_three_by_default_none_means_all_and_more_than_there_are_is_fine() -> None:
    reranker = fake()
    assert len(CrossEncoderRerank(reranker=reranker).compress_documents(documents(), QUERY)) == 3
    for top_n in (None, 100):
        rerank = CrossEncoderRerank(reranker=reranker, top_n=top_n)
        assert contents(rerank.compress_documents(documents(), QUERY)) == expected()


def test_scale_logit_reports_logits() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend(), scale="logit", top_n=1)
    best = rerank.compress_documents(documents(), QUERY)[0]
    assert best.metadata["relevance_score"] == pytest.approx(word_overlap(QUERY, BEST))


def test_score_json_round_trip() -> None:
    found = CrossEncoderRerank(reranker=fake()).compress_documents(documents(), QUERY)
    again = json.loads(json.dumps([document.metadata for document in found]))
    assert again == [document.metadata for document in found]


@pytest.mark.parametrize("title", ["undo commit", None, "  "])
def test_metadata_fields_come_first_one_a_line_and_missing_ones_are_left_out(title: str | None) -> None:
    backend = FakeBackend()
    rerank = CrossEncoderRerank(model=backend, metadata_fields=["title", "chapter", "nowhere"])
    rerank.compress_documents([Document("text", metadata={"chapter": 7, "title": title})], QUERY)
    assert backend.calls == [[(QUERY, "undo commit\n7\ntext" if title == "undo commit" else "7\ntext")]]


def test_document_text_decides_what_is_scored_and_not_what_is_returned() -> None:
    backend = FakeBackend()
    rerank = CrossEncoderRerank(model=backend, document_text=lambda document: document.metadata["source"])
    found = rerank.compress_documents(documents(["one"]), QUERY)
    assert backend.calls == [[(QUERY, "0.txt")]]
    assert contents(found) == ["one"]


def test_inputs_that_are_no_documents_or_no_text_are_named() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend(), document_text=lambda document: None)
    with pytest.raises(InputError, match=r"document_text must return a str.*position 0.*NoneType"):
        rerank.compress_documents(documents(), QUERY)
    with pytest.raises(InputError, match="LangChain Documents, got str at 1"):
        CrossEncoderRerank(model=FakeBackend()).compress_documents([Document("a"), "b"], QUERY)  # type: ignore[list-item]


def test_blank_query_is_an_error_and_a_blank_document_comes_last() -> None:
    backend = FakeBackend(lambda query, text: -50.0)
    rerank = CrossEncoderRerank(model=backend, top_n=None)
    with pytest.raises(InputError, match="query"):
        rerank.compress_documents(documents(), "  ")
    found = rerank.compress_documents(documents(["", "b"]), QUERY)
    assert contents(found) == ["b", ""]
    assert found[1].metadata["relevance_score"] == 0.0


# -- configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"top_n": 0}, "top_n must be an int of at least 1.*got 0"),
        ({"top_n": True}, "top_n"),
        ({"top_n": "3"}, "top_n"),
        ({"min_score": float("nan")}, "min_score must be a number.*nan"),
        ({"min_score": "0.5"}, "min_score"),
        ({"scale": "percent"}, "scale must be"),
        ({"backend": "tensorflow"}, "backend must be one of"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"max_length": 0}, "max_length"),
        ({"model": 42}, "model must be"),
        ({"reranker": "BAAI/bge-reranker-base"}, "reranker must be a Reranker, got str.*model="),
        ({"reranker": fake(), "scale": "logit"}, "either reranker= or its keywords: scale"),
        ({"metadata_fields": ["title"], "document_text": str}, "either metadata_fields or document_text"),
    ],
)
@pytest.mark.parametrize("adapter", ["compressor", "retriever", "tool"])
def test_a_setting_that_cannot_work_is_a_plain_configuration_error(
    adapter: str, keywords: dict[str, Any], message: str
) -> None:
    make: dict[str, Any] = {
        "compressor": CrossEncoderRerank,
        "retriever": lambda **given: RerankRetriever(retriever=KeywordRetriever(texts=TEXTS), **given),
        "tool": lambda **given: create_rerank_tool(KeywordRetriever(texts=TEXTS), **given),
    }
    with pytest.raises(ConfigurationError, match=message):
        make[adapter](**keywords)


@pytest.mark.parametrize("adapter", [CrossEncoderRerank, CrossEncoderScorer, RerankRetriever])
def test_unknown_keywords_are_refused(adapter: Any) -> None:
    first_stage = {"retriever": KeywordRetriever(texts=[])} if adapter is RerankRetriever else {}
    with pytest.raises(ValueError, match="top_k"):
        adapter(**first_stage, top_k=3)


def test_every_keyword_of_reranker_is_taken() -> None:
    given = {
        "model": "somewhere/some-model",
        "backend": "torch",
        "device": "cpu",
        "precision": "fp32",
        "threads": 2,
        "max_length": 77,
        "scale": "logit",
        "label": "entailment",
        "revision": "v1",
        "trust_remote_code": True,
        "instruction": "Find it.",
        "truncate_query": True,
        "passage_length": 50,
        "passage_overlap": 5,
        "spans": "sentences",
        "calibration": {"slope": 2.0, "intercept": -1.0},
        "cache": "scores.sqlite",
        "dedup": 0.9,
        "fusion": "rrf",
        "adjust": len,
        "order": "ends",
        "on_error": "keep_order",
    }
    assert set(given) == set(Reranker().config)
    assert CrossEncoderRerank(**given)._own.config == given
    assert CrossEncoderScorer(**given)._own.config == given


def test_changed_fields_take_effect() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend(), top_n=1)
    rerank.scale = "logit"
    assert rerank.compress_documents(documents(), QUERY)[0].metadata["relevance_score"] > 1
    probable = rerank.model_copy(update={"scale": "probability"})
    assert probable.compress_documents(documents(), QUERY)[0].metadata["relevance_score"] < 1
    with pytest.raises(ValueError, match="frozen"):
        rerank.reranker = fake()


def test_path_as_model_is_kept_as_a_string_and_one_reranker(tmp_path: Path) -> None:
    rerank = CrossEncoderRerank(model=tmp_path)
    assert rerank.model_dump_json() == CrossEncoderRerank(model=str(tmp_path)).model_dump_json()
    assert rerank._own is rerank._own


def test_dumps_pickles_and_copies_carry_configuration_only() -> None:
    rerank = CrossEncoderRerank(model=tiny("bert"), top_n=2, min_score=0.1, metadata_fields=["source"])
    fresh = len(pickle.dumps(rerank))
    before = rerank.compress_documents(documents(), QUERY)
    dump = rerank.model_dump()
    own = {"top_n", "min_score", "max_tokens", "deadline_s", "compress", "add_details", "metadata_fields"}
    own |= {"document_text", "first_stage_score_key"}
    assert set(dump) == {*Reranker().config, *own}
    assert json.loads(rerank.model_dump_json())["model"] == tiny("bert")
    assert len(pickle.dumps(rerank)) == fresh < 2000
    for other in (
        pickle.loads(pickle.dumps(rerank)),
        copy.deepcopy(rerank),
        CrossEncoderRerank(**dump),
        CrossEncoderRerank.model_validate_json(rerank.model_dump_json()),
    ):
        assert other.model_dump() == dump
        assert other._own is not rerank._own
        assert other.compress_documents(documents(), QUERY) == before


def test_a_shared_reranker_pickles_to_the_same_configuration() -> None:
    shared = Reranker(tiny("bert"), scale="logit", max_length=64)
    rerank = CrossEncoderRerank(reranker=shared)
    assert rerank._own is shared
    assert rerank.scale == "logit"
    again = pickle.loads(pickle.dumps(rerank))
    assert again._own.config == shared.config
    assert CrossEncoderRerank(**rerank.model_dump())._own.config == shared.config


def test_adapters_of_the_same_model_share_one_loaded_copy() -> None:
    first = CrossEncoderRerank(model=tiny("bert"))
    second = RerankRetriever(retriever=KeywordRetriever(texts=TEXTS), model=tiny("bert"), scale="logit")
    third = CrossEncoderScorer(model=tiny("bert"), max_length=32)
    first.compress_documents(documents(), QUERY)
    second.invoke(QUERY)
    third.score([(QUERY, BEST)])
    loaded = [adapter._own._loaded() for adapter in (first, second, third)]
    assert len({id(backend.model) for backend in loaded}) == 1  # type: ignore[attr-defined]


def test_construction_loads_nothing() -> None:
    rerank = CrossEncoderRerank(model="nobody/has-this-model")
    RerankRetriever(retriever=KeywordRetriever(texts=[]), model="nobody/has-this-model")
    create_rerank_tool(KeywordRetriever(texts=[]), model="nobody/has-this-model")
    CrossEncoderScorer(model="nobody/has-this-model")
    with pytest.raises(ModelLoadError):
        rerank.compress_documents(documents(), QUERY)


def test_repr_has_the_settings_only() -> None:
    rerank = CrossEncoderRerank(model=tiny("bert"), top_n=2)
    rerank.compress_documents(documents(), QUERY)
    assert "top_n=2" in repr(rerank)
    assert "Backend" not in repr(rerank)


def test_without_langchain_core_the_error_says_what_to_install() -> None:
    script = (
        "import sys\n"
        "sys.modules['langchain_core'] = None\n"
        "import rerank_plugins\n"
        "from rerank_plugins.errors import MissingDependencyError\n"
        "try:\n    import rerank_plugins.langchain\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 'pip install "rerank-plugins[langchain]"' in done.stdout


def test_the_adapters_need_langchain_core_alone() -> None:
    script = (
        "import sys, rerank_plugins.langchain\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'langchain', 'langchain_classic', 'langchain_community', 'torch', 'llama_index'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- inside the framework ------------------------------------------------------------------------------------


def first_stage(store: FAISS, k: int = 6) -> BaseRetriever:
    return store.as_retriever(search_kwargs={"k": k})


async def test_contextual_compression_over_faiss_sync_async_and_batch(store: FAISS) -> None:
    retriever = ContextualCompressionRetriever(
        base_compressor=CrossEncoderRerank(reranker=fake(), top_n=3), base_retriever=first_stage(store)
    )
    found = retriever.invoke(QUERY)
    assert contents(found) == expected()[:3]
    assert found != first_stage(store).invoke(QUERY)[:3]
    assert found[0].id == "d3"
    assert await retriever.ainvoke(QUERY) == found
    queries = [QUERY, "boil an egg"] * 4
    together = retriever.batch(queries)
    assert together == [retriever.invoke(query) for query in queries]
    assert await retriever.abatch(queries) == together


async def test_compressor_pipeline(store: FAISS) -> None:
    pipeline = DocumentCompressorPipeline(
        transformers=[
            CharacterTextSplitter(chunk_size=20, chunk_overlap=0, separator=" "),
            CrossEncoderRerank(reranker=fake(), top_n=4),
            CrossEncoderRerank(reranker=fake(lambda query, text: -len(text)), top_n=1),
        ]
    )
    retriever = ContextualCompressionRetriever(base_compressor=pipeline, base_retriever=first_stage(store))
    parts = [
        part
        for document in documents()
        for part in CharacterTextSplitter(chunk_size=20, chunk_overlap=0, separator=" ").split_text(
            document.page_content
        )
    ]
    shortest = min(expected(parts)[:4], key=len)
    assert contents(retriever.invoke(QUERY)) == [shortest]
    assert contents(await retriever.ainvoke(QUERY)) == [shortest]


async def test_ensemble_retriever_before_and_after(store: FAISS) -> None:
    reranker = fake()
    ensemble = EnsembleRetriever(retrievers=[first_stage(store, 3), KeywordRetriever(texts=TEXTS)])
    outside = RerankRetriever(retriever=ensemble, reranker=reranker, top_n=2)
    assert contents(outside.invoke(QUERY)) == expected()[:2]
    assert contents(await outside.ainvoke(QUERY)) == expected()[:2]
    inside = EnsembleRetriever(
        retrievers=[RerankRetriever(retriever=first_stage(store), reranker=reranker, top_n=2)] * 2
    )
    assert contents(inside.invoke(QUERY)) == expected()[:2]


async def test_lcel_chain(store: FAISS) -> None:
    retriever = RerankRetriever(retriever=first_stage(store), reranker=fake(), top_n=2)
    chain = (
        {
            "context": retriever | (lambda found: " / ".join(contents(found))),
            "question": RunnablePassthrough(),
        }
        | ChatPromptTemplate.from_template("{context}\n{question}")
        | (lambda prompt: prompt.to_messages()[0].content)
    )
    answer = f"{' / '.join(expected()[:2])}\n{QUERY}"
    assert chain.invoke(QUERY) == answer
    assert await chain.ainvoke(QUERY) == answer
    assert chain.batch([QUERY, QUERY]) == [answer, answer]


def test_many_threads_give_the_serial_result(store: FAISS) -> None:
    retriever = RerankRetriever(retriever=first_stage(store), model=tiny("bert"), top_n=None)
    queries = [f"{text} {i}" for i in range(4) for text in TEXTS]
    serial = [retriever.invoke(query) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(retriever.invoke, queries))
    for found, alone in zip(parallel, serial, strict=True):
        assert [document.id for document in found] == [document.id for document in alone]
        scores = [[document.metadata["relevance_score"] for document in documents] for documents in (found, alone)]
        # Callers share batches, and the padding of a batch is in the last digits of its logits.
        assert np.abs(np.subtract(*scores)).max() < 1e-6


# -- the retriever -------------------------------------------------------------------------------------------


async def test_retriever_equals_contextual_compression(store: FAISS) -> None:
    reranker = fake()
    ours = RerankRetriever(retriever=first_stage(store), reranker=reranker, top_n=2, min_score=0.5)
    theirs = ContextualCompressionRetriever(
        base_compressor=CrossEncoderRerank(reranker=reranker, top_n=2, min_score=0.5),
        base_retriever=first_stage(store),
    )
    assert ours.invoke(QUERY) == theirs.invoke(QUERY)
    assert await ours.ainvoke(QUERY) == await theirs.ainvoke(QUERY)


async def test_k_is_what_the_first_stage_fetches_and_the_callers_retriever_is_not_changed(
    store: FAISS,
) -> None:
    backend = FakeBackend()
    inner = store.as_retriever(search_kwargs={"k": 2, "fetch_k": 50})
    retriever = RerankRetriever(retriever=inner, model=backend, k=5, top_n=3)
    assert len(retriever.invoke(QUERY)) == 3
    assert len(await retriever.ainvoke(QUERY, k=4)) == 3
    RerankRetriever(retriever=inner, model=backend).invoke(QUERY)
    assert [len(call) for call in backend.calls] == [5, 4, 2]
    assert inner.search_kwargs == {"k": 2, "fetch_k": 50}
    assert retriever.retriever is inner


def test_k_reaches_retrievers_of_other_kinds(store: FAISS) -> None:
    class WithField(KeywordRetriever):
        k: int = 2

        def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
            return documents(self.texts)[: self.k]

    class WithArgument(KeywordRetriever):
        def _get_relevant_documents(
            self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int = 2
        ) -> list[Document]:
            return documents(self.texts)[:k]

    wrapped = ContextualCompressionRetriever(
        base_compressor=CrossEncoderRerank(model=FakeBackend(), top_n=None),
        base_retriever=first_stage(store, 2),
    )
    everything = RunnableLambda(lambda query: documents())
    for inner in (
        WithField(texts=TEXTS),
        WithArgument(texts=TEXTS),
        wrapped,
        KeywordRetriever(texts=TEXTS),
        everything,
    ):
        backend = FakeBackend()
        RerankRetriever(retriever=inner, model=backend, k=4).invoke(QUERY)
        assert len(backend.calls[0]) == 4, type(inner).__name__


def test_a_call_can_override_the_settings_and_passes_on_what_is_not_ours(store: FAISS) -> None:
    retriever = RerankRetriever(retriever=first_stage(store), reranker=fake(), top_n=3)
    assert contents(retriever.invoke(QUERY, top_n=1)) == expected()[:1]
    assert contents(retriever.invoke(QUERY, top_n=None)) == expected()
    assert contents(retriever.invoke(QUERY, filter={"source": "0.txt"})) == TEXTS[:1]
    threshold = retriever.invoke(QUERY)[1].metadata["relevance_score"]
    assert contents(retriever.invoke(QUERY, min_score=threshold)) == expected()[:2]
    for wrong in ({"k": 0}, {"top_n": 0}, {"min_score": "high"}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            retriever.invoke(QUERY, **wrong)
    with pytest.raises(ConfigurationError, match=r"k must be an int of at least 1.*-1"):
        RerankRetriever(retriever=first_stage(store), k=-1)


def test_configurable_fields(store: FAISS) -> None:
    retriever = RerankRetriever(retriever=first_stage(store), reranker=fake()).configurable_fields(
        top_n=ConfigurableField(id="top_n")
    )
    assert len(retriever.invoke(QUERY, config={"configurable": {"top_n": 1}})) == 1


async def test_nothing_retrieved_is_nothing_returned() -> None:
    retriever = RerankRetriever(retriever=KeywordRetriever(texts=[]), model="nobody/has-this-model")
    assert retriever.invoke(QUERY) == []
    assert await retriever.ainvoke(QUERY) == []


# -- the scorer ----------------------------------------------------------------------------------------------


def test_scorer_scores_pairs_of_several_queries_in_input_order() -> None:
    pairs = [
        ("red fox", "a blue whale and a gull"),
        ("blue whale", "a blue whale"),
        ("red fox", "a red fox"),
        ("red fox", ""),
    ]
    scores = CrossEncoderScorer(model=FakeBackend(), scale="logit").score(pairs)
    assert [type(score) for score in scores] == [float] * 4
    assert scores[:3] == pytest.approx([word_overlap(*pair) for pair in pairs[:3]])
    assert CrossEncoderScorer(model=FakeBackend()).score(pairs)[3] == 0.0
    assert CrossEncoderScorer(model="nobody/has-this-model").score([]) == []


async def test_scorer_in_langchain_classics_reranker(store: FAISS) -> None:
    retriever = ContextualCompressionRetriever(
        base_compressor=CrossEncoderReranker(model=CrossEncoderScorer(reranker=fake()), top_n=2),
        base_retriever=first_stage(store),
    )
    assert contents(retriever.invoke(QUERY)) == expected()[:2]
    assert contents(await retriever.ainvoke(QUERY)) == expected()[:2]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_order_and_scores_equal_those_of_langchain_classic(family: str) -> None:
    theirs = HuggingFaceCrossEncoder(model_name=tiny(family), model_kwargs={"device": "cpu"})
    ranked = CrossEncoderReranker(model=theirs, top_n=6).compress_documents(documents(), QUERY)
    ours = CrossEncoderRerank(model=tiny(family), backend="torch", device="cpu", top_n=6, scale="logit")
    assert [document.id for document in ours.compress_documents(documents(), QUERY)] == [d.id for d in ranked]
    pairs = [(QUERY, text) for text in TEXTS]
    scorer = CrossEncoderScorer(model=tiny(family), backend="torch", device="cpu")
    assert scorer.score(pairs) == pytest.approx([float(score) for score in theirs.score(pairs)], abs=1e-4)


# -- traces --------------------------------------------------------------------------------------------------


def only_child(run: Run, name: str) -> Run:
    return next(child for child in run.child_runs if child.name == name)


def check_rerank_run(run: Run, n_documents: int, top_n: int) -> None:
    assert run.run_type == "chain"
    assert run.error is None
    assert run.inputs == {
        "query": QUERY,
        "model": "fake",
        "top_n": top_n,
        "min_score": None,
        "n_documents": n_documents,
    }
    assert run.outputs is not None
    assert contents(run.outputs["documents"]) == expected()[:top_n]
    assert run.outputs["scores"] == [d.metadata["relevance_score"] for d in run.outputs["documents"]]
    assert len(run.outputs["scores"]) == top_n


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_rerank_is_a_child_run_of_contextual_compression(store: FAISS, is_async: bool) -> None:
    tracer = RunCollectorCallbackHandler()
    retriever = ContextualCompressionRetriever(
        base_compressor=CrossEncoderRerank(reranker=fake(), top_n=2), base_retriever=first_stage(store)
    )
    config: Any = {"callbacks": [tracer]}
    await retriever.ainvoke(QUERY, config) if is_async else retriever.invoke(QUERY, config)
    (root,) = tracer.traced_runs
    assert root.name == "ContextualCompressionRetriever"
    assert [child.name for child in root.child_runs] == ["VectorStoreRetriever", "CrossEncoderRerank"]
    run = root.child_runs[1]
    assert run.parent_run_id == root.id
    check_rerank_run(run, 6, 2)


@pytest.mark.parametrize("is_async", [False, True])
async def test_both_stages_are_child_runs_of_the_retriever(store: FAISS, is_async: bool) -> None:
    tracer = RunCollectorCallbackHandler()
    retriever = RerankRetriever(retriever=first_stage(store), reranker=fake(), k=5, top_n=2)
    config: Any = {"callbacks": [tracer], "tags": ["mine"]}
    await retriever.ainvoke(QUERY, config) if is_async else retriever.invoke(QUERY, config)
    (root,) = tracer.traced_runs
    assert root.name == "RerankRetriever"
    assert root.run_type == "retriever"
    assert [child.name for child in root.child_runs] == ["VectorStoreRetriever", "CrossEncoderRerank"]
    check_rerank_run(root.child_runs[1], 5, 2)
    assert "mine" in root.child_runs[1].tags


@pytest.mark.parametrize("is_async", [False, True])
async def test_without_callbacks_those_of_the_running_chain_are_taken(is_async: bool) -> None:
    rerank = CrossEncoderRerank(reranker=fake(), top_n=2)

    async def acompress(query: str) -> Any:
        return await rerank.acompress_documents(documents(), query)

    chain = RunnableLambda(lambda query: rerank.compress_documents(documents(), query), acompress)
    tracer = RunCollectorCallbackHandler()
    config: Any = {"callbacks": [tracer]}
    await chain.ainvoke(QUERY, config) if is_async else chain.invoke(QUERY, config)
    (root,) = tracer.traced_runs
    if is_async and sys.version_info < (3, 11):
        pytest.skip("asyncio passes no context on to tasks before Python 3.11")
    check_rerank_run(only_child(root, "CrossEncoderRerank"), 6, 2)


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_failure_ends_the_run_with_the_error(is_async: bool) -> None:
    tracer = RunCollectorCallbackHandler()
    rerank = CrossEncoderRerank(model=FakeBackend(lambda query, text: float("nan")))
    if is_async:
        with pytest.raises(ScoringError):
            await rerank.acompress_documents(documents(), QUERY, callbacks=[tracer])
    else:
        with pytest.raises(ScoringError):
            rerank.compress_documents(documents(), QUERY, callbacks=[tracer])
    (run,) = tracer.traced_runs
    assert run.error is not None
    assert "ScoringError" in run.error
    assert run.end_time is not None


# -- the tool ------------------------------------------------------------------------------------------------


def tool_call(query: str) -> dict[str, Any]:
    return {"name": "search_git", "args": {"query": query}, "id": "1", "type": "tool_call"}


async def test_tool_shows_rank_score_and_source_and_returns_documents(store: FAISS) -> None:
    tool = create_rerank_tool(
        first_stage(store), name="search_git", description="Searches git's manual.", reranker=fake(), top_n=2
    )
    assert (tool.name, tool.description) == ("search_git", "Searches git's manual.")
    assert list(tool.args) == ["query"]
    assert tool.args["query"]["description"]
    message = tool.invoke(tool_call(QUERY))
    assert contents(message.artifact) == expected()[:2]
    scores = [document.metadata["relevance_score"] for document in message.artifact]
    sources = [document.metadata["source"] for document in message.artifact]
    assert message.content == (
        f"[1] relevance score {scores[0]:.3f}, source: {sources[0]}\n{expected()[0]}\n\n"
        f"[2] relevance score {scores[1]:.3f}, source: {sources[1]}\n{expected()[1]}"
    )
    again = await tool.ainvoke(tool_call(QUERY))
    assert (again.content, again.artifact) == (message.content, message.artifact)
    assert tool.invoke({"query": QUERY}) == message.content


def test_tool_heading_is_one_line_whatever_the_metadata() -> None:
    document = Document("text", metadata={"title": "Two\nlines", "source": "", "page": 0})
    tool = create_rerank_tool(RunnableLambda(lambda query: [document]), model=FakeBackend(lambda query, text: 0.0))
    assert tool.invoke({"query": QUERY}) == "[1] relevance score 0.500, title: Two lines, page: 0\ntext"


@pytest.mark.parametrize("texts", [[], TEXTS])
def test_tool_says_that_nothing_was_found(texts: list[str]) -> None:
    tool = create_rerank_tool(
        KeywordRetriever(texts=texts),
        name="search_git",
        reranker=fake(lambda query, text: -5.0),
        min_score=0.5,
    )
    message = tool.invoke(tool_call(QUERY))
    assert message.content == "No relevant passages were found. Try another query."
    assert message.artifact == []


def test_tool_refuses_a_blank_query_as_a_wrong_argument() -> None:
    tool = create_rerank_tool(KeywordRetriever(texts=TEXTS), reranker=fake())
    with pytest.raises(ValueError, match="the query is blank"):
        tool.invoke({"query": " "})


def test_tool_passes_its_run_on(store: FAISS) -> None:
    tracer = RunCollectorCallbackHandler()
    create_rerank_tool(first_stage(store), reranker=fake()).invoke({"query": QUERY}, {"callbacks": [tracer]})
    (root,) = tracer.traced_runs
    inner = only_child(root, "RerankRetriever")
    assert [child.name for child in inner.child_runs] == ["VectorStoreRetriever", "CrossEncoderRerank"]


# -- what other packages get wrong ---------------------------------------------------------------------------


def test_defect_scores_are_dropped_and_the_callers_objects_returned() -> None:
    given = documents()
    found = CrossEncoderRerank(reranker=fake(), top_n=None).compress_documents(given, QUERY)
    assert all("relevance_score" in document.metadata for document in found)
    assert not {id(document) for document in found} & {id(document) for document in given}
    assert given == documents()


def test_defect_negative_top_n_drops_the_last() -> None:
    with pytest.raises(ConfigurationError, match=r"top_n.*-1"):
        CrossEncoderRerank(top_n=-1)


def test_defect_always_column_one_of_a_multi_class_head() -> None:
    with pytest.raises(ConfigurationError, match=r"entailment.*neutral"):
        CrossEncoderRerank(model=tiny("bert-nli")).compress_documents(documents(), QUERY)
    orders = []
    for label in ("contradiction", "entailment", "neutral"):
        rerank = CrossEncoderRerank(model=tiny("bert-nli"), label=label, top_n=None)
        orders.append([document.id for document in rerank.compress_documents(documents(), QUERY)])
    assert orders[0] != orders[1]
    assert orders[1] != orders[2]


async def test_defect_nan_outranks_the_best() -> None:
    values = {"a": 0.1, "b": float("nan"), "c": 5.0}
    rerank = CrossEncoderRerank(model=FakeBackend(lambda query, text: values[text]), top_n=2)
    with pytest.raises(ScoringError, match="'b'"):
        rerank.compress_documents(documents(list("abc")), QUERY)
    with pytest.raises(ScoringError, match="'b'"):
        await rerank.acompress_documents(documents(list("abc")), QUERY)


def test_defect_long_texts_cut_the_query() -> None:
    rerank = CrossEncoderRerank(model=tiny("bert"), max_length=32, top_n=None)
    long = [Document("git revert " * 300), Document("git revert " * 400)]
    scores = [d.metadata["relevance_score"] for d in rerank.compress_documents(long, "undo a commit")]
    assert scores[0] == pytest.approx(scores[1])
    other = [d.metadata["relevance_score"] for d in rerank.compress_documents(long, "boil an egg")]
    assert other != pytest.approx(scores)
    with pytest.raises(InputError, match="query"):
        rerank.compress_documents(long, "undo a commit " * 40)


def test_defect_no_threshold() -> None:
    logits = {"a": 2.0, "b": 0.0, "c": -2.0}
    backend = FakeBackend(lambda query, text: logits[text])
    given = documents(["c", "b", "a"])
    kept = CrossEncoderRerank(model=backend, min_score=0.5).compress_documents(given, QUERY)
    assert contents(kept) == ["a", "b"]
    kept = CrossEncoderRerank(model=backend, min_score=0.1, scale="logit").compress_documents(given, QUERY)
    assert contents(kept) == ["a"]
    kept = CrossEncoderRerank(model=backend, min_score=0.0, scale="logit").compress_documents(given, QUERY)
    assert contents(kept) == ["a", "b"]


def test_defect_saturated_scores_tie() -> None:
    logits = {"a": 17.0, "b": 18.0, "c": 20.0, "d": 60.0, "e": 70.0}
    rerank = CrossEncoderRerank(model=FakeBackend(lambda query, text: logits[text]), top_n=None)
    found = rerank.compress_documents(documents(list("abcde")), QUERY)
    assert contents(found) == list("edcba")
    scores = [document.metadata["relevance_score"] for document in found]
    assert scores[2] > scores[3] > scores[4]


def test_defect_scores_that_json_refuses() -> None:
    found = CrossEncoderRerank(model=tiny("bert"), top_n=None).compress_documents(documents(), QUERY)
    assert len(json.loads(json.dumps([document.metadata["relevance_score"] for document in found]))) == len(TEXTS)


def test_defect_id_type_and_metadata_are_lost_and_an_old_score_wins() -> None:
    lock = threading.Lock()
    given = Titled("undo", id="x", title="t", metadata={"relevance_score": 99.0, "deep": {"list": [1]}, "lock": lock})
    (found,) = CrossEncoderRerank(model=FakeBackend(lambda query, text: 0.0)).compress_documents([given], QUERY)
    assert type(found) is Titled
    assert (found.id, found.title, found.page_content) == ("x", "t", "undo")
    assert found.metadata == {"relevance_score": 0.5, "deep": {"list": [1]}, "lock": lock}
    found.metadata["deep"]["list"].append(2)
    found.metadata["new"] = True
    assert given.metadata == {"relevance_score": 99.0, "deep": {"list": [1]}, "lock": lock}


def test_defect_trust_remote_code_by_default() -> None:
    assert CrossEncoderRerank().trust_remote_code is False
    assert CrossEncoderRerank(trust_remote_code=True).model_dump()["trust_remote_code"] is True


class _NoExecutor(ThreadPoolExecutor):
    def submit(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the event loop's default executor was used")


async def test_defect_async_is_a_thread_of_the_default_executor() -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(_NoExecutor(1))
    scoring, released = threading.Event(), threading.Event()

    def logit(query: str, text: str) -> float:
        scoring.set()
        assert released.wait(20), "the event loop was blocked"
        return word_overlap(query, text)

    rerank = CrossEncoderRerank(model=FakeBackend(logit), top_n=1)
    task = asyncio.create_task(rerank.acompress_documents(documents(), QUERY))
    while not scoring.is_set():
        await asyncio.sleep(0.001)
    released.set()
    assert contents(await task) == [BEST]


def test_defect_the_model_is_loaded_again_in_every_call() -> None:
    rerank = CrossEncoderRerank(model=tiny("bert"))
    rerank.compress_documents(documents(), QUERY)
    loaded = rerank._own._loaded()
    rerank.compress_documents(documents(), QUERY)
    assert rerank._own._loaded() is loaded


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_defect_a_fixed_max_length_is_longer_than_the_positions(family: str) -> None:
    rerank = CrossEncoderRerank(model=tiny(family))
    assert len(rerank.compress_documents([Document("git revert " * 600)], QUERY)) == 1
    with pytest.raises(ConfigurationError, match="max_length"):
        CrossEncoderRerank(model=tiny(family), max_length=614).compress_documents(documents(), QUERY)


def test_defect_a_silent_fallback() -> None:
    def broken(query: str, text: str) -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CrossEncoderRerank(model=FakeBackend(broken)).compress_documents(documents(), QUERY)


async def test_defect_empty_input_fails_or_loads_the_model() -> None:
    rerank = CrossEncoderRerank(model="nobody/has-this-model")
    assert rerank.compress_documents([], QUERY) == []
    assert await rerank.acompress_documents([], QUERY) == []


@pytest.mark.bundled
def test_bundled_model_over_faiss(store: FAISS) -> None:
    retriever = RerankRetriever(retriever=first_stage(store), top_n=1)
    (best,) = retriever.invoke(QUERY)
    assert best.page_content == BEST
    assert 0 < best.metadata["relevance_score"] <= 1
