"""`rerank-plugins serve` in a thread of the test, on a free port of loopback."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from rerank_plugins import Reranker
from rerank_plugins.server import ServerOptions
from rerank_plugins.server._run import Server
from rerank_plugins.testing import FakeBackend, word_overlap

QUERY = "red fox in the snow"
TEXTS = ["a blue whale", "the red fox", "snow in the red morning, a fox", "nothing", "fox fox fox"]
ORDER = sorted(range(len(TEXTS)), key=lambda i: -word_overlap(QUERY, TEXTS[i]))


@contextlib.contextmanager
def serving(backend: Any = None, *, wait: bool = True, **options: Any) -> Iterator[Server]:
    """A running server; `FakeBackend` scores unless another backend is given."""
    reranker = Reranker(FakeBackend(fingerprint="fake") if backend is None else backend)
    server = Server(reranker, ServerOptions(**options), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run_to_end, daemon=True)
    thread.start()
    if wait:
        until(lambda: server.started and server.state.ready)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


def post(server: Server, path: str, body: Any = None, **keywords: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=30, **keywords)


class SlowBackend(FakeBackend):
    """Waits at `gate` in each call, and counts those who are inside."""

    def __init__(self) -> None:
        super().__init__(fingerprint="slow")
        self.gate = threading.Event()
        self.gate.set()
        self.inside = 0

    def logits(self, pairs: Any) -> Any:
        self.inside += 1
        try:
            assert self.gate.wait(20)
            return super().logits(pairs)
        finally:
            self.inside -= 1
