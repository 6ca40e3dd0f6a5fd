"""Spans and compression in LangChain, LlamaIndex and `serve`: the caller's objects, shortened, at their places."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from llama_index.core.schema import ImageNode, MetadataMode, Node, NodeWithScore, QueryBundle, TextNode

from rerank_plugins import ConfigurationError, Reranker, ServerError
from rerank_plugins import langchain as lc
from rerank_plugins import llama_index as li
from rerank_plugins.testing import FakeBackend

TEXT = "  A whale swims in the sea. The red fox runs. It rains a lot in the autumn. A fox is an animal of the wood. \n"
FOX, SECOND = TEXT.index("The red"), TEXT.index("A fox")
QUERY = "red fox"


def rerank(module: Any, **keywords: Any) -> Any:
    return module.CrossEncoderRerank(model=FakeBackend(), **{"scale": "logit", **keywords})


def places(spans: list[tuple[int, int, float]]) -> list[tuple[int, int]]:
    return [(start, end) for start, end, _ in spans]


# -- LangChain ----------------------------------------------------------------------------------------------------


def test_documents_tell_their_spans_and_stay_whole() -> None:
    documents = [Document(TEXT, id="a", metadata={"title": "red", "relevant_spans": "old"}), Document("", id="b")]
    before = copy.deepcopy(documents)
    for metadata_fields in (None, ["title"]):
        compressor = rerank(lc, spans="sentences", metadata_fields=metadata_fields)
        best, blank = compressor.compress_documents(documents, QUERY)
        assert documents == before
        assert best.page_content == TEXT
        spans = best.metadata["relevant_spans"]
        assert places(spans)[0] == (FOX, FOX + len("The red fox runs."))
        assert [score for _, _, score in spans] == sorted((score for _, _, score in spans), reverse=True)
        assert len(spans) == 4
        assert json.loads(json.dumps(spans)) == [list(span) for span in spans]
        assert "relevant_spans" not in blank.metadata
    assert "relevant_spans" not in rerank(lc).compress_documents(documents, QUERY)[0].metadata


def test_compressed_documents_keep_their_place_in_the_source() -> None:
    document = Document(TEXT, id="a", metadata={"start_index": 100, "source": "s"})
    (shorter,) = rerank(lc, compress=0.6).compress_documents([document], QUERY)
    assert shorter.page_content == "The red fox runs. ... A fox is an animal of the wood."
    assert (shorter.id, shorter.metadata["source"]) == ("a", "s")
    assert shorter.metadata["start_index"] == 100 + FOX
    assert sorted(places(shorter.metadata["relevant_spans"])) == [(FOX, FOX + 17), (SECOND, SECOND + 31)]
    for unknown in (None, -1, "7", True):
        (other,) = rerank(lc, compress=0.6).compress_documents(
            [Document(TEXT, metadata={"start_index": unknown})], QUERY
        )
        assert other.metadata["start_index"] is unknown
    (alone,) = rerank(lc, compress=0.6).compress_documents([Document(TEXT)], QUERY)
    assert "start_index" not in alone.metadata
    assert document == Document(TEXT, id="a", metadata={"start_index": 100, "source": "s"})


def test_a_text_made_for_scoring_is_found_again_in_the_page_content() -> None:
    document = Document(TEXT, metadata={"title": "animals"})
    keywords = {
        "compress": 0.6,
        "document_text": lambda document: f"A red fox. {document.page_content.strip()} The end.",
    }
    (shorter,) = rerank(lc, **keywords).compress_documents([document], QUERY)
    assert shorter.page_content == "The red fox runs. ... A fox is an animal of the wood."
    keywords["document_text"] = lambda document: "The red fox. Something else."
    (whole,) = rerank(lc, **keywords).compress_documents([document], QUERY)
    assert whole.page_content == TEXT
    assert "relevant_spans" not in whole.metadata


class Traces(BaseCallbackHandler):
    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
        self.inputs.append(inputs)

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.outputs.append(outputs)


async def test_retriever_compresses_by_setting_and_by_call_and_says_so_in_the_trace() -> None:
    found = [Document(TEXT), Document("Nothing. At all. Nowhere.")]
    retriever = lc.RerankRetriever(retriever=RunnableLambda(lambda query: found), model=FakeBackend(), scale="logit")
    traces = Traces()
    assert retriever.invoke(QUERY)[0].page_content == TEXT
    shorter = retriever.invoke(QUERY, {"callbacks": [traces]}, compress=0.4)
    assert [document.page_content for document in shorter] == ["The red fox runs. ... A fox is an animal of the wood."]
    assert await retriever.ainvoke(QUERY, compress=0.4) == shorter
    assert [inputs["compress"] for inputs in traces.inputs if "n_documents" in inputs] == [0.4]
    assert [outputs["documents"] for outputs in traces.outputs if "details" in outputs] == [shorter]
    with pytest.raises(ConfigurationError, match="compress must be"):
        retriever.invoke(QUERY, compress="yes")
    plain = Traces()
    retriever.invoke(QUERY, {"callbacks": [plain]})
    assert all("compress" not in inputs for inputs in plain.inputs)


def test_tools_show_what_is_left() -> None:
    tool = lc.create_rerank_tool(RunnableLambda(lambda query: [Document(TEXT)]), model=FakeBackend(), compress=True)
    assert tool.invoke({"query": QUERY}).endswith("\nThe red fox runs.")


# -- LlamaIndex ---------------------------------------------------------------------------------------------------


def node(cls: Any = TextNode, **keywords: Any) -> NodeWithScore:
    return NodeWithScore(node=cls(text=TEXT, id_="a", metadata={"title": "red"}, **keywords), score=0.3)


def test_nodes_tell_their_spans_hidden_from_llm_and_embedder() -> None:
    given = node()
    before, digest = copy.deepcopy(given), given.node.hash
    (best,) = rerank(li, spans="sentences").postprocess_nodes([given], query_str=QUERY)
    assert (given, given.node.hash) == (before, digest)
    assert best.node.get_content(MetadataMode.NONE) == TEXT
    assert places(best.node.metadata["relevant_spans"])[0] == (FOX, FOX + 17)
    assert best.node.node_id == "a"
    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        assert best.node.get_content(mode) == given.node.get_content(mode)
    (again,) = rerank(li).postprocess_nodes([best], query_str=QUERY)
    assert "relevant_spans" not in again.node.metadata
    assert again.score == rerank(li).postprocess_nodes([given], query_str=QUERY)[0].score


def test_compressed_nodes_keep_their_place_in_the_source() -> None:
    given = node(start_char_idx=100, end_char_idx=100 + len(TEXT))
    before = copy.deepcopy(given)
    (shorter,) = rerank(li, compress=0.6).postprocess_nodes([given], query_str=QUERY)
    assert given == before
    assert shorter.node.get_content(MetadataMode.NONE) == "The red fox runs. ... A fox is an animal of the wood."
    assert (shorter.node.start_char_idx, shorter.node.end_char_idx) == (100 + FOX, 100 + SECOND + 31)
    assert shorter.node.get_content(MetadataMode.LLM).startswith("title: red\n\nThe red fox runs.")
    (alone,) = rerank(li, compress=0.6).postprocess_nodes([node()], query_str=QUERY)
    assert (alone.node.start_char_idx, alone.node.end_char_idx) == (None, None)


async def test_any_kind_of_node_and_template() -> None:
    for cls in (TextNode, Node, ImageNode):
        keywords = {"text_resource": {"text": TEXT}} if cls is Node else {"text": TEXT}
        given = NodeWithScore(node=cls(**keywords, id_="x"), score=None)
        (shorter,) = await rerank(li, compress=0.6).apostprocess_nodes([given], QueryBundle(QUERY))
        assert type(shorter.node) is cls
        assert shorter.node.get_content(MetadataMode.NONE) == "The red fox runs. ... A fox is an animal of the wood."
        assert given.node.get_content(MetadataMode.NONE) == TEXT
    behind = node(text_template="{content}\n\n{metadata_str}")
    (shorter,) = rerank(li, compress=0.6).postprocess_nodes([behind], query_str=QUERY)
    assert shorter.node.get_content(MetadataMode.NONE) == "The red fox runs. ... A fox is an animal of the wood."


def test_settings_are_carried_in_both_frameworks() -> None:
    keywords = {"spans": "sentences", "compress": 0.3, "max_tokens": 100}
    for module in (lc, li):
        adapter = module.CrossEncoderRerank(**keywords)
        again = pickle.loads(pickle.dumps(adapter))
        assert {name: getattr(again, name) for name in keywords} == keywords
        assert again._own.settings.spans == "sentences"
        for bad in (0, "all", None, 2):
            with pytest.raises(ConfigurationError, match="compress must be"):
                module.CrossEncoderRerank(compress=bad)
    data = li.CrossEncoderRerank(**keywords).to_dict()
    assert {name: data[name] for name in keywords} == keywords
    assert li.CrossEncoderRerank.from_dict(data).compress == 0.3


def test_both_frameworks_keep_the_same_with_a_shared_reranker_and_a_budget() -> None:
    class Words(FakeBackend):
        def token_offsets(self, texts: Any) -> Any:
            return [[(0, 0)] * len(text.split()) for text in texts]

    texts = [TEXT, "Nothing. At all.", "Another red fox is here. And a blue one."]
    shared = Reranker(Words())
    keywords: dict[str, Any] = {"reranker": shared, "compress": 1.0, "max_tokens": 18, "top_n": None}
    expected = [item.excerpt for item in shared.rank(QUERY, texts, compress=1.0, max_tokens=18)]
    assert expected == ["Another red fox is here.", "The red fox runs. ... A fox is an animal of the wood."]
    documents = lc.CrossEncoderRerank(**keywords).compress_documents([Document(text) for text in texts], QUERY)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    kept = li.CrossEncoderRerank(**keywords).postprocess_nodes(nodes, query_str=QUERY)
    assert [document.page_content for document in documents] == [item.text for item in kept] == expected


def test_what_was_not_scored_stays_whole_in_both_frameworks() -> None:
    def down(query: str, text: str) -> float:
        raise ServerError("down", url="http://localhost:1", status=None)

    keywords: dict[str, Any] = {"model": FakeBackend(down), "on_error": "keep_order", "compress": True}
    (document,) = lc.CrossEncoderRerank(**keywords).compress_documents([Document(TEXT)], QUERY)
    assert document.page_content == TEXT
    assert "rerank_fallback" in document.metadata
    assert "relevant_spans" not in document.metadata
    (kept,) = li.CrossEncoderRerank(**keywords).postprocess_nodes([node()], query_str=QUERY)
    assert kept.text == TEXT
    assert "relevant_spans" not in kept.node.metadata


# -- serve --------------------------------------------------------------------------------------------------------


def test_serve_tells_spans_as_cohere_does() -> None:
    pytest.importorskip("starlette")
    from serving import post, serving

    body = {"model": "m", "query": QUERY, "documents": [TEXT, "Nothing. At all.", {"text": TEXT}]}
    with serving() as server:
        plain = post(server, "/v2/rerank", body).json()["results"]
        assert all("relevant_spans" not in row for row in plain)
        enabled = {"mode": "enabled", "threshold": 0.0}
        told = post(server, "/v2/rerank", {**body, "relevant_spans": enabled}).json()["results"]
        assert [(row["index"], row["relevance_score"]) for row in told] == [
            (row["index"], row["relevance_score"]) for row in plain
        ]
        assert [len(row["relevant_spans"]) for row in told] == [4, 4, 2]
        first = told[0]["relevant_spans"][0]
        assert first.keys() == {"start", "end", "score"}
        assert (first["start"], first["end"]) == (FOX, FOX + 17)
        assert 0 < first["score"] < 1
        few = {"mode": "enabled", "threshold": 0.6, "max_spans": 1}
        told = post(server, "/v2/rerank", {**body, "relevant_spans": few}).json()["results"]
        assert [len(row["relevant_spans"]) for row in told] == [1, 1, 0]
        usual = {**body, "top_n": 1, "relevant_spans": {"mode": "enabled"}}
        told = post(server, "/v2/rerank", usual).json()["results"]
        assert [len(row["relevant_spans"]) for row in told] == [4]
        for off in (None, {"mode": "disabled"}):
            assert post(server, "/v2/rerank", {**body, "relevant_spans": off}).json()["results"] == plain
        enabled_with = [{"threshold": 2}, {"threshold": "x"}, {"max_spans": 0}, {"max_spans": "x"}]
        for bad in (True, [], {}, {"mode": "on"}, *({"mode": "enabled", **wrong} for wrong in enabled_with)):
            refused = post(server, "/v2/rerank", {**body, "relevant_spans": bad})
            assert refused.status_code == 400
            assert "relevant_spans" in refused.json()["message"] or "max_spans" in refused.json()["message"]
        assert (
            "relevant_spans" not in post(server, "/v1/rerank", {**body, "relevant_spans": enabled}).json()["results"][0]
        )
