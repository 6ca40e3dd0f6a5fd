"""Requests over HTTP: one attempt at a time, within what is left of the call's time."""

from __future__ import annotations

import functools
import json
import os
import ssl
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from rerank_plugins._extras import import_extra
from rerank_plugins.backends._remote import RETRIES, Deadline, Failure, retries_of
from rerank_plugins.backends.http._messages import asked_pause_s, error_message
from rerank_plugins.errors import ConfigurationError, ServerError

__all__ = ["Answer", "Credentials", "attempt", "decoded", "http_library", "trust"]

CONNECT_S = 5.0
"""Time to connect: a server that is not there must not use up what others could answer in."""
LARGEST_ANSWER = 64 * 2**20


class Credentials:
    """A key, and user and password: never in a repr, never in a pickle.

    Args:
        key: The key itself: a str, or pydantic's ``SecretStr``.
        variable: Name of an environment variable that holds it; read at each request.
        login: User and password.

    Raises:
        ConfigurationError: Both a key and a variable, or a key that no header can hold.
    """

    def __init__(self, key: Any = None, variable: str | None = None, login: tuple[str, str] | None = None) -> None:
        reveal = getattr(key, "get_secret_value", None)
        value = reveal() if callable(reveal) else key
        if value is not None and not isinstance(value, str):
            raise ConfigurationError(f"api_key must be a str, a SecretStr or None; got {type(key).__name__}.")
        if value is not None and variable is not None:
            raise ConfigurationError("Give api_key or api_key_env, not both.")
        self._key = value if value is None else _checked(value, "api_key")
        self.variable = variable
        self._login = login
        self.lost = False

    def __repr__(self) -> str:
        return "Credentials(**********)"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_without_secrets, (self.variable, self.lost or self._key is not None or self._login is not None))

    def lost_copy(self) -> Credentials:
        """These, where a header was a secret and is not pickled."""
        return _without_secrets(self.variable, True)

    @property
    def given(self) -> bool:
        """Whether there is a key that was given directly."""
        return self._key is not None

    def key(self) -> str | None:
        """The key.

        Raises:
            ConfigurationError: It is not there.
        """
        if self.lost:
            raise ConfigurationError(
                "This backend was unpickled, and keys, passwords and secret headers are not pickled. Name the "
                "environment variable that holds the key: HttpBackend(..., api_key_env=NAME)."
            )
        if self.variable is None:
            return self._key
        value = os.environ.get(self.variable)
        if not value:
            raise ConfigurationError(
                f"The environment variable {self.variable!r} (api_key_env) is not set. Set it to the server's key."
            )
        return _checked(value, f"The environment variable {self.variable!r}")

    def login(self) -> tuple[str, str] | None:
        """User and password."""
        return self._login


def _checked(key: str, name: str) -> str:
    if not key.strip() or not key.isascii() or not key.isprintable():
        raise ConfigurationError(f"{name} must be a key of printable ASCII characters, without line ends.")
    return key.strip()


def _without_secrets(variable: str | None, lost: bool) -> Credentials:
    credentials = Credentials(variable=variable)
    credentials.lost = lost
    return credentials


