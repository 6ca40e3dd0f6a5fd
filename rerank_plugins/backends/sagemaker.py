"""A reranker on an Amazon SageMaker endpoint (extra ``sagemaker``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rerank_plugins.backends._aws import AwsBackend
from rerank_plugins.backends._remote import Deadline, Limits, check_number, check_scores
from rerank_plugins.errors import ConfigurationError, ServerError

__all__ = ["Handler", "SageMakerBackend"]

Handler = Literal["langchain", "tei", "cohere"]
"""What the container behind the endpoint speaks."""

BODY_BYTES = 6_291_456
"""Most bytes that SageMaker takes."""
_LIMITS = {
    "langchain": Limits(texts=1000, body_bytes=BODY_BYTES),
    "tei": Limits(texts=32, body_bytes=2_000_000),
    "cohere": Limits(texts=1000, body_bytes=BODY_BYTES),
}


class SageMakerBackend(AwsBackend):
    """Scores on a SageMaker endpoint: ``Reranker(SageMakerBackend("my-endpoint", handler="tei"))``.

    Args:
        endpoint_name: Name of the endpoint.
        handler: ``"langchain"``: the script of LangChain's ``SagemakerEndpointCrossEncoder`` (``text_pairs`` in, logits
            out); ``"tei"``: Hugging Face's Text Embeddings Inference container (logits); ``"cohere"``: Cohere's model
            packages (probabilities).
        region_name: AWS region; None leaves it to boto3.
        client: A boto3 ``sagemaker-runtime`` client, with its own timeouts; None makes one. It is not pickled.
        timeout_s: For one call, with all its requests, retries and pauses.
        max_concurrent: Requests of one call at the same time.
        max_texts: Most texts of a request; None takes what the kind of container usually takes.
        emits: What the scores are, ``"logit"`` or ``"probability"``, where it is not what the handler usually gives.
        fingerprint: For `Reranker(cache=...)`: a string that changes whenever the endpoint's scores do.

    Raises:
        ConfigurationError: A keyword that cannot work.
    """

    name = "sagemaker"

    def __init__(
        self,
        endpoint_name: str,
        handler: Handler = "langchain",
        *,
        region_name: str | None = None,
        client: Any = None,
        timeout_s: float = 60.0,
        max_concurrent: int = 4,
        max_texts: int | None = None,
        emits: Literal["logit", "probability"] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(
            "sagemaker-runtime",
            region_name=region_name,
            client=client,
            timeout_s=timeout_s,
            max_concurrent=max_concurrent,
            fingerprint=fingerprint,
        )
        if handler not in get_args(Handler):
            raise ConfigurationError(f"handler must be one of {', '.join(map(repr, _LIMITS))}; got {handler!r}.")
        if not isinstance(endpoint_name, str) or not endpoint_name:
            raise ConfigurationError(f"endpoint_name must be the name of an endpoint; got {endpoint_name!r}.")
        if emits not in (None, "logit", "probability"):
            raise ConfigurationError(f"emits must be 'logit', 'probability' or None; got {emits!r}.")
        if max_texts is not None:
            check_number("max_texts", max_texts, whole=True)
        self.endpoint_name = endpoint_name
        self.handler = handler
        self.max_texts = max_texts
        self.emits = emits or ("probability" if handler == "cohere" else "logit")

    @property
    def model_name(self) -> str:
        """Name of the endpoint."""
        return self.endpoint_name

    @property
    def address(self) -> str:
        """Name of the endpoint, for errors."""
        return f"sagemaker:{self.endpoint_name}"

    def __repr__(self) -> str:
        return f"SageMakerBackend({self.endpoint_name!r}, handler={self.handler!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        config = {
            "region_name": self._region_name,
            "timeout_s": self.timeout_s,
            "max_concurrent": self.max_concurrent,
            "max_texts": self.max_texts,
            "emits": self.emits,
            "fingerprint": self.fingerprint,
        }
        return _rebuilt, (self.endpoint_name, self.handler, config, self.instruction)

    def _limits(self, deadline: Deadline) -> Limits:
        limits = _LIMITS[self.handler]
        return Limits(self.max_texts or limits.texts, None, limits.body_bytes)

    def _overhead(self, query: str) -> int:
        return super()._overhead(self._query(query))

    def _text_overhead(self, query: str) -> int:
        # There the query stands beside each text.
        more = len(json.dumps(self._query(query))) if self.handler == "langchain" else 0
        return super()._text_overhead(query) + more

    def _scores(self, query: str, texts: Sequence[str], deadline: Deadline) -> list[float]:
        asked = self._query(query)
        content = json.dumps(self._body(asked, texts), ensure_ascii=False).encode()

        def call(client: Any) -> bytes:
            response = client.invoke_endpoint(
                EndpointName=self.endpoint_name, ContentType="application/json", Accept="application/json", Body=content
            )
            return bytes(response["Body"].read())

        answer = self._answered(call, (asked, *texts), deadline)
        try:
            said = json.loads(answer)
        except (ValueError, RecursionError):
            raise self._wrong("something that is no JSON") from None
        if self.handler == "tei":
            return check_scores(said, len(texts), "score", self._wrong)
        rows = said.get("scores" if self.handler == "langchain" else "results") if isinstance(said, dict) else None
        if self.handler == "langchain":
            if not isinstance(rows, list):
                raise self._wrong("no list 'scores'")
            rows = [{"index": i, "score": value} for i, value in enumerate(rows)]
            return check_scores(rows, len(texts), "score", self._wrong)
        return check_scores(rows, len(texts), "relevance_score", self._wrong)

    def _body(self, query: str, texts: Sequence[str]) -> dict[str, Any]:
        if self.handler == "langchain":
            return {"text_pairs": [[query, text] for text in texts]}
        if self.handler == "tei":
            return {"query": query, "texts": list(texts), "truncate": True, "raw_scores": True, "return_text": False}
        return {
            "query": query,
            "documents": [{"text": text} for text in texts],
            "top_n": len(texts),
            "return_documents": False,
            "rank_fields": ["text"],
        }

    def _wrong(self, what: str) -> ServerError:
        return ServerError(
            f"{self.address} answered with {what}. Check that its container is a {self.handler!r} one.",
            url=self.address,
            status=200,
        )


def _rebuilt(endpoint_name: str, handler: Handler, config: dict[str, Any], instruction: str | None) -> SageMakerBackend:
    backend = SageMakerBackend(endpoint_name, handler, **config)
    backend.instruction = instruction
    return backend
