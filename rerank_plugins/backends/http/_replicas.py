"""Several servers of the same model: turns, and a rest for those that do not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from rerank_plugins.backends._remote import restart_in_child

__all__ = ["Node", "Replicas"]

LONGEST_REST_S = 30.0


class Node:
    """One server.

    Attributes:
        url: Address of its rerank endpoint.
        failures: Requests in a row that it did not answer.
        rests_until: Not asked before, on the monotonic clock.
        busy_until: It asked for a pause until then.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.failures = 0
        self.rests_until = 0.0
        self.busy_until = 0.0

    @property
    def busy_s(self) -> float:
        """Seconds of the pause that it asked for."""
        return max(0.0, self.busy_until - time.monotonic())


class Replicas:
    """Servers in turn. One that does not answer rests for 1 s, then 2, 4 and so on up to 30, then is tried again.

    A single server never rests: there is nobody to ask instead.

    References:
        elastic-transport's node pool (https://github.com/elastic/elastic-transport-python).
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.nodes = [Node(url) for url in urls]
        self._turn = 0
        self.start_afresh()
        restart_in_child(self)

    def start_afresh(self) -> None:
        """In a forked child: nobody there holds the lock."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.nodes)

    def next(self, but: Node | None = None) -> Node | None:
        """The server whose turn it is, one that is not busy first; None where all of them rest.

        Args:
            but: The one that has just failed: taken only if there is no other.
        """
        with self._lock:
            now = time.monotonic()
            order = [self.nodes[(self._turn + i) % len(self.nodes)] for i in range(len(self.nodes))]
            awake = [node for node in order if len(self.nodes) == 1 or node.rests_until <= now]
            if not awake:
                return None
            node = min(awake, key=lambda node: (node is but, max(node.busy_until, now)))
            self._turn = (self.nodes.index(node) + 1) % len(self.nodes)
            if node.failures:
                # Tried by one call; the others leave it alone until that one knows.
                node.rests_until = now + self._rest_s(node.failures)
            return node

    def answered(self, node: Node) -> None:
        """It works."""
        with self._lock:
            node.failures, node.rests_until = 0, 0.0

    def failed(self, node: Node) -> None:
        """It did not answer."""
        with self._lock:
            node.failures += 1
            node.rests_until = time.monotonic() + self._rest_s(node.failures)

    def busy(self, node: Node, pause_s: float | None) -> None:
        """It asked for a pause, or is out of order: the others are asked first for a second."""
        if pause_s is None:
            pause_s = 0.0 if len(self.nodes) == 1 else 1.0
        with self._lock:
            node.busy_until = time.monotonic() + pause_s

    def wakes_in_s(self) -> float:
        """Seconds until the first one that rests is tried again."""
        return max(0.0, min(node.rests_until for node in self.nodes) - time.monotonic())

    @staticmethod
    def _rest_s(failures: int) -> float:
        return min(2.0 ** min(failures - 1, 10), LONGEST_REST_S)
