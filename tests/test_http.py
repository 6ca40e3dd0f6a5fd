"""`HttpBackend` against a real server on loopback that answers, and fails, in every way that servers do."""

from __future__ import annotations

import asyncio
import copy
import email.utils
import json
import multiprocessing
import os
import pickle
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import httpx2
import numpy as np
import pytest
from rerank_server import Fault, RerankServer, drip, half, hang, probability, reset, running

from rerank_plugins import Candidate, Reranker
from rerank_plugins.backends.http import HttpBackend, from_url
from rerank_plugins.backends.http.dialects import DIALECTS
from rerank_plugins.errors import ConfigurationError, QueryError, ServerError, ServerTimeout
from rerank_plugins.testing import FakeBackend, check_backend_contract, word_overlap

QUERY = "red fox in the snow"
TEXTS = ["a blue whale", "the red fox", "snow in the red morning, a fox", "nothing", "fox fox fox"]
PEM = Path(__file__).parent / "data" / "localhost.pem"


@pytest.fixture
def server():  # type: ignore[no-untyped-def]
    with running() as started:
        yield started


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rerank_plugins.backends._remote.FIRST_PAUSE_S", 0.05)


def expected(dialect: str) -> list[float]:
    score = word_overlap if DIALECTS[dialect].emits == "logit" else probability
    return [score(QUERY, text) for text in TEXTS]


def asked(backend: HttpBackend, texts: list[str] = TEXTS, query: str = QUERY) -> np.ndarray:
    return backend.logits([(query, text) for text in texts]).logits[:, 0]


# -- dialects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_gives_the_scores_in_input_order(server: RerankServer, dialect: str) -> None:
    backend = HttpBackend(server.url, dialect=dialect, model="m")
    np.testing.assert_allclose(asked(backend), expected(dialect), rtol=1e-6)
    assert server.paths[-1] == DIALECTS[dialect].path
    order = [item.index for item in Reranker(backend).rank(QUERY, TEXTS)]
    assert order == [item.index for item in Reranker(FakeBackend()).rank(QUERY, TEXTS)]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_keeps_the_contract_of_backends(server: RerankServer, dialect: str) -> None:
    check_backend_contract(HttpBackend(server.url, dialect=dialect, model="m"))


def test_what_each_dialect_sends(server: RerankServer) -> None:
    def sent(dialect: str, **keywords: object) -> dict[str, object]:
        asked(HttpBackend(server.url, dialect=dialect, model="m", **keywords), ["one", "two"], "q")  # type: ignore[arg-type]
        return server.bodies[-1]  # type: ignore[no-any-return]

    common = {"model": "m", "query": "q", "documents": ["one", "two"], "top_n": 2}
    assert sent("cohere") == common
    assert sent("jina") == {**common, "return_documents": False}
    assert sent("vllm") == {**common, "use_activation": False, "truncate_prompt_tokens": -1}
    assert sent("infinity") == {**common, "raw_scores": True, "return_documents": False}
    assert sent("tei") == {
        "query": "q",
        "texts": ["one", "two"],
        "truncate": True,
        "raw_scores": True,
        "return_text": False,
    }
    assert sent("voyage") == {
        "query": "q",
        "documents": ["one", "two"],
        "model": "m",
        "top_k": 2,
        "truncation": True,
        "return_documents": False,
    }
    assert sent("nim") == {
        "model": "m",
        "query": {"text": "q"},
        "passages": [{"text": "one"}, {"text": "two"}],
        "truncate": "END",
    }
    assert sent("mixedbread") == {
        "model": "m",
        "query": "q",
        "input": ["one", "two"],
        "top_k": 2,
        "return_input": False,
    }
    assert sent("pinecone", api_key="k") == {
        "model": "m",
        "query": "q",
        "documents": [{"text": "one"}, {"text": "two"}],
        "rank_fields": ["text"],
        "top_n": 2,
        "return_documents": False,
    }
    assert server.headers[-1]["api-key"] == "k"
    assert server.headers[-1]["x-pinecone-api-version"] == "2026-07"
    assert sent("cohere", extra_body={"priority": 1}) == {**common, "priority": 1}


@pytest.mark.parametrize(
    ("given", "dialect", "path"),
    [
        ("", "cohere", "/v2/rerank"),
        ("/", "jina", "/v1/rerank"),
        ("/v1", "jina", "/v1/rerank"),
        ("/v1/", "jina", "/v1/rerank"),
        ("/v1/rerank", "jina", "/v1/rerank"),
        ("/rerank", "jina", "/rerank"),
        ("/prefix", "infinity", "/prefix/rerank"),
        ("/compatible-api/v1/reranks", "jina", "/compatible-api/v1/reranks"),
        ("/v1/retrieval/nvidia/model/reranking", "nim", "/v1/retrieval/nvidia/model/reranking"),
        ("/providers/cohere/v2/rerank?api-version=1", "cohere", "/providers/cohere/v2/rerank?api-version=1"),
    ],
)
def test_the_address_of_a_server_or_of_its_endpoint(server: RerankServer, given: str, dialect: str, path: str) -> None:
    asked(HttpBackend(server.url + given, dialect=dialect))
    assert server.paths[-1] == path


