"""`HttpBackend` against the real llama.cpp server: its scores are those of our own engines on the same weights."""

from __future__ import annotations

import llama_cpp_model
import numpy as np
import pytest

from rerank_plugins import Reranker
from rerank_plugins.backends.http import HttpBackend, from_url
from rerank_plugins.errors import ServerError

xllamacpp = pytest.importorskip("xllamacpp")

QUERY = "what do the panda eat"
TEXTS = [
    "the bear is in the mountain and take bamboo",
    "paris is the capital of france",
    "undo a git commit with revert",
    "熊猫 in 中国",
    "food for the bear in winter: fruit and bamboo",
    "a",
]


@pytest.fixture(scope="module")
def url():  # type: ignore[no-untyped-def]
    params = xllamacpp.CommonParams()
    params.model.path = str(llama_cpp_model.GGUF)
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    params.port = 0
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_parallel = 2
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.verbosity = 0
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    return Reranker(llama_cpp_model.save(tmp_path_factory.mktemp("xlm_roberta")), backend="torch")


@pytest.mark.parametrize(("dialect", "keywords"), [("tei", {}), ("jina", {"emits": "logit"}), ("jina", {})])
def test_scores_are_those_of_our_own_engines(url: str, ours: Reranker, dialect: str, keywords: dict[str, str]) -> None:
    theirs = Reranker(HttpBackend(url, dialect=dialect, **keywords))  # type: ignore[arg-type]
    right = ours.logits(QUERY, TEXTS)
    assert np.ptp(right) > 5
    # llama.cpp's activation functions are tables of half precision.
    np.testing.assert_allclose(theirs.logits(QUERY, TEXTS), right, atol=0.03)
    np.testing.assert_allclose(theirs.score(QUERY, TEXTS), ours.score(QUERY, TEXTS), atol=0.01)
    assert [item.index for item in theirs.rank(QUERY, TEXTS)] == [item.index for item in ours.rank(QUERY, TEXTS)]


def test_many_texts_in_several_requests(url: str, ours: Reranker) -> None:
    texts = [f"{text} {number}" for number in range(10) for text in TEXTS]
    theirs = Reranker(HttpBackend(url, dialect="tei"))
    np.testing.assert_allclose(theirs.logits(QUERY, texts), ours.logits(QUERY, texts), atol=0.03)


def test_a_pair_that_is_too_large_is_an_error_at_once(url: str) -> None:
    for dialect in ("tei", "jina"):
        with pytest.raises(ServerError, match="too large to process") as caught:
            HttpBackend(url, dialect=dialect).logits([(QUERY, "fine"), (QUERY, "panda " * 900)])
        assert (caught.value.status, caught.value.passing) == (500, False)


def test_a_path_that_it_does_not_have(url: str) -> None:
    with pytest.raises(ServerError, match="404") as caught:
        HttpBackend(url, dialect="cohere").logits([(QUERY, "text")])
    assert not caught.value.passing


def test_it_says_what_it_is(url: str, ours: Reranker) -> None:
    backend = from_url(url)
    assert (backend.dialect.name, backend.emits) == ("tei", "logit")
    assert [item.index for item in Reranker(backend).rank(QUERY, TEXTS)] == [
        item.index for item in ours.rank(QUERY, TEXTS)
    ]
