"""Clients that people have, unchanged, against `rerank-plugins serve`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("starlette")
from serving import ORDER, QUERY, TEXTS, serving

from rerank_plugins import Reranker
from rerank_plugins.server._run import Server
from rerank_plugins.testing import FakeBackend

PROBABILITIES = [item.score for item in Reranker(FakeBackend()).rank(QUERY, TEXTS)]


@pytest.fixture(scope="module")
def server():  # type: ignore[no-untyped-def]
    with serving(api_key="sesame") as started:
        yield started


def test_cohere(server: Server) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2(api_key="sesame", base_url=server.url)
    answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS)
    assert [row.index for row in answer.results] == ORDER
    assert [row.relevance_score for row in answer.results] == pytest.approx(PROBABILITIES)
    answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS, top_n=2, max_tokens_per_doc=None)
    assert [row.index for row in answer.results] == ORDER[:2]
    assert answer.meta.api_version.version == "2"
    first = cohere.Client(api_key="sesame", base_url=server.url)
    answer = first.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS, return_documents=True)
    assert [(row.index, row.document.text) for row in answer.results] == [(i, TEXTS[i]) for i in ORDER]

    async def asked() -> Any:
        async with cohere.AsyncClientV2(api_key="sesame", base_url=server.url) as client:
            return await client.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS)

    assert [row.index for row in asyncio.run(asked()).results] == ORDER
    for call, error in (
        (lambda: client.rerank(model="m", query=QUERY, documents=[]), cohere.errors.BadRequestError),
        (lambda: client.rerank(model="m", query="", documents=TEXTS), cohere.errors.BadRequestError),
        (
            lambda: cohere.ClientV2(api_key="no", base_url=server.url).rerank(model="m", query="q", documents=["a"]),
            cohere.errors.UnauthorizedError,
        ),
    ):
        with pytest.raises(error) as caught:
            call()
        assert caught.value.body["message"]


def test_langchain_cohere(server: Server) -> None:
    module = pytest.importorskip("langchain_cohere")
    from langchain_core.documents import Document

    compressor = module.CohereRerank(base_url=server.url, cohere_api_key="sesame", model="rerank-v3.5", top_n=3)
    documents = [Document(text, metadata={"n": i}) for i, text in enumerate(TEXTS)]
    best = compressor.compress_documents(documents, QUERY)
    assert [document.metadata["n"] for document in best] == ORDER[:3]
    assert [document.metadata["relevance_score"] for document in best] == pytest.approx(PROBABILITIES[:3])


def test_llama_index_cohere(server: Server) -> None:
    module = pytest.importorskip("llama_index.postprocessor.cohere_rerank")
    reranker = module.CohereRerank(api_key="sesame", base_url=server.url, model="rerank-v3.5", top_n=3)
    check_nodes(reranker, 3)


def test_llama_index_text_embeddings_inference(server: Server) -> None:
    module = pytest.importorskip("llama_index.postprocessor.tei_rerank")
    reranker = module.TextEmbeddingInference(base_url=server.url, auth_token="Bearer sesame", top_n=4)
    check_nodes(reranker, 4)


def check_nodes(reranker: Any, top_n: int) -> None:
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.0) for i, text in enumerate(TEXTS)]
    best = reranker.postprocess_nodes(nodes, query_str=QUERY)
    assert [int(node.node_id) for node in best] == ORDER[:top_n]
    assert [node.score for node in best] == pytest.approx(PROBABILITIES[:top_n])


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    # Else it asks a server for prices when it is imported.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return pytest.importorskip("litellm")


# pydantic says of litellm's classes that it does not guard what is read-only in them.
@pytest.mark.filterwarnings("ignore:.*ReadOnly:UserWarning")
@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("cohere/rerank-v3.5", "/v2/rerank"),
        ("cohere/rerank-v3.5", "/v1/rerank"),
        ("jina_ai/jina-reranker-v2", ""),
        ("infinity/model", ""),
        ("infinity/model", "/infinity"),
        ("hosted_vllm/model", ""),
        ("hosted_vllm/model", "/v1"),
    ],
)
def test_litellm(server: Server, litellm: Any, model: str, base: str) -> None:
    asked = {"model": model, "query": QUERY, "documents": TEXTS, "api_base": server.url + base, "api_key": "sesame"}
    answer = litellm.rerank(**asked)
    assert [row["index"] for row in answer.results] == ORDER
    assert [row["relevance_score"] for row in answer.results] == pytest.approx(PROBABILITIES)
    cut = litellm.rerank(**asked, top_n=2, return_documents=True)
    assert [row["index"] for row in cut.results] == ORDER[:2]
    if base in ("/infinity", "/v1") or model.startswith("jina"):
        assert [row["document"]["text"] for row in cut.results] == [TEXTS[i] for i in ORDER[:2]]
    with pytest.raises(litellm.exceptions.AuthenticationError):
        litellm.rerank(**{**asked, "api_key": "wrong"})