def test_maximum_length_and_instruction(server: RerankServer) -> None:
    def sent(dialect: str) -> dict[str, object]:
        reranker = Reranker(HttpBackend(server.url, dialect=dialect), max_length=100, instruction="Judge: ")
        reranker.score("q", ["one"])
        return server.bodies[-1]  # type: ignore[no-any-return]

    body = sent("vllm")
    assert (body["truncate_prompt_tokens"], body["instruction"], body["query"]) == (100, "Judge: ", "q")
    body = sent("cohere")
    assert (body["max_tokens_per_doc"], body["query"]) == (100, "Judge: q")
    with pytest.raises(ConfigurationError, match="decides itself how many tokens"):
        sent("tei")


def test_probabilities_and_logits_become_scores_as_with_local_engines(server: RerankServer) -> None:
    logits = [word_overlap(QUERY, text) for text in TEXTS]
    for dialect in ("tei", "cohere"):
        backend = HttpBackend(server.url, dialect=dialect)
        np.testing.assert_allclose(
            Reranker(backend).score(QUERY, TEXTS), 1 / (1 + np.exp(-np.array(logits))), rtol=1e-5
        )
        np.testing.assert_allclose(Reranker(backend, scale="logit").score(QUERY, TEXTS), logits, rtol=1e-4, atol=1e-5)
        ranking = Reranker(backend).rank(QUERY, TEXTS, top_n=2, min_score=0.5)
        assert [item.index for item in ranking] == [2, 1]


def test_several_queries_in_one_call(server: RerankServer) -> None:
    pairs = [("red", "red"), ("blue", "red"), ("red", "blue"), ("blue", "blue"), ("blue", "blue sky")]
    scored = HttpBackend(server.url, dialect="tei").logits(pairs).logits[:, 0]
    np.testing.assert_allclose(scored, [word_overlap(*pair) for pair in pairs], rtol=1e-6)
    assert sorted(len(body["texts"]) for body in server.bodies) == [2, 3]


def test_texts_of_every_kind_arrive(server: RerankServer) -> None:
    texts = ["", " ", "é熊🐼\u2028", "a\x00b", "lone \ud800 surrogate", '"quoted"\\']
    HttpBackend(server.url, dialect="jina").logits([(QUERY, text) for text in texts])
    assert server.bodies[-1]["documents"] == [*texts[:4], "lone \ufffd surrogate", texts[5]]


def test_no_pairs_ask_nobody() -> None:
    scored = HttpBackend("http://127.0.0.1:9", dialect="tei").logits([])
    assert scored.logits.shape == (0, 1)
    assert scored.truncated.shape == (0,)


# -- requests within limits -----------------------------------------------------------------------------------------


def test_requests_hold_as_many_texts_as_the_server_takes(server: RerankServer) -> None:
    server.info = {"max_client_batch_size": 7, "max_input_length": 512, "model_id": "m", "model_sha": "abc"}
    texts = [f"fox {'x ' * i}" for i in range(50)]
    backend = HttpBackend(server.url, dialect="tei")
    np.testing.assert_allclose(asked(backend, texts), [word_overlap(QUERY, text) for text in texts], rtol=1e-6)
    assert [len(body["texts"]) for body in server.bodies].count(7) == 7
    assert len(server.bodies) == 8
    asked(backend, texts)
    assert server.paths.count("/info") == 1
    server.bodies.clear()
    asked(HttpBackend(server.url, dialect="cohere", max_texts=20), texts)
    assert sorted(len(body["documents"]) for body in server.bodies) == [10, 20, 20]


def test_requests_of_one_call_run_at_the_same_time_but_not_all(server: RerankServer) -> None:
    server.delay_s = 0.05
    backend = HttpBackend(server.url, dialect="jina", max_texts=1, max_concurrent=3)
    asked(backend, [f"text {i}" for i in range(9)])
    assert server.most_at_once == 3


def test_a_text_that_no_request_can_hold_is_cut_and_says_so(server: RerankServer) -> None:
    long = "红 fox " * 400_000
    assert len(long.encode()) > 2_000_000
    scored = HttpBackend(server.url, dialect="tei").logits([(QUERY, "short"), (QUERY, long), (QUERY, "fox")])
    assert scored.truncated.tolist() == [False, True, False]
    arrived = [text for body in server.bodies for text in body["texts"]]
    assert [long.startswith(text) for text in arrived].count(True) == 1
    assert max(len(json.dumps(body, ensure_ascii=False).encode()) for body in server.bodies) <= 2_000_000
    ranking = Reranker(HttpBackend(server.url, dialect="tei")).rank(QUERY, [long, "fox"])
    assert {item.index: item.truncated for item in ranking} == {0: True, 1: False}


