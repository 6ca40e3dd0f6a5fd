"""Retrieval test sets in BEIR layout, and what reranking does to them."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rerank_plugins.errors import ConfigurationError, InputError, ScoringError

Run = dict[str, dict[str, float]]
"""Scores by query id and document id; higher is better."""


class Scores(Protocol):
    """Anything with `Reranker.score`."""

    def score(self, query: str, texts: list[str], /) -> Any:
        """Logits of the texts, shape (n,), in input order."""


Scorer = Scores | Callable[[str, list[str]], Any]
"""A `Reranker`, or a function of a query and texts that gives their logits."""


@dataclass(frozen=True, slots=True)
class BeirDataset:
    """A test set: queries, documents, judgements and a first-stage ranking.

    Attributes:
        name: The folder's name.
        queries: Text by query id.
        documents: Text by document id, the title in front where there is one.
        qrels: Judgements by query id and document id.
        candidates: The first stage's document ids by query id, best first.
    """

    name: str
    queries: dict[str, str]
    documents: dict[str, str]
    qrels: dict[str, dict[str, int]]
    candidates: dict[str, list[str]]

    @property
    def usable(self) -> list[str]:
        """Ids of the queries that a measure can be computed for: those with a relevant document, in file order."""
        return [query for query in self.queries if max(self.qrels.get(query, {}).values(), default=0) > 0]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Undecodable bytes must not end the reading without a line number: they come up in the JSON or the qrels.
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
            for number, line in enumerate(raw, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
                if text.strip():
                    yield number, text.rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_texts(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, id and text, the title in front, of each line of a queries or corpus file.

    Raises:
        InputError: If a line is not valid, with the file and the line number.
    """
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            name, title, text = str(row["_id"]), str(row.get("title") or "").strip(), str(row["text"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f'{path}, line {number}: expected {{"_id", "text", "title"?}} ({error!r}).') from error
        yield number, name, f"{title} {text}" if title else text


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
    for number, line in _lines(path):
        fields = line.split("\t")
        if number == 1 and fields[0] in {"query-id", "query_id", "qid"}:
            continue
        if len(fields) < 3:
            raise InputError(f"{path}, line {number}: expected query id, document id and a number between tabs.")
        yield number, fields[0], fields[1], _number(path, number, fields[2])


def _trec_rows(path: Path) -> Iterator[tuple[int, str, str, float]]:
    for number, line in _lines(path):
        fields = line.split()
        if len(fields) != 6:
            raise InputError(
                f"{path}, line {number}: expected the six fields of a TREC run (query id, Q0, document id, rank, "
                f"score, tag), got {len(fields)}. Tab-separated query id, document id and rank need a file name that "
                "ends in .tsv."
            )
        # Evaluation tools read the score and ignore the rank.
        yield number, fields[0], fields[2], -_number(path, number, fields[4])


def _number(path: Path, line: int, field: str) -> float:
    try:
        value = float(field)
    except ValueError as error:
        raise InputError(f"{path}, line {line}: {field!r} is not a number.") from error
    if not np.isfinite(value):
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
        f"{folder} holds no {' or '.join(names)}. A BEIR folder has queries.jsonl, corpus.jsonl[.gz] and qrels.tsv."
    )


def read_collection(path: str | os.PathLike[str]) -> BeirDataset:
    """Reads a folder with queries.jsonl, corpus.jsonl[.gz] and qrels.tsv (or qrels/test.tsv), without candidates.

    Judgements of queries that are not in queries.jsonl are left out; those of documents that are not in the corpus
    stay, and count in the ideal ranking.

    Raises:
        ConfigurationError: If a file is missing.
        InputError: If a line is not valid, with the file and the line number, or if nothing can be measured.
    """
    folder = Path(path)
    queries = read_queries(find_file(folder, "queries.jsonl", "queries.jsonl.gz"))
    corpus = find_file(folder, "corpus.jsonl.gz", "corpus.jsonl")
    documents = {name: text for _, name, text in read_texts(corpus)}
    if not documents:
        raise InputError(f"{corpus} has no document.")
    judged = find_file(folder, "qrels.tsv", "qrels/test.tsv")
    qrels: dict[str, dict[str, int]] = {}
    for _, query, document, grade in read_rows(judged):
        if query in queries:
            qrels.setdefault(query, {})[document] = int(grade)
    dataset = BeirDataset(folder.resolve().name, queries, documents, qrels, {})
    if not dataset.usable:
        raise InputError(
            f"{judged} has no relevant document (a score above 0) for any query of queries.jsonl: nothing can be "
            "measured. Check that both use the same query ids."
        )
    return dataset


