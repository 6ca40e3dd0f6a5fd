"""Backends that can be given to another process, and end it, or fail, at certain texts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rerank_plugins.testing import word_overlap


class Poisoned:
    """Scores by words in common. Ends its process at "poison"; raises at "broken"; writes a line for each pair."""

    name = "poisoned"
    fingerprint = "poisoned"

    def __init__(self, log: Path | None = None, seconds: float = 0.0) -> None:
        self.log = log
        self.seconds = seconds

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        if any("broken" in text for _, text in pairs):
            raise RuntimeError("this backend cannot read broken texts")
        if any("poison" in text for _, text in pairs):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.log is not None:
            with self.log.open("a") as lines:
                lines.write("".join(f"{text}\n" for _, text in pairs))
        time.sleep(self.seconds * len(pairs))
        return np.array([word_overlap(query, text) for query, text in pairs], dtype=np.float32)