def test_a_query_that_leaves_no_room_is_an_error(server: RerankServer) -> None:
    with pytest.raises(QueryError, match="Shorten the query"):
        asked(HttpBackend(server.url, dialect="tei"), query="x" * 2_000_000)


# -- failures that pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504, 529])
def test_a_status_that_passes_is_tried_again(server: RerankServer, status: int) -> None:
    server.faults = [Fault(status, {"message": "busy"})] * 2
    np.testing.assert_allclose(asked(HttpBackend(server.url, dialect="tei")), expected("tei"), rtol=1e-6)
    assert len(server.bodies) == 3


@pytest.mark.parametrize("act", [half, reset], ids=["half an answer", "reset"])
def test_a_broken_connection_is_tried_again(server: RerankServer, act: object) -> None:
    server.faults = [Fault(act=act)]  # type: ignore[arg-type]
    np.testing.assert_allclose(asked(HttpBackend(server.url, dialect="tei")), expected("tei"), rtol=1e-6)
    assert len(server.bodies) == 2


def test_other_server_errors_are_tried_once_more(server: RerankServer) -> None:
    server.faults = [Fault(500, {"error": "boom"})]
    asked(HttpBackend(server.url, dialect="jina"))
    assert len(server.bodies) == 2
    server.faults = [Fault(500, {"error": "boom"})] * 3
    with pytest.raises(ServerError, match="answered 500: boom") as caught:
        asked(HttpBackend(server.url, dialect="jina"))
    assert caught.value.passing
    assert len(server.bodies) == 4


@pytest.mark.parametrize("form", ["seconds", "date", "milliseconds"])
def test_the_pause_that_a_server_asks_for_is_kept(server: RerankServer, form: str) -> None:
    headers = {
        "seconds": {"Retry-After": "1"},
        "date": {"Retry-After": email.utils.formatdate(time.time() + 2, usegmt=True)},
        "milliseconds": {"retry-after-ms": "900"},
    }[form]
    server.faults = [Fault(429, {"detail": "slow down"}, headers)]
    asked(HttpBackend(server.url, dialect="voyage", model="m"))
    pause = server.times[1] - server.times[0]
    assert 0.85 < pause < 2.5


def test_a_pause_beyond_the_call_fails_at_once(server: RerankServer) -> None:
    server.faults = [Fault(429, {"message": "slow down"}, {"Retry-After": "60"})]
    backend = HttpBackend(server.url, dialect="cohere", timeout_s=2)
    started = time.monotonic()
    with pytest.raises(ServerError, match="429: slow down") as caught:
        asked(backend)
    assert (caught.value.status, caught.value.passing) == (429, True)
    with pytest.raises(ServerError, match="pause of") as caught:
        asked(backend)
    assert time.monotonic() - started < 1
    assert len(server.bodies) == 1


def test_what_keeps_failing_ends_with_what_the_server_said(server: RerankServer) -> None:
    server.faults = [Fault(503, {"error": {"message": "Loading model", "type": "unavailable_error"}})] * 10
    with pytest.raises(ServerError, match=r"/v1/rerank answered 503: Loading model\.") as caught:
        asked(HttpBackend(server.url, dialect="jina"))
    assert (caught.value.status, caught.value.url) == (503, server.url + "/v1/rerank")
    assert len(server.bodies) == 4


def test_a_server_that_is_not_there() -> None:
    with running() as server:
        url = server.url
    with pytest.raises(ServerError, match="gave no answer") as caught:
        asked(HttpBackend(url, dialect="jina"))
    assert (caught.value.status, caught.value.passing) == (None, True)
    assert not isinstance(caught.value, ServerTimeout)


@pytest.mark.parametrize("act", [hang(3), drip(3)], ids=["hang", "drip"])
def test_no_call_takes_longer_than_its_time(server: RerankServer, act: object) -> None:
    server.faults = [Fault(act=act)]  # type: ignore[arg-type]
    started = time.monotonic()
    with pytest.raises(ServerTimeout, match=r"within 0\.5 s") as caught:
        asked(HttpBackend(server.url, dialect="jina", timeout_s=0.5))
    assert time.monotonic() - started < 1
    assert caught.value.passing


def test_retries_and_pauses_are_part_of_the_time(server: RerankServer) -> None:
    server.faults = [Fault(503, b"", {"Retry-After": "0.3"})] * 10
    started = time.monotonic()
    with pytest.raises(ServerError) as caught:
        asked(HttpBackend(server.url, dialect="jina", timeout_s=0.5))
    assert time.monotonic() - started < 0.7
    assert caught.value.status == 503


# -- failures that do not pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 413, 422, 424, 501])
def test_what_fails_again_is_not_tried_again(server: RerankServer, status: int) -> None:
    server.faults = [Fault(status, {"error": "no", "error_type": "Validation"})] * 2
    with pytest.raises(ServerError, match=f"answered {status}: no") as caught:
        asked(HttpBackend(server.url, dialect="tei"))
    assert (caught.value.status, caught.value.passing) == (status, False)
    assert len(server.bodies) == 1


