"""Spans of OpenTelemetry and lines of the debug log, alone and below LangChain's and LlamaIndex's own."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import StructuredTool
from llama_index.core import SummaryIndex
from llama_index.core.llms.mock import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import TextNode
from openinference.instrumentation import suppress_tracing
from openinference.instrumentation.langchain import LangChainInstrumentor
from openinference.instrumentation.llama_index import LlamaIndexInstrumentor
from openinference.semconv.trace import DocumentAttributes, OpenInferenceSpanKindValues, RerankerAttributes
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rerank_plugins import Candidate, Reranker, ScoringError
from rerank_plugins.langchain import CrossEncoderRerank, RelevantToolsMiddleware, RerankRetriever
from rerank_plugins.llama_index import CrossEncoderRerank as NodeRerank
from rerank_plugins.llama_index import RelevantToolRetriever
from rerank_plugins.telemetry import record_content
from rerank_plugins.testing import FakeBackend

EXPORTER = InMemorySpanExporter()
SECRET = "a secret question"


@pytest.fixture(scope="module", autouse=True)
def _provider() -> Iterator[None]:
    # A process has one provider. Where another test has set one, ours gets the spans too.
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(EXPORTER))
    yield
    EXPORTER.shutdown()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    EXPORTER.clear()
    yield
    record_content(True)


def spans() -> list[Any]:
    return list(EXPORTER.get_finished_spans())


def ours() -> list[Any]:
    return [span for span in spans() if span.instrumentation_scope.name == "rerank_plugins"]


def parents(span: Any) -> list[str]:
    """The names of a span's parents, the nearest first."""
    by_id = {one.context.span_id: one for one in spans()}
    found = []
    while span.parent is not None and span.parent.span_id in by_id:
        span = by_id[span.parent.span_id]
        found.append(span.name)
    return found


async def test_one_span_a_rerank_with_openinferences_attributes() -> None:
    reranker = Reranker(FakeBackend(), scale="logit")
    candidates = ["blue whale", Candidate("a red fox", id="fox", first_stage_score=0.5), "red"]
    ranking = await reranker.arank("red fox", candidates, top_n=2)
    (span,) = ours()
    name = reranker.model_name
    assert span.name == f"rerank {name}"
    assert dict(span.attributes) == {
        "openinference.span.kind": OpenInferenceSpanKindValues.RERANKER.value,
        "gen_ai.operation.name": "rerank",
        "gen_ai.request.model": name,
        "input.value": "red fox",
        "input.mime_type": "text/plain",
        RerankerAttributes.RERANKER_MODEL_NAME: name,
        RerankerAttributes.RERANKER_QUERY: "red fox",
        RerankerAttributes.RERANKER_TOP_K: 2,
        "reranker.input_documents.0.document.id": "0",
        "reranker.input_documents.0.document.content": "blue whale",
        "reranker.input_documents.1.document.id": "fox",
        "reranker.input_documents.1.document.content": "a red fox",
        "reranker.input_documents.1.document.score": 0.5,
        "reranker.input_documents.2.document.id": "2",
        "reranker.input_documents.2.document.content": "red",
        "reranker.output_documents.0.document.id": "fox",
        "reranker.output_documents.0.document.content": "a red fox",
        "reranker.output_documents.0.document.score": ranking[0].score,
        "reranker.output_documents.1.document.id": "2",
        "reranker.output_documents.1.document.content": "red",
        "reranker.output_documents.1.document.score": ranking[1].score,
    }
    assert DocumentAttributes.DOCUMENT_CONTENT == "document.content"
    assert DocumentAttributes.DOCUMENT_SCORE == "document.score"
    assert DocumentAttributes.DOCUMENT_ID == "document.id"


def test_each_of_many_queries_has_its_span() -> None:
    Reranker(FakeBackend()).rank_many([("a", ["a b", "c"]), ("c", ["c d"])])
    assert [(span.attributes["reranker.query"], span.attributes["reranker.top_k"]) for span in ours()] == [
        ("a", 2),
        ("c", 1),
    ]


