"""`rerank-plugins serve` against Infinity: the same weights, the same threads, the same requests.

    python benchmarks/serve.py --infinity ENVIRONMENT/bin/python [--clients 32] [--texts 10] [--seconds 10]

Infinity needs an environment of its own:

    python -m venv ENVIRONMENT
    ENVIRONMENT/bin/pip install "infinity-emb[server,torch]==0.0.78" "transformers<4.58" "numpy<2" "click<8.2"

Without `--infinity` the servers of this package are measured alone. The weights are all-MiniLM-L6-v2 under a seeded
head unless `--model` names another; the bundled model has a row of its own. The texts are paragraphs of CPython's
manual. Servers run one at a time, each in processes of its own, and take turns in every round; the figures are medians
of the rounds:

- seconds from the start of the command to the first answer, and memory after it (PSS of all its processes);
- the 50th percentile of calls of `--texts` by one client;
- documents a second, and the 95th percentile, of `--clients` that call for `--seconds`;
- what `HttpBackend` over loopback adds to a call of 20 texts in the process, by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from harness._model import prepare_model
from harness._work import QUESTIONS, shuffled_paragraphs

from rerank_plugins import Reranker
from rerank_plugins._machine import processor
from rerank_plugins.backends.http import HttpBackend
from rerank_plugins.models import BUNDLED_NAME

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--infinity", default=None, help="Python of an environment that has infinity-emb")
parser.add_argument("--model", default=None)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--clients", type=int, default=32)
parser.add_argument("--texts", type=int, default=10)
parser.add_argument("--calls", type=int, default=50)
parser.add_argument("--seconds", type=float, default=10.0)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--turns", type=int, default=100, help="calls in the process and over HTTP, by turns")
parser.add_argument("--json", action="store_true")
QUERY = QUESTIONS[0]
START_S = 300.0


class Client:
    """One connection that is kept."""

    def __init__(self, port: int, texts: list[str]) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self.body = json.dumps({"model": "m", "query": QUERY, "documents": texts})

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def call(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.connection.request("POST", "/rerank", self.body, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200 or not answer["results"]:
            raise RuntimeError(f"{response.status}: {answer}")
        return time.perf_counter() - start


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(command: list[str], port: int, threads: int, texts: list[str]) -> Iterator[tuple[float, psutil.Process]]:
    """A running server, and the seconds to its first answer."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            while True:
                if process.poll() is not None or time.perf_counter() - begin > START_S:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read().decode()[-2000:]}")
                try:
                    with Client(port, texts) as client:
                        client.call()
                    break
                except (OSError, http.client.HTTPException, RuntimeError, ValueError, KeyError):
                    time.sleep(0.02)
            yield time.perf_counter() - begin, psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def memory_mb(process: psutil.Process) -> float:
    """Proportional set size of a process and its children, in MB."""
    processes = [process, *process.children(recursive=True)]
    return float(sum(one.memory_full_info().pss for one in processes)) / 1e6


def measure(command: list[str], port: int, arguments: argparse.Namespace, texts: list[str]) -> dict[str, float]:
    """All figures of one server."""
    size = arguments.texts
    with started(command, port, arguments.threads, texts[:size]) as (start_s, process):
        time.sleep(1)
        memory = memory_mb(process)
        with Client(port, texts[:size]) as client:
            alone = [client.call() for _ in range(arguments.calls)]
        times: list[float] = []
        end = time.perf_counter() + arguments.seconds

        def work(number: int) -> None:
            with Client(port, [texts[(number * size + i) % len(texts)] for i in range(size)]) as own:
                while time.perf_counter() < end:
                    times.append(own.call())

        threads = [threading.Thread(target=work, args=(number,)) for number in range(arguments.clients)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
    return {
        "start_s": start_s,
        "memory_mb": memory,
        "alone_p50_ms": 1000 * statistics.median(alone),
        "documents_per_s": len(times) * size / seconds,
        "p95_ms": 1000 * float(np.percentile(times, 95)),
    }


def overhead(model: str, threads: int, turns: int, texts: list[str]) -> dict[str, float]:
    """A call of 20 texts in this process, and through `HttpBackend` to a server on loopback, by turns."""
    port = free_port()
    local = Reranker(model, threads=threads).prepare()
    with started(own_command(model, port, threads), port, threads, texts[:2]):
        remote = Reranker(HttpBackend(f"http://127.0.0.1:{port}", dialect="tei"))
        times: dict[str, list[float]] = {"in_process": [], "over_http": []}
        for _ in range(turns):
            for name, reranker in (("in_process", local), ("over_http", remote)):
                begin = time.perf_counter()
                reranker.rank(QUERY, texts[:20])
                times[name].append(time.perf_counter() - begin)
    in_process, over_http = (
        1000 * statistics.median(times[name][turns // 10 :]) for name in ("in_process", "over_http")
    )
    return {"in_process_ms": in_process, "over_http_ms": over_http, "added_ms": over_http - in_process}


def own_command(model: str, port: int, threads: int) -> list[str]:
    """The command of this package's server."""
    options = ["--port", str(port), "--model", model, "--threads", str(threads), "--max-concurrent", "256"]
    return [sys.executable, "-m", "rerank_plugins", "serve", *options]


def infinity_command(python: str, model: str, port: int) -> list[str]:
    """The command of Infinity."""
    options = ["--model-id", model, "--engine", "torch", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    return [str(Path(python).parent / "infinity_emb"), "v2", *options, "--no-model-warmup", "--no-bettertransformer"]


def main() -> None:
    """Measure, and write the figures."""
    arguments = parser.parse_args()
    texts = shuffled_paragraphs()
    with tempfile.TemporaryDirectory() as work:
        model = prepare_model(arguments.model, Path(work), int8=False, graph=True, progress=lambda *_: None)
        commands: dict[str, Callable[[int], list[str]]] = {
            "serve": lambda port: own_command(str(model.path), port, arguments.threads),
            "serve, bundled model": lambda port: own_command(BUNDLED_NAME, port, arguments.threads),
        }
        if arguments.infinity is not None:
            commands["infinity"] = lambda port: infinity_command(arguments.infinity, str(model.path), port)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                port = free_port()
                rounds[name].append(measure(command(port), port, arguments, texts))
        added = overhead(BUNDLED_NAME, arguments.threads, arguments.turns, texts)
    figures: dict[str, Any] = {
        name: {figure: statistics.median(one[figure] for one in found) for figure in found[0]}
        for name, found in rounds.items()
    }
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "infinity")}
        print(
            json.dumps({"processor": processor()[0], **settings, "servers": figures, "http_backend": added}, indent=1)
        )
        return
    for name, figure in figures.items():
        print(
            f"{name:22} start {figure['start_s']:6.2f} s   memory {figure['memory_mb']:6.0f} MB   "
            f"alone p50 {figure['alone_p50_ms']:6.1f} ms   {arguments.clients} clients: "
            f"{figure['documents_per_s']:6.0f} documents/s, p95 {figure['p95_ms']:6.0f} ms"
        )
    print(
        f"HttpBackend, 20 texts: {added['over_http_ms']:.1f} ms, in the process {added['in_process_ms']:.1f} ms "
        f"({added['added_ms']:+.1f} ms, {100 * added['added_ms'] / added['in_process_ms']:+.1f} %)"
    )


if __name__ == "__main__":
    main()