def test_a_pair_too_large_for_llama_cpp_is_not_tried_again(server: RerankServer) -> None:
    message = "input (903 tokens) is too large to process. increase the physical batch size (current batch size: 512)"
    server.faults = [Fault(500, {"error": {"code": 500, "message": message, "type": "server_error"}})] * 2
    with pytest.raises(ServerError, match="903 tokens") as caught:
        asked(HttpBackend(server.url, dialect="jina"))
    assert not caught.value.passing
    assert len(server.bodies) == 1


def changed(server: RerankServer, change: object) -> None:
    server.change = change  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[:-1], "4 scores for 5 texts: index 0 is missing"),
        (lambda rows: rows[:-1] + rows[:1], "twice"),
        (lambda rows: [{**row, "index": row["index"] + 1} for row in rows], "the index 5, of 5 texts"),
        (lambda rows: [{**row, "index": -1 - row["index"]} for row in rows], "the index -"),
        (lambda rows: [{**row, "index": str(row["index"])} for row in rows], "the index '"),
        (lambda rows: [{**row, "index": True} for row in rows], "the index True"),
        (lambda rows: [{"index": row["index"]} for row in rows], "None as the 'score' of text"),
        (lambda rows: [{**row, "score": float("nan")} for row in rows], "nan as the 'score' of text"),
        (lambda rows: [{**row, "score": float("inf")} for row in rows], "inf as the 'score' of text"),
        (lambda rows: [{**row, "score": "0.5"} for row in rows], "'0.5' as the 'score' of text"),
        (lambda rows: [{**row, "score": True} for row in rows], "True as the 'score' of text"),
        (lambda rows: {"results": rows}, "a dict where a list of scores is expected"),
        (lambda rows: [1, 2, 3, 4, 5], "the index None"),
        (lambda rows: {"error": "overloaded", "error_type": "Overloaded"}, "200 with an error: overloaded"),
        (lambda rows: [], "0 scores for 5 texts"),
    ],
)
def test_a_wrong_answer_is_an_error_and_never_a_ranking(server: RerankServer, change: object, says: str) -> None:
    changed(server, change)
    with pytest.raises(ServerError) as caught:
        asked(HttpBackend(server.url, dialect="tei"))
    assert says in str(caught.value)
    assert (caught.value.status, caught.value.passing) == (200, False)
    assert len(server.bodies) == 1


def test_rows_under_another_name(server: RerankServer) -> None:
    changed(server, lambda answer: {"data": answer["results"]})
    with pytest.raises(ServerError, match="no list 'results'"):
        asked(HttpBackend(server.url, dialect="cohere"))


def test_html_instead_of_json(server: RerankServer) -> None:
    page = b"<!doctype html><html><body>Welcome to nginx! " + QUERY.encode() + b"</body></html>"
    server.faults = [Fault(200, page, {"Content-Type": "text/html"}), Fault(502, page), Fault(404, page)]
    backend = HttpBackend(server.url, dialect="jina")
    with pytest.raises(ServerError, match=r"no JSON \(text/html, \d+ bytes\)") as caught:
        asked(backend)
    assert not caught.value.passing
    with pytest.raises(ServerError, match=r"answered 404\. Check the address"):
        asked(backend)


def test_a_redirect_is_not_followed(server: RerankServer) -> None:
    with running() as other:
        server.faults = [Fault(307, b"", {"Location": other.url + "/v1/rerank?token=secret"})]
        with pytest.raises(ServerError, match="a redirect to") as caught:
            asked(HttpBackend(server.url, dialect="jina", api_key="key"))
        assert "secret" not in str(caught.value)
        assert other.bodies == []


def test_a_certificate_that_is_wrong() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    trusting = ssl.create_default_context(cafile=PEM)
    with running(tls=context) as server:
        with pytest.raises(ServerError, match="certificate that cannot be trusted") as caught:
            asked(HttpBackend(server.url, dialect="jina"))
        assert not caught.value.passing
        transport = httpx2.HTTPTransport(verify=trusting)
        with pytest.raises(ServerError, match="certificate that cannot be trusted"):
            # It was made for localhost.
            asked(HttpBackend(server.url, dialect="jina", transport=transport))
        named = server.url.replace("127.0.0.1", "localhost")
        asked(HttpBackend(named, dialect="jina", transport=transport))
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"message": "bad input"}, "bad input"),
        ({"detail": "bad input"}, "bad input"),
        ({"detail": [{"loc": ["body", "top_n"], "msg": "too small", "input": "x"}]}, "body.top_n: too small"),
        ({"error": "bad input", "error_type": "Validation"}, "bad input"),
        ({"error": {"code": 400, "message": "bad input"}}, "bad input"),
        ({"errors": [{"message": "bad input"}]}, "bad input"),
        ({"object": "error", "message": {"message": "bad input"}}, "bad input"),
        ("bad input", "bad input"),
        (b"", "answered 400."),
        (b"[[[[" * 100_000, "answered 400."),
        ({"error": None, "message": "bad input"}, "bad input"),
    ],
)
def test_error_bodies_of_every_shape(server: RerankServer, body: object, says: str) -> None:
    server.faults = [Fault(400, body if isinstance(body, bytes) else json.dumps(body).encode())]
    with pytest.raises(ServerError) as caught:
        asked(HttpBackend(server.url, dialect="jina"))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        "cannot read 'the red fox'",
        "failed on: snow in the red morn...",
        f"query: {QUERY}",
        "line\nsnow in the red morning",
    ],
)
def test_no_error_repeats_a_text_or_the_query(server: RerankServer, message: str) -> None:
    server.faults = [Fault(400, {"message": message})]
    with pytest.raises(ServerError, match="a message that repeats the input"):
        asked(HttpBackend(server.url, dialect="jina"))


