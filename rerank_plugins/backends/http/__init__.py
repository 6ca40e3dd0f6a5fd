"""Rerank servers over HTTP."""

from __future__ import annotations

from rerank_plugins.backends.http._backend import HttpBackend
from rerank_plugins.backends.http._from_url import from_url

__all__ = ["HttpBackend", "from_url"]
