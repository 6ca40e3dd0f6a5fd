from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports huggingface_hub: a test that would download must fail, not wait.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models: threads that wait for each other cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the user or another test has cached may decide a test, and no test may write there."""
    monkeypatch.setenv("RERANK_PLUGINS_CACHE", str(tmp_path / "rerank-plugins-cache"))


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    """Commands configure logging for their process; here their handlers would write into later tests' output."""
    loggers = [
        logging.getLogger(name) for name in (None, "rerank_plugins", "uvicorn", "uvicorn.error", "uvicorn.access")
    ]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate, logger.disabled) for logger in loggers]
    yield
    for logger, handlers, level, propagate, disabled in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
