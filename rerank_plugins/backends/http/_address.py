"""Addresses of servers: endpoint, secrets, and what may be shown."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from rerank_plugins.errors import ConfigurationError

__all__ = ["Address", "beside", "endpoint", "parse"]

ENDPOINTS = frozenset({"rerank", "reranks", "reranking", "ranking"})
"""Last parts of a path that is the whole address of an endpoint."""


class Address(NamedTuple):
    """An address and what must not be seen of it."""

    parts: SplitResult
    """Without user and password."""
    login: tuple[str, str] | None
    """User and password."""

    @property
    def url(self) -> str:
        """The address, without user and password."""
        return urlunsplit(self.parts)


def parse(url: object) -> Address:
    """An address of a server.

    Raises:
        ConfigurationError: It is none.
    """
    if not isinstance(url, str):
        raise ConfigurationError(f"The address of a server must be a str; got {type(url).__name__}.")
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as error:
        # Not the address itself: it may hold a password.
        raise ConfigurationError(f"The address of a server cannot be read: {error}.") from None
    shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if parts.scheme.lower() not in ("http", "https") or not host or any(c.isspace() for c in shown):
        raise ConfigurationError(f"The address of a server must look like http://localhost:8080; got {shown!r}.")
    login = None
    if "@" in parts.netloc:
        login = (unquote(parts.username or ""), unquote(parts.password or ""))
    name = f"[{host}]" if ":" in host else host
    return Address(parts._replace(netloc=name if port is None else f"{name}:{port}", fragment=""), login)


def endpoint(parts: SplitResult, path: str) -> str:
    """Address of the endpoint `path` at a server, whether `parts` is the server's or already the endpoint's.

    ``http://host``, ``http://host/v1`` and ``http://host/v1/rerank`` all give ``http://host/v1/rerank`` for the path
    ``/v1/rerank``.
    """
    base = [part for part in parts.path.split("/") if part]
    wanted = [part for part in path.split("/") if part]
    if base and base[-1] in ENDPOINTS:
        joined = base
    else:
        shared = max(n for n in range(len(wanted) + 1) if n == 0 or base[-n:] == wanted[:n])
        joined = base + wanted[shared:]
    return urlunsplit(parts._replace(path="/" + "/".join(joined)))


def beside(url: str, name: str) -> str:
    """The address `name` at the server of an endpoint: ``info`` and ``http://host/v1/rerank`` give
    ``http://host/info``.
    """
    parts = urlsplit(url)
    base = [part for part in parts.path.split("/") if part]
    while base and (base[-1] in ENDPOINTS or base[-1] in ("v1", "v2")):
        base.pop()
    return urlunsplit(parts._replace(path="/" + "/".join([*base, name]), query=""))
