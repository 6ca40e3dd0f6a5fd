"""A backend from a URL alone, for configuration by a string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from rerank_plugins.backends.http._address import parse
from rerank_plugins.backends.http._backend import HttpBackend
from rerank_plugins.backends.http.dialects import DIALECTS
from rerank_plugins.errors import ConfigurationError

__all__ = ["from_url"]

_OPTIONS: dict[str, Callable[[str], Any]] = {"dialect": str, "model": str, "api_key_env": str, "timeout_s": float}
"""What the query of a URL may say; the rest of it is the server's."""
_OWNERS = {"vllm": "vllm", "infinity": "infinity", "llamacpp": "tei"}
"""Dialect of a server by what its list of models gives as the owner."""


def from_url(url: str, **keywords: Any) -> HttpBackend:
    """A rerank server by its address alone.

    ``http://localhost:8080?dialect=tei&model=NAME&api_key_env=VARIABLE&timeout_s=5``: those four may stand in the query
    of the address, anything else there belongs to the server. Without a dialect, that of a hosted service is taken, or
    that of a path that only one kind has (``/v2/rerank``, ``/v1/ranking``), or the server is asked what it is.

    Args:
        url: The address; user and password in it are sent as such and never shown.
        **keywords: Of `HttpBackend`.

    Raises:
        ConfigurationError: The dialect cannot be told.
        ServerError: The server was asked, and did not answer.
    """
    address = parse(url)
    options: dict[str, Any] = {}
    others = []
    for name, value in parse_qsl(address.parts.query, keep_blank_values=True):
        if name in _OPTIONS:
            try:
                options[name] = _OPTIONS[name](value)
            except ValueError:
                raise ConfigurationError(
                    f"{name} in the address of a server must be a number; got {value!r}."
                ) from None
        else:
            others.append((name, value))
    parts = urlsplit(url.strip())
    bare = urlunsplit(parts._replace(query=urlencode(others), fragment=""))
    options = {**options, **keywords}
    dialect = options.pop("dialect", None) or _by_address(bare) or _asked(bare, options)
    return HttpBackend(bare, dialect=dialect, **options)


def _by_address(url: str) -> str | None:
    parts = parse(url).parts
    for dialect in DIALECTS.values():
        if dialect.default_url and parts.hostname == urlsplit(dialect.default_url).hostname:
            return dialect.name
    path = parts.path.rstrip("/")
    if path.endswith("/v2/rerank"):
        return "cohere"
    return "nim" if path.endswith("/v1/ranking") else None


def _asked(url: str, options: dict[str, Any]) -> str:
    """The dialect of a server, from what ``/info`` and its list of models say."""
    asking = HttpBackend(url, **{**options, "dialect": "tei", "hedge": False})
    try:
        if "max_client_batch_size" in asking.about("info"):
            return "tei"
        for path in ("v1/models", "models"):
            models = asking.about(path).get("data")
            for entry in models if isinstance(models, list) else []:
                owner = entry.get("owned_by") if isinstance(entry, dict) else None
                if owner in _OWNERS:
                    return _OWNERS[owner]
    finally:
        if options.get("transport") is None:
            asking.close()
    raise ConfigurationError(
        f"{asking.url} does not say what kind of server it is. Name it: {parse(url).url}?dialect=NAME, one of "
        f"{', '.join(DIALECTS)}."
    )
