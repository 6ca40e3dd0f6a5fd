"""What both frameworks' adapters share: reading metadata, copying it, keywords of other rerankers, copies' state."""

from __future__ import annotations

import datetime
import decimal
import gc
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pandas as pd
import pytest
from checkpoints import tiny
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda
from llama_index.core.schema import MediaResource, NodeWithScore, TextNode

from rerank_plugins import Candidate, Reranker
from rerank_plugins._adapters import copied, number, value_text
from rerank_plugins._agent_texts import heading
from rerank_plugins.backends import load as loading
from rerank_plugins.errors import ConfigurationError, InputError, QueryError
from rerank_plugins.langchain import CrossEncoderRerank, CrossEncoderScorer, RerankRetriever, create_rerank_tool
from rerank_plugins.llama_index import CrossEncoderRerank as NodeRerank
from rerank_plugins.llama_index import create_rerank_tool as create_node_tool
from rerank_plugins.testing import FakeBackend

MISSING = [
    None,
    float("nan"),
    np.nan,
    np.float32("nan"),
    decimal.Decimal("nan"),
    pd.NA,
    pd.NaT,
    np.datetime64("NaT"),
    "",
    " \t",
    "\u200b",
    [],
    (),
    set(),
    {},
    np.array([]),
    pd.Series([], dtype=object),
    [None, float("nan"), [], [""], {"a": None}],
    b"",
    b"\xff\xfe\x00",
]


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_what_is_missing_has_no_text(value: Any) -> None:
    assert value_text(value) == ""
    backend = FakeBackend()
    document = Document("text", metadata={"title": value, "page": 0})
    CrossEncoderRerank(model=backend, metadata_fields=["title", "page"]).compress_documents([document], "q")
    NodeRerank(model=backend).postprocess_nodes(
        [NodeWithScore(node=TextNode(text="text", metadata={"title": value, "page": 0}))], query_str="q"
    )
    assert backend.calls == [[("q", "0\ntext")], [("q", "page: 0\n\ntext")]]
    tool = create_rerank_tool(RunnableLambda(lambda query: [document]), model=FakeBackend(lambda query, text: 0.0))
    assert tool.invoke({"query": "q"}) == "[1] relevance score 0.500, page: 0\ntext"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("nan", "nan"),
        (0, "0"),
        (False, "False"),
        (1.5, "1.5"),
        (np.float64(1.5), "1.5"),
        (["git", "vcs"], "git, vcs"),
        (("git", None, 3), "git, 3"),
        ({"c", "a", "b"}, "a, b, c"),
        (frozenset({2, 1}), "1, 2"),
        ({"author": "Ann", "years": [2001, 2002], "none": None}, "author: Ann, years: 2001, years: 2002"),
        (np.array([[1, 2], [3, 4]]), "1, 2, 3, 4"),
        (pd.Series(["x", None, "y"]), "x, y"),
        (b"caf\xc3\xa9", "café"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (pd.Timestamp("2026-01-02"), "2026-01-02 00:00:00"),
    ],
)
def test_values_as_text(value: Any, text: str) -> None:
    assert value_text(value) == text


def nested(levels: int) -> list[Any]:
    outer: list[Any] = ["inside"]
    for _ in range(levels):
        outer = [outer]
    return outer


def test_cycles_and_deep_values_are_read_once() -> None:
    loop: dict[str, Any] = {"a": 1}
    loop["self"] = loop
    assert value_text(loop) == "a: 1"
    assert value_text(nested(5000)) == "inside"
    # Doubling at each level, it has 2**40 leaves.
    many: list[Any] = ["x"]
    for _ in range(40):
        many = [many, many]
    assert value_text(many) == "x"


