"""LangChain: configurations that pass through, other cross-encoders as models, details of results, bad documents."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from checkpoints import tiny
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_community.cross_encoders import HuggingFaceCrossEncoder
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableConfig, RunnableLambda
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from rerank_plugins import Reranker
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.langchain import CrossEncoderRerank, CrossEncoderScorer, RerankRetriever, create_rerank_tool
from rerank_plugins.testing import FakeBackend, word_overlap

TEXTS = ["git add stages files", "git revert undoes a commit", "bake the bread"]
QUERY = "undo a commit"


def documents(texts: Sequence[str] = TEXTS) -> list[Document]:
    return [Document(text, metadata={"score": 0.9 - 0.1 * i}) for i, text in enumerate(texts)]


# -- configurations ----------------------------------------------------------------------------------------------


class Tenant(BaseRetriever):
    tenant: str = "nobody"

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [Document(self.tenant)]


def configurable() -> Any:
    return Tenant().configurable_fields(tenant=ConfigurableField(id="tenant"))


@pytest.mark.parametrize("k", [None, 5])
async def test_what_is_configured_in_a_call_reaches_the_first_stage(k: int | None) -> None:
    config: RunnableConfig = {"configurable": {"tenant": "acme"}}
    for inner in (configurable(), configurable().with_retry(), RunnableLambda(str.lower) | configurable()):
        retriever = RerankRetriever(retriever=inner, model=FakeBackend(), k=k)
        assert [spec.id for spec in retriever.config_specs] == ["tenant"]
        with pytest.warns() if k else _nothing():
            found = [
                retriever.invoke(QUERY, config),
                await retriever.ainvoke(QUERY, config),
                retriever.with_config(config).invoke(QUERY),
                (RunnableLambda(str.upper) | retriever).invoke(QUERY, config),
                retriever.batch([QUERY], config)[0],
                (await retriever.abatch([QUERY], config))[0],
            ]
        assert [documents[0].page_content for documents in found] == ["acme"] * 6
        assert retriever.invoke(QUERY, top_n=1)[0].page_content == "nobody"


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_rest_of_the_configuration_arrives_too(is_async: bool) -> None:
    seen: list[RunnableConfig] = []

    def find(query: str, config: RunnableConfig) -> list[Document]:
        seen.append(config)
        return documents()

    retriever = RerankRetriever(retriever=RunnableLambda(find), model=FakeBackend())
    tracer = RunCollectorCallbackHandler()
    config: RunnableConfig = {
        "tags": ["mine"],
        "metadata": {"user": "u1"},
        "max_concurrency": 3,
        "recursion_limit": 7,
        "run_name": "outer",
        "callbacks": [tracer],
    }
    await retriever.ainvoke(QUERY, config) if is_async else retriever.invoke(QUERY, config)
    (arrived,) = seen
    assert arrived["tags"] == ["mine"]
    assert arrived["metadata"]["user"] == "u1"
    assert arrived["max_concurrency"] == 3
    assert arrived["recursion_limit"] == 7
    (root,) = tracer.traced_runs
    assert root.name == "outer"
    assert [child.name for child in root.child_runs] == ["find", "CrossEncoderRerank"]
    assert root.child_runs[0].tags.count("mine") == 1


# -- other cross-encoders as models --------------------------------------------------------------------------------


class Own(BaseCrossEncoder):
    def score(self, text_pairs: Any) -> list[float]:
        return [word_overlap(query, text) for query, text in text_pairs]


class Declared(Own):
    emits = "probability"

    def score(self, text_pairs: Any) -> list[float]:
        return [0.25 if "revert" in text else 0.125 for _, text in text_pairs]


def test_a_cross_encoder_of_the_users_ranks_and_its_scores_are_reported_as_they_are() -> None:
    rerank = CrossEncoderRerank(model=Own(), top_n=1)
    (best,) = rerank.compress_documents(documents(), QUERY)
    assert best.page_content == TEXTS[1]
    assert best.metadata["relevance_score"] == pytest.approx(word_overlap(QUERY, TEXTS[1]))
    assert rerank.scale == "logit"
    assert rerank._own.model_name == "Own"
    with pytest.raises(ConfigurationError, match=r"Own does not say whether.*emits = 'logit' or 'probability'"):
        CrossEncoderRerank(model=Own(), scale="probability")
    with pytest.raises(ConfigurationError, match="label"):
        CrossEncoderRerank(model=Own(), label=True)


def test_a_declared_scale_is_believed() -> None:
    best = CrossEncoderRerank(model=Declared(), top_n=1).compress_documents(documents(), QUERY)[0]
    assert best.metadata["relevance_score"] == pytest.approx(0.25)
    best = CrossEncoderRerank(model=Declared(), top_n=1, scale="logit").compress_documents(documents(), QUERY)[0]
    assert best.metadata["relevance_score"] == pytest.approx(-1.0986, abs=1e-3)

    class Wrong(Own):
        emits = "percent"

    with pytest.raises(ConfigurationError, match=r"emits of Wrong.*'percent'"):
        CrossEncoderRerank(model=Wrong())


@pytest.mark.parametrize("family", ["bert", "bert-2class"])
def test_the_frameworks_cross_encoder_keeps_its_scores(family: str) -> None:
    theirs = HuggingFaceCrossEncoder(model_name=tiny(family), model_kwargs={"device": "cpu"})
    expected = {
        text: float(score) for text, score in zip(TEXTS, theirs.score([(QUERY, t) for t in TEXTS]), strict=True)
    }
    rerank = CrossEncoderRerank(model=theirs, top_n=None)
    found = rerank.compress_documents(documents(), QUERY)
    assert [d.page_content for d in found] == sorted(TEXTS, key=lambda text: -expected[text])
    for document in found:
        assert document.metadata["relevance_score"] == pytest.approx(expected[document.page_content], abs=1e-6)
    assert rerank.scale == ("probability" if family == "bert" else "logit")
    retriever = RerankRetriever(retriever=RunnableLambda(lambda query: documents()), model=theirs, top_n=1)
    assert retriever.invoke(QUERY)[0].page_content == found[0].page_content


def test_our_own_scorer_as_model_is_its_reranker() -> None:
    shared = Reranker(FakeBackend(), scale="logit")
    rerank = CrossEncoderRerank(model=CrossEncoderScorer(reranker=shared), top_n=1)
    assert rerank._own is shared


# -- details -------------------------------------------------------------------------------------------------------


async def test_details_are_in_the_metadata_where_asked_for_and_always_in_the_trace() -> None:
    given = [*documents(), Document("git revert " * 300, metadata={"relevance_score": 7})]
    for add_details in (False, True):
        tracer = RunCollectorCallbackHandler()
        rerank = CrossEncoderRerank(model=tiny("bert"), backend="torch", top_n=None, add_details=add_details)
        found = rerank.compress_documents(given, QUERY, callbacks=[tracer])
        again = await rerank.acompress_documents(given, QUERY)
        assert [d.metadata.keys() for d in found] == [d.metadata.keys() for d in again]
        (run,) = tracer.traced_runs
        assert run.outputs is not None
        by_rank = {detail["first_stage_rank"]: detail for detail in run.outputs["details"]}
        assert [by_rank[rank]["truncated"] for rank in (1, 2, 3, 4)] == [False, False, False, True]
        assert [by_rank[rank]["first_stage_score"] for rank in (1, 2, 3, 4)] == pytest.approx([0.9, 0.8, 0.7, 7.0])
        for document, detail in zip(found, run.outputs["details"], strict=True):
            if add_details:
                assert detail.items() <= document.metadata.items()
            else:
                assert not detail.keys() & document.metadata.keys()
    assert all("first_stage_rank" not in document.metadata for document in given)


def test_details_of_a_second_stage_replace_those_of_the_first() -> None:
    first = CrossEncoderRerank(model=FakeBackend(), add_details=True, top_n=None)
    second = CrossEncoderRerank(model=FakeBackend(lambda query, text: -len(text)), add_details=True, top_n=1)
    middle = first.compress_documents(documents(), QUERY)
    (best,) = second.compress_documents(middle, QUERY)
    assert best.page_content == "bake the bread"
    earlier = {document.page_content: document.metadata["relevance_score"] for document in middle}
    assert best.metadata["first_stage_score"] == earlier["bake the bread"]
    assert best.metadata["first_stage_rank"] == 2


def test_every_window_has_the_metadata_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    backend_texts: list[str] = []
    rerank = CrossEncoderRerank(
        model=tiny("bert"), backend="torch", metadata_fields=["title", "tags"], passage_length=20, top_n=1
    )
    backend = rerank._own._loaded()
    logits = backend.logits
    monkeypatch.setattr(backend, "logits", lambda pairs: backend_texts.extend(t for _, t in pairs) or logits(pairs))
    long = Document("git revert undoes a commit. " * 20, metadata={"title": "The manual", "tags": ["git", None, "vcs"]})
    rerank.compress_documents([long], QUERY)
    assert len(backend_texts) > 5
    assert all(text.startswith("The manual\ngit, vcs\n") for text in backend_texts)


def test_max_tokens_and_deadlines_are_keywords_of_the_adapters() -> None:
    rerank = CrossEncoderRerank(model=tiny("bert"), backend="torch", top_n=None, max_tokens=9)
    assert len(rerank.compress_documents(documents(), QUERY)) < 3
    retriever = RerankRetriever(retriever=RunnableLambda(lambda query: documents()), reranker=rerank._own, top_n=None)
    assert len(retriever.invoke(QUERY)) == 3
    assert len(retriever.invoke(QUERY, max_tokens=9)) < 3

    class Slow(FakeBackend):
        pairs_at_a_time = 1

        def logits(self, pairs: Any) -> Any:
            time.sleep(0.2)
            return super().logits(pairs)

    tracer = RunCollectorCallbackHandler()
    late = CrossEncoderRerank(model=Slow(), top_n=None, deadline_s=0.1)
    found = late.compress_documents(documents(), QUERY, callbacks=[tracer])
    assert [document.page_content for document in found] == TEXTS
    assert ["relevance_score" in document.metadata for document in found] == [True, False, False]
    assert ["time was up" in document.metadata.get("rerank_fallback", "") for document in found] == [False, True, True]
    assert "time was up" in tracer.traced_runs[0].outputs["fallback"]  # type: ignore[index]


class Away(FakeBackend):
    def logits(self, pairs: Any) -> Any:
        raise ConnectionRefusedError("nobody listens")


def test_what_was_not_reranked_says_so_and_keeps_no_old_score() -> None:
    given = [Document(text, metadata={"relevance_score": 0.9, "rerank_fallback": "old"}) for text in TEXTS]
    keywords: dict[str, Any] = {"model": Away(), "on_error": "keep_order", "min_score": 0.5}
    found = CrossEncoderRerank(**keywords, top_n=2).compress_documents(given, QUERY)
    assert [document.page_content for document in found] == TEXTS[:2]
    for document in found:
        assert document.metadata.keys() == {"rerank_fallback"}
        assert "fake failed (ConnectionRefusedError: nobody listens)" in document.metadata["rerank_fallback"]
    tool = create_rerank_tool(RunnableLambda(lambda query: given), **keywords, top_n=1)
    assert tool.invoke({"query": QUERY}) == f"[1] not reranked\n{TEXTS[0]}"
    (again,) = CrossEncoderRerank(model=FakeBackend(), top_n=1).compress_documents(found, QUERY)
    assert "rerank_fallback" not in again.metadata
    with pytest.raises(ConnectionRefusedError):
        CrossEncoderRerank(model=Away()).compress_documents(given, QUERY)


def test_fusion_and_adjustments_read_the_metadata() -> None:
    given = [
        Document(text, metadata={"score": score, "near": 1 - score})
        for text, score in zip(TEXTS, (9, 0, 1), strict=True)
    ]
    flat: dict[str, Any] = {"model": FakeBackend(lambda query, text: 0.0), "top_n": None}

    def order(**keywords: Any) -> list[str]:
        ranked = CrossEncoderRerank(**flat, **keywords).compress_documents(given, QUERY)
        return [document.page_content for document in ranked]

    assert order(fusion=0.5) == [TEXTS[0], TEXTS[2], TEXTS[1]]
    assert order(fusion=0.5, first_stage_score_key="near") == [TEXTS[1], TEXTS[2], TEXTS[0]]
    assert order(adjust=lambda item: -item.candidate.metadata["score"]) == [TEXTS[1], TEXTS[2], TEXTS[0]]
    with pytest.raises(InputError, match="first_stage_score"):
        order(fusion=0.5, first_stage_score_key="nowhere")
    with pytest.raises(ConfigurationError, match="first_stage_score_key"):
        CrossEncoderRerank(first_stage_score_key=3)
    repeated = CrossEncoderRerank(**flat, dedup="exact", add_details=True).compress_documents(given * 2, QUERY)
    assert [document.metadata["duplicates"] for document in repeated] == [[3], [4], [5]]


# -- bad documents -------------------------------------------------------------------------------------------------


def broken(**fields: Any) -> Document:
    return Document.model_construct(**{"page_content": "text", "metadata": {}, **fields})


BAD_DOCUMENTS = {
    "page_content None": (broken(page_content=None), "page_content of the Document at 1 must be a str, got NoneType"),
    "page_content 42": (broken(page_content=42), "page_content of the Document at 1.*int"),
    "page_content list": (broken(page_content=["a"]), "page_content of the Document at 1.*list"),
    "page_content bytes": (broken(page_content=b"a"), "page_content of the Document at 1.*bytes"),
    "metadata None": (broken(metadata=None), "metadata of the Document at 1 must be a dict, got NoneType"),
    "metadata list": (broken(metadata=[]), "metadata of the Document at 1.*list"),
    "nothing": (None, "got NoneType at 1"),
    "a dict": ({"page_content": "text"}, "got dict at 1"),
    "a text": ("text", "got str at 1"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
async def test_a_bad_document_is_an_input_error_with_its_position(case: str) -> None:
    document, message = BAD_DOCUMENTS[case]
    rerank = CrossEncoderRerank(model=FakeBackend(), metadata_fields=["title"])
    retriever = RerankRetriever(retriever=RunnableLambda(lambda query: [Document("a"), document]), model=FakeBackend())
    with pytest.raises(InputError, match=message):
        rerank.compress_documents([Document("a"), document], QUERY)
    with pytest.raises(InputError, match=message):
        await rerank.acompress_documents([Document("a"), document], QUERY)
    with pytest.raises(InputError, match=message):
        retriever.invoke(QUERY)
    with pytest.raises(InputError, match=message):
        await retriever.ainvoke(QUERY)


BAD_CONTAINERS: dict[str, Any] = {
    "NoneType": None,
    "dict": {"documents": []},
    "Document": Document("a"),
    "str": "text",
    "set": set(),
    "int": 3,
}


@pytest.mark.parametrize("kind", BAD_CONTAINERS)
async def test_a_bad_container_is_an_input_error(kind: str) -> None:
    given = BAD_CONTAINERS[kind]
    retriever = RerankRetriever(retriever=RunnableLambda(lambda query: given), model=FakeBackend(), k=3)
    with pytest.raises(InputError, match=f"What RunnableLambda returns must be a list.*{kind}"):
        retriever.invoke(QUERY)
    with pytest.raises(InputError, match=kind):
        await retriever.ainvoke(QUERY)
    with pytest.raises(InputError, match=f"documents must be a list.*{kind}"):
        CrossEncoderRerank(model=FakeBackend()).compress_documents(given, QUERY)


def test_an_iterator_is_taken_by_the_compressor_and_refused_from_a_first_stage() -> None:
    assert len(CrossEncoderRerank(model=FakeBackend()).compress_documents(iter(documents()), QUERY)) == 3  # type: ignore[arg-type]

    class Lazy(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> Any:
            return iter(documents())

    # Callbacks of the first stage get the same object, and may have read it.
    with pytest.raises(InputError, match="What Lazy returns must be a list.*iterator"):
        RerankRetriever(retriever=Lazy(), model=FakeBackend()).invoke(QUERY)


def test_a_pipeline_of_langchain_still_gets_tuples() -> None:
    class Tuples(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> Any:
            return tuple(documents())

    compression = ContextualCompressionRetriever(
        base_compressor=CrossEncoderRerank(model=FakeBackend(), top_n=1), base_retriever=Tuples()
    )
    assert compression.invoke(QUERY)[0].page_content == TEXTS[1]
