"""LlamaIndex: what of a node is scored, details of results, and bad nodes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny
from llama_index.core import SimpleDirectoryReader
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from test_llama_index import FOX, FOX_ORDER, Fixed, found, ids

# Fixtures that pytest finds by their names.
from test_llama_index import events as events

from rerank_plugins.errors import InputError, QueryError
from rerank_plugins.llama_index import CrossEncoderRerank, create_rerank_tool
from rerank_plugins.testing import FakeBackend


def scored(node: TextNode, **keywords: Any) -> str:
    backend = FakeBackend()
    CrossEncoderRerank(model=backend, **keywords).postprocess_nodes([NodeWithScore(node=node)], query_str="q")
    return backend.calls[0][0][1]


# -- file paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/home/ann/notes/a.txt", r"C:\notes\a.txt", r"\\server\share\a.txt", "file:///home/a.txt", Path("/home/a.txt")],
    ids=str,
)
def test_absolute_file_paths_are_not_scored_unless_asked_for(path: Any) -> None:
    node = TextNode(text="text", metadata={"file_path": path, "title": "T"})
    assert scored(node) == "title: T\n\ntext"
    assert scored(node, metadata_mode=MetadataMode.ALL) == "title: T\n\ntext"
    assert scored(node, score_file_paths=True) == f"file_path: {path}\ntitle: T\n\ntext"
    assert node.metadata == {"file_path": path, "title": "T"}


@pytest.mark.parametrize("value", ["src/app.py", "https://example.org/a", "and/or", "a\n/b"])
def test_other_values_are_scored(value: str) -> None:
    assert scored(TextNode(text="text", metadata={"source": value})) == f"source: {value}\n\ntext"


def test_the_order_does_not_depend_on_where_a_folder_lies(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"note {i} on commits and branches")
    orders = []
    rerank = CrossEncoderRerank(model=tiny("bert"), backend="torch", top_n=None)
    for place in ("a", "undo a commit/git revert", "x" * 60):
        if place != "a":
            shutil.copytree(folder, tmp_path / place)
        read = SimpleDirectoryReader(str(tmp_path / place)).load_data()
        nodes = sorted((NodeWithScore(node=node) for node in read), key=lambda item: item.metadata["file_name"])
        assert str(tmp_path) in nodes[0].metadata["file_path"]
        ranked = rerank.postprocess_nodes(nodes, query_str="undo a commit")
        orders.append([(item.metadata["file_name"], item.score) for item in ranked])
    assert orders[0] == orders[1] == orders[2]


# -- windows and missing values ------------------------------------------------------------------------------------


def test_every_window_has_the_metadata_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    rerank = CrossEncoderRerank(model=tiny("bert"), backend="torch", passage_length=64, top_n=1)
    backend = rerank._own._loaded()
    logits = backend.logits
    monkeypatch.setattr(backend, "logits", lambda pairs: texts.extend(t for _, t in pairs) or logits(pairs))
    node = TextNode(text="git revert undoes a commit. " * 60, metadata={"title": "Manual", "tags": ["git", "vcs"]})
    rerank.postprocess_nodes([NodeWithScore(node=node)], query_str="undo")
    assert len(texts) > 5
    assert all(text.startswith("title: Manual\ntags: git, vcs\n\n") for text in texts)


@pytest.mark.parametrize("template", ["{metadata_str}\n---\n{content}", "{content} ({metadata_str})"])
def test_the_nodes_own_template_is_kept(template: str) -> None:
    node = TextNode(text=" body\n", metadata={"a": 1}, text_template=template)
    assert scored(node) == node.get_content(MetadataMode.EMBED)


def test_a_node_with_metadata_alone_is_scored_by_it() -> None:
    assert scored(TextNode(text="", metadata={"a": 1})) == "a: 1"


# -- details -------------------------------------------------------------------------------------------------------


async def test_details_are_hidden_metadata_where_asked_for_and_always_in_the_event(events: list[Any]) -> None:
    for add_details in (False, True):
        rerank = CrossEncoderRerank(model=FakeBackend(), top_n=2, add_details=add_details)
        nodes = found(metadata={"title": "t"})
        ranked = rerank.postprocess_nodes(nodes, query_str=FOX)
        assert ids(await rerank.apostprocess_nodes(nodes, query_str=FOX)) == ids(ranked) == FOX_ORDER[:2]
        end = [event for event in events if isinstance(event, ReRankEndEvent)][-1]
        assert end.tags["details"] == [
            {"node_id": "fox", "first_stage_rank": 2, "first_stage_score": pytest.approx(0.8), "truncated": False},
            {"node_id": "den", "first_stage_rank": 4, "first_stage_score": pytest.approx(0.6), "truncated": False},
        ]
        for item, detail in zip(ranked, end.tags["details"], strict=True):
            known = {key: value for key, value in detail.items() if key != "node_id"}
            assert item.metadata == ({"title": "t", **known} if add_details else {"title": "t"})
            for mode in (MetadataMode.LLM, MetadataMode.EMBED):
                assert item.get_content(mode) == f"title: t\n\n{item.text}"
        assert all(item.metadata == {"title": "t"} for item in nodes)


def test_details_and_the_retrieval_score_go_together() -> None:
    rerank = CrossEncoderRerank(model=FakeBackend(), add_details=True, keep_retrieval_score=True)
    item = rerank.postprocess_nodes([NodeWithScore(node=TextNode(text="a"), score=float("nan"))], query_str="q")[0]
    assert item.metadata == {
        "first_stage_rank": 1,
        "first_stage_score": None,
        "truncated": False,
        "retrieval_score": None,
    }
    assert sorted(item.node.excluded_llm_metadata_keys) == sorted(item.metadata)


def test_max_tokens_is_a_keyword() -> None:
    nodes = found({"a": "git revert", "b": "git add", "c": "git log"})
    rerank = CrossEncoderRerank(model=tiny("bert"), backend="torch", max_tokens=4)
    assert 0 < len(rerank.postprocess_nodes(nodes, query_str="undo")) < 3


class Away(FakeBackend):
    def logits(self, pairs: Any) -> Any:
        raise ConnectionRefusedError("nobody listens")


def test_what_was_not_reranked_keeps_the_retrievers_score_and_says_so(events: list[Any]) -> None:
    nodes = found(metadata={"title": "t"})
    keywords: dict[str, Any] = {"model": Away(), "on_error": "keep_order", "min_score": 0.95}
    ranked = CrossEncoderRerank(**keywords, top_n=2).postprocess_nodes(nodes, query_str=FOX)
    assert [(item.node_id, item.score) for item in ranked] == [("whale", 0.9), ("fox", pytest.approx(0.8))]
    for item in ranked:
        assert "nobody listens" in item.metadata["rerank_fallback"]
        assert item.get_content(MetadataMode.LLM) == f"title: t\n\n{item.text}"
        assert item.get_content(MetadataMode.EMBED) == f"title: t\n\n{item.text}"
    assert "nobody listens" in events[-1].tags["fallback"]
    output = create_rerank_tool(Fixed(nodes), **keywords, top_n=1).call(query=FOX)
    assert output.content == "[1] not reranked, title: t\ntitle: t\n\na blue whale sings"
    again = CrossEncoderRerank(model=FakeBackend()).postprocess_nodes(ranked, query_str=FOX)
    assert all("rerank_fallback" not in item.metadata for item in again)


def test_fusion_and_adjustments_read_score_and_metadata() -> None:
    nodes = found(metadata={"boost": 0})
    nodes[2].node.metadata["boost"] = 5
    flat: dict[str, Any] = {"model": FakeBackend(lambda query, text: 0.0), "top_n": 2}
    for item in nodes:
        item.score = -item.get_score()
    assert ids(CrossEncoderRerank(**flat, fusion=0.5).postprocess_nodes(nodes, query_str=FOX)) == ["blank", "den"]
    rerank = CrossEncoderRerank(**flat, adjust=lambda item: item.candidate.metadata["boost"])
    assert ids(rerank.postprocess_nodes(nodes, query_str=FOX)) == ["car", "whale"]


# -- bad nodes -----------------------------------------------------------------------------------------------------


def bad(**fields: Any) -> NodeWithScore:
    node = TextNode(text="text")
    for name, value in fields.items():
        node.__dict__[name] = value
    return NodeWithScore.model_construct(node=node, score=None)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (bad(text=None), r"text of node 1 must be a str, got NoneType"),
        (bad(text=42), r"text of node 1 must be a str, got int"),
        (bad(text=["a"], metadata={"a": 1}), r"text of node 1 must be a str, got list"),
        (bad(metadata=None), r"metadata of node 1 must be a dict, got NoneType"),
        (None, r"number 1 is a NoneType"),
        ("text", r"number 1 is a str"),
    ],
)
async def test_a_bad_node_is_an_input_error_with_its_position(item: Any, message: str) -> None:
    rerank = CrossEncoderRerank(model=FakeBackend())
    with pytest.raises(InputError, match=message):
        rerank.postprocess_nodes([*found()[:1], item], query_str="q")
    with pytest.raises(InputError, match=message):
        await rerank.apostprocess_nodes([*found()[:1], item], query_str="q")


@pytest.mark.parametrize("nodes", [None, {}, "text", TextNode(text="a"), {1}], ids=lambda nodes: type(nodes).__name__)
def test_a_bad_container_is_an_input_error(nodes: Any) -> None:
    with pytest.raises(InputError, match=f"nodes must be a list.*{type(nodes).__name__}"):
        CrossEncoderRerank(model=FakeBackend()).postprocess_nodes(nodes, query_str="q")


def test_a_query_that_is_too_long_has_an_error_of_its_own_and_can_be_cut() -> None:
    query = "undo a commit " * 400
    with pytest.raises(QueryError, match="leaves no room"):
        CrossEncoderRerank(model=tiny("bert"), backend="torch").postprocess_nodes(found(), query_str=query)
    rerank = CrossEncoderRerank(model=tiny("bert"), backend="torch", truncate_query=True, add_details=True)
    ranked = rerank.postprocess_nodes(found(), query_str=query)
    assert all(item.metadata["truncated"] for item in ranked)
