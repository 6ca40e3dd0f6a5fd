"""Training data: lines of pairs in, lists of one query and several graded passages out."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rerank_plugins.errors import ConfigurationError, InputError

_SPLITS = {"train", "dev", "test"}


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, a passage, and how relevant the passage is, from 0 to 1."""

    query: str
    passage: str
    label: float
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """One query with its candidate passages: what a listwise loss sees.

    Attributes:
        query: The query.
        passages: The candidates.
        target: A probability for each passage, summing to 1.
        gains: Graded relevance of each passage, for measuring.
        kind: Where the group comes from, for example a set's name.
        judged: True where ``gains`` are people's labels, so that an absolute (binary) loss may use them.
    """

    query: str
    passages: tuple[str, ...]
    target: tuple[float, ...]
    gains: tuple[float, ...]
    kind: str = ""
    judged: bool = True


def normalise(text: str) -> str:
    """The text as used for telling duplicates: NFKC, lower case, letters and digits only, single spaces."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))


def _open(path: Path) -> Iterator[tuple[int, bytes]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        yield from enumerate(lines, 1)


def read_pairs(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Pair]:
    """Reads pairs from JSON lines, and checks every line before anything else happens.

    Args:
        paths: Files of JSON lines ``{"query", "passage", "label", "split"?}`` (``.gz`` allowed), or folders
            that hold a ``pairs.jsonl`` or ``pairs.jsonl.gz``. Further fields are ignored.

    Returns:
        The pairs in file order.

    Raises:
        ConfigurationError: If a file is missing.
        InputError: If a line is not valid, with the file and the line number.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    pairs: list[Pair] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            found = [path / name for name in ("pairs.jsonl", "pairs.jsonl.gz") if (path / name).is_file()]
            if not found:
                raise ConfigurationError(f"{path} holds neither pairs.jsonl nor pairs.jsonl.gz.")
            path = found[0]
        if not path.is_file():
            raise ConfigurationError(f"No training file {path}.")
        for number, line in _open(path):
            if line.strip():
                pairs.append(_pair(line, f"{path}, line {number}"))
    return pairs


def _pair(line: bytes, where: str) -> Pair:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(row, dict):
        raise InputError(f'{where}: expected an object {{"query", "passage", "label"}}, got {type(row).__name__}.')
    texts = []
    for key in ("query", "passage"):
        text = row.get(key)
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: {key!r} must be a text that is not blank, got {text!r}.")
        texts.append(text)
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not 0 <= label <= 1:
        raise InputError(f"{where}: 'label' must be a number from 0 to 1, got {label!r}.")
    split = row.get("split")
    if split is not None and split not in _SPLITS:
        raise InputError(f"{where}: 'split' must be one of {sorted(_SPLITS)} or left out, got {split!r}.")
    return Pair(texts[0], texts[1], float(label), split)


def is_held_out(query: str, fraction: float = 0.1) -> bool:
    """Whether a query belongs to the dev part, decided by its text alone so that every run agrees."""
    digest = hashlib.sha256(normalise(query).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < fraction


def split_pairs(pairs: Iterable[Pair], fraction: float = 0.1) -> tuple[list[Pair], list[Pair]]:
    """Train and dev pairs: the data's own splits where it has both, otherwise a fixed share of the queries.

    Pairs of a ``test`` split are left out of both.
    """
    kept = [pair for pair in pairs if pair.split != "test"]
    if {pair.split for pair in kept} >= {"train", "dev"}:
        dev_queries = {normalise(pair.query) for pair in kept if pair.split == "dev"}
        train = [pair for pair in kept if pair.split != "dev" and normalise(pair.query) not in dev_queries]
        return train, [pair for pair in kept if pair.split == "dev"]
    train = [pair for pair in kept if not is_held_out(pair.query, fraction)]
    return train, [pair for pair in kept if is_held_out(pair.query, fraction)]


def by_query(pairs: Iterable[Pair]) -> dict[str, dict[str, float]]:
    """Passages and their labels by query, in the order they come; the highest label of a repeated pair
    counts."""
    found: dict[str, dict[str, float]] = {}
    for pair in pairs:
        labels = found.setdefault(pair.query, {})
        labels[pair.passage] = max(pair.label, labels.get(pair.passage, 0.0))
    return found


def groups_from_pairs(pairs: Iterable[Pair], size: int, seed: int = 0, kind: str = "") -> list[Group]:
    """Groups of at most ``size`` passages out of judged pairs alone, one for each positive.

    Queries with no positive, or with nothing but positives, teach no order and are left out.
    """
    rng = random.Random(seed)
    groups = []
    for query, labels in by_query(pairs).items():
        positives = [text for text, label in labels.items() if label > 0]
        negatives = [text for text, label in labels.items() if label == 0]
        if not negatives:
            continue
        for positive in positives:
            chosen = [positive, *rng.sample(negatives, min(size - 1, len(negatives)))]
            gains = tuple(labels[text] for text in chosen)
            target = tuple(1.0 if text == positive else 0.0 for text in chosen)
            groups.append(Group(query, tuple(chosen), target, gains, kind))
    return groups


def evaluation_groups(pairs: Iterable[Pair], limit: int | None = None, kind: str = "") -> list[Group]:
    """One group per query with all its judged passages, for measuring."""
    groups = []
    for query, labels in by_query(pairs).items():
        gains = tuple(labels.values())
        if max(gains) > 0 and min(gains) < max(gains):
            total = sum(gains)
            groups.append(Group(query, tuple(labels), tuple(gain / total for gain in gains), gains, kind))
    if limit is not None and len(groups) > limit:
        groups = random.Random(0).sample(groups, limit)
    return groups


def write_groups(path: Path, groups: Iterable[Group]) -> None:
    """Writes groups as JSON lines, at once or not at all."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as out:
        for group in groups:
            row = {name: getattr(group, name) for name in ("query", "passages", "target", "gains", "kind", "judged")}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)


def read_groups(path: Path) -> list[Group]:
    """Reads what `write_groups` wrote."""
    groups = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            for name in ("passages", "target", "gains"):
                row[name] = tuple(row[name])
            groups.append(Group(**row))
    return groups
