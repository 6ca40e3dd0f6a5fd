"""A reranker on Amazon Bedrock (extra ``sagemaker``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rerank_plugins.backends._aws import AwsBackend
from rerank_plugins.backends._remote import Deadline, Limits, check_scores
from rerank_plugins.errors import ConfigurationError, ServerError

__all__ = ["BedrockBackend"]

LIMITS = Limits(texts=1000, characters=32_000)
"""Of Bedrock's ``Rerank``."""


class BedrockBackend(AwsBackend):
    """Scores by Bedrock's ``Rerank``: ``Reranker(BedrockBackend("arn:aws:bedrock:...:foundation-model/cohere..."))``.

    Its scores are probabilities. A text of more than 32,000 characters is cut and counts as ``truncated``.

    Args:
        model_arn: ARN of the model.
        region_name: AWS region; None takes the one of the ARN.
        client: A boto3 ``bedrock-agent-runtime`` client, with its own timeouts; None makes one. It is not pickled.
        timeout_s: For one call, with all its requests, retries and pauses.
        max_concurrent: Requests of one call at the same time.
        fingerprint: For `Reranker(cache=...)`: a string that changes whenever the model's scores do.

    Raises:
        ConfigurationError: A keyword that cannot work.
    """

    name = "bedrock"
    emits = "probability"

    def __init__(
        self,
        model_arn: str,
        *,
        region_name: str | None = None,
        client: Any = None,
        timeout_s: float = 60.0,
        max_concurrent: int = 4,
        fingerprint: str | None = None,
    ) -> None:
        parts = model_arn.split(":") if isinstance(model_arn, str) else []
        if len(parts) < 6 or parts[0] != "arn":
            raise ConfigurationError(
                "model_arn must be an ARN such as arn:aws:bedrock:us-west-2::foundation-model/cohere.rerank-v3-5:0; "
                f"got {model_arn!r}."
            )
        super().__init__(
            "bedrock-agent-runtime",
            region_name=region_name or parts[3] or None,
            client=client,
            timeout_s=timeout_s,
            max_concurrent=max_concurrent,
            fingerprint=fingerprint,
        )
        self.model_arn = model_arn

    @property
    def model_name(self) -> str:
        """The model's ARN."""
        return self.model_arn

    @property
    def address(self) -> str:
        """The model's ARN, for errors."""
        return self.model_arn

    def __repr__(self) -> str:
        return f"BedrockBackend({self.model_arn!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        config = {
            "region_name": self._region_name,
            "timeout_s": self.timeout_s,
            "max_concurrent": self.max_concurrent,
            "fingerprint": self.fingerprint,
        }
        return _rebuilt, (self.model_arn, config, self.instruction)

    def _limits(self, deadline: Deadline) -> Limits:
        return LIMITS

    def _scores(self, query: str, texts: Sequence[str], deadline: Deadline) -> list[float]:
        asked = self._query(query)
        request = {
            "queries": [{"type": "TEXT", "textQuery": {"text": asked}}],
            "sources": [
                {"type": "INLINE", "inlineDocumentSource": {"type": "TEXT", "textDocument": {"text": text}}}
                for text in texts
            ],
            "rerankingConfiguration": {
                "type": "BEDROCK_RERANKING_MODEL",
                "bedrockRerankingConfiguration": {
                    "modelConfiguration": {"modelArn": self.model_arn},
                    "numberOfResults": len(texts),
                },
            },
        }
        rows: list[Any] = []
        page: dict[str, str] = {}

        def call(client: Any) -> Any:
            return client.rerank(**request, **page)

        # A page has at least one row, so more pages than texts are no answer.
        for _ in texts:
            answer = self._answered(call, (asked, *texts), deadline)
            rows += answer.get("results", [])
            if not answer.get("nextToken"):
                break
            page = {"nextToken": answer["nextToken"]}
        return check_scores(rows, len(texts), "relevanceScore", self._wrong)

    def _wrong(self, what: str) -> ServerError:
        return ServerError(f"{self.address} answered with {what}.", url=self.address, status=200)


def _rebuilt(model_arn: str, config: dict[str, Any], instruction: str | None) -> BedrockBackend:
    backend = BedrockBackend(model_arn, **config)
    backend.instruction = instruction
    return backend
