"""SageMaker and Bedrock: the real botocore against a server on loopback, whose requests must be signed rightly."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
from rerank_server import Fault, RerankServer, hang, probability, reset, running

from rerank_plugins import Reranker
from rerank_plugins.backends.bedrock import BedrockBackend
from rerank_plugins.backends.sagemaker import SageMakerBackend
from rerank_plugins.errors import ConfigurationError, ServerError, ServerTimeout
from rerank_plugins.testing import FakeBackend, check_backend_contract, word_overlap

pytest.importorskip("boto3")

QUERY = "red fox in the snow"
TEXTS = ["a blue whale", "the red fox", "snow in the red morning, a fox", "nothing", "fox fox fox"]
ARN = "arn:aws:bedrock:us-west-2::foundation-model/cohere.rerank-v3-5:0"
KEY_ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    with running() as started:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", started.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL_BEDROCK_AGENT_RUNTIME", started.url)
        started.rank = answer
        yield started


def answer(body: dict[str, Any]) -> Any:
    if "text_pairs" in body:
        return {"scores": [word_overlap(query, text) for query, text in body["text_pairs"]]}
    if "texts" in body:
        rows = [{"index": i, "score": word_overlap(body["query"], text)} for i, text in enumerate(body["texts"])]
        return sorted(rows, key=lambda row: -row["score"])
    if "sources" in body:
        (query,) = body["queries"]
        texts = [source["inlineDocumentSource"]["textDocument"]["text"] for source in body["sources"]]
        rows = [
            {"index": i, "relevanceScore": probability(query["textQuery"]["text"], text)}
            for i, text in enumerate(texts)
        ]
        rows.sort(key=lambda row: -row["relevanceScore"])
        # In pages of three.
        start = int(body.get("nextToken", 0))
        return {"results": rows[start : start + 3], **({"nextToken": str(start + 3)} if start + 3 < len(rows) else {})}
    texts = [document["text"] for document in body["documents"]]
    rows = [{"index": i, "relevance_score": probability(body["query"], text)} for i, text in enumerate(texts)]
    return {"results": sorted(rows, key=lambda row: -row["relevance_score"])}


def asked(backend: Any, texts: list[str] = TEXTS) -> np.ndarray:
    return backend.logits([(QUERY, text) for text in texts]).logits[:, 0]


def check_signature(server: RerankServer, body: bytes, region: str, service: str) -> None:
    """The signature (version 4) of the last request, computed anew.

    Source: "Signature Version 4 for API requests" in AWS's documentation of IAM.
    """
    headers = server.headers[-1]
    scheme, _, rest = headers["authorization"].partition(" ")
    fields = dict(part.strip().split("=", 1) for part in rest.split(","))
    key_id, day, *scope = fields["Credential"].split("/")
    assert (scheme, key_id, scope) == ("AWS4-HMAC-SHA256", KEY_ID, [region, service, "aws4_request"])
    names = fields["SignedHeaders"].split(";")
    digest = hashlib.sha256(body).hexdigest()
    canonical = "\n".join(
        ["POST", server.paths[-1], "", *(f"{name}:{headers[name]}" for name in names), "", ";".join(names), digest]
    )
    text = "\n".join(
        [
            "AWS4-HMAC-SHA256",
            headers["x-amz-date"],
            "/".join([day, *scope]),
            hashlib.sha256(canonical.encode()).hexdigest(),
        ]
    )
    key = f"AWS4{SECRET}".encode()
    for part in (day, *scope):
        key = hmac.digest(key, part.encode(), "sha256")
    assert fields["Signature"] == hmac.digest(key, text.encode(), "sha256").hex()


@pytest.mark.parametrize("handler", ["langchain", "tei", "cohere"])
def test_sagemaker_by_each_handler(server: RerankServer, handler: Any) -> None:
    backend = SageMakerBackend("my-endpoint", handler, region_name="eu-west-1")
    score = probability if handler == "cohere" else word_overlap
    np.testing.assert_allclose(asked(backend), [score(QUERY, text) for text in TEXTS], rtol=1e-6)
    assert server.paths[-1] == "/endpoints/my-endpoint/invocations"
    assert server.headers[-1]["content-type"] == "application/json"
    check_signature(server, server.raw[-1], "eu-west-1", "sagemaker")
    order = [item.index for item in Reranker(backend).rank(QUERY, TEXTS)]
    assert order == [item.index for item in Reranker(FakeBackend()).rank(QUERY, TEXTS)]
    check_backend_contract(backend)


def test_bedrock(server: RerankServer) -> None:
    backend = BedrockBackend(ARN)
    np.testing.assert_allclose(asked(backend), [probability(QUERY, text) for text in TEXTS], rtol=1e-6)
    assert server.paths == ["/rerank", "/rerank"]
    check_signature(server, server.raw[-1], "us-west-2", "bedrock")
    first = server.bodies[0]["rerankingConfiguration"]["bedrockRerankingConfiguration"]
    assert first == {"modelConfiguration": {"modelArn": ARN}, "numberOfResults": 5}
    assert server.bodies[1]["nextToken"] == "3"
    order = [item.index for item in Reranker(backend).rank(QUERY, TEXTS)]
    assert order == [item.index for item in Reranker(FakeBackend()).rank(QUERY, TEXTS)]


def test_bedrock_cuts_what_is_longer_than_it_takes(server: RerankServer) -> None:
    scored = BedrockBackend(ARN).logits([(QUERY, "fox " * 10_000), (QUERY, "x" * 32_000), (QUERY, "fox")])
    assert scored.truncated.tolist() == [True, False, False]
    sent = [source["inlineDocumentSource"]["textDocument"]["text"] for source in server.bodies[0]["sources"]]
    assert [len(text) for text in sent] == [32_000, 32_000, 3]


def test_sagemaker_bodies_stay_within_its_limit(server: RerankServer) -> None:
    texts = [f"{i} " + "fox " * 100_000 for i in range(40)]
    backend = SageMakerBackend("e", region_name="eu-west-1", timeout_s=120)
    np.testing.assert_allclose(asked(backend, texts), [word_overlap(QUERY, text) for text in texts], rtol=1e-5)
    assert len(server.raw) == 3
    assert max(map(len, server.raw)) <= 6_291_456
    assert SageMakerBackend("e", max_texts=1)._limits(None).texts == 1  # type: ignore[arg-type]


def refused(status: int, code: str, **fields: Any) -> Fault:
    return Fault(status, {"message": "no", "Message": "no", **fields}, {"x-amzn-ErrorType": code})


@pytest.mark.parametrize(
    ("fault", "status", "sent"),
    [
        (refused(429, "ThrottlingException"), 429, 4),
        (refused(400, "ThrottlingException"), 400, 4),
        (refused(429, "ModelNotReadyException"), 429, 4),
        (refused(503, "ServiceUnavailable"), 503, 4),
        (refused(530, "InternalDependencyException"), 530, 4),
        (refused(500, "InternalFailure"), 500, 2),
        (refused(400, "ValidationError"), 400, 1),
        (refused(403, "AccessDeniedException"), 403, 1),
        (refused(404, "ResourceNotFoundException"), 404, 1),
        (refused(424, "ModelError", OriginalStatusCode=503, OriginalMessage="overloaded"), 503, 4),
        (refused(424, "ModelError", OriginalStatusCode=429, OriginalMessage="overloaded"), 429, 4),
        (refused(424, "ModelError", OriginalStatusCode=422, OriginalMessage="batch size 33 > 32"), 422, 1),
        (refused(424, "ModelError", OriginalStatusCode=400, OriginalMessage="bad"), 400, 1),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else None,
)
def test_sagemaker_errors(
    server: RerankServer, monkeypatch: pytest.MonkeyPatch, fault: Fault, status: int, sent: int
) -> None:
    monkeypatch.setattr("rerank_plugins.backends._remote.FIRST_PAUSE_S", 0.01)
    server.faults = [fault] * 4
    with pytest.raises(ServerError, match=f"sagemaker:e answered {status}") as caught:
        asked(SageMakerBackend("e", "tei", region_name="eu-west-1"))
    assert (caught.value.status, caught.value.passing, len(server.bodies)) == (status, sent > 1, sent)
    server.faults = [fault]
    if sent > 1:
        asked(SageMakerBackend("e", "tei", region_name="eu-west-1"))


@pytest.mark.parametrize(
    ("code", "status", "sent"),
    [
        ("ThrottlingException", 429, 4),
        ("DependencyFailedException", 424, 4),
        ("ServiceQuotaExceededException", 400, 4),
        ("ValidationException", 400, 1),
        ("AccessDeniedException", 403, 1),
    ],
)
def test_bedrock_errors(
    server: RerankServer, monkeypatch: pytest.MonkeyPatch, code: str, status: int, sent: int
) -> None:
    monkeypatch.setattr("rerank_plugins.backends._remote.FIRST_PAUSE_S", 0.01)
    server.faults = [refused(status, code)] * 4
    with pytest.raises(ServerError, match=code) as caught:
        asked(BedrockBackend(ARN))
    assert (caught.value.status, caught.value.passing, len(server.bodies)) == (status, sent > 1, sent)


def test_no_error_repeats_a_text(server: RerankServer) -> None:
    server.faults = [refused(424, "ModelError", OriginalStatusCode=400, OriginalMessage="cannot read 'the red fox'")]
    with pytest.raises(ServerError, match="repeats the input"):
        asked(SageMakerBackend("e", "tei", region_name="eu-west-1"))


def test_connections(server: RerankServer) -> None:
    server.faults = [Fault(act=reset)]
    asked(SageMakerBackend("e", "tei", region_name="eu-west-1"))
    server.faults = [Fault(act=hang(3))]
    with pytest.raises(ServerTimeout, match=r"within 0\.5 s"):
        asked(SageMakerBackend("e", "tei", region_name="eu-west-1", timeout_s=0.5))


@pytest.mark.parametrize(
    ("handler", "change", "says"),
    [
        ("langchain", lambda said: {"scores": said["scores"][:-1]}, "index 4 is missing"),
        ("langchain", lambda said: said["scores"], "no list 'scores'"),
        ("langchain", lambda said: {"scores": [[score] for score in said["scores"]]}, "must be a finite number"),
        ("tei", lambda said: said[:-1], "4 scores for 5 texts"),
        ("cohere", lambda said: {"results": said["results"] * 2}, "twice"),
    ],
)
def test_wrong_answers(server: RerankServer, handler: Any, change: Any, says: str) -> None:
    server.change = change
    with pytest.raises(ServerError) as caught:
        asked(SageMakerBackend("e", handler, region_name="eu-west-1"))
    assert says in str(caught.value)
    assert not caught.value.passing


def test_pickles_hold_the_configuration(server: RerankServer) -> None:
    for backend in (
        SageMakerBackend("e", "tei", region_name="eu-west-1", max_texts=2, fingerprint="1"),
        BedrockBackend(ARN),
    ):
        right = asked(backend)
        data = pickle.dumps(backend)
        assert SECRET.encode() not in data
        twin = pickle.loads(data)
        np.testing.assert_array_equal(asked(twin), right)
        assert (repr(twin), twin.fingerprint) == (repr(backend), backend.fingerprint)


def test_a_client_of_the_callers() -> None:
    class Client:
        def invoke_endpoint(self, **request: Any) -> dict[str, Any]:
            return {"Body": io.BytesIO(json.dumps(answer(json.loads(request["Body"]))).encode())}

    assert asked(SageMakerBackend("e", client=Client()), ["red"]).tolist() == pytest.approx([0.99])


def test_configurations_that_cannot_work(server: RerankServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (
        lambda: SageMakerBackend("e", "other"),  # type: ignore[arg-type]
        lambda: SageMakerBackend(""),
        lambda: SageMakerBackend("e", emits="score"),  # type: ignore[arg-type]
        lambda: SageMakerBackend("e", max_texts=0),
        lambda: SageMakerBackend("e", timeout_s=-1),
        lambda: BedrockBackend("cohere.rerank-v3-5:0"),
        lambda: asked(SageMakerBackend("e")),
        lambda: Reranker(BedrockBackend(ARN), max_length=100).score(QUERY, TEXTS),
    ):
        with pytest.raises(ConfigurationError):
            call()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ConfigurationError, match="credentials are missing"):
        asked(SageMakerBackend("e", region_name="eu-west-1"))
