from __future__ import annotations

import asyncio
import copy
import gc
import json
import math
import pickle
import runpy
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from checkpoints import QUERY, TEXTS, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.postprocessor import SentenceTransformerRerank
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.vector_stores.faiss import FaissVectorStore

from rerank_plugins import Reranker
from rerank_plugins.backends import load as loading
from rerank_plugins.errors import ConfigurationError, InputError, MissingDependencyError, ScoringError
from rerank_plugins.llama_index import CrossEncoderRerank, create_rerank_tool
from rerank_plugins.testing import FakeBackend

FOX = "the red fox"
PASSAGES = {
    "whale": "a blue whale sings",
    "fox": "the red fox jumps",
    "car": "a red car",
    "den": "the red fox sleeps in the den and hunts at night",
    "blank": "  ",
}
FOX_ORDER = ["fox", "den", "car", "whale", "blank"]


def found(passages: dict[str, str] = PASSAGES, **fields: Any) -> list[NodeWithScore]:
    """What a retriever would return: nodes with falling scores."""
    return [
        NodeWithScore(node=TextNode(text=text, id_=name, **copy.deepcopy(fields)), score=0.9 - 0.1 * i)
        for i, (name, text) in enumerate(passages.items())
    ]


def of(logits: dict[str, float]) -> CrossEncoderRerank:
    return CrossEncoderRerank(model=FakeBackend(lambda query, text: logits[text]), top_n=None)


def ids(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [item.node_id for item in nodes]


def results(nodes: Sequence[NodeWithScore]) -> list[tuple[str, float | None]]:
    return [(item.node_id, item.score) for item in nodes]


def shout(node: Any) -> str:
    return str(node.metadata["title"])


class WordEmbedding(BaseEmbedding):
    """Deterministic: one dimension for each word, by its checksum."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = np.zeros(64)
        for word in text.lower().split():
            vector[zlib.crc32(word.encode()) % 64] += 1
        return list(vector / max(float(np.linalg.norm(vector)), 1e-9))

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class Fixed(BaseRetriever):
    """Finds the same nodes for every query, and remembers the queries."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        super().__init__()
        self.nodes = nodes
        self.queries: list[str] = []

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.queries.append(query_bundle.query_str)
        return self.nodes


class CallbackRecorder(BaseCallbackHandler):
    def __init__(self) -> None:
        super().__init__([], [])
        self.started: list[tuple[CBEventType, dict[Any, Any]]] = []
        self.ended: list[tuple[CBEventType, dict[Any, Any]]] = []

    def on_event_start(self, event_type: CBEventType, payload: Any = None, *args: Any, **kwargs: Any) -> str:
        self.started.append((event_type, payload))
        return ""

    def on_event_end(self, event_type: CBEventType, payload: Any = None, *args: Any, **kwargs: Any) -> None:
        self.ended.append((event_type, payload))

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...


class EventRecorder(BaseEventHandler):
    events: list[Any] = []

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)


