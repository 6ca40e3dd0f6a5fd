"""Judged pairs and triples in JSON lines, and the files of BEIR folders: read, and every line checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rerank_plugins._lines import found_keys, read_lines, read_objects
from rerank_plugins.errors import ConfigurationError, InputError

PAIRS = ("pairs.jsonl", "pairs.jsonl.gz")
QUERIES = ("queries.jsonl", "queries.jsonl.gz")
"""Files by which a folder of judged pairs and a BEIR folder are known."""
CANDIDATES = ("candidates.tsv", "candidates-bm25.tsv")
"""Candidate lists that a BEIR folder may bring, in the order in which they are looked for."""

_SPLITS = {"train", "dev", "test"}
_TRIPLE = '{"query", "positive", "negative"}'
_EXPECTED = f'{{"query", "passage", "label"}} or {_TRIPLE}'


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, a passage, and how relevant the passage is, from 0 to 1."""

    query: str
    passage: str
    label: float
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Triple:
    """A query, a relevant passage, and passages that are not relevant.

    Attributes:
        query: The query.
        positive: The relevant passage.
        negatives: The others, at least one.
        positive_score: A cross-encoder's logit of the positive; None where the file has none.
        negative_scores: Its logits of the negatives, in their order; None where the file has none.
        split: ``"train"``, ``"dev"``, ``"test"`` or None.
    """

    query: str
    positive: str
    negatives: tuple[str, ...]
    positive_score: float | None = None
    negative_scores: tuple[float, ...] | None = None
    split: str | None = None


def pairs_of_file(path: Path) -> list[Pair]:
    """The judged pairs of a file of pairs or triples, in file order.

    Raises:
        InputError: A line is not valid, with the file and the line number.
    """
    return [pair for row, where in read_objects(path, _EXPECTED) for pair in _pairs_of(row, where)]


def triples_of_file(path: Path) -> list[Triple]:
    """The triples of a file, in file order.

    Raises:
        ConfigurationError: There is no such file.
        InputError: A line is not valid, with the file and the line number.
    """
    return [_triple(row, where) for row, where in read_objects(_existing(path), _TRIPLE)]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path}.")
    return path


def pairs_file(path: Path) -> Path | None:
    """The file of JSON lines that is meant; None for a BEIR folder.

    Raises:
        ConfigurationError: There is neither.
    """
    if not path.is_dir():
        return _existing(path)
    for name in PAIRS:
        if (path / name).is_file():
            return path / name
    if any((path / name).is_file() for name in QUERIES):
        return None
    raise ConfigurationError(
        f"{path} holds neither pairs.jsonl nor pairs.jsonl.gz, and no queries.jsonl as a BEIR folder has."
    )


def _pairs_of(row: dict[str, Any], where: str) -> list[Pair]:
    if "passage" in row or not {"positive", "negative"} & row.keys():
        return [_pair(row, where)]
    triple = _triple(row, where)
    negatives = [Pair(triple.query, text, 0.0, triple.split) for text in triple.negatives]
    return [Pair(triple.query, triple.positive, 1.0, triple.split), *negatives]


def _check_keys(row: dict[str, Any], needed: list[str], expected: str, where: str) -> None:
    if lacking := found_keys(row, needed):
        remedy = "Rename the keys"
        if "_id" in row:
            remedy = "It belongs to a BEIR folder: give the folder"
        elif {"query", "passage"} <= row.keys() and "positive" in needed:
            remedy = "For triples of such pairs: rerank-plugins mine"
        raise InputError(f"{where}: expected an object {expected}; this one {lacking}. {remedy}.")


def _text(row: dict[str, Any], key: str, where: str) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {key!r} must be a text that is not blank, got {text!r:.80}.")
    return text


def _split(row: dict[str, Any], where: str) -> str | None:
    split = row.get("split")
    if split is not None and (not isinstance(split, str) or split not in _SPLITS):
        raise InputError(f"{where}: 'split' must be one of {sorted(_SPLITS)} or left out, got {split!r}.")
    return split


def _pair(row: dict[str, Any], where: str) -> Pair:
    _check_keys(row, ["query", "passage", "label"], _EXPECTED, where)
    query, passage = _text(row, "query", where), _text(row, "passage", where)
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not 0 <= label <= 1:
        raise InputError(f"{where}: 'label' must be a number from 0 to 1, got {label!r}.")
    return Pair(query, passage, float(label), _split(row, where))


