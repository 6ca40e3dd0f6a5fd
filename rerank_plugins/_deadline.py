"""Until when the call that runs in this context may score."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["DeadlineExceeded", "deadline", "remaining_s"]

_until: contextvars.ContextVar[float | None] = contextvars.ContextVar("until", default=None)


class DeadlineExceeded(Exception):
    """Time is up before all pairs were scored. Never reaches the caller of a `Reranker`."""


@contextmanager
def deadline(until: float | None) -> Iterator[None]:
    """Let engines stop at a time of `time.monotonic`; None sets no limit."""
    token = _until.set(until)
    try:
        yield
    finally:
        _until.reset(token)


def remaining_s() -> float | None:
    """Seconds that are left, at least 0.0; None where there is no limit."""
    until = _until.get()
    return None if until is None else max(0.0, until - time.monotonic())
