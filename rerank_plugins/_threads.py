"""Synchronous work behind an ``await``: in threads of our own, and ended when its task is cancelled."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from rerank_plugins._cancellation import Cancellation, cancellation

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["in_thread"]

T = TypeVar("T")

THREADS = 64
"""Calls at the same time. Most of their threads sleep, their pairs in the batches of one that runs."""


# Threads of our own: the event loop's default executor is small, and shared with file and DNS calls.
@functools.cache
def _executors() -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
    """One thread that starts the others, and the others."""
    from concurrent.futures import ThreadPoolExecutor

    return (
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="rerank-plugins-start"),
        ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="rerank-plugins"),
    )


if hasattr(os, "register_at_fork"):
    # A forked child inherits the pools, but none of their threads.
    os.register_at_fork(after_in_child=_executors.cache_clear)


async def in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function in another thread, in a copy of this context.

    Cancelling it drops the pairs of the call that are not scored yet, and the thread is free after the batch that runs.

    Args:
        function: What to call.
        *args: Passed on.
        **kwargs: Passed on.

    Returns:
        What it returned.

    Raises:
        RuntimeError: No thread can be started.
        Exception: What it raised.
    """
    # Here, because importing them takes a quarter of the package's import time.
    import asyncio
    from concurrent.futures import Future

    stop = Cancellation()
    context = contextvars.copy_context()
    context.run(cancellation.set, stop)
    future: Future[T] = Future()
    starter, workers = _executors()
    # Whoever takes the call out makes it, or tells why not.
    calls: list[Callable[[], T]] = [functools.partial(context.run, function, *args, **kwargs)]
    try:
        # Not straight to the workers: starting a thread waits for it to run, which would hold up the event loop.
        starter.submit(_start, workers, future, calls)
        return await asyncio.wrap_future(future)
    except BaseException:
        # Cancelled, its event loop has gone, or no thread: nothing of the call need go on.
        stop.cancel()
        calls.clear()
        raise


def _start(workers: ThreadPoolExecutor, future: Future[T], calls: list[Callable[[], T]]) -> None:
    try:
        workers.submit(_fulfil, future, calls)
    except BaseException as error:
        # The pool keeps what it could not start a thread for.
        with contextlib.suppress(IndexError):
            calls.pop()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        del future


def _fulfil(future: Future[T], calls: list[Callable[[], T]]) -> None:
    try:
        call = calls.pop()
    except IndexError:
        return
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
        # The traceback knows this frame, and the future knows the traceback.
        del future
    else:
        future.set_result(result)
