"""Training data: readers of pairs, triples and BEIR folders, and groups of a query with its passages."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rerank_plugins._judgements import (
    QUERIES,
    Pair,
    Triple,
    find_file,
    pairs_file,
    pairs_of_file,
    read_queries,
    read_rows,
    read_texts,
    triples_of_file,
)
from rerank_plugins._paths import new_file
from rerank_plugins._printable import json_text, parse_json
from rerank_plugins.errors import InputError, RerankError
from rerank_plugins.training.settings import Paths


@dataclass(frozen=True, slots=True)
class DataSource:
    """A file or folder of training data.

    Attributes:
        name: Its name, without the folders above it.
        rows: Judged pairs in it, or lines of triples.
        queries: Distinct queries.
        passages: Documents of its corpus; 0 without one.
        sha256: Of its files, one after the other.
    """

    name: str
    rows: int
    queries: int
    passages: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Data of one or more sources.

    Attributes:
        pairs: Judged pairs, in file order.
        passages: Corpora of BEIR folders: further passages for mining negatives.
        sources: Files and folders.
    """

    pairs: list[Pair]
    passages: list[str]
    sources: tuple[DataSource, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """One query with its candidate passages: an example for a listwise loss.

    Attributes:
        query: The query.
        passages: The candidates.
        target: Target probabilities of the listwise loss; they sum to 1.
        gains: Graded relevance of each passage, from 0 to 1: for nDCG, for the binary loss and for calibration.
    """

    query: str
    passages: tuple[str, ...]
    target: tuple[float, ...]
    gains: tuple[float, ...]


def normalise(text: str) -> str:
    """Form in which texts are compared: NFKC, lower case, letters and digits only, single spaces."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))


def as_paths(given: Paths) -> list[Path]:
    """One or several paths as a list."""
    return [Path(path) for path in ([given] if isinstance(given, (str, os.PathLike)) else given)]


def read_data(paths: Paths) -> TrainingData:
    """Reads judged pairs in any of the layouts that `train` takes, and checks every line.

    Args:
        paths: One or several of: a file of JSON lines (``.gz`` allowed), each line a pair
            ``{"query", "passage", "label", "split"?}`` or a triple ``{"query", "positive", "negative", "split"?}``; a
            folder with ``pairs.jsonl[.gz]``; a BEIR folder with ``queries.jsonl``, ``corpus.jsonl[.gz]`` and
            ``qrels.tsv``, or ``qrels/train.tsv`` and ``qrels/dev.tsv`` as splits. Grades of a BEIR folder are divided
            by its highest one. Further fields are ignored.

    Returns:
        Pairs in file order, and corpora.

    Raises:
        ConfigurationError: If a file is missing.
        InputError: If a line is not valid, with the file and the line number.
    """
    pairs: list[Pair] = []
    passages: list[str] = []
    sources: list[DataSource] = []
    for path in as_paths(paths):
        file = pairs_file(path)
        if file is None:
            found, corpus, files = _read_beir(path)
            passages += corpus
        else:
            found, corpus, files = pairs_of_file(file), [], [file]
        pairs += found
        sources.append(_source(path, found, len(corpus), files))
    return TrainingData(pairs, passages, tuple(sources))


def _source(path: Path, found: Sequence[Pair | Triple], passages: int, files: Sequence[Path]) -> DataSource:
    return DataSource(path.resolve().name, len(found), len({row.query for row in found}), passages, _digest(files))


def read_pairs(paths: Paths) -> list[Pair]:
    """The judged pairs of files and folders, in file order; see `read_data` for what they may be.

    Raises:
        ConfigurationError: If a file is missing.
        InputError: If a line is not valid, with the file and the line number.
    """
    return read_data(paths).pairs


def read_triples(paths: Paths) -> list[Triple]:
    """Reads triples from JSON lines, such as `mine` writes, and checks every line.

    Args:
        paths: Files (``.gz`` allowed) of JSON lines ``{"query", "positive", "negative", "positive_score"?,
            "negative_score"?, "split"?}``, where ``negative`` may be a list and ``negative_score`` is one then too.

    Raises:
        ConfigurationError: If a file is missing.
        InputError: If a line is not valid, with the file and the line number.
    """
    return read_triple_data(paths)[0]


def read_triple_data(paths: Paths) -> tuple[list[Triple], tuple[DataSource, ...]]:
    """The triples of files, as `read_triples` reads them, and what was read."""
    read = [(path, triples_of_file(path)) for path in as_paths(paths)]
    sources = tuple(_source(path, found, 0, [path]) for path, found in read)
    return [triple for _, found in read for triple in found], sources


def _read_beir(folder: Path) -> tuple[list[Pair], list[str], list[Path]]:
    """Pairs, the corpus without its blank documents, and the files that were read."""
    asked, corpus, *qrels = _beir_files(folder)
    named = {"train.tsv": "train", "dev.tsv": "dev"}
    splits = [(path, named.get(path.name)) for path in qrels]
    queries = read_queries(asked)
    documents = {name: text for _, name, text in read_texts(corpus)}
    judged: list[tuple[str, str, float, str | None]] = []
    for path, split in splits:
        for number, query, document, grade in read_rows(path):
            where = f"{path}, line {number}"
            if query not in queries:
                raise InputError(f"{where}: the query {query!r} is not in {asked.name}.")
            if not documents.get(document, "").strip():
                raise InputError(f"{where}: the document {document!r} is not in {corpus.name}, or has no text.")
            judged.append((query, document, grade, split))
    highest = max((grade for _, _, grade, _ in judged), default=0.0)
    if highest <= 0:
        raise InputError(f"{splits[0][0]} has no relevant document (a score above 0): nothing can be learnt from it.")
    pairs = [Pair(queries[q], documents[d], max(0.0, grade / highest), split) for q, d, grade, split in judged]
    passages = [text for text in documents.values() if text.strip()]
    return pairs, passages, [asked, corpus, *qrels]


def is_trained_on(model: Path, data: Path) -> bool:
    """Whether a model was trained, by its directory's ``training.json``, on the judgements of a file or folder."""
    try:
        facts = parse_json((model / "training.json").read_bytes())
        file = pairs_file(data)
        if file is None:
            files = _beir_files(data)
            judged = find_file(data, "qrels.tsv", "qrels/test.tsv") in files
        else:
            files = [file]
            judged = all(pair.split != "test" for pair in pairs_of_file(file))
        return judged and _digest(files) in facts["data"]
    except (OSError, ValueError, KeyError, TypeError, RerankError):
        return False


def _beir_files(folder: Path) -> list[Path]:
    """Queries, corpus, and training judgements: one file, or one each for the splits train and dev."""
    asked = find_file(folder, *QUERIES)
    corpus = find_file(folder, "corpus.jsonl.gz", "corpus.jsonl")
    files = [asked, corpus, find_file(folder, "qrels.tsv", "qrels/train.tsv")]
    if files[-1].name == "train.tsv" and (folder / "qrels" / "dev.tsv").is_file():
        files.append(folder / "qrels" / "dev.tsv")
    return files


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def is_held_out(query: str, fraction: float = 0.1) -> bool:
    """Whether a query is a dev query: a hash of its text decides, the same in every run."""
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
    """Passages and their labels by query, in file order; the highest label of a repeated pair counts."""
    found: dict[str, dict[str, float]] = {}
    for pair in pairs:
        labels = found.setdefault(pair.query, {})
        labels[pair.passage] = max(pair.label, labels.get(pair.passage, 0.0))
    return found


def answered(pairs: Iterable[Pair]) -> list[tuple[str, dict[str, float]]]:
    """`by_query` of the queries that have a relevant passage, with a label above 0."""
    return [(query, labels) for query, labels in by_query(pairs).items() if max(labels.values()) > 0]


def groups_from_pairs(pairs: Iterable[Pair], size: int, seed: int = 0) -> list[Group]:
    """Groups of at most ``size`` judged passages, one for each positive.

    A group has a positive and passages of lower labels; the target is their labels, scaled to the sum 1. A query
    without a positive, or without a passage of a lower label, has no group.
    """
    rng = random.Random(seed)
    groups = []
    for query, labels in by_query(pairs).items():
        for positive in [text for text, label in labels.items() if label > 0]:
            lower = [text for text, label in labels.items() if label < labels[positive]]
            if not lower:
                continue
            chosen = [positive, *rng.sample(lower, min(size - 1, len(lower)))]
            gains = tuple(labels[text] for text in chosen)
            groups.append(Group(query, tuple(chosen), normalised(gains), gains))
    return groups


def normalised(gains: Sequence[float]) -> tuple[float, ...]:
    """Gains scaled to the sum 1, as a target."""
    total = sum(gains)
    return tuple(gain / total for gain in gains)


def evaluation_groups(pairs: Iterable[Pair], limit: int | None = None) -> list[Group]:
    """One group per query with all its judged passages, for measuring; at most ``limit`` of them, drawn at random."""
    groups = []
    for query, labels in by_query(pairs).items():
        gains = tuple(labels.values())
        if max(gains) > 0 and min(gains) < max(gains):
            groups.append(Group(query, tuple(labels), normalised(gains), gains))
    if limit is not None and len(groups) > limit:
        groups = random.Random(0).sample(groups, limit)
    return groups


def write_groups(path: Path, groups: Iterable[Group]) -> None:
    """Writes groups as JSON lines, atomically."""
    with new_file(path) as out:
        for group in groups:
            out.write((json_text(asdict(group)) + "\n").encode())


def read_groups(path: Path) -> list[Group]:
    """Groups of a file of `write_groups`."""
    groups = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            for name in ("passages", "target", "gains"):
                row[name] = tuple(row[name])
            groups.append(Group(**row))
    return groups