@pytest.fixture
def events() -> Iterator[list[Any]]:
    """Rerank events that reach the root dispatcher, where users attach their handlers."""
    recorder = EventRecorder()
    root = get_dispatcher()
    root.add_event_handler(recorder)
    yield recorder.events
    root.event_handlers.remove(recorder)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The model specs that were really loaded."""
    # Agents of other tests are cycles, which hold their models until then.
    gc.collect()
    seen: list[Any] = []
    load = loading._load

    def counting(spec: Any) -> Any:
        seen.append(spec)
        return load(spec)

    monkeypatch.setattr(loading, "_load", counting)
    return seen


@pytest.fixture
def faiss_index() -> VectorStoreIndex:
    nodes = [
        TextNode(text=text, id_=name, metadata={"source": f"{name}.txt"})
        for name, text in PASSAGES.items()
        if text.strip()
    ]
    store = FaissVectorStore(faiss.IndexFlatIP(64))
    return VectorStoreIndex(
        nodes,
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=WordEmbedding(model_name="words"),
    )


# -- ranking ------------------------------


def test_nodes_come_in_the_order_of_the_reranker_with_its_scores() -> None:
    ranked = CrossEncoderRerank(model=FakeBackend(), top_n=None).postprocess_nodes(found(), query_str=FOX)
    expected = Reranker(FakeBackend()).rank(FOX, list(PASSAGES.values()))
    assert ids(ranked) == FOX_ORDER
    assert [item.score for item in ranked] == [item.score for item in expected]
    assert ranked[-1].score == 0.0


def test_top_n_is_3_unless_told_otherwise() -> None:
    assert ids(CrossEncoderRerank(model=FakeBackend()).postprocess_nodes(found(), query_str=FOX)) == FOX_ORDER[:3]


def test_top_n_may_exceed_the_number_of_nodes() -> None:
    ranked = CrossEncoderRerank(model=FakeBackend(), top_n=99).postprocess_nodes(found(), query_str=FOX)
    assert ids(ranked) == FOX_ORDER


def test_equal_logits_keep_the_order_of_the_retriever() -> None:
    assert ids(of(dict.fromkeys(PASSAGES.values(), 1.0)).postprocess_nodes(found(), query_str=FOX)) == list(PASSAGES)


def test_a_query_bundle_is_as_good_as_a_string() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend())
    assert results(rerank.postprocess_nodes(found(), query_bundle=QueryBundle(FOX))) == results(
        rerank.postprocess_nodes(found(), query_str=FOX)
    )


async def test_async_gives_the_sync_result() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend(), top_n=None, min_score=0.1, keep_retrieval_score=True)
    assert await rerank.apostprocess_nodes(found(), query_str=FOX) == rerank.postprocess_nodes(found(), query_str=FOX)


async def test_32_tasks_at_once_give_the_serial_result() -> None:
    rerank = CrossEncoderRerank(model=tiny("bert"), backend="torch", top_n=None)
    nodes = found({str(i): text for i, text in enumerate(TEXTS[:4])})
    queries = [f"{QUERY} {i}" for i in range(32)]
    together = await asyncio.gather(*(rerank.apostprocess_nodes(nodes, query_str=query) for query in queries))
    for query, ranked in zip(queries, together, strict=True):
        serial = rerank.postprocess_nodes(nodes, query_str=query)
        assert ids(ranked) == ids(serial)
        assert [item.score for item in ranked] == pytest.approx([item.score for item in serial], abs=1e-6)


@pytest.mark.parametrize("mode", list(MetadataMode))
def test_the_scored_text_is_the_content_in_the_metadata_mode(mode: MetadataMode) -> None:
    backend = FakeBackend()
    nodes = found(
        {"one": "text"},
        metadata={"a": 1, "b": 2, "c": 3},
        excluded_embed_metadata_keys=["a"],
        excluded_llm_metadata_keys=["b"],
    )
    CrossEncoderRerank(model=backend, metadata_mode=mode).postprocess_nodes(nodes, query_str="q")
    assert backend.calls == [[("q", nodes[0].get_content(mode))]]


def test_the_embedders_text_is_scored_by_default() -> None:
    backend = FakeBackend()
    nodes = found({"one": "text"}, metadata={"a": 1, "b": 2}, excluded_embed_metadata_keys=["a"])
    CrossEncoderRerank(model=backend).postprocess_nodes(nodes, query_str="q")
    assert backend.calls == [[("q", "b: 2\n\ntext")]]


def test_node_text_decides_what_is_scored() -> None:
    backend = FakeBackend()
    nodes = found({"one": "text"}, metadata={"title": "Foxes"})
    CrossEncoderRerank(model=backend, node_text=shout).postprocess_nodes(nodes, query_str="q")
    assert backend.calls == [[("q", "Foxes")]]


def test_a_field_that_is_set_later_counts() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend())
    rerank.top_n = 1
    assert ids(rerank.postprocess_nodes(found(), query_str=FOX)) == ["fox"]


# -- what goes in and what comes out ------------------------------


def rich_nodes() -> list[NodeWithScore]:
    common = {"metadata": {"title": "t", "tags": ["x", {"y": 1}]}, "embedding": [0.25, 0.5]}
    related = RelatedNodeInfo(node_id="parent", metadata={"deep": [1]})
    relationships = {NodeRelationship.SOURCE: related, NodeRelationship.CHILD: [related]}
    plain = [
        TextNode(text="the red fox", id_="text", relationships=relationships, start_char_idx=3, **common),
        Document(text="red fox", id_="document", **common),
        ImageNode(text="red", id_="image", image_path="fox.png", **common),
        IndexNode(text="whale", id_="index", index_id="other", obj=threading.Lock(), **common),
    ]
    return [NodeWithScore(node=node, score=0.5) for node in copy_nodes(plain)]


def copy_nodes(nodes: Sequence[Any]) -> list[Any]:
    return [node.model_copy(update={"metadata": copy.deepcopy(node.metadata)}) for node in nodes]


def test_what_comes_out_keeps_id_type_metadata_relationships_hash_and_embedding() -> None:
    nodes = rich_nodes()
    ranked = CrossEncoderRerank(model=FakeBackend(), top_n=None).postprocess_nodes(nodes, query_str=FOX)
    given_by_id = {item.node_id: item.node for item in nodes}
    assert ids(ranked) == ["text", "document", "image", "index"]
    for item in ranked:
        given_node = given_by_id[item.node_id]
        assert item.node == given_node
        assert type(item.node) is type(given_node)
        assert item.node.hash == given_node.hash
        assert item.node.relationships == given_node.relationships
        assert item.node.embedding == [0.25, 0.5]
    assert ranked[-1].node.obj is nodes[-1].node.obj


def test_changing_what_comes_out_leaves_what_went_in() -> None:
    nodes = rich_nodes()
    before = [repr(item) for item in nodes]
    for item in CrossEncoderRerank(model=FakeBackend(), top_n=None).postprocess_nodes(nodes, query_str=FOX):
        item.score = -1.0
        item.metadata["title"] = "changed"
        item.metadata["tags"][1]["y"] = "changed"
        item.node.embedding.append(1.0)
        item.node.excluded_llm_metadata_keys.append("title")
        for relation in item.node.relationships.values():
            for info in relation if isinstance(relation, list) else [relation]:
                info.metadata["deep"].append(2)
        item.node.relationships.clear()
        if isinstance(item.node, Document):
            item.node.text_resource.text = "changed"
    assert [repr(item) for item in nodes] == before


def test_a_subclass_of_node_with_score_stays_one() -> None:
    class Labelled(NodeWithScore):
        label: str

    nodes = [Labelled(node=TextNode(text="a"), label="kept")]
    ranked = CrossEncoderRerank(model=FakeBackend()).postprocess_nodes(nodes, query_str="q")
    assert type(ranked[0]) is Labelled
    assert ranked[0].label == "kept"
    assert ranked[0] is not nodes[0]


def test_the_retrieval_score_is_kept_where_neither_llm_nor_embedder_sees_it() -> None:
    nodes = found(metadata={"title": "t"})
    ranked = CrossEncoderRerank(model=FakeBackend(), keep_retrieval_score=True).postprocess_nodes(nodes, query_str=FOX)
    assert ids(ranked) == ["fox", "den", "car"]
    assert [item.metadata["retrieval_score"] for item in ranked] == pytest.approx([0.8, 0.6, 0.7])
    by_id = {item.node_id: item for item in nodes}
    for item in ranked:
        for mode in (MetadataMode.LLM, MetadataMode.EMBED, MetadataMode.NONE):
            assert item.get_content(mode) == by_id[item.node_id].get_content(mode)
        assert item.node.get_content_blocks(MetadataMode.LLM) == by_id[item.node_id].node.get_content_blocks(
            MetadataMode.LLM
        )
    assert all(item.metadata == {"title": "t"} and not item.node.excluded_llm_metadata_keys for item in nodes)


def test_a_second_rerank_replaces_the_retrieval_score() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend(), keep_retrieval_score=True)
    once = rerank.postprocess_nodes(found(), query_str=FOX)
    twice = rerank.postprocess_nodes(once, query_str=FOX)
    assert [item.metadata["retrieval_score"] for item in twice] == [item.score for item in once]
    assert twice[0].node.excluded_llm_metadata_keys == ["retrieval_score"]


def test_a_retriever_without_scores_has_no_retrieval_score_to_keep() -> None:
    nodes = [NodeWithScore(node=TextNode(text="a"))]
    ranked = CrossEncoderRerank(model=FakeBackend(), keep_retrieval_score=True).postprocess_nodes(nodes, query_str="q")
    assert ranked[0].metadata == {"retrieval_score": None}


def test_the_retrieval_score_is_not_kept_unless_asked_for() -> None:
    assert CrossEncoderRerank(model=FakeBackend()).postprocess_nodes(found(), query_str=FOX)[0].metadata == {}


# -- errors ------------------------------


def test_a_missing_query_says_how_to_pass_it() -> None:
    with pytest.raises(InputError, match=r"postprocess_nodes\(nodes, query_str='...'\)"):
        CrossEncoderRerank(model=FakeBackend()).postprocess_nodes(found())


async def test_a_missing_query_says_so_in_async_too() -> None:
    with pytest.raises(InputError, match="needs the query"):
        await CrossEncoderRerank(model=FakeBackend()).apostprocess_nodes(found())


def test_a_blank_query_is_an_input_error() -> None:
    with pytest.raises(InputError, match="blank"):
        CrossEncoderRerank(model=FakeBackend()).postprocess_nodes(found(), query_str=" ")


def test_bare_nodes_are_an_input_error_that_says_how_to_wrap_them() -> None:
    with pytest.raises(InputError, match=r"number 1 is a TextNode.*NodeWithScore\(node=node\)"):
        CrossEncoderRerank(model=FakeBackend()).postprocess_nodes(
            [*found()[:1], TextNode(text="b")],  # type: ignore[list-item]
            query_str="q",
        )


def test_node_text_that_returns_no_text_is_an_input_error() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend(), node_text=lambda node: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="must be a str, got NoneType"):
        rerank.postprocess_nodes(found(), query_str="q")


@pytest.mark.parametrize(
    "keywords",
    [
        {"top_n": 0},
        {"top_n": -1},
        {"top_n": True},
        {"min_score": math.nan},
        {"scale": "percent"},
        {"backend": "abacus"},
        {"max_length": 0},
        {"model": 7},
        {"reranker": "a string"},
        {"reranker": Reranker(), "precision": "fp16"},
    ],
    ids=str,
)
def test_a_keyword_that_cannot_work_is_a_configuration_error(keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        CrossEncoderRerank(**keywords)


def test_an_unknown_keyword_is_refused() -> None:
    with pytest.raises(ValueError, match="topn"):
        CrossEncoderRerank(topn=3)  # type: ignore[call-arg]


def test_without_llama_index_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("rerank_plugins.llama_index")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llama_index.core", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rerank-plugins\[llama-index\]"'):
        import rerank_plugins.llama_index  # noqa: F401


# -- events ------------------------------


async def run_both_ways(rerank: CrossEncoderRerank, nodes: list[NodeWithScore], way: str) -> list[NodeWithScore]:
    if way == "sync":
        return rerank.postprocess_nodes(nodes, query_str=FOX)
    return await rerank.apostprocess_nodes(nodes, query_str=FOX)


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize(("top_n", "reported"), [(2, 2), (None, 5)])
async def test_both_kinds_of_events_tell_the_same(
    way: str, top_n: int | None, reported: int, events: list[Any]
) -> None:
    recorder, nodes = CallbackRecorder(), found()
    rerank = CrossEncoderRerank(
        reranker=Reranker(FakeBackend()), top_n=top_n, callback_manager=CallbackManager([recorder])
    )
    ranked = await run_both_ways(rerank, nodes, way)

    start, end = (event for event in events if isinstance(event, ReRankStartEvent | ReRankEndEvent))
    assert isinstance(start, ReRankStartEvent)
    assert start.query == QueryBundle(FOX)
    assert start.nodes == nodes
    assert start.top_n == reported
    assert start.model_name == "fake"
    assert isinstance(end, ReRankEndEvent)
    assert end.nodes == ranked
    assert start.span_id is not None
    assert start.span_id == end.span_id

    assert recorder.started == [
        (
            CBEventType.RERANKING,
            {
                EventPayload.NODES: nodes,
                EventPayload.MODEL_NAME: "fake",
                EventPayload.QUERY_STR: FOX,
                EventPayload.TOP_K: reported,
            },
        )
    ]
    assert recorder.ended == [(CBEventType.RERANKING, {EventPayload.NODES: ranked})]


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_empty_input_has_start_and_end_events(way: str, events: list[Any]) -> None:
    recorder = CallbackRecorder()
    rerank = CrossEncoderRerank(model=FakeBackend(), callback_manager=CallbackManager([recorder]))
    assert await run_both_ways(rerank, [], way) == []
    assert [type(event) for event in events] == [ReRankStartEvent, ReRankEndEvent]
    assert len(recorder.started) == 1
    assert recorder.ended == [(CBEventType.RERANKING, {EventPayload.NODES: []})]


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_an_error_closes_the_callback_event(way: str, events: list[Any]) -> None:
    recorder = CallbackRecorder()
    rerank = CrossEncoderRerank(
        model=FakeBackend(lambda query, text: math.nan), callback_manager=CallbackManager([recorder])
    )
    with pytest.raises(ScoringError) as caught:
        await run_both_ways(rerank, found(), way)
    assert recorder.ended == [(CBEventType.RERANKING, {EventPayload.EXCEPTION: caught.value})]
    assert not any(isinstance(event, ReRankEndEvent) for event in events)


# -- configuration, and nothing else ------------------------------

ROUND_TRIPS: dict[str, Callable[[CrossEncoderRerank], CrossEncoderRerank]] = {
    "to_dict": lambda rerank: CrossEncoderRerank.from_dict(rerank.to_dict()),
    "to_json": lambda rerank: CrossEncoderRerank.from_json(rerank.to_json()),
    "model_dump_json": lambda rerank: CrossEncoderRerank.from_json(rerank.model_dump_json()),
    "pickle": lambda rerank: pickle.loads(pickle.dumps(rerank)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("way", ROUND_TRIPS)
@pytest.mark.parametrize("shared", [False, True], ids=["keywords", "shared"])
def test_round_trips_carry_the_configuration_and_rank_alike(way: str, shared: bool) -> None:
    keywords = {"model": tiny("bert-nli"), "backend": "torch", "label": "entailment", "scale": "logit"}
    cuts = {"top_n": 4, "min_score": -50.0, "metadata_mode": MetadataMode.NONE, "keep_retrieval_score": True}
    if shared:
        rerank = CrossEncoderRerank(reranker=Reranker(**keywords), **cuts)  # type: ignore[arg-type]
    else:
        rerank = CrossEncoderRerank(**keywords, **cuts)  # type: ignore[arg-type]
    nodes = found({str(i): text for i, text in enumerate(TEXTS)})
    ranked = rerank.postprocess_nodes(nodes, query_str=QUERY)
    other = ROUND_TRIPS[way](rerank)
    assert type(other) is CrossEncoderRerank
    assert other.to_dict() == rerank.to_dict()
    assert other.to_dict().items() >= {**keywords, **cuts, "class_name": "CrossEncoderRerank"}.items()
    assert other.postprocess_nodes(nodes, query_str=QUERY) == ranked
    assert len(ranked) == 4


def test_a_pickle_holds_no_weights() -> None:
    rerank = CrossEncoderRerank(model=tiny("bert"), backend="torch")
    before = pickle.dumps(rerank)
    rerank.postprocess_nodes(found(), query_str=FOX)
    assert pickle.dumps(rerank) == before
    assert len(before) < 2000


def test_copies_load_nothing_before_they_rank(loads: list[Any]) -> None:
    rerank = CrossEncoderRerank(model="nobody/nothing")
    for round_trip in ROUND_TRIPS.values():
        assert round_trip(rerank).model == "nobody/nothing"
    assert loads == []


def test_a_directory_given_as_a_path_can_be_written_as_json(tmp_path: Path) -> None:
    assert json.loads(CrossEncoderRerank(model=tmp_path).to_json())["model"] == str(tmp_path)


def test_node_text_is_given_again_after_to_dict_and_survives_a_pickle() -> None:
    rerank = CrossEncoderRerank(model="nobody/nothing", node_text=shout)
    assert "node_text" not in rerank.to_dict()
    assert CrossEncoderRerank.from_dict(rerank.to_dict(), node_text=shout).node_text is shout
    assert pickle.loads(pickle.dumps(rerank)).node_text is shout


def test_a_ready_backend_survives_a_dict_and_a_pickle_but_json_says_why_not() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend(), top_n=2)
    for way in ("to_dict", "pickle", "deepcopy"):
        other = ROUND_TRIPS[way](rerank)
        assert ids(other.postprocess_nodes(found(), query_str=FOX)) == ["fox", "den"]
    with pytest.raises(ConfigurationError, match=r"None, a Hub id or a directory, .* got FakeBackend"):
        rerank.to_json()


def test_a_backend_that_cannot_be_pickled_is_never_swapped_for_another() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend(lambda query, text: 0.0))
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(rerank)


def test_it_has_a_json_schema_as_other_postprocessors_do() -> None:
    assert {"model", "top_n", "min_score", "class_name"} <= set(CrossEncoderRerank.model_json_schema()["properties"])


# -- the defects of other rerankers ------------------------------


def test_defect_2_a_nan_is_an_error_and_never_on_top() -> None:
    logits = dict(zip(PASSAGES.values(), [0.1, math.nan, 5.0, 1.0, 1.0], strict=True))
    with pytest.raises(ScoringError, match=r"nan.*the red fox jumps"):
        of(logits).postprocess_nodes(found(), query_str="q")


def test_defect_5_a_threshold_cuts_in_the_scale_of_the_reranker() -> None:
    logits = dict(zip(PASSAGES.values(), [-2.0, 2.0, 0.0, -0.1, 0.0], strict=True))
    for scale, min_score in (("probability", 0.5), ("logit", 0.0)):
        rerank = CrossEncoderRerank(
            model=FakeBackend(lambda query, text: logits[text]), top_n=None, scale=scale, min_score=min_score
        )
        assert ids(rerank.postprocess_nodes(found(), query_str="q")) == ["fox", "car"]
    rerank.min_score = 3.0
    assert rerank.postprocess_nodes(found(), query_str="q") == []


def test_defect_7_saturated_sigmoids_still_rank_by_logit() -> None:
    texts = {str(logit): f"text {logit}" for logit in (17, 20, 18, 40, 50)}
    rerank = of({text: float(name) for name, text in texts.items()})
    ranked = rerank.postprocess_nodes(found(texts), query_str="q")
    assert ids(ranked) == ["50", "40", "20", "18", "17"]
    assert ranked[2].score is not None
    assert ranked[2].score > ranked[3].get_score() > ranked[4].get_score()


def test_defect_8_scores_are_python_floats_that_json_takes() -> None:
    nodes = found()
    for item in nodes:
        item.score = np.float32(item.score)
    ranked = CrossEncoderRerank(model=FakeBackend(), keep_retrieval_score=True).postprocess_nodes(nodes, query_str=FOX)
    assert {type(item.score) for item in ranked} == {float}
    assert {type(item.metadata["retrieval_score"]) for item in ranked} == {float}
    assert json.loads(json.dumps([item.to_dict() for item in ranked]))[0]["score"] == ranked[0].score


def test_defect_9_nodes_are_not_mutated() -> None:
    nodes = found(metadata={"title": "t", "relevance_score": 9})
    before, held = [repr(item) for item in nodes], [item.node for item in nodes]
    ranked = CrossEncoderRerank(model=FakeBackend(), keep_retrieval_score=True).postprocess_nodes(nodes, query_str=FOX)
    assert [repr(item) for item in nodes] == before
    assert all(item.node is node for item, node in zip(nodes, held, strict=True))
    assert not {id(item) for item in ranked} & {id(item) for item in nodes}
    assert not {id(item.node) for item in ranked} & {id(item.node) for item in nodes}


def test_defect_9_the_retrieval_score_stays_out_of_the_prompt(faiss_index: VectorStoreIndex) -> None:
    engine = faiss_index.as_query_engine(
        node_postprocessors=[CrossEncoderRerank(model=FakeBackend(), keep_retrieval_score=True)],
        llm=MockLLM(),
    )
    response = engine.query(FOX)
    assert "retrieval_score" in response.source_nodes[0].metadata
    assert "source: fox.txt" in str(response)
    assert "retrieval_score" not in str(response)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(alphabet="ab \n", max_size=6), max_size=12), st.randoms(use_true_random=False))
def test_defect_11_every_node_gets_the_score_of_its_own_text(texts: list[str], random: Any) -> None:
    def logit(query: str, text: str) -> float:
        return float(zlib.crc32(text.encode()) % 7) - 3

    nodes = found({str(i): text for i, text in enumerate(texts)})
    random.shuffle(nodes)
    ranked = CrossEncoderRerank(model=FakeBackend(logit), top_n=None, scale="logit").postprocess_nodes(
        nodes, query_str="q"
    )
    assert sorted(ids(ranked)) == sorted(ids(nodes))
    for item in ranked:
        text = texts[int(item.node_id)]
        assert item.text == text
        if text.strip():
            assert item.score == logit("q", text)


def test_defect_12_remote_code_is_off_and_to_dict_says_what_is_true() -> None:
    assert CrossEncoderRerank(model="nobody/nothing").to_dict()["trust_remote_code"] is False
    on = CrossEncoderRerank(model="nobody/nothing", trust_remote_code=True)
    assert on.to_dict()["trust_remote_code"] is True
    assert CrossEncoderRerank.from_dict(on.to_dict())._own.config["trust_remote_code"] is True
    shared = CrossEncoderRerank(reranker=Reranker("nobody/nothing", trust_remote_code=True))
    assert shared.to_dict()["trust_remote_code"] is True


class RefusingExecutor(ThreadPoolExecutor):
    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        raise AssertionError("borrowed the event loop's default executor")


async def test_defect_13_async_neither_blocks_the_loop_nor_borrows_its_executor() -> None:
    scoring, released = threading.Event(), threading.Event()

    def logit(query: str, text: str) -> float:
        scoring.set()
        assert released.wait(10), "the event loop was blocked while the model scored"
        return 0.0

    asyncio.get_running_loop().set_default_executor(RefusingExecutor())
    task = asyncio.create_task(CrossEncoderRerank(model=FakeBackend(logit)).apostprocess_nodes(found(), query_str=FOX))
    while not scoring.is_set():
        await asyncio.sleep(0)
    released.set()
    assert len(await task) == 3


def test_defect_14_the_model_is_loaded_once(loads: list[Any]) -> None:
    keywords = {"model": tiny("bert"), "backend": "torch"}
    adapters = [CrossEncoderRerank(**keywords, top_n=n) for n in (1, 2)]
    assert loads == []
    for rerank in adapters * 2:
        rerank.postprocess_nodes(found(), query_str=FOX)
    assert len(loads) == 1


def test_defect_15_a_long_text_does_not_outrun_the_positions_of_the_model() -> None:
    nodes = found({"long": "the red fox jumps " * 2000, "short": "a red fox"})
    rerank = CrossEncoderRerank(model=tiny("roberta"), backend="torch")
    assert len(rerank.postprocess_nodes(nodes, query_str=FOX)) == 2


def test_defect_20_empty_input_is_empty_output_without_a_model(loads: list[Any]) -> None:
    assert CrossEncoderRerank(model="nobody/nothing").postprocess_nodes([], query_str="q") == []
    assert loads == []


@pytest.mark.parametrize("family", ["bert", "electra", "roberta"])
def test_the_order_is_that_of_llama_indexs_own_reranker(family: str) -> None:
    nodes = found({str(i): text for i, text in enumerate(TEXTS[:8])}, metadata={"title": "pandas"})
    theirs = SentenceTransformerRerank(model=tiny(family), top_n=8, device="cpu", trust_remote_code=False)
    ours = CrossEncoderRerank(model=tiny(family), backend="torch", top_n=8)
    expected = theirs.postprocess_nodes(copy.deepcopy(nodes), query_str=QUERY)
    ranked = ours.postprocess_nodes(nodes, query_str=QUERY)
    assert len({item.score for item in ranked}) == 8
    np.testing.assert_allclose(
        [item.score for item in ranked], [float(item.get_score()) for item in expected], atol=1e-4
    )
    assert ids(ranked) == ids(expected)


# -- in engines, over a real FAISS index ------------------------------


def order_in(text: str) -> list[str]:
    """Names of the passages in a prompt, in the order in which they stand there."""
    places = {name: text.find(f"source: {name}.txt") for name in PASSAGES}
    return sorted((name for name, place in places.items() if place >= 0), key=lambda name: places[name])


def test_a_query_engine_answers_from_the_reranked_nodes(faiss_index: VectorStoreIndex) -> None:
    first = ids(faiss_index.as_retriever(similarity_top_k=4).retrieve("red"))
    engine = faiss_index.as_query_engine(
        similarity_top_k=4,
        node_postprocessors=[CrossEncoderRerank(model=FakeBackend(), metadata_mode=MetadataMode.NONE, top_n=2)],
        llm=MockLLM(),
    )
    response = engine.query(FOX)
    assert len(first) == 4
    assert ids(response.source_nodes) == ["fox", "den"]
    assert order_in(str(response)) == ["fox", "den"]


async def test_a_query_engine_does_the_same_in_async(faiss_index: VectorStoreIndex) -> None:
    engine = RetrieverQueryEngine.from_args(
        faiss_index.as_retriever(similarity_top_k=4),
        node_postprocessors=[CrossEncoderRerank(model=FakeBackend(), metadata_mode=MetadataMode.NONE, top_n=3)],
        llm=MockLLM(),
    )
    response = await engine.aquery(FOX)
    assert results(response.source_nodes) == results(engine.query(FOX).source_nodes)
    assert ids(response.source_nodes) == ["fox", "den", "car"]
    assert order_in(str(response)) == ["fox", "den", "car"]


async def test_a_chat_engine_answers_from_the_reranked_nodes(faiss_index: VectorStoreIndex) -> None:
    engine = faiss_index.as_chat_engine(
        chat_mode="context",
        similarity_top_k=4,
        node_postprocessors=[CrossEncoderRerank(model=FakeBackend(), metadata_mode=MetadataMode.NONE, top_n=2)],
        llm=MockLLM(),
    )
    response = engine.chat(FOX)
    assert ids(response.source_nodes) == ["fox", "den"]
    assert order_in(str(response)) == ["fox", "den"]
    engine.reset()
    assert results((await engine.achat(FOX)).source_nodes) == results(response.source_nodes)


def test_an_event_of_the_rerank_is_part_of_the_query(faiss_index: VectorStoreIndex, events: list[Any]) -> None:
    engine = faiss_index.as_query_engine(node_postprocessors=[CrossEncoderRerank(model=FakeBackend())], llm=MockLLM())
    engine.query(FOX)
    names = [type(event).__name__ for event in events]
    assert names.index("RetrievalEndEvent") < names.index("ReRankStartEvent") < names.index("ReRankEndEvent")
    assert names.index("ReRankEndEvent") < names.index("SynthesizeStartEvent")


# -- the tool ------------------------------


def test_the_tool_lists_ranked_passages_with_score_and_source() -> None:
    retriever = Fixed(found(metadata={"source": "a\nb.txt"}, excluded_embed_metadata_keys=["source"]))
    tool = create_rerank_tool(retriever, reranker=Reranker(FakeBackend()), top_n=2)
    output = tool.call(query=FOX)
    assert retriever.queries == [FOX]
    assert output.content.split("\n\n") == [
        "[1] relevance score 0.951, source: a b.txt\nsource: a\nb.txt",
        "the red fox jumps",
        "[2] relevance score 0.947, source: a b.txt\nsource: a\nb.txt",
        PASSAGES["den"],
    ]
    assert ids(output.raw_output) == ["fox", "den"]
    assert output.raw_output[0].score == pytest.approx(0.951, abs=5e-4)
    assert output.tool_name == "search_documents"
    assert not output.is_error


async def test_the_tool_gives_the_same_in_async_without_the_loops_executor() -> None:
    class Async(Fixed):
        async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            return self._retrieve(query_bundle)

    tool = create_rerank_tool(Async(found()), model=FakeBackend(), top_n=4)
    expected = tool.call(query=FOX)
    asyncio.get_running_loop().set_default_executor(RefusingExecutor())
    output = await tool.acall(query=FOX)
    assert output.content == expected.content
    assert results(output.raw_output) == results(expected.raw_output)


@pytest.mark.parametrize(
    ("nodes", "min_score"), [([], None), (found(), 0.99)], ids=["nothing retrieved", "nothing good enough"]
)
async def test_a_tool_that_finds_nothing_says_so(nodes: list[NodeWithScore], min_score: float | None) -> None:
    tool = create_rerank_tool(Fixed(nodes), model=FakeBackend(), min_score=min_score)
    for output in (tool.call(query=FOX), await tool.acall(query=FOX)):
        assert output.content == "No relevant passages were found. Try another query."
        assert output.raw_output == []


def test_the_source_is_one_that_the_llm_may_see() -> None:
    node = TextNode(text="red", id_="n", metadata={"source": "secret.txt"}, excluded_llm_metadata_keys=["source"])
    tool = create_rerank_tool(Fixed([NodeWithScore(node=node)]), model=FakeBackend(), keep_retrieval_score=True)
    assert tool.call(query="red").content == "[1] relevance score 0.725, source: n\nred"
    node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id="handbook")
    assert "source: handbook\n" in tool.call(query="red").content


def test_the_tool_tells_the_language_model_its_one_argument() -> None:
    tool = create_rerank_tool(Fixed([]), name="handbook", description="The handbook.", model=FakeBackend())
    function = tool.metadata.to_openai_tool()["function"]
    assert function["name"] == "handbook"
    assert function["description"] == "The handbook."
    assert list(function["parameters"]["properties"]) == ["query"]
    assert function["parameters"]["properties"]["query"]["type"] == "string"
    assert function["parameters"]["required"] == ["query"]


def test_a_tool_with_a_keyword_that_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError):
        create_rerank_tool(Fixed([]), top_n=0)
    with pytest.raises(ConfigurationError):
        create_rerank_tool(Fixed([]), reranker=Reranker(), scale="logit")


async def tool_results(agent: FunctionAgent | ReActAgent) -> tuple[list[ToolCallResult], str]:
    handler = agent.run(user_msg="What does the red fox do?")
    seen = [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    return seen, str(await handler)


async def test_a_function_agent_calls_the_tool_and_reads_the_passages(faiss_index: VectorStoreIndex) -> None:
    prompts: list[Sequence[ChatMessage]] = []

    def reply(messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
        prompts.append(list(messages))
        if len(prompts) > 1:
            return ChatMessage(role="assistant", content="It jumps.")
        call = ToolCallBlock(tool_call_id="1", tool_name="search_documents", tool_kwargs={"query": FOX})
        return ChatMessage(role="assistant", blocks=[call])

    tool = create_rerank_tool(faiss_index.as_retriever(similarity_top_k=4), model=FakeBackend(), top_n=2)
    llm = MockFunctionCallingLLM(response_generator=reply, is_chat_model=True)
    calls, answer = await tool_results(FunctionAgent(tools=[tool], llm=llm, streaming=False))
    assert answer == "It jumps."
    assert [call.tool_kwargs for call in calls] == [{"query": FOX}]
    assert ids(calls[0].tool_output.raw_output) == ["fox", "den"]
    assert prompts[1][-1].role == "tool"
    assert order_in(str(prompts[1][-1].content)) == ["fox", "den"]


class ReactScript(MockLLM):
    """Asks for the tool first, and answers once it has seen an observation."""

    def _script(self, prompt: str) -> str:
        if "Observation: [1] relevance score" in prompt:
            return "Thought: I can answer without using any more tools.\nAnswer: It jumps."
        return f'Thought: I need to look.\nAction: search_documents\nAction Input: {{"query": "{FOX}"}}'

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return super().complete(self._script(prompt), formatted, **kwargs)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return super().stream_complete(self._script(prompt), formatted, **kwargs)


async def test_a_react_agent_calls_the_tool_and_reads_the_passages(faiss_index: VectorStoreIndex) -> None:
    tool = create_rerank_tool(faiss_index.as_retriever(similarity_top_k=4), model=FakeBackend(), top_n=2)
    calls, answer = await tool_results(ReActAgent(tools=[tool], llm=ReactScript(), streaming=False))
    assert answer == "It jumps."
    assert len(calls) == 1
    assert calls[0].tool_output.content.startswith("[1] relevance score 0.9")


# -- the example and the bundled model ------------------------------

EXAMPLE = Path(__file__).parents[1] / "examples" / "llama_index_faiss.py"


def test_the_example_runs_with_a_model_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))["main"](["how do I undo a commit", "--model", tiny("bert")])
    first, reranked = capsys.readouterr().out.split("Reranked:\n")
    assert first.startswith("how do I undo a commit\n\nFAISS:\n  1  0.")
    assert len(reranked.splitlines()) == 3


@pytest.mark.bundled
def test_the_bundled_model_reranks_nodes() -> None:
    nodes = found({"add": "git add stages files", "revert": "git revert undoes a commit"})
    ranked = CrossEncoderRerank(top_n=1).postprocess_nodes(nodes, query_str="how do I undo a commit")
    assert ids(ranked) == ["revert"]
    assert type(ranked[0].score) is float