def read_candidates(path: Path, dataset: BeirDataset) -> BeirDataset:
    """The data set with candidates from a file: a TREC run, or, named .tsv, lines *query id, document id, rank*.

    Candidates of queries that the data set does not have are left out.

    Raises:
        InputError: If a line is not valid or names a document that is not in the corpus, with file and line number.
    """
    rows = read_rows if path.name.removesuffix(".gz").endswith(".tsv") else _trec_rows
    ranked: dict[str, list[tuple[float, str]]] = {}
    for number, query, document, place in rows(path):
        if query not in dataset.queries:
            continue
        if document not in dataset.documents:
            raise InputError(f"{path}, line {number}: the document {document!r} is not in the corpus.")
        ranked.setdefault(query, []).append((place, document))
    order = {
        query: list(dict.fromkeys(document for _, document in sorted(found, key=lambda row: row[0])))
        for query, found in ranked.items()
    }
    return replace(dataset, candidates=order)


def read_beir(path: str | os.PathLike[str], candidates: str | None = None) -> BeirDataset:
    """Reads a folder with queries.jsonl, corpus.jsonl[.gz], qrels.tsv and a first stage's candidates.

    Args:
        path: The folder.
        candidates: Name of the candidates file, with lines *query id, document id, rank*; None takes
            ``candidates.tsv``, or else ``candidates-bm25.tsv``.

    Raises:
        ConfigurationError: If a file is missing.
        InputError: If a line is not valid, with the file and the line number.
    """
    names = (candidates,) if candidates else CANDIDATES
    return read_candidates(find_file(Path(path), *names), read_collection(path))


CANDIDATES = ("candidates.tsv", "candidates-bm25.tsv")
"""Candidate lists that a folder may bring, in the order in which they are looked for."""


def first_stage_run(dataset: BeirDataset, top_k: int | None = 100) -> Run:
    """The candidates in their given order, as a run."""
    return {
        query: {d: -float(rank) for rank, d in enumerate(found[:top_k])} for query, found in dataset.candidates.items()
    }


def score_texts(scorer: Scorer, query: str, texts: Sequence[str]) -> NDArray[np.float64]:
    """Logits of the texts, shape (n,), in input order.

    Raises:
        ScoringError: There is not one finite number for each text.
    """
    score: Any = getattr(scorer, "score", scorer)
    logits = np.asarray(score(query, list(texts)), dtype=np.float64)
    if logits.shape != (len(texts),) or not np.isfinite(logits).all():
        raise ScoringError(
            f"Expected one finite score for each of {len(texts)} texts of the query {query[:80]!r}; got shape "
            f"{logits.shape} with {int(np.count_nonzero(~np.isfinite(logits)))} values that are not finite."
        )
    return logits


def rerank_run(
    reranker: Scorer,
    dataset: BeirDataset,
    top_k: int | None = 100,
    progress: Callable[[str, float], None] | None = None,
) -> Run:
    """The candidates in the order that a reranker gives them.

    Equal logits keep the first stage's order. Queries without judgements are not scored: no measure could use
    them.

    Args:
        reranker: A `Reranker`, or a function of a query and texts that gives their logits.
        dataset: The test set.
        top_k: How many candidates of each query are reranked, and kept; None takes all.
        progress: Called with the set's name and the share done.
    """
    queries = [query for query in dataset.candidates if query in dataset.qrels]
    run: Run = {}
    for number, query in enumerate(queries, 1):
        found = dataset.candidates[query][:top_k]
        logits = score_texts(reranker, dataset.queries[query], [dataset.documents[d] for d in found])
        # Places rather than logits: evaluation tools break ties by document id.
        order = np.argsort(-logits, kind="stable")
        run[query] = {found[row]: -float(place) for place, row in enumerate(order)}
        if progress is not None:
            progress(dataset.name, number / len(queries))
    return run
