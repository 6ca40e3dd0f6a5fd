"""A rerank server as a backend."""

from __future__ import annotations

import base64
import contextvars
import functools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Literal

import numpy as np

from rerank_plugins._texts import scorable
from rerank_plugins.backends._remote import (
    RETRIES,
    THREADS,
    Deadline,
    Failure,
    Limits,
    RemoteBackend,
    check_number,
    check_scores,
    pause_s,
    restart_in_child,
    retried,
    sleep,
)
from rerank_plugins.backends.http._address import beside, endpoint, parse
from rerank_plugins.backends.http._client import Answer, Credentials, attempt, decoded, http_library, trust
from rerank_plugins.backends.http._hedge import Latencies
from rerank_plugins.backends.http._replicas import Node, Replicas
from rerank_plugins.backends.http.dialects import DIALECTS, Ask, Dialect
from rerank_plugins.errors import ConfigurationError, ServerError
from rerank_plugins.selection import to_scale

__all__ = ["HttpBackend"]

_SECRET = re.compile("key|token|auth|secret|cookie", re.IGNORECASE)
"""Names of headers whose values are secrets."""


class HttpBackend(RemoteBackend):
    """Scores on a rerank server: ``Reranker(HttpBackend("http://localhost:8080", dialect="tei"))``.

    Texts are sent in requests that the server takes, a few at the same time. What passes (no connection, 408, 429, 502,
    503, 504, 529, once another status from 500 on) is tried again until `timeout_s`, after the pause that the server
    asks for; every answer is checked. Threads and tasks share one backend, and its connections.

    Args:
        url: Address of the server, or of its rerank endpoint; several for replicas, which are asked in turn, and where
            one that does not answer rests. None for the hosted service of the dialect.
        dialect: Kind of the server: ``"cohere"``, ``"jina"`` (also LiteLLM, Xinference, SiliconFlow, llama.cpp),
            ``"vllm"``, ``"infinity"``, ``"tei"`` (also llama.cpp, ``rerank-plugins serve``), ``"voyage"``, ``"nim"``,
            ``"mixedbread"`` or ``"pinecone"``.
        model: Name of the model at the server.
        api_key: The key, a str or a ``SecretStr``. It is not pickled: a copy in another process needs `api_key_env`.
        api_key_env: Name of an environment variable that holds the key, read at each request.
        timeout_s: For one call, with all its requests, retries and pauses.
        max_concurrent: Requests of one call at the same time.
        max_texts: Most texts of a request, where the server takes fewer than its kind usually does.
        hedge: Ask a second server where the first takes longer than nine in ten requests did, and take the first
            answer: at most for one request in ten, and only with two addresses or more. Paid services bill both.
        emits: What the server's scores are, ``"logit"`` or ``"probability"``, where it is not what its dialect usually
            gives.
        fingerprint: For `Reranker(cache=...)`: a string that changes whenever the server's scores do. The dialect
            ``"tei"`` asks the server for its model and that one's revision.
        headers: Sent with each request. Values are never shown; of those whose name says key, token, auth, secret or
            cookie, none is pickled.
        extra_body: Put into each request, e.g. ``{"priority": 1}``.
        transport: An ``httpx2.BaseTransport`` (or httpx's): for certificates, proxies and tests.

    Attributes:
        emits: ``"logit"`` where the server has a switch for them, otherwise ``"probability"``.
        url: Address of the (first) endpoint.

    Raises:
        ConfigurationError: A keyword that cannot work.

    Example:
        >>> backend = HttpBackend("http://localhost:8080", dialect="tei")
        >>> backend.url
        'http://localhost:8080/rerank'
    """

    name = "http"

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        dialect: str,
        model: str | None = None,
        api_key: Any = None,
        api_key_env: str | None = None,
        timeout_s: float = 30.0,
        max_concurrent: int = 4,
        max_texts: int | None = None,
        hedge: bool = False,
        emits: Literal["logit", "probability"] | None = None,
        fingerprint: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        transport: Any = None,
    ) -> None:
        super().__init__(timeout_s=timeout_s, max_concurrent=max_concurrent)
        if dialect not in DIALECTS:
            raise ConfigurationError(f"dialect must be one of {', '.join(map(repr, DIALECTS))}; got {dialect!r}.")
        self.dialect: Dialect = DIALECTS[dialect]
        if emits not in (None, "logit", "probability"):
            raise ConfigurationError(f"emits must be 'logit', 'probability' or None; got {emits!r}.")
        if max_texts is not None:
            check_number("max_texts", max_texts, whole=True)
        urls: list[Any] = [self.dialect.default_url] if url is None else [url]
        if isinstance(url, Sequence) and not isinstance(url, str):
            urls = list(url)
        if not urls or urls[0] is None:
            raise ConfigurationError(f"The dialect {dialect!r} has no hosted service: give the address of a server.")
        addresses = [parse(each) for each in urls]
        logins = {address.login for address in addresses}
        if len(logins) > 1:
            raise ConfigurationError("All addresses of one backend must have the same user and password.")
        if hedge and len(addresses) < 2:
            raise ConfigurationError("hedge=True needs two addresses or more: url=[...].")
        try:
            json.dumps(extra_body)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"extra_body must be what JSON can hold: {error}.") from None
        self.model = model
        self.emits = self.dialect.emits if emits is None else emits
        self.max_texts = max_texts
        self.hedge = hedge
        self.extra_body = dict(extra_body or {})
        self.takes_max_length = self.dialect.takes_max_length
        self._given_emits = emits
        self._addresses = [address.url for address in addresses]
        self._fingerprint = fingerprint
        self._headers = dict(headers or {})
        self._credentials = Credentials(api_key, api_key_env, logins.pop())
        self._transport = transport
        self._library = http_library(transport)
        self._replicas = Replicas([endpoint(address.parts, self.dialect.path) for address in addresses])
        self._latencies = Latencies()
        self._info = _Info()

    # -- settings -----------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Address of the (first) endpoint, without user and password."""
        return self._replicas.nodes[0].url

    @property
    def address(self) -> str:
        """As `url`."""
        return self.url

    @property
    def pairs_at_a_time(self) -> int:  # type: ignore[override]
        """With a deadline, what one round of requests holds."""
        return self.max_concurrent * (self.max_texts or self.dialect.limits.texts or 1000)

    @property
    def model_name(self) -> str:
        """Name of the model, or the address where none was given."""
        return self.url if self.model is None else self.model

    @property
    def fingerprint(self) -> str | None:  # type: ignore[override]
        """What a score cache knows the server's model by; see the argument. May ask the server, once.

        Raises:
            ServerError: The server must be asked, and did not answer.
        """
        told = self._fingerprint
        if told is None and self.dialect.tells_limits:
            info = self._told(Deadline(self.timeout_s))
            # The revision: a name alone outlives the weights behind it.
            if info.get("model_id") and info.get("model_sha"):
                told = f"{info['model_id']}@{info['model_sha']}:{info.get('model_dtype')}"
        return None if told is None else f"{self.dialect.name}:{self.emits}:{self.model}:{told}"

    def __repr__(self) -> str:
        urls = self._addresses[0] if len(self._addresses) == 1 else self._addresses
        shown = {name: value for name, value in self._config().items() if value != _DEFAULTS[name]}
        parts = [repr(urls), f"dialect={self.dialect.name!r}", *(f"{name}={value!r}" for name, value in shown.items())]
        secrets = {
            "api_key": self._credentials.given,
            "headers": bool(self._headers),
            "login": self._credentials.login() is not None,
        }
        return f"HttpBackend({', '.join(parts + [f'{name}=**********' for name, there in secrets.items() if there])})"

    def _config(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "api_key_env": self._credentials.variable,
            "timeout_s": self.timeout_s,
            "max_concurrent": self.max_concurrent,
            "max_texts": self.max_texts,
            "hedge": self.hedge,
            "emits": self._given_emits,
            "fingerprint": self._fingerprint,
            "extra_body": self.extra_body or None,
            "transport": self._transport,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        secret = any(_SECRET.search(name) for name in self._headers)
        state = {
            "max_length": self.max_length,
            "instruction": self.instruction,
            "_credentials": self._credentials.lost_copy() if secret else self._credentials,
            "_headers": {name: value for name, value in self._headers.items() if not _SECRET.search(name)},
        }
        return _rebuilt, (self._addresses, self.dialect.name, self._config(), state)

    # -- requests -----------------------------------------------------------------------------------------------

    def _limits(self, deadline: Deadline) -> Limits:
        limits = self.dialect.limits
        texts, body_bytes = limits.texts, limits.body_bytes
        if self.dialect.tells_limits:
            told = self._told(deadline, needed=False)
            texts = _count(told.get("max_client_batch_size")) or texts
            body_bytes = _count(told.get("payload_limit")) or body_bytes
        return Limits(self.max_texts or texts, limits.characters, body_bytes)

    def about(self, name: str) -> dict[str, Any]:
        """What the server says of itself at an address beside that of reranking, such as ``info`` or ``v1/models``.

        Args:
            name: Path from the root of the server.

        Returns:
            The JSON object; empty where the server has none there.

        Raises:
            ServerError: The server did not answer.
        """
        deadline = Deadline(self.timeout_s)

        def ask() -> dict[str, Any]:
            node = self._replicas.next()
            if node is None:
                raise self._all_rest(None)
            try:
                _, said = self._exchange(node, deadline, None, beside(node.url, name), ())
            except Failure as failure:
                if failure.error.passing or failure.error.status in (401, 403):
                    raise
                return {}
            return said if isinstance(said, dict) else {}

        return retried(ask, deadline)

    def _told(self, deadline: Deadline, needed: bool = True) -> Mapping[str, Any]:
        """What ``/info`` says; asked once, unless the server does not answer."""
        info = self._info
        with info.lock:
            if info.told is not None:
                return info.told
            node = self._replicas.next()
            if node is None:
                if needed:
                    raise self._all_rest(None)
                return {}
            try:
                _, told = self._exchange(node, deadline, None, beside(node.url, "info"), ())
            except Failure as failure:
                if failure.error.passing or failure.error.status in (401, 403):
                    if needed:
                        raise failure.error from failure.__cause__
                    return {}
                told = {}
            info.told = told if isinstance(told, dict) else {}
            return info.told

    def _scores(self, query: str, texts: Sequence[str], deadline: Deadline) -> list[float]:
        dialect = self.dialect
        asked, instruction = query, self.instruction
        if instruction is not None and not dialect.takes_instruction:
            asked, instruction = scorable(instruction) + query, None
        body = {**dialect.body(Ask(asked, texts, self.model, self.max_length, instruction)), **self.extra_body}
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        inputs = (asked, *texts)

        def scores(node: Node) -> list[float]:
            answer, said = self._exchange(node, deadline, content, node.url, inputs)
            rows = said if dialect.rows is None else said.get(dialect.rows) if isinstance(said, dict) else None

            def wrong(what: str) -> ServerError:
                return ServerError(
                    f"{node.url} answered 200 with {what}. Check that it is a {dialect.name!r} server.",
                    url=node.url,
                    status=200,
                )

            if rows is None:
                raise Failure(wrong(f"no list {dialect.rows!r}"))
            try:
                values = check_scores(rows, len(texts), dialect.score, wrong)
            except ServerError as error:
                raise Failure(error) from None
            return self._as_emitted(values, answer)

        return self._tried(scores, deadline)

    def _as_emitted(self, values: list[float], answer: Answer) -> list[float]:
        if self.emits == "logit":
            return values
        if self._given_emits is None and answer.headers.get("server", "").startswith("llama.cpp"):
            # Its scores are logits in every shape, and it says who it is.
            return [float(value) for value in to_scale(np.asarray(values), "probability")]
        for value in values:
            if not 0.0 <= value <= 1.0:
                raise Failure(
                    ServerError(
                        f"{answer.url} answered 200 with the score {value:g}, which is no probability. If its "
                        f"scores are logits, say so: HttpBackend(..., dialect={self.dialect.name!r}, emits='logit').",
                        url=answer.url,
                        status=200,
                    )
                )
        return values

    def _tried(self, ask: Callable[[Node], list[float]], deadline: Deadline) -> list[float]:
        """`ask` of one server after another, until one answers, an error is final, or no time is left."""
        last: Failure | None = None
        node: Node | None = None
        for retry in range(RETRIES + 1):
            node = self._replicas.next(but=node)
            if node is None:
                raise self._all_rest(last)
            pause = self._pause_s(node, last, retry)
            if pause >= deadline.left_s:
                raise _busy(node, deadline) if last is None else last.error from None
            if pause:
                sleep(pause)
            try:
                return self._hedged(ask, node, deadline) if self.hedge else ask(node)
            except Failure as failure:
                last = failure
                if retry >= failure.retries:
                    break
        assert last is not None
        raise last.error from last.__cause__

    def _pause_s(self, node: Node, last: Failure | None, retry: int) -> float:
        busy = node.busy_s
        if last is None or busy:
            return busy
        # Another server need not be waited for.
        return pause_s(retry - 1) if retry >= len(self._replicas) else 0.0

    def _all_rest(self, last: Failure | None) -> ServerError:
        said = "" if last is None else f" The last error: {last.error}"
        return ServerError(
            f"None of the {len(self._replicas)} servers ({', '.join(node.url for node in self._replicas.nodes)}) "
            f"answers; the next one is asked again in {self._replicas.wakes_in_s():.1f} s.{said}",
            url=self.url,
        )

    def _hedged(self, ask: Callable[[Node], list[float]], node: Node, deadline: Deadline) -> list[float]:
        """The first answer of one server, or of another that is asked where the first one is slow."""
        pool = self._process.pool("hedges", 2 * THREADS)
        running: list[Future[list[float]]] = [pool.submit(contextvars.copy_context().run, ask, node)]
        slow_s = self._latencies.slow_s()
        done, _ = wait(running, timeout=deadline.left_s if slow_s is None else slow_s)
        if not done and slow_s is not None and self._latencies.may_hedge():
            other = self._replicas.next(but=node)
            if other is not None and other is not node and not other.busy_s:
                running.append(pool.submit(contextvars.copy_context().run, ask, other))
        waiting = set(running)
        while waiting:
            done, waiting = wait(waiting, timeout=deadline.left_s + 0.05, return_when=FIRST_COMPLETED)
            good = next((future for future in done if future.exception() is None), None)
            if good is not None:
                return good.result()
            if not done:
                raise Failure(deadline.error(node.url))
        return running[0].result()

    def _exchange(
        self, node: Node, deadline: Deadline, content: bytes | None, url: str, inputs: Sequence[str]
    ) -> tuple[Answer, Any]:
        """The answer of one request, and its JSON; what it tells of the server is remembered."""
        secret = self._credentials.key()
        headers = {"Content-Type": "application/json", "Accept": "application/json", **self.dialect.headers}
        started = deadline.left_s
        try:
            answer = attempt(
                self._library,
                self._process.client(self._new_client),
                deadline,
                url,
                body=content,
                headers={**headers, **self._headers},
                auth=functools.partial(_signed, self._credentials, self.dialect),
                inputs=inputs,
                secret=secret,
                lasting=self.dialect.lasting,
            )
            self._replicas.answered(node)
            if content is not None:
                self._latencies.add(started - deadline.left_s)
            return answer, decoded(answer, inputs, secret)
        except Failure as failure:
            if failure.error.status is not None:
                self._replicas.answered(node)
                if failure.retries:
                    self._replicas.busy(node, failure.after_s)
            elif failure.error.passing:
                self._replicas.failed(node)
            raise

    def _new_client(self) -> Any:
        limits = self._library.Limits(max_connections=None, max_keepalive_connections=THREADS)
        return self._library.Client(transport=self._transport, limits=limits, verify=trust(self._library.__name__))


def _signed(credentials: Credentials, dialect: Dialect, request: Any) -> Any:
    # Here and not in headers that are passed on, so that no secret stands in a traceback.
    key, login = credentials.key(), credentials.login()
    if key is not None:
        request.headers[dialect.key_header] = dialect.key_prefix + key
    elif login is not None:
        request.headers["Authorization"] = "Basic " + base64.b64encode(":".join(login).encode()).decode()
    return request


def _busy(node: Node, deadline: Deadline) -> ServerError:
    return ServerError(
        f"{node.url} has asked for a pause of {node.busy_s:.1f} s more, and this call has {deadline.left_s:.1f} s "
        "(timeout_s). Ask later, or raise timeout_s.",
        url=node.url,
        status=429,
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


class _Info:
    """What the server says of itself; None before it was asked."""

    def __init__(self) -> None:
        self.told: dict[str, Any] | None = None
        self.start_afresh()
        restart_in_child(self)

    def start_afresh(self) -> None:
        self.lock = threading.Lock()


def _rebuilt(urls: list[str], dialect: str, config: dict[str, Any], state: dict[str, Any]) -> HttpBackend:
    backend = HttpBackend(urls, dialect=dialect, **config)
    backend.__dict__.update(state)
    return backend


_DEFAULTS = {
    "model": None,
    "api_key_env": None,
    "timeout_s": 30.0,
    "max_concurrent": 4,
    "max_texts": None,
    "hedge": False,
    "emits": None,
    "fingerprint": None,
    "extra_body": None,
    "transport": None,
}
