"""A process that loads models and scores with them, so that a test can give it a hub, limit it and end it."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CODE = r"""
import json, os, resource, sys, time
answers, sys.stdout = sys.stdout, sys.stderr
if limit := os.environ.get("TEST_MEMORY_LIMIT"):
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
import numpy as np
from rerank_plugins import Reranker
from rerank_plugins.errors import RerankError

def answer(model, query, texts, keywords):
    reranker = Reranker(model, **keywords).prepare()
    together = reranker.logits(query, texts)
    alone = np.concatenate([reranker.logits(query, [text]) for text in texts])
    return {
        "engine": reranker.backend_name,
        "precision": reranker.precision,
        "logits": np.asarray(together, dtype=float).tolist(),
        "alone": np.asarray(alone, dtype=float).tolist(),
    }

for line in sys.stdin:
    try:
        found = answer(*json.loads(line))
    except RerankError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        found = {"error": f"not an error of the package: {type(error).__name__}", "message": str(error)}
    print(json.dumps(found), file=answers, flush=True)
"""


class Loader:
    """Answers `ask`; started at the first one, and again where one took too long.

    Args:
        home: Directory of the process's own caches.
        endpoint: A hub; None is offline.
        memory: Most bytes of address space.
        first: A model that torch can load: what it imports then is not waited for in any question.
    """

    def __init__(
        self, home: Path, endpoint: str | None = None, memory: int | None = None, first: Path | None = None
    ) -> None:
        self.home = home
        self.first = first
        self.environment = {
            **os.environ,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": str(int(endpoint is None)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RERANK_PLUGINS_CACHE": str(home / "rerank-plugins"),
            **({} if endpoint is None else {"HF_ENDPOINT": endpoint}),
            **({} if memory is None else {"TEST_MEMORY_LIMIT": str(memory)}),
        }
        self._process: subprocess.Popen[str] | None = None

    def ask(
        self,
        model: str,
        query: str,
        texts: list[str],
        within_s: float = 240.0,
        meanwhile: Callable[[], object] = bool,
        **keywords: Any,
    ) -> dict[str, Any]:
        """Loads a model and scores the texts together and each alone.

        Args:
            model: A directory or a name on the hub.
            query: The query.
            texts: The texts.
            within_s: What takes longer is ended.
            meanwhile: Called while the process works.
            **keywords: Of `Reranker`.

        Returns:
            ``engine``, ``precision``, ``logits`` and ``alone``; or ``error`` and ``message``.
        """
        if self._process is None and self.first is not None:
            first, self.first = self.first, None
            self.ask(str(first), query, texts, backend="torch")
            self.first = first
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([model, query, texts, keywords]) + "\n")
        process.stdin.flush()
        try:
            meanwhile()
        except BaseException:
            # Or its answer would be the next question's.
            self.close()
            raise
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(within_s):
                self.close()
                return {"error": "no answer", "message": f"none within {within_s:g} s"}
        line = process.stdout.readline()
        if not line:
            self.close()
            return {"error": "no answer", "message": "the process ended"}
        found: dict[str, Any] = json.loads(line)
        return found

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