def test_copies_are_new_at_every_depth_and_keep_types_and_cycles() -> None:
    class Unique:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    one, resource = Unique(), MediaResource(text="t")
    value: dict[str, Any] = {
        "list": [1, {"deep": [2]}],
        "tuple": ([3],),
        "set": {4},
        "ordered": OrderedDict(a=[5]),
        "default": defaultdict(list, a=[6]),
        "object": one,
        "resource": resource,
    }
    value["self"] = value
    new = copied(value, (MediaResource,))
    assert new["self"] is new
    assert new["object"] is one
    assert new["resource"] == resource
    assert new["resource"] is not resource
    assert (type(new["ordered"]), type(new["default"])) == (OrderedDict, defaultdict)
    new["list"][1]["deep"].append(0)
    new["tuple"][0].append(0)
    new["set"].add(0)
    new["ordered"]["a"].append(0)
    new["default"]["a"].append(0)
    assert (value["list"], value["tuple"], value["set"]) == ([1, {"deep": [2]}], ([3],), {4})
    assert (value["ordered"]["a"], value["default"]["a"]) == ([5], [6])


@pytest.mark.parametrize("framework", ["langchain", "llama_index"])
def test_metadata_with_a_cycle_or_3000_levels_is_ranked_copied_and_shown(framework: str) -> None:
    deep, loop = nested(3000), [1]
    loop.append(loop)  # type: ignore[arg-type]
    metadata = {"deep": deep, "loop": loop, "title": "T"}
    made: Any
    if framework == "langchain":
        documents = [Document.model_construct(page_content="text", metadata=metadata)]
        rerank = CrossEncoderRerank(model=FakeBackend(), metadata_fields=["deep", "loop"])
        (made,) = rerank.compress_documents(documents, "q")
        tool: Any = create_rerank_tool(RunnableLambda(lambda query: documents), model=FakeBackend())
        assert "title: T" in tool.invoke({"query": "q"})
    else:
        nodes = [NodeWithScore(node=TextNode(text="text", metadata=metadata))]
        (made,) = NodeRerank(model=FakeBackend()).postprocess_nodes(nodes, query_str="q")
        from test_llama_index import Fixed

        output = create_node_tool(Fixed(nodes), model=FakeBackend()).call(query="q")
        assert "title: T" in output.content
    assert made.metadata["deep"] is not deep
    assert made.metadata["loop"][1] is made.metadata["loop"]
    assert loop[1] is loop
    made.metadata["loop"].append(2)
    assert len(loop) == 2


def test_a_heading_names_what_there_is_once() -> None:
    metadata = {"title": "A\nB", "file_name": "a.txt", "page_label": "iv", "url": "a.txt", "source": pd.NA}
    assert heading(2, 0.5, metadata) == "[2] relevance score 0.500, title: A B, source: a.txt, page: iv"
    assert heading(1, 0.5, {}, "doc-1") == "[1] relevance score 0.500, source: doc-1"


def test_numbers_are_finite_and_no_flags() -> None:
    assert number(None, True, "0.5", float("nan"), float("inf"), np.float32(0.5)) == 0.5
    assert number(pd.NA) is None


# -- keywords ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "counterpart"),
    [
        ("score_threshold", "min_score"),
        ("similarity_cutoff", "min_score"),
        ("top_k", "top_n"),
        ("model_name_or_path", "model"),
        ("cohere_api_key", "the model runs here"),
        ("api_key", "the model runs here"),
        ("choice_batch_size", "batches are made by token length"),
        ("llm", "a cross-encoder scores"),
        ("max_tokens_per_doc", "passage_length"),
        ("use_fp16", "precision"),
        ("instrution", "instruction"),
        ("topn", "top_n"),
        ("nonsense", "nothing like it"),
    ],
)
def test_keywords_of_other_rerankers_are_told_their_counterpart(keyword: str, counterpart: str) -> None:
    for adapter in (CrossEncoderRerank, NodeRerank):
        with pytest.raises(ConfigurationError, match=rf"{keyword} -> .*{counterpart}"):
            adapter(**{keyword: "x"})


