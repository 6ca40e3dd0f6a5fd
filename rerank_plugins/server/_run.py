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

__all__ = ["Server", "is_loopback", "serve"]

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
    Server(reranker, options, host=host, port=port).run_to_end()


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"Cannot listen at {host}:{port}: {error}. Choose another --host or --port."
        ) from error
    return listener


class Server(uvicorn.Server):
    """One listening server; `serve` says the arguments.

    Attributes:
        url: Where it listens.
    """

    def __init__(self, reranker: Reranker, options: ServerOptions, *, host: str, port: int) -> None:
        app = create_app(reranker, options)
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=5,
            )
        )
        self.state: RerankServer = app.state.server
        self._listener = _listener(host, port)
        self._drained_by: float | None = None
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._listener.getsockname()[1]}"

    def run_to_end(self) -> None:
        """Serve until a signal, or until `stop`.

        Raises:
            RerankError: The model cannot be loaded.
        """
        log.info("Listening at %s", self.url)
        try:
            self.run(sockets=[self._listener])
        finally:
            self._listener.close()
        if self.state.failed is not None:
            raise self.state.failed

    def stop(self) -> None:
        """Let running requests end, answer new ones with 503, then end."""
        self.state.stopping = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one stops, a second SIGINT ends at once."""
        # Not recorded as uvicorn does: an end that was asked for is no failure.
        if self.state.stopping and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to end; asked ten times a second."""
        if self.state.failed is not None:
            return True
        if self.state.stopping:
            now = time.monotonic()
            self._drained_by = self._drained_by or now + DRAIN_S
            if not self.state.running or now > self._drained_by:
                return True
        return bool(await super().on_tick(counter))


class _Protocol(H11Protocol):
    """HTTP whose heads may not take for ever, and whose addresses no log repeats."""

    _head: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        # uvicorn's own line has the query of the address, and is written wherever the root logger has a handler.
        self.access_log = False

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
