"""How the thread of a call learns that nobody waits for its result any more."""

from __future__ import annotations

import contextvars
import threading

__all__ = ["Cancellation", "Cancelled", "cancellation"]


class Cancelled(Exception):
    """Ends the thread of a call whose caller has gone: nobody is left to see it."""


class Cancellation:
    """Tells the thread of a call that nobody waits for its result any more."""

    def __init__(self) -> None:
        self.cancelled = False
        self._wakes: set[threading.Event] = set()

    def cancel(self) -> None:
        """Drop what is not scored yet. Never blocks, so that an event loop can call it."""
        self.cancelled = True
        for wake in list(self._wakes):
            wake.set()

    def add(self, wake: threading.Event) -> None:
        """Set `wake` when cancelled."""
        self._wakes.add(wake)

    def discard(self, wake: threading.Event) -> None:
        """Forget `wake`."""
        self._wakes.discard(wake)


cancellation: contextvars.ContextVar[Cancellation | None] = contextvars.ContextVar("cancellation", default=None)
"""How the call that runs in this context can be cancelled; None where it cannot."""