def test_what_is_most_important_stays_where_a_span_is_full() -> None:
    Reranker(FakeBackend()).rank("red fox", [f"text {i}" for i in range(500)])
    (span,) = ours()
    assert span.dropped_attributes > 0
    assert span.attributes["openinference.span.kind"] == "RERANKER"
    assert span.attributes["reranker.query"] == "red fox"
    assert span.attributes["reranker.top_k"] == 500


def everything(span: Any) -> str:
    events = [(event.name, dict(event.attributes)) for event in span.events]
    return f"{span.name} {dict(span.attributes)} {events} {span.status.description}"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        (None, ""),
        ("RERANK_PLUGINS_TRACE_CONTENT", "false"),
        ("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "False"),
        ("OPENINFERENCE_HIDE_INPUTS", "true"),
    ],
)
def test_content_is_off_by_a_switch(variable: str | None, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(query: str, text: str) -> float:
        raise RuntimeError(f"cannot score {query}: {text}")

    if variable is None:
        record_content(False)
    else:
        monkeypatch.setenv(variable, value)
        monkeypatch.setenv("OPENINFERENCE_HIDE_OUTPUTS", "true")
    Reranker(FakeBackend()).rank(SECRET, ["hidden words", "other words"])
    with pytest.raises((ScoringError, RuntimeError)):
        Reranker(FakeBackend(fails)).rank(SECRET, ["hidden words"])
    good, bad = ours()
    for span in (good, bad):
        assert "secret" not in everything(span)
        assert "words" not in everything(span)
        assert span.attributes["reranker.input_documents.0.document.id"] == "0"
    assert good.attributes["reranker.output_documents.1.document.score"] < 1
    assert bad.status.status_code is trace.StatusCode.ERROR
    assert bad.attributes["error.type"] in ("RuntimeError", "ScoringError")


def test_inputs_and_outputs_are_hidden_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENINFERENCE_HIDE_OUTPUTS", "true")
    Reranker(FakeBackend()).rank("red fox", ["a red fox"])
    (span,) = ours()
    assert span.attributes["reranker.input_documents.0.document.content"] == "a red fox"
    assert "reranker.output_documents.0.document.content" not in span.attributes
    assert span.attributes["reranker.query"] == "red fox"


def test_an_error_is_told_and_a_fallback_too() -> None:
    def fails(query: str, text: str) -> float:
        raise ConnectionError("down")

    with pytest.raises((ScoringError, ConnectionError)):
        Reranker(FakeBackend(fails)).rank("red fox", ["a red fox"])
    Reranker(FakeBackend(fails), on_error="keep_order").rank("red fox", ["a red fox"])
    other = Reranker(FakeBackend())
    Reranker(FakeBackend(fails), on_error=other).rank("red fox", ["a red fox"])
    failed, kept, inner, outer = ours()
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert [event.name for event in failed.events] == ["exception"]
    assert kept.status.status_code is not trace.StatusCode.ERROR
    assert "down" in kept.attributes["rerank.fallback"]
    assert "reranker.output_documents.0.document.score" not in kept.attributes
    # The reranker that takes over has a span of its own, inside.
    assert inner.parent.span_id == outer.context.span_id
    assert "down" in outer.attributes["rerank.fallback"]


async def test_it_is_a_child_of_the_callers_span_and_parent_of_what_is_below() -> None:
    tracer = trace.get_tracer("tests")

    def scores(query: str, text: str) -> float:
        with tracer.start_as_current_span("below"):
            return 1.0

    with tracer.start_as_current_span("caller"):
        await Reranker(FakeBackend(scores)).arank("red fox", ["a red fox"])
    (span,) = ours()
    assert parents(span) == ["caller"]
    (below,) = [one for one in spans() if one.name == "below"]
    assert parents(below) == [span.name, "caller"]


def test_suppressed_instrumentation_makes_no_span() -> None:
    with suppress_tracing():
        Reranker(FakeBackend()).rank("red fox", ["a red fox"])
    assert spans() == []


def test_nobody_who_does_not_trace_imports_opentelemetry() -> None:
    code = (
        "import sys; from rerank_plugins import Reranker; from rerank_plugins.testing import FakeBackend\n"
        "Reranker(FakeBackend()).rank('a', ['b'])\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_debug_log_has_counts_and_no_texts(caplog: Any) -> None:
    reranker = Reranker(FakeBackend())
    with caplog.at_level(logging.DEBUG, "rerank_plugins"):
        reranker.rank_many([(SECRET, ["hidden words", "b", "c"]), ("other words", ["d"])], top_n=2)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "rerank_plugins"]
    assert line.startswith(f"reranked: model {reranker.model_name}, 2 queries, 4 candidates, 3 kept, ")
    assert line.endswith(" ms")
    assert "secret" not in line
    assert "words" not in line


@pytest.fixture
def langchain_spans() -> Iterator[None]:
    LangChainInstrumentor().instrument()
    yield
    LangChainInstrumentor().uninstrument()


@pytest.fixture
def llama_index_spans() -> Iterator[None]:
    LlamaIndexInstrumentor().instrument()
    yield
    LlamaIndexInstrumentor().uninstrument()


class Scripted(FakeMessagesListChatModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


@pytest.mark.usefixtures("langchain_spans")
@pytest.mark.parametrize("is_async", [False, True])
async def test_below_langchains_spans(is_async: bool) -> None:
    documents = [Document("a red fox"), Document("blue")]
    reranker = Reranker(FakeBackend())
    retriever = RerankRetriever(retriever=RunnableLambda(lambda query: documents), reranker=reranker)
    chain = retriever | RunnableLambda(len)
    assert (await chain.ainvoke("red fox") if is_async else chain.invoke("red fox")) == 2
    (span,) = ours()
    assert parents(span) == ["CrossEncoderRerank", "RerankRetriever", "RunnableSequence"]
    EXPORTER.clear()
    compressor = CrossEncoderRerank(reranker=reranker)
    if is_async:
        await compressor.acompress_documents(documents, "red fox")
    else:
        compressor.compress_documents(documents, "red fox")
    (span,) = ours()
    assert parents(span) == ["CrossEncoderRerank"]


@pytest.mark.usefixtures("langchain_spans")
@pytest.mark.parametrize("is_async", [False, True])
async def test_below_the_spans_of_langchains_agents(is_async: bool) -> None:
    tools = [
        StructuredTool.from_function(lambda: "x", name=f"about_{name}", description=f"Tells of {name}.")
        for name in ("rain", "mail", "news")
    ]
    middleware = RelevantToolsMiddleware(1, reranker=Reranker(FakeBackend()))
    agent = create_agent(Scripted(responses=[AIMessage("done")]), tools, middleware=[middleware])
    state = {"messages": [("user", "tells of news.")]}
    await agent.ainvoke(state) if is_async else agent.invoke(state)  # type: ignore[call-overload]
    (span,) = ours()
    assert parents(span) == ["RelevantTools", "model", "LangGraph"]
    (choice,) = [one for one in spans() if one.name == "RelevantTools"]
    assert "about_news" in choice.attributes["output.value"]


@pytest.mark.usefixtures("llama_index_spans")
@pytest.mark.parametrize("is_async", [False, True])
async def test_below_llama_indexs_spans(is_async: bool) -> None:
    index = SummaryIndex([TextNode(text="a red fox"), TextNode(text="blue")])
    reranker = Reranker(FakeBackend())
    engine = RetrieverQueryEngine(
        index.as_retriever(),
        response_synthesizer=get_response_synthesizer(llm=MockLLM(), response_mode="compact"),  # type: ignore[arg-type]
        node_postprocessors=[NodeRerank(reranker=reranker)],
    )
    await engine.aquery("red fox") if is_async else engine.query("red fox")
    (span,) = ours()
    above = parents(span)
    assert above[0].startswith("CrossEncoderRerank.")
    assert above[-1].startswith("RetrieverQueryEngine.")
    EXPORTER.clear()
    from llama_index.core.tools import FunctionTool

    tools = [FunctionTool.from_defaults(lambda: "x", name=name, description=f"Tells of {name}.") for name in "abc"]
    retriever = RelevantToolRetriever(tools, 1, reranker=reranker)
    await retriever.aretrieve("tells of b.") if is_async else retriever.retrieve("tells of b.")
    (span,) = ours()
    assert parents(span)[-1].startswith("_ToolNodes.")
    (retrieval,) = [one for one in spans() if "retrieval.documents.0.document.content" in one.attributes]
    assert retrieval.attributes["retrieval.documents.0.document.content"] == "b: Tells of b."
