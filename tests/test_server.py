"""`rerank-plugins serve` over real connections: shapes, errors, bounds, and its end."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("starlette")
from serving import ORDER, QUERY, TEXTS, SlowBackend, post, serving, until

from rerank_plugins import Reranker
from rerank_plugins.backends.http import HttpBackend, from_url
from rerank_plugins.errors import ConfigurationError, ModelLoadError, ScoringError, ServerError
from rerank_plugins.server import ServerOptions, create_app, serve
from rerank_plugins.server._run import Server, is_loopback
from rerank_plugins.testing import FakeBackend, check_backend_contract, word_overlap

LOGITS = {i: pytest.approx(word_overlap(QUERY, text), rel=1e-5) for i, text in enumerate(TEXTS)}
PROBABILITIES = {i: pytest.approx(1 / (1 + math.exp(-word_overlap(QUERY, text)))) for i, text in enumerate(TEXTS)}


@pytest.fixture(scope="module")
def server():  # type: ignore[no-untyped-def]
    with serving() as started:
        yield started


def rows(response: httpx.Response, name: str = "relevance_score") -> dict[int, float]:
    assert response.status_code == 200, response.text
    said = response.json()
    results = said if isinstance(said, list) else said["results"]
    assert [row["index"] for row in results] == ORDER[: len(results)]
    return {row["index"]: row[name] for row in results}


# -- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v2/rerank", "/v1/rerank", "/rerank", "/infinity/rerank"])
def test_documents_give_results(server: Server, path: str) -> None:
    body = {"model": "any", "query": QUERY, "documents": TEXTS}
    assert rows(post(server, path, body)) == PROBABILITIES
    assert len(rows(post(server, path, {**body, "top_n": 2}))) == 2
    for all_of_them in (None, 0, 5, 50, 5.0):
        assert len(rows(post(server, path, {**body, "top_n": all_of_them}))) == 5
    objects = {**body, "documents": [{"text": text, "more": 1} for text in TEXTS]}
    assert rows(post(server, path, objects)) == PROBABILITIES


def test_texts_give_a_bare_list(server: Server) -> None:
    body = {"query": QUERY, "texts": TEXTS}
    for path in ("/rerank", "/"):
        assert rows(post(server, path, body), "score") == PROBABILITIES
    assert rows(post(server, "/rerank", {**body, "raw_scores": True}), "score") == LOGITS
    told = post(server, "/rerank", {**body, "return_text": True, "truncate": None}).json()
    assert [row["text"] for row in told] == [TEXTS[i] for i in ORDER]


def test_logits_by_each_switch(server: Server) -> None:
    body = {"query": QUERY, "documents": TEXTS}
    assert rows(post(server, "/rerank", {**body, "raw_scores": True})) == LOGITS
    assert rows(post(server, "/rerank", {**body, "use_activation": False})) == LOGITS
    assert rows(post(server, "/rerank", {**body, "use_activation": True, "raw_scores": None})) == PROBABILITIES
    with serving(raw_scores=True) as raw:
        assert rows(post(raw, "/v1/rerank", body)) == LOGITS
        assert rows(post(raw, "/v1/rerank", {**body, "raw_scores": False})) == PROBABILITIES
        assert (
            rows(post(raw, "/rerank", {"query": QUERY, "texts": TEXTS, "raw_scores": False}), "score") == PROBABILITIES
        )


@pytest.mark.parametrize(
    ("path", "asked", "given"),
    [
        ("/v2/rerank", None, None),
        ("/v2/rerank", True, {"text": TEXTS[2]}),
        ("/v1/rerank", None, {"text": TEXTS[2]}),
        ("/v1/rerank", True, {"text": TEXTS[2]}),
        ("/v1/rerank", False, None),
        ("/rerank", None, None),
        ("/rerank", True, {"text": TEXTS[2]}),
        ("/infinity/rerank", True, TEXTS[2]),
        ("/infinity/rerank", None, None),
    ],
)
def test_documents_are_given_back_as_each_client_expects(
    server: Server, path: str, asked: bool | None, given: Any
) -> None:
    body = {"query": QUERY, "documents": TEXTS, **({} if asked is None else {"return_documents": asked})}
    assert post(server, path, body).json()["results"][0].get("document") == given


def test_litellm_gets_what_both_of_its_providers_take(server: Server) -> None:
    # As its providers infinity/ and hosted_vllm/ send it, to the byte.
    body = {"model": "x", "query": QUERY, "documents": TEXTS, "return_documents": True}
    headers = {"User-Agent": "litellm/1.110.2", "Authorization": "Bearer k"}
    response = post(server, "/rerank", body, headers=headers)
    assert rows(response) == PROBABILITIES
    assert all("document" not in row for row in response.json()["results"])


def test_requests_of_open_webui_and_dify(server: Server) -> None:
    # Open WebUI, retrieval/models/external.py: every index is needed back.
    webui = {"model": "m", "query": QUERY, "documents": TEXTS, "top_n": len(TEXTS)}
    assert set(rows(post(server, "/v1/rerank", webui, headers={"Authorization": "Bearer sk"}))) == set(range(5))
    # Dify, openai_api_compatible/models/rerank: it puts a sigmoid of its own on the score.
    dify = {"model": "m", "query": QUERY, "documents": TEXTS, "top_n": None, "return_documents": True}
    results = post(server, "/v1/rerank", dify).json()["results"]
    assert [(row["index"], row["document"]["text"]) for row in results] == [(i, TEXTS[i]) for i in ORDER]


def test_nulls_and_unknown_fields_are_ignored(server: Server) -> None:
    names = ["top_n", "max_tokens_per_doc", "priority", "return_documents", "rank_fields", "max_chunks_per_doc"]
    names += ["instruction", "truncate_prompt_tokens", "truncation_side", "raw_scores", "use_activation", "user"]
    body = {"model": None, "query": QUERY, "documents": TEXTS, **dict.fromkeys(names), "unheard_of": {"a": [1]}}
    for path in ("/v2/rerank", "/v1/rerank", "/rerank"):
        assert rows(post(server, path, body)) == PROBABILITIES
    spans = {"query": QUERY, "documents": TEXTS, "relevant_spans": {"mode": "enabled", "max_spans": 2}}
    assert rows(post(server, "/v2/rerank", spans)) == PROBABILITIES


def test_blank_texts_rank_last_and_their_raw_score_overflows_nowhere(server: Server) -> None:
    body = {"query": "red", "documents": ["", "red", " \n"], "raw_scores": True}
    results = post(server, "/rerank", body).json()["results"]
    assert [row["index"] for row in results] == [1, 0, 2]
    assert math.exp(-results[-1]["relevance_score"]) < math.inf
    results = post(server, "/rerank", {**body, "raw_scores": False}).json()["results"]
    assert [row["relevance_score"] for row in results[1:]] == [0, 0]


def test_texts_of_every_kind(server: Server) -> None:
    texts = ["é熊🐼\u2028", "a\x00b", "lone \ud800", '"\\', "x" * 100_000]
    content = json.dumps({"query": "é", "documents": texts, "return_documents": True}).encode()
    response = httpx.post(server.url + "/rerank", content=content)
    assert response.status_code == 200
    assert {row["document"]["text"] for row in json.loads(response.content)["results"]} == set(texts)


def test_instruction_and_length_of_one_request() -> None:
    backend = Configurable()
    with serving(backend) as server:
        body = {"query": "q", "documents": ["one"]}
        for more, told in (
            ({}, (None, None)),
            ({"instruction": "Judge. "}, (None, "Judge. ")),
            ({"truncate_prompt_tokens": 10}, (10, None)),
            ({"truncate_prompt_tokens": 5000, "instruction": "J"}, (77, "J")),
            ({"truncate_prompt_tokens": -1}, (None, None)),
        ):
            post(server, "/rerank", {**body, **more})
            assert backend.told[-1] == told


class Configurable(FakeBackend):
    max_length = 77

    def __init__(self) -> None:
        super().__init__(fingerprint="1")
        self.told: list[tuple[int | None, str | None]] = []
        self.now: tuple[int | None, str | None] = (None, None)

    def configured(self, *, max_length: int | None, instruction: str | None, truncate_query: bool = False) -> Any:
        other = Configurable()
        other.told, other.now = self.told, (max_length, instruction)
        return other

    def logits(self, pairs: Any) -> Any:
        self.told.append(self.now)
        return super().logits(pairs)


# -- our own client -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["cohere", "jina", "vllm", "infinity", "tei"])
def test_our_own_client_in_each_dialect(server: Server, dialect: str) -> None:
    backend = HttpBackend(server.url, dialect=dialect)
    reranker = Reranker(backend)
    assert [item.index for item in reranker.rank(QUERY, TEXTS)] == ORDER
    local = Reranker(FakeBackend())
    np.testing.assert_allclose(reranker.score(QUERY, TEXTS), local.score(QUERY, TEXTS), rtol=1e-6)
    np.testing.assert_allclose(reranker.logits(QUERY, TEXTS), local.logits(QUERY, TEXTS), rtol=1e-4, atol=1e-5)
    check_backend_contract(backend)


def test_a_url_is_enough(server: Server) -> None:
    backend = from_url(server.url)
    assert (backend.dialect.name, backend.emits) == ("tei", "logit")
    cached = Reranker(backend, cache=100)
    first = cached.score(QUERY, TEXTS)
    np.testing.assert_array_equal(cached.score(QUERY, TEXTS), first)
    info = httpx.get(server.url + "/info").json()
    assert (info["model_id"], info["max_client_batch_size"]) == ("fake", 10_000)
    assert len(info["model_sha"]) == 64


def test_models_health_and_metrics(server: Server) -> None:
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    (model,) = httpx.get(server.url + "/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("fake", "model")

    def count(name: str) -> float:
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = count("rerank_texts_total"), count('rerank_requests_total{path="/v2/rerank",status="200"}')
    post(server, "/v2/rerank", {"query": QUERY, "documents": TEXTS})
    after = count("rerank_texts_total"), count('rerank_requests_total{path="/v2/rerank",status="200"}')
    assert (after[0] - before[0], after[1] - before[1]) == (5, 1)
    assert count("rerank_ready") == 1


# -- errors ---------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Any, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe{}", 400),
    (b"[" * 100_000, 400),
    (b'{"query": "q", "documents": ["a"], "top_n": ' + b"9" * 5000 + b"}", 400),
    ([], 400),
    ("text", 400),
    (None, 400),
    ({}, 400),
    ({"query": "q"}, 400),
    ({"documents": ["a"]}, 400),
    ({"query": "q", "documents": []}, 400),
    ({"query": "", "documents": ["a"]}, 400),
    ({"query": " ", "documents": ["a"]}, 400),
    ({"query": None, "documents": ["a"]}, 400),
    ({"query": 5, "documents": ["a"]}, 400),
    ({"query": ["q"], "documents": ["a"]}, 400),
    ({"query": "q", "documents": "a"}, 400),
    ({"query": "q", "documents": None}, 400),
    ({"query": "q", "documents": {"0": "a"}}, 400),
    ({"query": "q", "documents": ["a", 5]}, 400),
    ({"query": "q", "documents": ["a", None]}, 400),
    ({"query": "q", "documents": [["a"]]}, 400),
    ({"query": "q", "documents": [{"title": "a"}]}, 400),
    ({"query": "q", "documents": ["a"], "top_n": -1}, 400),
    ({"query": "q", "documents": ["a"], "top_n": "3"}, 400),
    ({"query": "q", "documents": ["a"], "top_n": True}, 400),
    ({"query": "q", "documents": ["a"], "top_n": 1.5}, 400),
    ({"query": "q", "documents": ["a"], "return_documents": "yes"}, 400),
    ({"query": "q", "documents": ["a"], "raw_scores": 1}, 400),
    ({"query": "q", "documents": ["a"], "instruction": 1}, 400),
    ({"query": "q", "documents": ["a"], "truncate_prompt_tokens": 0}, 400),
    ({"query": "q", "documents": ["a"], "truncation_side": "left"}, 400),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_requests_get_the_error_of_each_shape(server: Server, number: int) -> None:
    body, status = WRONG[number]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    for path in ("/v2/rerank", "/v1/rerank", "/rerank"):
        response = httpx.post(server.url + path, content=content)
        assert response.status_code == status, response.text
        said = response.json()
        message = said["message"] if path == "/v2/rerank" else said["error"]["message"]
        assert message.endswith(".")
        assert path == "/v2/rerank" or said["error"]["code"] == status


@pytest.mark.parametrize(
    ("more", "status", "kind"),
    [
        ({"texts": []}, 400, "Empty"),
        ({"query": ""}, 400, "Empty"),
        ({"texts": "a"}, 422, "Validation"),
        ({"texts": [{"text": "a"}]}, 422, "Validation"),
        ({"query": 1}, 422, "Validation"),
        ({"texts": ["a"] * 10_001}, 422, "Validation"),
        ({"truncate": "yes"}, 422, "Validation"),
        ({"truncation_direction": "left"}, 422, "Validation"),
        ({"raw_scores": 0}, 422, "Validation"),
    ],
)
def test_errors_of_text_embeddings_inference(server: Server, more: dict[str, Any], status: int, kind: str) -> None:
    response = post(server, "/rerank", {"query": "q", "texts": ["a"], **more})
    assert (response.status_code, response.json()["error_type"]) == (status, kind)
    assert isinstance(response.json()["error"], str)


def test_a_text_that_is_cut_is_refused_where_truncation_is() -> None:
    from rerank_plugins.models import BUNDLED_NAME

    with serving(BUNDLED_NAME) as server:
        body = {"query": "q", "texts": ["short", "word " * 2000]}
        assert post(server, "/rerank", body).status_code == 200
        response = post(server, "/rerank", {**body, "truncate": False})
        assert (response.status_code, response.json()["error_type"]) == (422, "Validation")
        assert "texts[1]" in response.json()["error"]
        # A query that leaves no room for a text is the client's error.
        response = post(server, "/v2/rerank", {"query": "word " * 2000, "documents": ["a"]})
        assert response.status_code == 400


def test_unknown_addresses_and_methods(server: Server) -> None:
    response = post(server, "/v3/rerank", {})
    assert response.status_code == 404
    assert "/v2/rerank" in response.json()["error"]["message"]
    response = httpx.get(server.url + "/v2/rerank")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ScoringError(f"not finite for {TEXTS[0]}"), 424),
        (ServerError(f"down: {TEXTS[0]}", url="http://x"), 503),
        (ServerError(f"wrong key: {TEXTS[0]}", url="http://x", status=401), 502),
        (RuntimeError(f"boom: {TEXTS[0]}"), 500),
    ],
)
def test_failures_of_the_model_tell_nobody_a_text(
    error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(FakeBackend):
        def logits(self, pairs: Any) -> Any:
            if any(text == TEXTS[0] for _, text in pairs):
                raise error
            return super().logits(pairs)

    with caplog.at_level(logging.DEBUG), serving(Failing(fingerprint="1")) as server:
        response = post(server, "/v2/rerank", {"query": QUERY, "documents": TEXTS})
        assert response.status_code == status
        assert TEXTS[0] not in response.text
        assert post(server, "/v2/rerank", {"query": QUERY, "documents": TEXTS[1:]}).status_code == 200
    assert type(error).__name__ in caplog.text
    for secret in (QUERY, *TEXTS):
        assert secret not in caplog.text


def test_logs_hold_no_text(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        post(server, "/v2/rerank", {"query": QUERY, "documents": TEXTS})
        post(server, "/v2/rerank?query=" + TEXTS[1], {"query": QUERY, "documents": [TEXTS[1], 5]})
        httpx.post(server.url + "/rerank", content=f"{{{TEXTS[1]}")
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    own = [record.getMessage() for record in ours if record.name == "rerank_plugins.server"]
    assert [line.split(" ")[:2] for line in own] == [["/v2/rerank", "200"], ["/v2/rerank", "400"], ["/rerank", "400"]]
    assert not any(text in record.getMessage() for record in ours for text in (QUERY, *TEXTS))


# -- keys -----------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    body = {"query": QUERY, "documents": TEXTS}
    with serving(api_key="sesame") as server:
        for headers in (
            {},
            {"Authorization": "sesame"},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer"},
        ):
            for path in ("/v2/rerank", "/rerank", "/v1/rerank"):
                response = post(server, path, body, headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
            for path in ("/info", "/v1/models", "/metrics"):
                assert httpx.get(server.url + path, headers=headers).status_code == 401
        assert post(server, "/v2/rerank", body, headers={"Authorization": "Bearer sesame"}).status_code == 200
        assert httpx.get(server.url + "/health").status_code == 200
        reranker = Reranker(HttpBackend(server.url, dialect="tei", api_key="sesame"))
        assert [item.index for item in reranker.rank(QUERY, TEXTS)] == ORDER
        with pytest.raises(ServerError, match="401"):
            Reranker(HttpBackend(server.url, dialect="tei", api_key="other")).rank(QUERY, TEXTS)
    assert "sesame" not in repr(ServerOptions(api_key="sesame"))


def test_only_this_machine_is_let_in_without_a_key() -> None:
    hosts = {"127.0.0.1": True, "localhost": True, "::1": True, "127.1.2.3": True}
    hosts |= {"0.0.0.0": False, "::": False, "192.168.0.5": False, "example.org": False}
    assert {host: is_loopback(host) for host in hosts} == hosts
    with pytest.raises(ConfigurationError, match="--no-auth"):
        serve(Reranker(FakeBackend()), ServerOptions(), host="0.0.0.0", port=0)


# -- bounds ---------------------------------------------------------------------------------------------------------


def test_over_the_limit_is_429_at_once() -> None:
    backend = SlowBackend()
    body = {"query": QUERY, "documents": TEXTS}
    with serving(backend, max_concurrent=2) as server, ThreadPoolExecutor(2) as pool:
        backend.gate.clear()
        running = [pool.submit(post, server, "/v2/rerank", body) for _ in range(2)]
        until(lambda: server.state.running == 2)
        started = time.monotonic()
        for path, say in (("/v2/rerank", "message"), ("/rerank", "error")):
            response = post(server, path, body)
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            assert say in response.json()
        response = post(server, "/rerank", {"query": QUERY, "texts": TEXTS})
        assert response.json()["error_type"] == "Overloaded"
        assert time.monotonic() - started < 5
        backend.gate.set()
        assert [future.result().status_code for future in running] == [200, 200]
        assert post(server, "/v2/rerank", body).status_code == 200


def test_a_client_that_goes_away_stops_its_work() -> None:
    backend = SlowBackend()
    with serving(backend, max_concurrent=1) as server:
        backend.gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v2/rerank", json={"query": "q", "documents": ["a"]}, timeout=0.3)
        until(lambda: server.state.running == 0)
        backend.gate.set()
        assert post(server, "/v2/rerank", {"query": "q", "documents": ["a"]}).status_code == 200


def test_work_that_nobody_waits_for_is_dropped() -> None:
    from rerank_plugins._cancellation import cancellation

    seen: list[bool] = []

    class Watching(FakeBackend):
        def logits(self, pairs: Any) -> Any:
            if pairs[0][0] == "slow":
                stop = cancellation.get()
                assert stop is not None
                until(lambda: stop.cancelled)
                seen.append(True)
            return super().logits(pairs)

    with serving(Watching(fingerprint="1")) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v2/rerank", json={"query": "slow", "documents": ["a"]}, timeout=0.3)
        until(lambda: seen)


def test_large_bodies_and_many_documents() -> None:
    with serving(max_body_bytes=2**20, max_texts=1000) as server:
        many = post(server, "/v2/rerank", {"query": "q", "documents": ["a"] * 100_000})
        assert many.status_code == 400
        assert "at most 1000" in many.json()["message"]
        for path in ("/v2/rerank", "/rerank"):
            large = post(server, path, {"query": "q", "documents": ["x" * 4_000_000]})
            assert large.status_code == 413

        def chunks():  # type: ignore[no-untyped-def]
            yield b'{"query": "q", "documents": ["'
            for _ in range(40):
                yield b"x" * 100_000

        assert httpx.post(server.url + "/v1/rerank", content=chunks()).status_code == 413
        assert post(server, "/v2/rerank", {"query": "q", "documents": ["a"] * 1000}).status_code == 200
        assert server.state.bodies.held == 0


def test_bodies_share_a_bound() -> None:
    with serving(max_body_bytes=2**20, max_texts=10) as server:
        server.state.bodies.at_once = 600_000
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as held:
            held.sendall(b"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n" + b" " * 500_000)
            until(lambda: server.state.bodies.held > 400_000)
            response = post(server, "/rerank", {"query": "q", "texts": ["x" * 300_000]})
            assert response.status_code == 429
        until(lambda: server.state.bodies.held == 0)
        assert post(server, "/rerank", {"query": "q", "texts": ["x" * 300_000]}).status_code == 200


def test_slow_senders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rerank_plugins.server._run.HEADERS_S", 0.4)
    with serving(body_s=0.4) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        head = b"POST /v2/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        with socket.create_connection(address, timeout=10) as slow:
            slow.sendall(head + b'{"query":')
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        for beginning in (b"", b"POST /v2/re", head[:-4]):
            with socket.create_connection(address, timeout=10) as slow:
                slow.sendall(beginning)
                assert slow.recv(1000) == b""
        # One that is idle between requests is left alone.
        with httpx.Client() as client:
            assert client.get(server.url + "/health").status_code == 200
            time.sleep(0.6)
            assert client.get(server.url + "/health").status_code == 200
        with socket.create_connection(address, timeout=10) as broken:
            broken.sendall(b"\x16\x03\x01\x02\x00nonsense\r\n\r\n")
            assert broken.recv(1000).startswith(b"HTTP/1.1 400")
        assert post(server, "/v2/rerank", {"query": "q", "documents": ["a"]}).status_code == 200


def test_a_work_that_takes_longer_than_a_head_may_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rerank_plugins.server._run.HEADERS_S", 0.2)
    backend = SlowBackend()
    with serving(backend) as server:
        backend.gate.clear()
        threading.Timer(0.8, backend.gate.set).start()
        assert post(server, "/v2/rerank", {"query": "q", "documents": ["a"]}).status_code == 200


def test_many_clients_at_the_same_time(server: Server) -> None:
    body = {"query": QUERY, "documents": TEXTS}
    with httpx.Client() as client, ThreadPoolExecutor(32) as pool:

        def call(_: int) -> dict[int, float]:
            return rows(client.post(server.url + "/v2/rerank", json=body, timeout=30))

        assert all(result == PROBABILITIES for result in pool.map(call, range(200)))


# -- beginning and end ----------------------------------------------------------------------------------------------


def test_ready_only_after_the_warm_up() -> None:
    backend = SlowBackend()
    backend.gate.clear()
    with serving(backend, wait=False) as server:
        until(lambda: server.started)
        response = httpx.get(server.url + "/health")
        assert (response.status_code, response.json()) == (503, {"status": "loading"})
        response = post(server, "/v2/rerank", {"query": "q", "documents": ["a"]})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert httpx.get(server.url + "/info").status_code == 503
        backend.gate.set()
        until(lambda: httpx.get(server.url + "/health").status_code == 200)
        assert post(server, "/v2/rerank", {"query": "q", "documents": ["a"]}).status_code == 200


def test_a_model_that_is_not_there_ends_the_server() -> None:
    server = Server(Reranker("/nowhere/at/all"), ServerOptions(), host="127.0.0.1", port=0)
    with pytest.raises(ModelLoadError):
        server.run_to_end()


def test_stopping_lets_running_calls_end() -> None:
    backend = SlowBackend()
    body = {"query": "q", "documents": ["a"]}
    with serving(backend) as server, ThreadPoolExecutor(1) as pool:
        backend.gate.clear()
        running = pool.submit(post, server, "/v2/rerank", body)
        until(lambda: server.state.running == 1)
        server.stop()
        response = post(server, "/v2/rerank", body)
        assert (response.status_code, response.json()) == (503, {"message": "The server is stopping."})
        assert httpx.get(server.url + "/health").status_code == 503
        backend.gate.set()
        assert running.result().status_code == 200
        until(lambda: refused(server))


def refused(server: Server) -> bool:
    try:
        httpx.get(server.url + "/health", timeout=1)
    except httpx.HTTPError:
        return True
    return False


def test_the_command_until_sigterm(tmp_path: Any) -> None:
    command = [sys.executable, "-m", "rerank_plugins", "serve", "--port", "0"]
    command += ["--api-key-env", "SERVE_KEY", "--raw-scores", "--max-concurrent", "4"]
    environment = {**os.environ, "SERVE_KEY": "sesame", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines: list[str] = []
        while "Listening at" not in (lines or [""])[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        url = lines[-1].split()[-1]
        until(lambda: healthy(url), 60)
        headers = {"Authorization": "Bearer sesame"}
        documents = ["git add stages files", "git revert undoes a commit"]
        body = {"query": "how do I undo a commit", "documents": documents}
        answer = httpx.post(url + "/v1/rerank", json=body, headers=headers).json()
        assert (answer["results"][0]["index"], answer["model"]) == (1, "rerank-plugins/minilm-l6")
        local = Reranker().logits("how do I undo a commit", documents)
        told = {row["index"]: row["relevance_score"] for row in answer["results"]}
        np.testing.assert_allclose([told[0], told[1]], local, atol=0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "")
        assert "commit" not in err
        assert "sesame" not in err
    finally:
        process.kill()


def healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--api-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["--host", "no.such.host.invalid", "--no-auth"], "Cannot listen"),
    ],
)
def test_commands_that_cannot_work(arguments: list[str], says: str) -> None:
    from typer.testing import CliRunner

    from rerank_plugins.cli._app import app

    result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    assert result.exit_code == 2
    assert says in result.output


def test_the_image_runs_what_there_is() -> None:
    import re
    import shlex
    from pathlib import Path

    from typer.testing import CliRunner

    from rerank_plugins.cli._app import app

    root = Path(__file__).parent.parent
    lines = (root / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in shlex.split(line)[1:-1]]
    let_in = {line.removeprefix("!") for line in (root / ".dockerignore").read_text().split() if line.startswith("!")}
    assert {"pyproject.toml", "rerank_plugins"} <= set(copied) == let_in
    assert all((root / name).exists() for name in copied)
    (user,) = [line.split()[1] for line in lines if line.startswith("USER")]
    assert user not in ("0", "root")
    command = [
        word for line in lines if line.startswith(("ENTRYPOINT", "CMD")) for word in json.loads(line.split(None, 1)[1])
    ]
    # Without the key that it names it says so, and does not start.
    result = CliRunner().invoke(app, command[1:])
    assert (result.exit_code, "RERANK_API_KEY" in result.output) == (2, True)
    port = command[command.index("--port") + 1]
    assert any(re.search(rf"^EXPOSE {port}$", line) for line in lines)
    assert any(line.lstrip().startswith("HEALTHCHECK") and f":{port}/health" in line for line in lines)


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="Cannot listen"):
            Server(Reranker(FakeBackend()), ServerOptions(), host="127.0.0.1", port=taken.getsockname()[1])


def test_the_application_is_an_asgi_application() -> None:
    from starlette.testclient import TestClient

    with TestClient(create_app(Reranker(FakeBackend(fingerprint="1")))) as client:
        until(lambda: client.get("/health").status_code == 200)
        assert rows(client.post("/v2/rerank", json={"query": QUERY, "documents": TEXTS})) == PROBABILITIES
    with pytest.raises(ConfigurationError):
        create_app(Reranker(FakeBackend()), ServerOptions(max_concurrent=0))
