"""A server for programs that speak to rerankers over HTTP (extra ``serve``)."""

from __future__ import annotations

from rerank_plugins._extras import import_extra

for _module in ("starlette", "uvicorn", "prometheus_client"):
    import_extra(_module, "serve")

from rerank_plugins.server._app import RerankServer, ServerOptions, create_app
from rerank_plugins.server._run import serve

__all__ = ["RerankServer", "ServerOptions", "create_app", "serve"]
