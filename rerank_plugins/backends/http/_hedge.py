"""When a second server is worth asking."""

from __future__ import annotations

import collections
import math
import threading

from rerank_plugins.backends._remote import restart_in_child

__all__ = ["Latencies"]


class Latencies:
    """How long requests take, and how many second ones they have earned.

    References:
        Dean and Barroso, "The Tail at Scale", 2013 (https://doi.org/10.1145/2408776.2408794): hedged requests after a
        high percentile, within a small share of all requests.
    """

    LEAST = 10
    """Requests that must be known before one counts as slow."""
    SHARE = 0.1
    """Second requests for each request."""

    def __init__(self) -> None:
        self._seconds: collections.deque[float] = collections.deque(maxlen=200)
        self._earned = 1.0
        self.start_afresh()
        restart_in_child(self)

    def start_afresh(self) -> None:
        """In a forked child: nobody there holds the lock."""
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """A request took so long."""
        with self._lock:
            self._seconds.append(seconds)
            self._earned = min(self._earned + self.SHARE, 10.0)

    def slow_s(self) -> float | None:
        """What nine in ten requests took less than; None before enough are known."""
        with self._lock:
            if len(self._seconds) < self.LEAST:
                return None
            return sorted(self._seconds)[math.ceil(0.9 * len(self._seconds)) - 1]

    def may_hedge(self) -> bool:
        """Whether a second request may be sent now; counts it."""
        with self._lock:
            if self._earned < 1.0:
                return False
            self._earned -= 1.0
            return True
