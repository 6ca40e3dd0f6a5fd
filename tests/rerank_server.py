"""A rerank server on loopback that speaks every dialect, and fails as it is told to."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rerank_plugins.testing import word_overlap


class Fault:
    """One answer that is no ranking: a status, headers and a body, or something done to the connection."""

    def __init__(
        self,
        status: int = 200,
        body: bytes | dict[str, Any] | list[Any] = b"",
        headers: dict[str, str] | None = None,
        act: Callable[[BaseHTTPRequestHandler], None] | None = None,
    ) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = headers or {}
        self.act = act


def half(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"results": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def reset(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def hang(seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: time.sleep(seconds)


def drip(seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer of one byte every 50 ms, which no timeout between two bytes sees."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)

    return act


class RerankServer:
    """Answers by word overlap; what is in `faults` comes first, one for each request.

    Attributes:
        url: Its address.
        bodies: The bodies of all requests.
        raw: Their bytes.
        paths: Their paths.
        headers: Their headers.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None, delay_s: float = 0.0, info: Any = None) -> None:
        self.faults: list[Fault] = []
        self.bodies: list[Any] = []
        self.raw: list[bytes] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.delay_s = delay_s
        self.info = info
        self.change: Callable[[Any], Any] = lambda answer: answer
        self.rank: Callable[[Any], Any] = ranking
        self.software = "test"
        self._connections: list[Any] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                outer.post(self)

            def do_GET(self) -> None:
                outer.get(self)

            def log_message(self, *args: object) -> None:
                pass

            def version_string(self) -> str:
                return outer.software

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def process_request(self, request: Any, client_address: Any) -> None:
                outer._connections.append(request)
                super().process_request(request, client_address)

            def handle_error(self, *args: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """As when its process is killed: open connections end too."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        self.paths.append(handler.path)
        if handler.path == "/info" and self.info is not None:
            send(handler, Fault(200, self.info))
        else:
            send(handler, Fault(404, {"error": "not found"}))

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        body = json.loads(raw)
        with self._lock:
            self.raw.append(raw)
            self.paths.append(handler.path)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.bodies.append(body)
            self.times.append(time.monotonic())
            fault = self.faults.pop(0) if self.faults else None
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay_s)
            if fault is None:
                send(handler, Fault(200, self.change(self.rank(body))))
            elif fault.act is not None:
                handler.close_connection = True
                fault.act(handler)
            else:
                send(handler, fault)
        finally:
            with self._lock:
                self._at_once -= 1


def send(handler: BaseHTTPRequestHandler, answer: Fault) -> None:
    handler.send_response(answer.status)
    for name, value in {"Content-Type": "application/json", **answer.headers}.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(answer.body)))
    handler.end_headers()
    handler.wfile.write(answer.body)


def probability(query: str, text: str) -> float:
    """A score in 0..1 with the order of the logits."""
    return 1 / (1 + 2.718281828459045 ** -word_overlap(query, text))


def ranking(body: dict[str, Any]) -> Any:
    """The answer of each kind of server, by the shape of the request; best first, as all of them do."""
    query = body["query"]["text"] if isinstance(body["query"], dict) else body["query"]
    given = next(body[name] for name in ("documents", "texts", "passages", "input") if name in body)
    texts = [text if isinstance(text, str) else text["text"] for text in given]
    logits = body.get("raw_scores") or body.get("use_activation") is False or "passages" in body
    score = word_overlap if logits else probability
    rows = sorted(((score(query, text), i) for i, text in enumerate(texts)), reverse=True)
    rows = rows[: body.get("top_n") or body.get("top_k")]
    if "texts" in body:
        return [{"index": i, "score": value} for value, i in rows]
    if "passages" in body:
        assert not {"top_n", "top_k"} & set(body)
        return {"rankings": [{"index": i, "logit": value} for value, i in rows]}
    if "input" in body or "rank_fields" in body:
        return {"data": [{"index": i, "score": value} for value, i in rows], "model": body["model"]}
    results = [{"index": i, "relevance_score": value} for value, i in rows]
    return {"data": results} if "top_k" in body else {"results": results, "model": body.get("model")}


@contextlib.contextmanager
def running(**keywords: Any) -> Iterator[RerankServer]:
    server = RerankServer(**keywords)
    try:
        yield server
    finally:
        server.close()
