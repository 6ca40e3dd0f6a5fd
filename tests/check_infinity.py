"""`HttpBackend` and `serve` beside a real Infinity: ``python tests/check_infinity.py ENVIRONMENT``.

Infinity needs versions of its own, so it gets an environment of its own, made at ENVIRONMENT where there is none (1.4
GB). Checked are a seeded model's scores on Infinity against those in this process, and that no call fails and no order
changes while one of two Infinity replicas is killed under load, with `rerank-plugins serve` as the third.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import llama_cpp_model
import numpy as np

from rerank_plugins import Reranker
from rerank_plugins.backends.http import HttpBackend, from_url

REQUIREMENTS = ["infinity-emb[server,torch]==0.0.78", "transformers<4.58", "numpy<2", "click<8.2", "typer<0.16"]
QUERY = "what do the panda eat"
TEXTS = [
    "the bear is in the mountain and take bamboo",
    "paris is the capital of france",
    "undo a git commit with revert",
    "food for the bear in winter: fruit and bamboo",
    "a",
]


def environment(directory: Path) -> Path:
    """Python of an environment with Infinity, which is made if need be."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    return python


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            end = time.monotonic() + 300
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise SystemExit(f"{command[0]} did not start:\n{log.read().decode()[-3000:]}")
                time.sleep(0.2)
            yield process
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    python = environment(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        model = llama_cpp_model.save(Path(work) / "model")
        ports = [free_port() for _ in range(3)]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        infinity = [str(python.parent / "infinity_emb"), "v2", "--model-id", model, "--engine", "torch"]
        infinity += ["--device", "cpu", "--dtype", "float32", "--no-bettertransformer", "--no-model-warmup", "--port"]
        ours = [
            sys.executable,
            "-c",
            "from rerank_plugins.cli import main; main()",
            "serve",
            "--model",
            model,
            "--port",
        ]
        processes = [
            stack.enter_context(running([*command, str(port)], port))
            for command, port in zip((infinity, infinity, ours), ports, strict=True)
        ]
        local = Reranker(model)
        right = local.logits(QUERY, TEXTS)
        order = [item.index for item in local.rank(QUERY, TEXTS)]
        dialect = from_url(urls[0]).dialect.name
        assert dialect == "infinity", dialect
        for url in urls:
            told = Reranker(HttpBackend(url, dialect="infinity")).logits(QUERY, TEXTS)
            difference = float(np.abs(told - right).max())
            print(f"{url}: largest difference of a logit {difference:.1e}")
            assert difference < 1e-3
        reranker = Reranker(HttpBackend(urls, dialect="infinity"))
        killed = threading.Event()

        def call(number: int) -> list[int]:
            if number == 100:
                processes[1].kill()
                killed.set()
            return [item.index for item in reranker.rank(QUERY, TEXTS)]

        with ThreadPoolExecutor(8) as pool:
            orders = list(pool.map(call, range(300)))
        assert killed.is_set()
        assert all(one == order for one in orders), "another order"
        print(f"{len(orders)} calls, one of three servers killed under load: none failed, every order right")


if __name__ == "__main__":
    main()
