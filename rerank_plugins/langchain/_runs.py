"""Runs of our own in LangChain's traces: children of the run that calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import get_async_callback_manager_for_config, get_callback_manager_for_config

from rerank_plugins.langchain._otel import current

__all__ = ["arun", "run"]


@contextmanager
def run(name: str, inputs: Mapping[str, Any], callbacks: Callbacks = None) -> Iterator[dict[str, Any]]:
    """A run of a name; the body fills in its outputs.

    Args:
        name: Shown in traces.
        inputs: What a trace says of the call.
        callbacks: Of the caller's run; None takes those of the chain that is running.
    """
    manager = get_callback_manager_for_config(_config(callbacks))
    started = manager.on_chain_start(None, dict(inputs), name=name)
    outputs: dict[str, Any] = {}
    try:
        with current(started.run_id):
            yield outputs
    except BaseException as error:
        started.on_chain_error(error)
        raise
    started.on_chain_end(outputs)


@asynccontextmanager
async def arun(name: str, inputs: Mapping[str, Any], callbacks: Callbacks = None) -> AsyncIterator[dict[str, Any]]:
    """As `run`: LangChain's callbacks of async calls are async themselves."""
    manager = get_async_callback_manager_for_config(_config(callbacks))
    started = await manager.on_chain_start(None, dict(inputs), name=name)
    outputs: dict[str, Any] = {}
    try:
        with current(started.run_id):
            yield outputs
    except BaseException as error:
        await started.on_chain_error(error)
        raise
    await started.on_chain_end(outputs)


def _config(callbacks: Callbacks) -> RunnableConfig:
    return ensure_config(None if callbacks is None else {"callbacks": callbacks})
