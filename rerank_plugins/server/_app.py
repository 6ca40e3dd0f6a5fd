"""The application behind ``rerank-plugins serve``: one model, in the shapes that clients speak."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import rerank_plugins
from rerank_plugins._threads import in_thread
from rerank_plugins.errors import ConfigurationError, InputError, ScoringError, ServerError
from rerank_plugins.reranker import Reranker
from rerank_plugins.server._body import Bodies
from rerank_plugins.server._metrics import Metrics
from rerank_plugins.server._shapes import Ask, Refused, Shape, answer, error_body, parse, shape_of

__all__ = ["RerankServer", "ServerOptions", "create_app"]

log = logging.getLogger("rerank_plugins.server")

RERANK_PATHS = ("/v2/rerank", "/v1/rerank", "/rerank", "/infinity/rerank", "/")
"""Cohere; Jina and Cohere's first version; vLLM, Infinity and text-embeddings-inference by the body; Infinity alone,
whose answers give documents as strings; text-embeddings-inference alone."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server allows.

    Attributes:
        api_key: What clients must send as a Bearer token; None lets everybody in.
        max_concurrent: Requests that are worked on at the same time; more are answered with 429.
        raw_scores: Give logits instead of probabilities where a request does not say which.
        max_texts: Most texts of a request.
        max_body_bytes: Most bytes of a request.
        body_s: Time that a request may take to arrive.
    """

    api_key: str | None = field(default=None, repr=False)
    max_concurrent: int = 64
    raw_scores: bool = False
    max_texts: int = 10_000
    max_body_bytes: int = 8 * 2**20
    body_s: float = 20.0


class RerankServer:
    """The state and the endpoints of one application.

    Args:
        reranker: What ranks. Its scores are given as probabilities, or as logits where a client asks for them.
        options: What the server allows.

    Attributes:
        ready: Whether the model is warm.
        stopping: Set it to refuse new requests.
        running: Requests that are worked on.
        failed: Why the model could not be loaded.
    """

    def __init__(self, reranker: Reranker, options: ServerOptions) -> None:
        if options.max_concurrent < 1:
            raise ConfigurationError(f"max_concurrent must be at least 1; got {options.max_concurrent}.")
        self.reranker = Reranker(**{**reranker.config, "scale": "probability"})
        self.options = options
        self.metrics = Metrics()
        self.bodies = Bodies(options.max_body_bytes, 4 * options.max_body_bytes, options.body_s)
        self.model = _public_name(self.reranker.model_name)
        self.ready = False
        self.stopping = False
        self.running = 0
        self.failed: BaseException | None = None
        self._started = int(time.time())
        self._configured = functools.lru_cache(maxsize=32)(self._configure)

    def _configure(self, instruction: str | None, max_length: int | None, spans: bool) -> Reranker:
        """The reranker with what one request says otherwise; the loaded model is shared."""
        config = self.reranker.config
        limit = self.reranker.max_length
        if max_length is not None and limit is not None:
            max_length = min(max_length, limit)
        windows = config["spans"] is None and config["passage_length"] is not None
        changes = {
            "instruction": instruction,
            "max_length": max_length,
            "spans": "sentences" if spans and not windows else None,
        }
        return Reranker(**{**config, **{name: value for name, value in changes.items() if value is not None}})

    async def warm_up(self) -> None:
        """Load the model and score a pair; then the server is ready."""
        try:
            await in_thread(self._warm)
        except Exception as error:
            self.failed = error
            return
        self.ready = True
        self.metrics.ready.set(1)

    def _warm(self) -> None:
        self.reranker.prepare()
        self.reranker.score("is it warm", ["It is warm now."])

    # -- endpoints ----------------------------------------------------------------------------------------------

    async def rerank(self, request: Request) -> Response:
        """Rank the texts of a request."""
        path, agent = request.url.path, request.headers.get("user-agent", "")
        started = time.perf_counter()
        n_texts = 0
        refused: Refused | None = None
        shape: Shape = shape_of(path, b"")
        body = b""
        try:
            self._check_open()
            body = await self.bodies.read(request)
            shape = shape_of(path, body)
            if self.running >= self.options.max_concurrent:
                raise Refused(429, "Too many requests at the same time. Try again.", "Overloaded")
            self.running += 1
            try:
                n_texts, content = await self._while_there(request, in_thread(self._ranked, path, agent, body))
            finally:
                self.running -= 1
            response = Response(content, media_type="application/json")
        except Refused as error:
            refused = error
        except ClientDisconnect:
            refused = Refused(499, "The client has gone.")
        except Exception as error:
            refused = self._failure(error)
        finally:
            self.bodies.free(len(body))
        if refused is not None:
            response = _error(shape, refused)
        seconds = time.perf_counter() - started
        self.metrics.requests.labels(path, str(response.status_code)).inc()
        self.metrics.seconds.observe(seconds)
        self.metrics.texts.inc(n_texts)
        log.info("%s %d %d texts %.1f ms", path, response.status_code, n_texts, 1000 * seconds)
        return response

    def _check_open(self) -> None:
        if self.stopping:
            raise Refused(503, "The server is stopping.", "Unhealthy")
        if not self.ready:
            raise Refused(503, "The model is loading. Try again.", "Unhealthy")

    def _ranked(self, path: str, agent: str, body: bytes) -> tuple[int, bytes]:
        options = self.options
        ask = parse(path, body, agent=agent, max_texts=options.max_texts, raw=options.raw_scores)
        # Spans are found of what is given back alone.
        ranking = self._reranker_for(ask).rank(ask.query, ask.texts, None if ask.spans is None else ask.top_n)
        if not all(item.scored for item in ranking):
            raise Refused(503, "Not all texts could be scored.", "Unhealthy")
        if ask.strict and any(item.truncated for item in ranking):
            where = min(item.index for item in ranking if item.truncated)
            raise Refused(422, f"texts[{where}] has more tokens than the model takes, and truncate is false.")
        return len(ask.texts), answer(ask, ranking, self.model)

    def _reranker_for(self, ask: Ask) -> Reranker:
        if ask.instruction is None and ask.max_length is None and ask.spans is None:
            return self.reranker
        return self._configured(ask.instruction, ask.max_length, ask.spans is not None)

    async def _while_there(self, request: Request, work: Awaitable[tuple[int, bytes]]) -> tuple[int, bytes]:
        """The result of `work`, which ends if the client goes away."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            task.cancel()
            gone.cancel()

    def _failure(self, error: Exception) -> Refused:
        # Messages may hold texts: what the client did is told to it alone, the rest to nobody.
        if isinstance(error, InputError | ConfigurationError):
            return Refused(400, str(error))
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        log.error("%s while ranking:\n%s", type(error).__name__, where)
        if isinstance(error, ServerError):
            status = 503 if error.passing else 502
            return Refused(status, "The server that this one asks failed.", "Unhealthy")
        if isinstance(error, ScoringError):
            return Refused(424, "The model could not score these texts.", "Backend")
        return Refused(500, "Internal error.", "Backend")

    async def health(self, request: Request) -> Response:
        """Whether requests are taken."""
        if self.ready and not self.stopping:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopping" if self.stopping else "loading"}, 503)

    async def info(self, request: Request) -> Response:
        """What text-embeddings-inference tells of itself."""
        self._check_open()
        reranker, options = self.reranker, self.options
        return JSONResponse(
            {
                "model_id": self.model,
                "model_sha": await in_thread(lambda: reranker.fingerprint),
                "model_dtype": reranker.precision,
                "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
                "max_concurrent_requests": options.max_concurrent,
                "max_input_length": reranker.max_length,
                "max_batch_tokens": None,
                "max_batch_requests": None,
                "max_client_batch_size": options.max_texts,
                "auto_truncate": True,
                "payload_limit": options.max_body_bytes,
                "tokenization_workers": 1,
                "version": rerank_plugins.__version__,
            }
        )

    async def models(self, request: Request) -> Response:
        """The list of models, of which there is one."""
        self._check_open()
        one = {
            "id": self.model,
            "object": "model",
            "created": self._started,
            "owned_by": "rerank-plugins",
            "max_model_len": self.reranker.max_length,
        }
        return JSONResponse({"object": "list", "data": [one]})

    async def counts(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        self.metrics.running.set(self.running)
        self.metrics.ready.set(self.ready and not self.stopping)
        content, kind = self.metrics.text()
        return Response(content, headers={"Content-Type": kind})

    def checked(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that asks for the key."""
        key = self.options.api_key
        wanted = None if key is None else key.encode()

        async def with_key(request: Request) -> Response:
            if wanted is not None:
                kind, _, token = request.headers.get("authorization", "").partition(" ")
                given = token.strip().encode() if kind.lower() == "bearer" else b""
                if not hmac.compare_digest(given, wanted):
                    shape = shape_of(request.url.path, b"")
                    return _error(shape, Refused(401, "The API key is missing or wrong: send it as a Bearer token."))
            try:
                return await endpoint(request)
            except Refused as error:
                return _error("tei" if request.url.path == "/info" else "openai", error)

        return with_key


def create_app(reranker: Reranker, options: ServerOptions | None = None) -> Starlette:
    """An ASGI application that ranks: what ``rerank-plugins serve`` runs.

    Args:
        reranker: What ranks.
        options: What the server allows.

    Returns:
        The application; its `RerankServer` is ``app.state.server``.

    Raises:
        ConfigurationError: An option that cannot work.
    """
    server = RerankServer(reranker, options or ServerOptions())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Not awaited: meanwhile the server says that it is not ready.
        task = asyncio.ensure_future(server.warm_up())
        yield
        task.cancel()

    routes = [Route(path, server.checked(server.rerank), methods=["POST"]) for path in RERANK_PATHS]
    routes += [
        Route("/info", server.checked(server.info)),
        Route("/v1/models", server.checked(server.models)),
        Route("/health", server.health),
        Route("/metrics", server.checked(server.counts)),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: _not_found, 405: _not_found})
    app.state.server = server
    return app


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    paths = ", ".join((*RERANK_PATHS, "/info", "/v1/models", "/health", "/metrics"))
    message = f"There is {'no such address' if status == 404 else 'another method'} here. Addresses: {paths}."
    return _error(shape_of(request.url.path, b""), Refused(status, message), getattr(error, "headers", None))


def _error(shape: Shape, refused: Refused, headers: Any = None) -> Response:
    more = dict(headers or {})
    if refused.status in (429, 503):
        more["Retry-After"] = "1"
    if refused.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    if refused.status in (408, 413, 503):
        # The body may not have been read to its end.
        more["Connection"] = "close"
    content = error_body(shape, refused.status, refused.message, refused.kind)
    return Response(content, refused.status, headers=more, media_type="application/json")


def _public_name(name: str) -> str:
    # Not the machine's directories.
    return Path(name).name if Path(name).is_dir() else name
