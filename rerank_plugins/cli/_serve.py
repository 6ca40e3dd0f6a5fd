"""`rerank-plugins serve`: the model for programs that ask over HTTP."""

from __future__ import annotations

import logging.config
import os
from typing import Annotated, Any

import typer

from rerank_plugins.cli._options import takes_settings
from rerank_plugins.errors import ConfigurationError

__all__ = ["serve"]


@takes_settings(
    "model",
    "backend",
    "precision",
    "threads",
    "label",
    "max_length",
    "instruction",
    "revision",
    "trust_remote_code",
)
def serve(
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for a free one.")] = 8787,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable with the key that clients send as a Bearer token."),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let others than this machine in without a key.")] = False,
    max_concurrent: Annotated[
        int, typer.Option(min=1, help="Requests worked on at the same time; more are answered with 429.")
    ] = 64,
    max_body_mb: Annotated[int, typer.Option(min=1, max=1024, help="Largest request, in MiB.")] = 8,
    raw_scores: Annotated[
        bool, typer.Option("--raw-scores", help="Give logits where a request does not ask for probabilities.")
    ] = False,
    **chosen: Any,
) -> None:
    """Serve one model to clients of Cohere, Jina, vLLM, Infinity and Text Embeddings Inference.

    `/v2/rerank`, `/v1/rerank`, `/rerank`, `/info`, `/v1/models`, `/health`, `/metrics`. Logs hold no query and no text.
    """
    from rerank_plugins import Reranker
    from rerank_plugins.server import ServerOptions
    from rerank_plugins.server import serve as run

    key = None
    if api_key_env is not None:
        key = os.environ.get(api_key_env, "").strip()
        if not key:
            raise ConfigurationError(f"The environment variable {api_key_env!r} (--api-key-env) is not set. Set it.")
    options = ServerOptions(
        api_key=key, max_concurrent=max_concurrent, raw_scores=raw_scores, max_body_bytes=max_body_mb * 2**20
    )
    logging.config.dictConfig(_LOGGING)
    run(Reranker(**chosen), options, host=host, port=port, no_auth=no_auth)


_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {name: {"handlers": ["stderr"], "level": "INFO"} for name in ("rerank_plugins", "uvicorn")},
}