def test_no_error_repeats_the_key(server: RerankServer) -> None:
    server.faults = [Fault(401, {"message": "Incorrect API key provided: sk-abcdef"})]
    with pytest.raises(ServerError) as caught:
        asked(HttpBackend(server.url, dialect="jina", api_key="sk-abcdef"))
    assert "sk-abcdef" not in str(caught.value)
    assert "Incorrect API key" in str(caught.value)


def test_logits_where_probabilities_are_expected(server: RerankServer) -> None:
    changed(
        server,
        lambda answer: {"results": [{**row, "relevance_score": row["index"] - 2.0} for row in answer["results"]]},
    )
    with pytest.raises(ServerError, match="no probability.*emits='logit'"):
        asked(HttpBackend(server.url, dialect="jina"))
    assert asked(HttpBackend(server.url, dialect="jina", emits="logit")).tolist() == [-2, -1, 0, 1, 2]
    # It says who it is, and its scores are logits.
    server.software = "llama.cpp"
    reranker = Reranker(HttpBackend(server.url, dialect="jina"), scale="logit")
    np.testing.assert_allclose(reranker.score(QUERY, TEXTS), [-2, -1, 0, 1, 2], atol=1e-5)


# -- replicas -------------------------------------------------------------------------------------------------------


def test_replicas_take_turns_and_one_that_is_gone_rests(server: RerankServer) -> None:
    with running() as other:
        backend = HttpBackend([server.url, other.url], dialect="jina")
        for _ in range(4):
            asked(backend)
        assert (len(server.bodies), len(other.bodies)) == (2, 2)
    for _ in range(6):
        np.testing.assert_allclose(asked(backend), expected("jina"), rtol=1e-6)
    assert len(server.bodies) == 8


def test_a_retry_goes_to_the_next_replica_at_once(server: RerankServer) -> None:
    with running() as other:
        backend = HttpBackend([server.url, other.url], dialect="jina")
        server.faults = [Fault(503, b"", {"Retry-After": "20"})]
        started = time.monotonic()
        for _ in range(3):
            asked(backend)
        assert time.monotonic() - started < 1
        assert (len(server.bodies), len(other.bodies)) == (1, 3)


def test_when_all_replicas_are_gone_calls_fail_at_once_and_they_come_back() -> None:
    with running() as one, running() as two:
        urls = [one.url, two.url]
    backend = HttpBackend(urls, dialect="jina")
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(ServerError, match="None of the 2 servers") as caught:
            asked(backend)
        assert caught.value.passing
        assert time.monotonic() - started < 0.5
    # Nobody is asked while both rest, even one that has come back.
    with running() as new:
        backend._replicas.nodes[0].url = new.url + "/v1/rerank"
        with pytest.raises(ServerError, match="asked again in"):
            asked(backend)
        assert new.bodies == []
        time.sleep(1.1)
        np.testing.assert_allclose(asked(backend), expected("jina"), rtol=1e-6)


def test_no_call_fails_while_a_replica_is_killed_under_load() -> None:
    with running(delay_s=0.005) as one, running(delay_s=0.005) as two:
        backend = HttpBackend([one.url, two.url], dialect="tei")
        failures: list[Exception] = []

        def call(number: int) -> None:
            try:
                np.testing.assert_allclose(asked(backend), expected("tei"), rtol=1e-6)
            except Exception as error:
                failures.append(error)
            if number == 60:
                two.close()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(call, range(200)))
        assert failures == []
        assert 20 < len(two.bodies) < 100 < len(one.bodies)


def test_hedging_asks_another_replica_where_one_is_slow(server: RerankServer) -> None:
    with running() as other:
        backend = HttpBackend([server.url, other.url], dialect="jina", hedge=True)
        for _ in range(20):
            asked(backend)
        before = len(server.bodies) + len(other.bodies)
        server.faults = [Fault(act=hang(2))]
        other.faults = []
        started = time.monotonic()
        asked(backend)
        asked(backend)
        assert time.monotonic() - started < 1
        assert len(server.bodies) + len(other.bodies) <= before + 3


