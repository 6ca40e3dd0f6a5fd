"""A server for programs that speak to rerankers over HTTP.

Install it with ``pip install "rerank-plugins[serve]"``; it needs no torch.
"""

from __future__ import annotations

from rerank_plugins._extras import import_extra

import_extra("starlette", "serve")
import_extra("uvicorn", "serve")

# After the lines above, which say what to install.
from rerank_plugins.server._app import ServerOptions, create_app  # noqa: E402
from rerank_plugins.server._run import serve  # noqa: E402

__all__ = ["ServerOptions", "create_app", "serve"]