class Answer(NamedTuple):
    """What a server answered."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes


def http_library(transport: object = None) -> ModuleType:
    """httpx2, or httpx where only that is installed or where `transport` belongs to it."""
    of_transport = {cls.__module__.partition(".")[0] for cls in type(transport).__mro__}
    if "httpx" not in of_transport:
        try:
            return import_module("httpx2")
        except ImportError:
            pass
    # Both come with huggingface-hub, one of them with each of its versions.
    return import_extra("httpx", "http")


@functools.cache
def trust(library: str) -> ssl.SSLContext:
    """Whose certificates are trusted; made once, because reading them takes 40 ms."""
    return import_module(library).create_ssl_context()  # type: ignore[no-any-return]


def attempt(
    library: ModuleType,
    client: Any,
    deadline: Deadline,
    url: str,
    *,
    body: bytes | None,
    headers: Mapping[str, str],
    auth: Callable[[Any], Any] | None,
    inputs: Iterable[str] = (),
    secret: str | None = None,
    lasting: Iterable[str] = (),
) -> Answer:
    """Send one request and read the whole answer.

    Args:
        library: httpx2 or httpx.
        client: Its client.
        deadline: The request gets what is left.
        url: Where.
        body: Sent by POST; None for GET.
        headers: Sent with it.
        auth: Puts the secrets into the request.
        inputs: Query and texts, which no error may repeat.
        secret: Nor this.
        lasting: Messages of statuses from 500 on that do not pass.

    Returns:
        An answer with status 200.

    Raises:
        Failure: There was none.
    """
    left = deadline.left_s
    if not left:
        raise Failure(deadline.error(url))
    timeout = library.Timeout(left, connect=min(left, CONNECT_S), pool=left)
    method = "GET" if body is None else "POST"
    parts: list[bytes] = []
    size = 0
    try:
        with client.stream(
            method, url, content=body, headers=headers, timeout=timeout, auth=auth, follow_redirects=False
        ) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > LARGEST_ANSWER:
                    raise Failure(_error(url, response.status_code, f"more than {LARGEST_ANSWER:,} bytes"))
                if not deadline.left_s:
                    raise Failure(deadline.error(url))
    except (library.HTTPError, library.StreamError, ssl.SSLError) as error:
        raise _no_answer(library, error, url, deadline) from error
    answer = Answer(url, response.status_code, response.headers, b"".join(parts))
    if answer.status != 200:
        raise _refused(answer, inputs, secret, lasting)
    return answer


def decoded(answer: Answer, inputs: Iterable[str], secret: str | None) -> Any:
    """The JSON of an answer.

    Raises:
        Failure: It is none, or an object that tells of an error.
    """
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        kind = answer.headers.get("content-type", "no content type").partition(";")[0]
        raise Failure(
            _error(
                answer.url,
                answer.status,
                f"something that is no JSON ({kind}, {len(answer.body)} bytes). Is this the address of a rerank server",
            )
        ) from None
    if isinstance(value, dict) and (value.get("error") or value.get("errors")):
        message = error_message(answer.body, inputs, secret)
        raise Failure(_error(answer.url, answer.status, f"an error: {message}"))
    return value


def _error(url: str, status: int, what: str, passing: bool | None = None) -> ServerError:
    return ServerError(f"{url} answered {status} with {what}.", url=url, status=status, passing=passing)


def _refused(answer: Answer, inputs: Iterable[str], secret: str | None, lasting: Iterable[str]) -> Failure:
    status, url = answer.status, answer.url
    message = error_message(answer.body, inputs, secret)
    if 300 <= status < 400:
        target = answer.headers.get("location", "elsewhere").partition("?")[0]
        return Failure(
            _error(url, status, f"a redirect to {target}, which is not followed. Give the address it leads to")
        )
    retries = retries_of(status)
    # What the server says is read before it is cut or left out.
    if status >= 500 and any(part.encode() in answer.body for part in lasting):
        retries = 0
    hint = {
        401: " Give the server's key by api_key or api_key_env.",
        403: " The key may not do this.",
        404: " Check the address, the dialect and the model's name.",
        413: " Send fewer or shorter texts.",
        429: " The server is busy: send less at a time, or raise timeout_s.",
    }.get(status, "")
    text = f"{url} answered {status}{': ' + message.rstrip('.') if message else ''}.{hint}"
    error = ServerError(text, url=url, status=status, passing=retries > 0)
    return Failure(error, retries=retries, after_s=asked_pause_s(answer.headers) if retries else None)


def _no_answer(library: ModuleType, error: Exception, url: str, deadline: Deadline) -> Failure:
    if isinstance(error, library.TimeoutException) and not isinstance(error, library.ConnectTimeout):
        return Failure(deadline.error(url))
    if not deadline.left_s:
        return Failure(deadline.error(url))
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            told = cause.verify_message or str(cause)
            text = (
                f"{url} has a certificate that cannot be trusted: {told}. Use the name it was made for, or trust its "
                "issuer: HttpBackend(..., transport=HTTPTransport(verify=ssl_context))."
            )
            return Failure(ServerError(text, url=url, passing=False))
        cause = cause.__cause__ or cause.__context__
    lasting = isinstance(error, library.UnsupportedProtocol | library.DecodingError)
    text = f"{url} gave no answer: {type(error).__name__}: {error}. Check that the server runs."
    return Failure(ServerError(text, url=url, passing=not lasting), retries=0 if lasting else RETRIES)