def test_the_first_stages_score_has_another_name_in_langchain() -> None:
    with pytest.raises(ConfigurationError, match="keep_retrieval_score -> add_details"):
        CrossEncoderRerank(keep_retrieval_score=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("model", "ours"),
    [
        ("ms-marco-MiniLM-L-12-v2", "cross-encoder/ms-marco-MiniLM-L12-v2"),
        ("ms-marco-MultiBERT-L-12", "BAAI/bge-reranker-v2-m3"),
        ("rerank-v3.5", "its maker's API alone"),
        ("rerank-english-v3.0", "its maker's API alone"),
        ("jina-reranker-v2-base-multilingual", "BAAI/bge-reranker-v2-m3"),
    ],
)
def test_models_that_only_another_library_has_are_told_ours(model: str, ours: str) -> None:
    for adapter in (CrossEncoderRerank, NodeRerank):
        with pytest.raises(ConfigurationError, match=ours):
            adapter(model=model)


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_length": "128"},
        {"trust_remote_code": "false"},
        {"passage_length": 100.5},
        {"truncate_query": 1},
        {"threads": "2"},
        {"instruction": 5},
        {"revision": 5},
        {"cache": True},
    ],
    ids=str,
)
def test_the_adapters_refuse_what_the_core_refuses_with_its_words(keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as core:
        Reranker("some/model", **keywords)
    for adapter in (CrossEncoderRerank, NodeRerank, CrossEncoderScorer):
        with pytest.raises(ConfigurationError) as theirs:
            adapter(model="some/model", **keywords)
        assert str(theirs.value) == str(core.value)


@pytest.mark.parametrize(
    ("adapter", "keywords"),
    [
        (CrossEncoderRerank, {"add_details": "false"}),
        (CrossEncoderRerank, {"max_tokens": "100"}),
        (CrossEncoderRerank, {"metadata_fields": "title"}),
        (NodeRerank, {"keep_retrieval_score": "false"}),
        (NodeRerank, {"score_file_paths": 0}),
        (NodeRerank, {"metadata_mode": "everything"}),
        (RerankRetriever, {"retriever": 42}),
        (RerankRetriever, {}),
    ],
)
def test_the_adapters_own_keywords_are_checked_and_named(adapter: Any, keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(keywords), "retriever")):
        adapter(**keywords)


# -- state of copies ---------------------------------------------------------------------------------------------


class Few(BaseRetriever):
    def _get_relevant_documents(self, query: str, **kwargs: Any) -> list[Document]:
        return [Document(text) for text in ("git add stages", "git revert undoes a commit", "bread")]


@pytest.mark.parametrize("shared", [False, True])
def test_a_cache_given_by_number_is_one_for_all_copies_that_langchain_makes(shared: bool) -> None:
    backend = FakeBackend()
    keywords = {"reranker": Reranker(backend, cache=1000)} if shared else {"model": backend, "cache": 1000}
    retriever = RerankRetriever(retriever=Few(), **keywords).configurable_fields(
        top_n=ConfigurableField(id="top_n"), scale=ConfigurableField(id="scale")
    )
    for settings in ({"top_n": 1}, {"top_n": 2}, {"scale": "logit"}, {"top_n": 1, "scale": "logit"}, {}):
        found = retriever.invoke("undo a commit", {"configurable": settings})
        assert found[0].page_content == "git revert undoes a commit"
        assert (found[0].metadata["relevance_score"] > 1) == ("scale" in settings)
    assert len(backend.calls) == 1


def test_copies_keep_what_they_have_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    # Agents of other tests are cycles, which hold their models until then.
    gc.collect()
    loaded: list[Any] = []
    load = loading._load
    monkeypatch.setattr(loading, "_load", lambda settings: loaded.append(settings) or load(settings))
    retriever = RerankRetriever(retriever=Few(), model=tiny("bert"), backend="torch").configurable_fields(
        top_n=ConfigurableField(id="top_n"), max_length=ConfigurableField(id="length")
    )
    for settings in ({"top_n": 1}, {"top_n": 2}, {"length": 16}, {"length": 32}):
        retriever.invoke("undo a commit", {"configurable": settings})
    assert len(loaded) == 1


