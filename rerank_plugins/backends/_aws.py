"""What SageMaker and Bedrock share: a boto3 client, and its errors as ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rerank_plugins._extras import import_extra
from rerank_plugins._texts import scorable
from rerank_plugins.backends._remote import (
    RETRIES,
    THREADS,
    Deadline,
    Failure,
    RemoteBackend,
    retried,
    retries_of,
)
from rerank_plugins.backends.http._messages import shown
from rerank_plugins.errors import ConfigurationError, ServerError

__all__ = ["AwsBackend"]

PASSING = frozenset(
    {
        "BadGatewayException",
        "DependencyFailedException",
        "InternalDependencyException",
        "ModelNotReadyException",
        "ServiceQuotaExceededException",
        "ServiceUnavailable",
        "ServiceUnavailableException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
"""Error codes that pass, whatever their status."""


class AwsBackend(RemoteBackend):
    """A reranker behind an AWS service, signed and sent by boto3, whose own retries are switched off.

    Args:
        service: Name of the service for boto3.
        region_name: AWS region; None leaves it to boto3.
        client: A boto3 client of the caller's, with its own timeouts; None makes one. It is not pickled.
        timeout_s: For one call, with all its requests, retries and pauses.
        max_concurrent: Requests of one call at the same time.
        fingerprint: For `Reranker(cache=...)`.
    """

    def __init__(
        self,
        service: str,
        *,
        region_name: str | None,
        client: Any,
        timeout_s: float,
        max_concurrent: int,
        fingerprint: str | None,
    ) -> None:
        super().__init__(timeout_s=timeout_s, max_concurrent=max_concurrent)
        self._service = service
        self._region_name = region_name
        self._given_client = client
        self.fingerprint = fingerprint

    def _client(self) -> Any:
        return self._given_client or self._process.client(self._new_client)

    def _new_client(self) -> Any:
        boto3 = import_extra("boto3", "sagemaker")
        config = import_extra("botocore.config", "sagemaker").Config(
            connect_timeout=min(5.0, self.timeout_s),
            read_timeout=self.timeout_s,
            retries={"total_max_attempts": 1},
            max_pool_connections=THREADS,
        )
        try:
            # A session of its own: boto3's default one is not safe to make clients with from several threads.
            return boto3.session.Session().client(self._service, region_name=self._region_name, config=config)
        except import_extra("botocore.exceptions", "sagemaker").BotoCoreError as error:
            raise ConfigurationError(f"boto3 cannot make a client for {self._service}: {error}") from error

    def _query(self, query: str) -> str:
        return query if self.instruction is None else scorable(self.instruction) + query

    def _answered(self, call: Callable[[Any], Any], inputs: Sequence[str], deadline: Deadline) -> Any:
        """What `call` returns for a client, tried again where that may help."""
        client = self._client()
        exceptions = import_extra("botocore.exceptions", "sagemaker")

        def attempt() -> Any:
            try:
                return call(client)
            except exceptions.ClientError as error:
                raise self._refused(error.response, inputs) from error
            except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
                raise ConfigurationError(
                    f"AWS credentials are missing: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile "
                    "or a role."
                ) from error
            except exceptions.ReadTimeoutError as error:
                raise Failure(deadline.error(self.address)) from error
            except exceptions.SSLError as error:
                raise Failure(ServerError(f"{self.address}: {error}", url=self.address, passing=False)) from error
            except exceptions.HTTPClientError as error:
                text = f"{self.address} gave no answer: {type(error).__name__}. Check region and network."
                raise Failure(ServerError(text, url=self.address), retries=RETRIES) from error
            except exceptions.BotoCoreError as error:
                # What boto3 checks before it sends anything.
                raise ConfigurationError(f"boto3 does not send this request: {type(error).__name__}.") from error

        return retried(attempt, deadline)

    def _refused(self, response: Mapping[str, Any], inputs: Iterable[str]) -> Failure:
        error = response.get("Error", {})
        code = str(error.get("Code", ""))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        message = str(error.get("Message", ""))
        retries = RETRIES if code in PASSING else retries_of(status or 500)
        original = response.get("OriginalStatusCode")
        if original is not None:
            # The container's own answer, inside the service's 424.
            status, message = original, str(response.get("OriginalMessage", message))
            retries = retries_of(original)
        text = shown(message, inputs).rstrip(".")
        return Failure(
            ServerError(
                f"{self.address} answered {status} ({code}){': ' + text if text else ''}.",
                url=self.address,
                status=status,
                passing=retries > 0,
            ),
            retries=retries,
        )
