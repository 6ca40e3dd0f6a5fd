"""Worker processes as the benchmark sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from harness._contenders import Contender
from rerank_plugins.errors import ScoringError

__all__ = ["Worker"]


class Worker:
    """A process that runs contenders, and waits for a request otherwise.

    Args:
        threads: Threads of every engine in it.
        memory: Bytes of data that it may hold, where the system can hold it to that; None means no limit.
    """

    def __init__(self, threads: int, memory: int | None = None) -> None:
        self.threads = threads
        count = str(threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "RAYON_NUM_THREADS": count,
            # The model is a directory here: nobody has anything to ask the Hub for.
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[2]), *(path or os.getcwd() for path in sys.path)]
            ),
        }
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("_engines.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            encoding="utf-8",
            env=environment,
        )
        if memory is not None and sys.platform == "linux":
            self.ask("limit", size=memory)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Ask for something, and wait for the answer.

        Raises:
            ScoringError: It failed, or the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            raise ScoringError(f"the process ended with code {code}: {self._last_message()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ScoringError(str(reply["error"]))
        return reply

    def load(self, contender: Contender, model: Path) -> None:
        """Load a contender.

        Raises:
            ScoringError: It cannot be loaded.
        """
        keywords = {**contender.keywords, **({"threads": self.threads} if contender.takes_threads else {})}
        self.ask(
            "load",
            name=contender.name,
            function=contender.load,
            model=str(model),
            keywords=keywords,
            library=contender.library,
            threads=self.threads,
        )

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._messages.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_message(self) -> str:
        self._messages.seek(0)
        lines = self._messages.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it left no message"
