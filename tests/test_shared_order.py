"""One `Reranker`, two frameworks: one loaded model, one order, the same scores."""

from __future__ import annotations

import asyncio
import gc
import zlib
from typing import Any

import pytest
from checkpoints import QUERY, TEXTS, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from rerank_plugins import Reranker
from rerank_plugins import langchain as lc
from rerank_plugins import llama_index as li
from rerank_plugins.backends import load as loading
from rerank_plugins.testing import FakeBackend

MIXED = [*TEXTS, " ", TEXTS[0], TEXTS[2], "", "x"]
"""Short, long, CJK and emoji texts, blank ones and repeated ones."""

Results = list[tuple[str, float]]


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, id=str(i)) for i, text in enumerate(texts)]


def nodes(texts: list[str]) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.5) for i, text in enumerate(texts)]


def of_documents(ranked: Any) -> Results:
    return [(document.id, document.metadata["relevance_score"]) for document in ranked]


def of_nodes(ranked: list[NodeWithScore]) -> Results:
    return [(item.node_id, item.get_score()) for item in ranked]


def both(keywords: dict[str, Any], query: str, texts: list[str]) -> tuple[Results, Results]:
    in_langchain = lc.CrossEncoderRerank(**keywords).compress_documents(documents(texts), query)
    in_llama_index = li.CrossEncoderRerank(**keywords).postprocess_nodes(nodes(texts), query_str=query)
    return of_documents(in_langchain), of_nodes(in_llama_index)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The model specs that were really loaded, from none."""
    gc.collect()
    seen: list[Any] = []
    load = loading._load

    def counting(spec: Any) -> Any:
        seen.append(spec)
        return load(spec)

    monkeypatch.setattr(loading, "_load", counting)
    return seen


@pytest.mark.parametrize("scale", ["probability", "logit"])
@pytest.mark.parametrize("cuts", [{"top_n": None}, {"top_n": 4}, {"top_n": None, "min_score": 0.4}], ids=str)
@pytest.mark.parametrize("family", ["electra", "xlm-roberta"])
def test_a_shared_reranker_gives_both_frameworks_the_same(family: str, cuts: dict[str, Any], scale: Any) -> None:
    shared = Reranker(tiny(family), backend="torch", scale=scale)
    in_langchain, in_llama_index = both({"reranker": shared, **cuts}, QUERY, MIXED)
    expected = [(str(item.index), item.score) for item in shared.rank(QUERY, MIXED, **cuts)]
    assert in_langchain == in_llama_index == expected
    assert 0 < len(expected) <= len(MIXED)


def test_a_shared_reranker_loads_one_model(loads: list[Any]) -> None:
    shared = Reranker(tiny("bert"), backend="torch")
    compressor = lc.CrossEncoderRerank(reranker=shared)
    postprocessor = li.CrossEncoderRerank(reranker=shared)
    assert loads == []
    for _ in range(2):
        compressor.compress_documents(documents(TEXTS), QUERY)
        postprocessor.postprocess_nodes(nodes(TEXTS), query_str=QUERY)
    assert len(loads) == 1


def test_the_same_keywords_load_one_model_too(loads: list[Any]) -> None:
    keywords = {"model": tiny("bert"), "backend": "torch", "top_n": None}
    compressor, postprocessor = lc.CrossEncoderRerank(**keywords), li.CrossEncoderRerank(**keywords)
    in_langchain = of_documents(compressor.compress_documents(documents(MIXED), QUERY))
    assert of_nodes(postprocessor.postprocess_nodes(nodes(MIXED), query_str=QUERY)) == in_langchain
    assert len(loads) == 1


def test_the_same_texts_in_another_order_score_the_same_in_the_other_framework() -> None:
    shared = Reranker(tiny("bert"), backend="torch", scale="logit")
    in_langchain = lc.CrossEncoderRerank(reranker=shared, top_n=None).compress_documents(documents(TEXTS), QUERY)
    backwards = nodes(TEXTS)[::-1]
    in_llama_index = li.CrossEncoderRerank(reranker=shared, top_n=None).postprocess_nodes(backwards, query_str=QUERY)
    assert [item.node_id for item in in_llama_index] == [document.id for document in in_langchain]
    assert [item.get_score() for item in in_llama_index] == pytest.approx(
        [document.metadata["relevance_score"] for document in in_langchain], abs=1e-4
    )


@settings(deadline=None, max_examples=100)
@given(
    texts=st.lists(st.text(alphabet="ab\u718a\U0001f43c \n", max_size=5), max_size=15),
    top_n=st.none() | st.integers(1, 20),
    min_score=st.none() | st.floats(0, 1),
)
def test_whatever_the_texts_both_frameworks_agree(texts: list[str], top_n: int | None, min_score: float | None) -> None:
    # Few distinct logits, so that ties are common; some too large for their sigmoids to differ.
    shared = Reranker(FakeBackend(lambda query, text: (-40, -1, 0, 2, 38, 45)[zlib.crc32(text.encode()) % 6]))
    cuts = {"top_n": top_n, "min_score": min_score}
    in_langchain, in_llama_index = both({"reranker": shared, **cuts}, "q", texts)
    expected = [(str(item.index), item.score) for item in shared.rank("q", texts, top_n, min_score)]
    assert in_langchain == in_llama_index == expected


async def test_both_frameworks_at_once_give_the_serial_result() -> None:
    shared = Reranker(tiny("bert"), backend="torch")
    compressor = lc.CrossEncoderRerank(reranker=shared, top_n=None)
    postprocessor = li.CrossEncoderRerank(reranker=shared, top_n=None)
    texts, queries = TEXTS[:5], [f"{QUERY} {i}" for i in range(8)]
    in_langchain = asyncio.gather(*(compressor.acompress_documents(documents(texts), query) for query in queries))
    in_llama_index = asyncio.gather(
        *(postprocessor.apostprocess_nodes(nodes(texts), query_str=query) for query in queries)
    )
    for query, ranked_documents, ranked_nodes in zip(queries, await in_langchain, await in_llama_index, strict=True):
        expected = shared.rank(query, texts)
        for result in (of_documents(ranked_documents), of_nodes(ranked_nodes)):
            assert [name for name, _ in result] == [str(item.index) for item in expected]
            assert [score for _, score in result] == pytest.approx([item.score for item in expected], abs=1e-6)


@pytest.mark.bundled
def test_the_bundled_model_gives_both_frameworks_the_same(loads: list[Any]) -> None:
    with Reranker():
        in_langchain, in_llama_index = both({"top_n": None}, QUERY, MIXED)
    assert in_langchain == in_llama_index
    assert len(in_langchain) == len(MIXED)
    assert len(loads) <= 1
