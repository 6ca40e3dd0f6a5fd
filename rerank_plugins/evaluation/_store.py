"""Scores kept on disk, so that an evaluation that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from rerank_plugins._paths import write_file
from rerank_plugins._printable import parse_json
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
            write_file(path, "".join(json.dumps(row) + "\n" for row in rows))
            self._file = path.open("a", encoding="utf-8")
        except (OSError, ConfigurationError) as error:
            raise cannot_keep(directory, error) from error
        self.path = path

    def get(self, key: str, n_texts: int) -> tuple[list[float], float] | None:
        """Scores in the order of the texts, and the seconds they took; None where they are not known."""
        known = self._known.get(key)
        return known if known is not None and len(known[0]) == n_texts else None

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


def cannot_keep(directory: Path, error: Exception) -> ConfigurationError:
    """What to raise where scores or searches cannot be kept."""
    return ConfigurationError(
        f"Scores cannot be kept in {directory}: {error} Name another directory with work=..., or one for all caches "
        "in the environment variable RERANK_PLUGINS_CACHE."
    )


def _read(path: Path) -> list[dict[str, Any]]:
    """The header and the rows, up to the first line that is damaged; empty where there is no header."""
    try:
        content = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    rows: list[dict[str, Any]] = []
    for line in content.splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not (_is_row(row) if rows else _is_header(row)):
            break
        rows.append(row)
    return rows


def _is_header(row: dict[str, Any]) -> bool:
    probes = row.get("probes")
    return isinstance(probes, dict) and all(_are_numbers(values) for values in probes.values())


def _is_row(row: dict[str, Any]) -> bool:
    seconds = row.get("seconds")
    return (
        isinstance(row.get("key"), str)
        and _are_numbers(row.get("scores"))
        and _are_numbers([seconds])
        and float(cast(float, seconds)) >= 0
    )


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 for value in values
    )


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