def test_hedging_stays_within_its_share(server: RerankServer) -> None:
    with running() as other:
        backend = HttpBackend([server.url, other.url], dialect="jina", hedge=True)
        for _ in range(20):
            asked(backend)
        server.delay_s = other.delay_s = 0.03
        before = len(server.bodies) + len(other.bodies)
        for _ in range(20):
            asked(backend)
        # What 40 requests have earned, and no more; then slow is what they all are.
        assert 20 < len(server.bodies) + len(other.bodies) - before <= 25


# -- failing open ---------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_told_as_such_where_the_server_is_asked_what_it_is() -> None:
    transport = httpx2.MockTransport(lambda request: httpx2.Response(401))
    with pytest.raises(ServerError, match="answered 401"):
        from_url("http://host", transport=transport)
    with pytest.raises(ServerError, match="answered 401"):
        Reranker(HttpBackend("http://host", dialect="tei", transport=transport), cache=10).score(QUERY, TEXTS)


def test_a_deadline_keeps_what_was_scored_and_the_first_stage_order(server: RerankServer) -> None:
    reranker = Reranker(HttpBackend(server.url, dialect="jina", max_texts=2, max_concurrent=1))
    reranker.rank(QUERY, TEXTS)
    server.faults = [Fault(act=hang(3))]
    started = time.monotonic()
    ranking = reranker.rank(QUERY, TEXTS, deadline_s=0.4)
    assert time.monotonic() - started < 1
    assert ranking.fallback
    assert [item.index for item in ranking] == [0, 1, 2, 3, 4]
    assert not any(item.scored for item in ranking)
    server.faults.clear()
    server.delay_s = 0.25
    ranking = reranker.rank(QUERY, TEXTS, deadline_s=0.4)
    assert [item.index for item in ranking] == [1, 0, 2, 3, 4]
    assert [item.scored for item in ranking] == [True, True, False, False, False]


def test_a_server_that_is_gone_falls_back_and_a_wrong_key_does_not(server: RerankServer) -> None:
    with running() as gone:
        url = gone.url
    for model in (HttpBackend(url, dialect="jina"), url):
        kept = Reranker(model, on_error="keep_order").rank(QUERY, TEXTS)
        assert [item.index for item in kept] == [0, 1, 2, 3, 4]
        assert kept.fallback
    chain = Reranker(HttpBackend(url, dialect="jina"), on_error=Reranker(HttpBackend(server.url, dialect="tei")))
    assert [item.index for item in chain.rank(QUERY, TEXTS)] == [2, 1, 4, 3, 0]
    server.faults = [Fault(401)]
    with pytest.raises(ServerError, match="401"):
        Reranker(HttpBackend(server.url, dialect="tei"), on_error="keep_order").rank(QUERY, TEXTS)


# -- keys, pickles, addresses ---------------------------------------------------------------------------------------