def test_changed_fields_and_copies_keep_the_cache() -> None:
    backend = FakeBackend()
    rerank = CrossEncoderRerank(model=backend, cache=1000)
    documents = [Document("a"), Document("b")]
    rerank.compress_documents(documents, "q")
    rerank.scale = "logit"
    rerank.compress_documents(documents, "q")
    rerank.model_copy(update={"top_n": 1}).compress_documents(documents, "q")
    rerank.model_copy(update={"scale": "probability"}).compress_documents(documents, "q")
    rerank.model_copy(deep=True).compress_documents(documents, "q")
    assert len(backend.calls) == 1
    other = CrossEncoderRerank(model=backend, cache=1000)
    other.compress_documents(documents, "q")
    assert len(backend.calls) == 2


# -- headers -----------------------------------------------------------------------------------------------------


def test_every_window_begins_with_the_header_and_has_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = Reranker(tiny("bert"), backend="torch", passage_length=12, passage_overlap=3, cache=100)
    seen: list[tuple[str, str]] = []
    backend = reranker._loaded()
    logits = backend.logits
    monkeypatch.setattr(backend, "logits", lambda pairs: seen.extend(pairs) or logits(pairs))
    text = " ".join(f"git revert undoes commit {i}" for i in range(20))
    candidate = Candidate(text, header="the title\n")
    (item,) = reranker.rank("undo a commit", [candidate])
    assert len(seen) > 8
    assert all(window.startswith("the title\n") for _, window in seen)
    lengths = [len(offsets) for offsets in backend.token_offsets([window for _, window in seen])]
    assert max(lengths) <= 12
    assert all(str(i) in " ".join(window for _, window in seen).split() for i in range(20))
    assert item.candidate is candidate
    assert item.text == text
    assert not item.truncated

    scores = {
        window: float(Reranker(tiny("bert"), backend="torch").logits("undo a commit", [window])[0])
        for _, window in seen
    }
    assert item.logit == pytest.approx(max(scores.values()), abs=1e-5)
    before = len(seen)
    assert reranker.rank("undo a commit", [candidate])[0].logit == item.logit
    assert len(seen) == before
    # The same characters without a header are other windows, and no hit of the cache.
    reranker.rank("undo a commit", ["the title\n" + text])
    assert len(seen) > before


def test_a_long_header_is_cut_to_half_a_window_and_the_cut_is_visible() -> None:
    reranker = Reranker(tiny("bert"), backend="torch", passage_length=10)
    long = Candidate("git revert undoes a commit " * 10, header="a very long title " * 20 + "\n")
    short = Candidate("git revert", header="title\n")
    ranking = reranker.rank("undo", [long, short])
    assert {item.index: item.truncated for item in ranking} == {0: True, 1: False}
    with pytest.raises(InputError, match=r"header must be a str.*int"):
        Candidate("text", header=3)  # type: ignore[arg-type]


def test_without_windows_header_and_text_are_one_text() -> None:
    backend = FakeBackend()
    ranking = Reranker(backend).rank("q", [Candidate("text", header="title\n"), Candidate("", header="only a title")])
    assert backend.calls == [[("q", "title\ntext"), ("q", "only a title")]]
    assert [item.candidate.scored_text for item in ranking] != []
    budget = Reranker(tiny("bert"), backend="torch")
    pair = [Candidate("git", header="revert a commit\n")]
    assert len(budget.rank("q", pair, max_tokens=4)) == 1
    assert len(budget.rank("q", pair, max_tokens=3)) == 0


def test_queries_that_cannot_be_used_have_an_error_of_their_own() -> None:
    for query in ("", "\u200b", 5):
        with pytest.raises(QueryError):
            Reranker(FakeBackend()).rank(query, ["text"])  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="leaves no room"):
        Reranker(tiny("bert"), backend="torch", max_length=16).rank("undo a commit " * 20, ["text"])
