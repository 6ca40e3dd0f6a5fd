"""Runs the application: uvicorn, with an end that lets running requests finish."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rerank_plugins.errors import ConfigurationError
from rerank_plugins.reranker import Reranker
from rerank_plugins.server._app import RerankServer, ServerOptions, create_app

__all__ = ["is_loopback", "serve"]

log = logging.getLogger("rerank_plugins.server")

HEADERS_S = 10.0
"""Time that the head of a request may take to arrive."""
DRAIN_S = 30.0
"""Time that running requests have to end, once the server is told to stop."""
KEEP_ALIVE_S = 75
"""Longer than clients and proxies keep idle connections, so that they close them and never meet a closed one."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(reranker: Reranker, options: ServerOptions, *, host: str, port: int, no_auth: bool = False) -> None:
    """Serve until SIGTERM or SIGINT: then running requests end, new ones are answered with 503.

    Args:
        reranker: What ranks.
        options: What the server allows.
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one.
        no_auth: Listen at an address that others can reach without a key.

    Raises:
        ConfigurationError: Others could reach the server without a key, or the port is taken.
        RerankError: The model cannot be loaded.
    """
    if options.api_key is None and not no_auth and not is_loopback(host):
        raise ConfigurationError(
            f"At {host} anybody who reaches this machine could use the server. Name an environment variable with a key "
            "by --api-key-env, or say --no-auth."
        )
    app = create_app(reranker, options)
    listener = _listener(host, port)
    log.info("Listening at http://%s:%d", host, listener.getsockname()[1])
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=5,
        backlog=2048,
    )
    server = _Server(config, app.state.server)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
    if app.state.server.failed is not None:
        raise app.state.server.failed


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"Cannot listen at {host}:{port}: {error}. Choose another --host or --port."
        ) from error
    return listener


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: RerankServer) -> None:
        super().__init__(config)
        self._rerank = server
        self._drained_by: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not recorded as uvicorn does: an end that was asked for is no failure.
        if self._rerank.stopping and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        self._rerank.stopping = True

    async def on_tick(self, counter: int) -> bool:
        if self._rerank.failed is not None:
            return True
        if self._rerank.stopping:
            now = time.monotonic()
            self._drained_by = self._drained_by or now + DRAIN_S
            if not self._rerank.running or now > self._drained_by:
                return True
        return bool(await super().on_tick(counter))


class _Protocol(H11Protocol):
    """HTTP whose heads may not take for ever."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Whether a head is on its way: started, and not there yet."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._head is None:
            self._head = self.loop.call_later(HEADERS_S, self._too_slow)

    def _unwatch(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_slow(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