def test_keys_are_sent_and_never_shown(server: RerankServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydantic import SecretStr

    monkeypatch.setenv("MY_RERANK_KEY", "from-env")
    for keywords, header in (
        ({"api_key": "sk-direct"}, "Bearer sk-direct"),
        ({"api_key": SecretStr("sk-secret")}, "Bearer sk-secret"),
        ({"api_key_env": "MY_RERANK_KEY"}, "Bearer from-env"),
    ):
        backend = HttpBackend(server.url, dialect="jina", **keywords)  # type: ignore[arg-type]
        asked(backend)
        assert server.headers[-1]["authorization"] == header
        for secret in ("sk-direct", "sk-secret", "from-env"):
            assert secret not in repr(backend)
            assert secret not in str(vars(backend))
            assert secret.encode() not in pickle.dumps(backend)
            assert secret not in repr(Reranker(backend))
    monkeypatch.delenv("MY_RERANK_KEY")
    with pytest.raises(ConfigurationError, match="'MY_RERANK_KEY'.*is not set"):
        asked(backend)


def test_user_and_password_of_an_address(server: RerankServer) -> None:
    url = server.url.replace("//", "//me:p%40ss@")
    backend = HttpBackend(url, dialect="jina")
    asked(backend)
    assert server.headers[-1]["authorization"] == "Basic bWU6cEBzcw=="
    server.faults = [Fault(400, {"message": "no"})]
    with pytest.raises(ServerError) as caught:
        asked(backend)
    for shown in (repr(backend), str(caught.value), caught.value.url, backend.url, Reranker(backend).model_name):
        assert "p%40ss" not in shown
        assert "p@ss" not in shown
    with pytest.raises(ConfigurationError) as wrong:
        HttpBackend("ftp://me:p%40ss@host", dialect="jina")
    assert "p%40ss" not in str(wrong.value)


def test_a_copy_in_another_process(server: RerankServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_RERANK_KEY", "from-env")
    backend = HttpBackend(
        server.url,
        dialect="tei",
        api_key_env="MY_RERANK_KEY",
        timeout_s=5,
        headers={"X-Team": "a"},
        extra_body={"a": 1},
    )
    twin = pickle.loads(pickle.dumps(Reranker(backend, scale="logit")))
    np.testing.assert_allclose(twin.score(QUERY, TEXTS), expected("tei"), rtol=1e-6)
    assert server.headers[-1]["authorization"] == "Bearer from-env"
    assert server.headers[-1]["x-team"] == "a"
    assert server.bodies[-1]["a"] == 1
    for secret in ({"api_key": "sk-1"}, {"headers": {"X-Api-Key": "sk-1"}}):
        data = pickle.dumps(HttpBackend(server.url, dialect="tei", **secret))  # type: ignore[arg-type]
        assert b"sk-1" not in data
        with pytest.raises(ConfigurationError, match="api_key_env"):
            asked(pickle.loads(data))
    direct = HttpBackend(server.url, dialect="tei", api_key="sk-1")
    for same_process in (copy.copy(direct), copy.deepcopy(direct)):
        asked(same_process)
        assert server.headers[-1]["authorization"] == "Bearer sk-1"


def test_errors_survive_a_pickle() -> None:
    error = ServerError("m", url="http://x", status=500, passing=False)
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.url, twin.status, twin.passing) == ("m", "http://x", 500, False)
    assert [ServerError("", url="", status=status).passing for status in (None, 200, 401, 408, 429, 500, 503)] == [
        True, False, False, True, True, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "keywords",
    [
        {"dialect": "nope"},
        {"url": "localhost:8080"},
        {"url": "ftp://host"},
        {"url": "http://"},
        {"url": "http://host:port"},
        {"url": "http://ho st"},
        {"url": []},
        {"url": None, "dialect": "tei"},
        {"url": 8080},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"timeout_s": True},
        {"max_concurrent": 0},
        {"max_texts": 0},
        {"emits": "score"},
        {"hedge": True},
        {"api_key": "a", "api_key_env": "B"},
        {"api_key": "a\nb"},
        {"api_key": 5},
        {"extra_body": {"a": {1, 2}}},
    ],
    ids=str,
)
def test_keywords_that_cannot_work(keywords: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        HttpBackend(**{"url": "http://localhost:8080", "dialect": "tei", **keywords})  # type: ignore[arg-type]


def test_hosted_services_have_addresses() -> None:
    assert HttpBackend(dialect="cohere").url == "https://api.cohere.com/v2/rerank"
    assert HttpBackend(dialect="pinecone").url == "https://api.pinecone.io/rerank"


def test_the_cache_needs_a_fingerprint(server: RerankServer) -> None:
    with pytest.raises(ConfigurationError, match="fingerprint"):
        Reranker(HttpBackend(server.url, dialect="jina"), cache=100).score(QUERY, TEXTS)
    cached = Reranker(HttpBackend(server.url, dialect="jina", fingerprint="v1"), cache=100)
    first = cached.score(QUERY, TEXTS)
    n = len(server.bodies)
    np.testing.assert_array_equal(cached.score(QUERY, TEXTS), first)
    assert len(server.bodies) == n
    server.info = {"max_client_batch_size": 32, "model_id": "m", "model_sha": "abc", "model_dtype": "float32"}
    assert "m@abc" in str(HttpBackend(server.url, dialect="tei").fingerprint)
    server.info = {"max_client_batch_size": 32, "model_id": "m", "model_sha": None}
    assert HttpBackend(server.url, dialect="tei").fingerprint is None


# -- a URL as the name of a model -----------------------------------------------------------------------------------


def test_a_url_says_the_dialect_or_the_server_does(server: RerankServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_RERANK_KEY", "k")
    backend = from_url(server.url + "?dialect=jina&model=m&api_key_env=MY_RERANK_KEY&timeout_s=7&api-version=3")
    asked(backend)
    assert (backend.dialect.name, backend.model, backend.timeout_s) == ("jina", "m", 7)
    with pytest.raises(ConfigurationError, match="timeout_s"):
        from_url(server.url + "?dialect=jina&timeout_s=soon")
    assert server.paths[-1] == "/v1/rerank?api-version=3"
    assert server.headers[-1]["authorization"] == "Bearer k"
    assert from_url(server.url + "/v2/rerank").dialect.name == "cohere"
    assert from_url("https://api.voyageai.com/v1").dialect.name == "voyage"
    with pytest.raises(ConfigurationError, match=r"\?dialect=NAME"):
        from_url(server.url)
    server.info = {"max_client_batch_size": 32}
    assert from_url(server.url).dialect.name == "tei"
    assert from_url(server.url, dialect="vllm", timeout_s=3).timeout_s == 3


def test_a_url_is_a_model(server: RerankServer) -> None:
    server.info = {"max_client_batch_size": 32, "model_id": "m", "model_sha": "1"}
    right = [word_overlap(QUERY, text) for text in TEXTS]
    for url in (server.url, server.url.upper().replace("HTTP", "http"), server.url + "?dialect=tei&timeout_s=5"):
        np.testing.assert_allclose(Reranker(url).logits(QUERY, TEXTS), right, rtol=1e-5)
    secret = server.url.replace("//", "//me:p%40ss@")
    reranker = Reranker(secret)
    reranker.rank(QUERY, TEXTS)
    assert server.headers[-1]["authorization"].startswith("Basic ")
    for shown in (repr(reranker), reranker.model_name, reranker.rank(QUERY, TEXTS).model):
        assert "p%40ss" not in shown
    n = server.paths.count("/info")
    assert [item.index for item in Reranker(secret).rank(QUERY, TEXTS)] == [2, 1, 4, 3, 0]
    # One backend, with its connections, for all rerankers of an address.
    assert server.paths.count("/info") == n
    with pytest.raises(ConfigurationError, match="precision"):
        Reranker(server.url, precision="int8")


def test_servers_are_told_by_their_list_of_models() -> None:
    owners = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/v1/models":
            return httpx2.Response(200, json={"data": [{"id": "m", "owned_by": owners[-1]}]})
        return httpx2.Response(404, json={"detail": "Not Found"})

    for owner, dialect in (("vllm", "vllm"), ("infinity", "infinity"), ("llamacpp", "tei")):
        owners.append(owner)
        assert from_url("http://host", transport=httpx2.MockTransport(handle)).dialect.name == dialect


# -- threads, tasks, forks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [httpx, httpx2], ids=["httpx", "httpx2"])
def test_a_transport_of_either_library(library: object) -> None:
    def handle(request):  # type: ignore[no-untyped-def]
        if request.method == "GET":
            return library.Response(404)  # type: ignore[attr-defined]
        texts = json.loads(request.content)["texts"]
        return library.Response(200, json=[{"index": i, "score": float(len(t))} for i, t in enumerate(texts)])  # type: ignore[attr-defined]

    transport = library.MockTransport(handle)  # type: ignore[attr-defined]
    assert asked(HttpBackend("http://host", dialect="tei", transport=transport), ["a", "bcd"]).tolist() == [1, 3]


def test_many_threads_share_one_backend(server: RerankServer) -> None:
    reranker = Reranker(HttpBackend(server.url, dialect="tei"))
    right = [item.index for item in reranker.rank(QUERY, TEXTS)]
    with ThreadPoolExecutor(16) as pool:
        for ranking in pool.map(lambda _: reranker.rank(QUERY, TEXTS), range(100)):
            assert [item.index for item in ranking] == right


def test_one_backend_serves_several_event_loops(server: RerankServer) -> None:
    reranker = Reranker(HttpBackend(server.url, dialect="tei"))

    async def several() -> list[list[int]]:
        rankings = await asyncio.gather(*(reranker.arank(QUERY, TEXTS) for _ in range(20)))
        return [[item.index for item in ranking] for ranking in rankings]

    results = asyncio.run(several()) + asyncio.run(several())
    assert all(result == results[0] for result in results)


async def test_a_cancelled_call_ends_at_once_and_sends_no_more(server: RerankServer) -> None:
    server.delay_s = 0.2
    reranker = Reranker(HttpBackend(server.url, dialect="jina", max_texts=1, max_concurrent=1))
    before = threading.active_count()
    task = asyncio.ensure_future(reranker.arank(QUERY, [f"text {i}" for i in range(50)]))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.5)
    assert len(server.bodies) <= 3
    assert threading.active_count() <= before + 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_connections(server: RerankServer) -> None:
    reranker = Reranker(HttpBackend(server.url, dialect="tei"))
    right = reranker.score(QUERY, TEXTS)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(reranker.score(QUERY, TEXTS).tolist()))
    child.start()
    np.testing.assert_array_equal(reranker.score(QUERY, TEXTS), right)
    np.testing.assert_array_equal(queue.get(), right)
    child.join(10)


def test_close_and_use_again(server: RerankServer) -> None:
    backend = HttpBackend(server.url, dialect="jina")
    asked(backend)
    backend.close()
    asked(backend)
    assert len(server.bodies) == 2


def test_the_callers_objects_stay_as_they_are(server: RerankServer) -> None:
    candidates = [Candidate(text, id=str(i), metadata={"n": i}) for i, text in enumerate(TEXTS)]
    before = copy.deepcopy(candidates)
    ranking = Reranker(HttpBackend(server.url, dialect="tei")).rank(QUERY, candidates)
    assert candidates == before
    assert {item.candidate.id for item in ranking} == {str(i) for i in range(len(TEXTS))}


@pytest.mark.parametrize("status", [200, 201, 204, 299, 300, 399, 418, 499, 511, 599])
def test_every_status_with_nonsense_is_an_error_of_ours(server: RerankServer, status: int) -> None:
    server.faults = [Fault(status, b"" if status == 204 else b"\xff\xfe")] * 2
    with pytest.raises(ServerError) as caught:
        asked(HttpBackend(server.url, dialect="jina"))
    assert caught.value.status == status