def _triple(row: dict[str, Any], where: str) -> Triple:
    _check_keys(row, ["query", "positive", "negative"], _TRIPLE, where)
    query, positive = _text(row, "query", where), _text(row, "positive", where)
    given = row.get("negative")
    several = given if isinstance(given, list) else [given]
    if not several:
        raise InputError(f"{where}: 'negative' must be a text or a list of at least one, got [].")
    negatives = tuple(_text({"negative": text}, "negative", where) for text in several)
    if positive in negatives:
        raise InputError(f"{where}: the same text is 'positive' and 'negative': {positive[:80]!r}.")
    scores = row.get("negative_score")
    listed: list[Any] = scores if isinstance(scores, list) else [scores]
    if scores is not None and (len(listed) != len(negatives) or isinstance(scores, list) != isinstance(given, list)):
        raise InputError(
            f"{where}: 'negative_score' must be a number, or a list of one for each of {len(negatives)} negatives; "
            f"got {scores!r}."
        )
    for key, values in (("positive_score", [row.get("positive_score")]), ("negative_score", listed)):
        for value in values:
            if (value is None and key in row and row[key] is not None) or not _is_score(value):
                raise InputError(f"{where}: {key!r} must be a finite number or left out, got {value!r}.")
    first = row.get("positive_score")
    return Triple(
        query,
        positive,
        negatives,
        None if first is None else float(first),
        None if scores is None else tuple(float(value) for value in listed),
        _split(row, where),
    )


def _is_score(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def read_texts(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, id and text, the title in front, of each line of a queries or corpus file.

    Raises:
        InputError: If a line is not valid, with the file and the line number.
    """
    expected = '{"_id", "text", "title"?}'
    for row, where in read_objects(path, expected):
        if lacking := found_keys(row, ["_id", "text"]):
            raise InputError(f"{where}: expected an object {expected}; this one {lacking}.")
        name, text, title = row["_id"], row["text"], row.get("title") or ""
        if not isinstance(name, str | int) or not isinstance(text, str) or not isinstance(title, str):
            raise InputError(
                f"{where}: expected texts in {expected}; got {type(name).__name__}, {type(text).__name__} and "
                f"{type(title).__name__}."
            )
        title = title.strip()
        yield int(where.rsplit(" ", 1)[-1]), str(name), f"{title} {text}" if title else text


def read_queries(path: Path) -> dict[str, str]:
    """Text by query id.

    Raises:
        InputError: If a line is not valid or a query is blank, with the file and the line number.
    """
    found = {}
    for number, name, text in read_texts(path):
        if not text.strip():
            raise InputError(f"{path}, line {number}: the query is blank; give it a text, or delete the line.")
        found[name] = text
    return found


def read_rows(path: Path) -> Iterator[tuple[int, str, str, float]]:
    """Line number, query id, document id and number of each line of a tab-separated file.

    Raises:
        InputError: If a line is not valid, with the file and the line number.
    """
    for number, line in read_lines(path):
        fields = line.split("\t")
        if number == 1 and fields[0] in {"query-id", "query_id", "qid"}:
            continue
        if len(fields) < 3:
            raise InputError(f"{path}, line {number}: expected query id, document id and a number between tabs.")
        yield number, fields[0], fields[1], number_of(path, number, fields[2])


def number_of(path: Path, line: int, field: str) -> float:
    """A field as a finite number.

    Raises:
        InputError: It is none, with the file and the line number.
    """
    try:
        value = float(field)
    except ValueError as error:
        raise InputError(f"{path}, line {line}: {field!r} is not a number.") from error
    if not math.isfinite(value):
        raise InputError(f"{path}, line {line}: expected a finite number, got {field!r}.")
    return value


def find_file(folder: Path, *names: str) -> Path:
    """The first of some files that a folder holds.

    Raises:
        ConfigurationError: It holds none of them.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ConfigurationError(
        f"{folder} holds no {' or '.join(names)}. A BEIR folder has queries.jsonl, corpus.jsonl[.gz] and qrels.tsv; "
        'judged pairs are a file of JSON lines {"query", "passage", "label"}.'
    )
