"""Scores kept on disk, so that an evaluation that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rerank_plugins.errors import ConfigurationError

_FORMAT = 1
_TOLERANCE = 1e-4
"""Largest difference of two logits of one model: engines may sum in another order from run to run."""

Probes = Mapping[str, Sequence[float]]
"""Logits by `pair_key` of a few pairs: what tells one state of a model from another."""


def pair_key(query: str, texts: Sequence[str]) -> str:
    """A name for the content of a query and its candidates."""
    return hashlib.sha256(json.dumps([query, *texts]).encode()).hexdigest()[:32]


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[-80:] or "unnamed"


class ScoreFile:
    """The scores of one model on one data set: a JSON line for each query, written as soon as it is known.

    A score is found again only under the exact query and candidate texts, in their order, and a file is taken up
    again only by a model of the same name and settings that gives the same logits for the first queries. So neither
    edited data nor retrained weights under an old name are ever mixed with old scores: a changed model gets a file
    of its own, beside the old one.

    Args:
        directory: Where the files are.
        dataset: Name of the data set.
        model: Name of the model.
        settings: What else decides the scores.
        probes: Logits of the first queries, computed now.
        resume: Take up a file that fits; otherwise it is begun anew.

    Raises:
        ConfigurationError: The directory cannot be written.
    """

    def __init__(
        self, directory: Path, dataset: str, model: str, settings: Mapping[str, Any], probes: Probes, resume: bool
    ) -> None:
        facts = {"format": _FORMAT, "dataset": dataset, "model": model, "settings": dict(settings)}
        self._known: dict[str, tuple[list[float], float]] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for number in itertools.count(1):
                suffix = "" if number == 1 else f".{number}"
                path = directory / f"{slug(dataset)}.{slug(model)}{suffix}.scores.jsonl"
                lines = _read(path)
                if not lines or _fits(lines[0], facts, probes):
                    break
            if resume:
                self._known = {row["key"]: (row["scores"], row["seconds"]) for row in lines[1:]}
            # Written anew rather than appended to: a line that a kill cut in two is gone then.
            rows = lines if lines and resume else [{**facts, "probes": {key: list(p) for key, p in probes.items()}}]
            work = path.with_name(path.name + ".tmp")
            work.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            work.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"The scores cannot be kept in {directory}: {error}.") from error
        self.path = path

    def get(self, key: str) -> tuple[list[float], float] | None:
        """Scores in the order of the texts, and the seconds they took; None where they are not known."""
        return self._known.get(key)

    def put(self, key: str, scores: Sequence[float], seconds: float) -> None:
        """Keep the scores of a query."""
        self._file.write(json.dumps({"key": key, "scores": list(scores), "seconds": seconds}) + "\n")
        self._file.flush()

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """The header and the rows, up to the first line that is damaged; empty where there is no header."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        return []
    rows: list[dict[str, Any]] = []
    for line in content.splitlines():
        try:
            row = json.loads(line)
            if not rows and not isinstance(row["probes"], dict):
                return []
            if rows and not (isinstance(row["scores"], list) and float(row["seconds"]) >= 0 and row["key"]):
                break
        except (ValueError, KeyError, TypeError):
            break
        rows.append(row)
    return rows


def _fits(header: Mapping[str, Any], facts: Mapping[str, Any], probes: Probes) -> bool:
    old = header["probes"]
    return (
        all(header.get(key) == json.loads(json.dumps(value)) for key, value in facts.items())
        and old.keys() == probes.keys()
        and all(
            len(old[key]) == len(now) and np.allclose(old[key], now, rtol=0, atol=_TOLERANCE)
            for key, now in probes.items()
        )
    )
