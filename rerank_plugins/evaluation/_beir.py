"""Retrieval test sets in BEIR layout, and what reranking does to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._judgements import (
    CANDIDATES,
    PAIRS,
    QUERIES,
    find_file,
    number_of,
    pairs_of_file,
    read_queries,
    read_rows,
    read_texts,
)
from rerank_plugins._lines import read_lines
from rerank_plugins.errors import InputError, ScoringError

Run = dict[str, dict[str, float]]
"""Scores by query id and document id; higher is better."""


class Scores(Protocol):
    """Anything with a method like `Reranker.score`; `logits` is taken where there is one."""

    def score(self, query: str, texts: list[str], /) -> Any:
        """Scores of the texts, shape (n,), in input order; higher is better."""


HIGHEST_GRADE = 1000
"""trec_eval keeps a table as long as the highest grade, and wraps numbers beyond 32 bits."""

Scorer = Scores | Callable[[str, list[str]], Any]
"""A `Reranker`, or a function of a query and texts that gives their scores."""


@dataclass(frozen=True, slots=True)
class BeirDataset:
    """A test set: queries, documents, judgements and a first-stage ranking.

    Attributes:
        name: The folder's name.
        queries: Text by query id.
        documents: Text by document id, the title in front where there is one.
        qrels: Judgements by query id and document id.
        candidates: The first stage's document ids by query id, best first.
        scores: The first stage's scores by query id, in the order of `candidates`; empty where only its order is known.
    """

    name: str
    queries: dict[str, str]
    documents: dict[str, str]
    qrels: dict[str, dict[str, int]]
    candidates: dict[str, list[str]]
    scores: dict[str, list[float]] = field(default_factory=dict)

    @property
    def usable(self) -> list[str]:
        """Ids of the queries that a measure can be computed for: those with a relevant document, in file order."""
        return [query for query in self.queries if max(self.qrels.get(query, {}).values(), default=0) > 0]


def _trec_rows(path: Path) -> Iterator[tuple[int, str, str, float]]:
    for number, line in read_lines(path):
        fields = line.split()
        if len(fields) != 6:
            raise InputError(
                f"{path}, line {number}: expected the six fields of a TREC run (query id, Q0, document id, rank, "
                f"score, tag), got {len(fields)}. Tab-separated query id, document id and rank need a file name that "
                "ends in .tsv."
            )
        # Evaluation tools read the score and ignore the rank.
        yield number, fields[0], fields[2], -number_of(path, number, fields[4])


def read_collection(path: str | os.PathLike[str]) -> BeirDataset:
    """Reads a folder with queries.jsonl, corpus.jsonl[.gz] and qrels.tsv (or qrels/test.tsv), without candidates.

    A file of judged pairs, or a folder with ``pairs.jsonl`` alone, is read as `read_judged_pairs` says.

    Judgements of queries that are not in queries.jsonl are left out; those of documents that are not in the corpus
    stay, and count in the ideal ranking.

    Raises:
        ConfigurationError: If a file is missing.
        InputError: If a line is not valid, with the file and the line number, or if nothing can be measured.
    """
    folder = Path(path)
    if not any((folder / name).is_file() for name in QUERIES):
        for file in (folder, *(folder / name for name in PAIRS)):
            if file.is_file():
                return read_judged_pairs(file)
    queries = read_queries(find_file(folder, *QUERIES))
    corpus = find_file(folder, "corpus.jsonl.gz", "corpus.jsonl")
    documents = {name: text for _, name, text in read_texts(corpus)}
    if not documents:
        raise InputError(f"{corpus} has no document.")
    judged = find_file(folder, "qrels.tsv", "qrels/test.tsv")
    qrels: dict[str, dict[str, int]] = {}
    for number, query, document, grade in read_rows(judged):
        if grade != int(grade) or abs(grade) > HIGHEST_GRADE:
            raise InputError(
                f"{judged}, line {number}: a grade must be a whole number from -{HIGHEST_GRADE} to {HIGHEST_GRADE}, "
                f"got {grade:g}."
            )
        if query in queries:
            qrels.setdefault(query, {})[document] = int(grade)
    dataset = BeirDataset(folder_name(folder), queries, documents, qrels, {})
    if not dataset.usable:
        raise InputError(
            f"{judged} has no relevant document (a score above 0) for any query of queries.jsonl: nothing can be "
            "measured. Check that both use the same query ids."
        )
    return dataset


def read_judged_pairs(file: Path) -> BeirDataset:
    """A file of judged pairs or triples as a collection: all its passages are the corpus of each query.

    The queries are those of the split "test", where pairs have that, and otherwise all. Labels become grades: as they
    are where all are whole numbers, and otherwise in hundredths.

    Raises:
        InputError: If a line is not valid, or nothing is relevant.
    """
    pairs = pairs_of_file(file)
    tested = any(pair.split == "test" for pair in pairs)
    whole = all(pair.label == int(pair.label) for pair in pairs)
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for pair in pairs:
        document = documents.setdefault(pair.passage, f"p{len(documents) + 1}")
        if pair.split == "test" or not tested:
            query = queries.setdefault(pair.query, f"q{len(queries) + 1}")
            grade = round(pair.label * (1 if whole else 100))
            grades = qrels.setdefault(query, {})
            grades[document] = max(grade, grades.get(document, 0))
    dataset = BeirDataset(
        file.resolve().name.removesuffix(".gz").removesuffix(".jsonl"),
        {name: text for text, name in queries.items()},
        {name: text for text, name in documents.items()},
        qrels,
        {},
    )
    if not dataset.usable:
        raise InputError(f"{file} has no relevant passage, with a label above 0: nothing can be measured.")
    return dataset


_COMMON_NAMES = {"beir", "data", "dataset", "test", "dev", "eval", "evaluation"}


def folder_name(folder: Path) -> str:
    """A data set's name: its folder's, with the one above it where many are called the same."""
    resolved = folder.resolve()
    name = resolved.name
    return f"{resolved.parent.name}/{name}" if name.lower() in _COMMON_NAMES and resolved.parent.name else name


def read_candidates(path: Path, dataset: BeirDataset) -> BeirDataset:
    """The data set with candidates from a file: a TREC run, or, named .tsv, lines *query id, document id, rank*.

    Candidates of queries that the data set does not have are left out.

    Raises:
        InputError: If a line is not valid or names a document that is not in the corpus, with file and line number.
    """
    only_ranks = path.name.removesuffix(".gz").endswith(".tsv")
    ranked: dict[str, list[tuple[float, str]]] = {}
    for number, query, document, place in (read_rows if only_ranks else _trec_rows)(path):
        if query not in dataset.queries:
            continue
        if document not in dataset.documents:
            raise InputError(f"{path}, line {number}: the document {document!r} is not in the corpus.")
        ranked.setdefault(query, []).append((place, document))
    order: dict[str, dict[str, float]] = {}
    for query, found in ranked.items():
        places = order[query] = {}
        for place, document in sorted(found, key=lambda row: row[0]):
            places.setdefault(document, -place)
    scores = {} if only_ranks else {query: list(found.values()) for query, found in order.items()}
    return replace(dataset, candidates={query: list(found) for query, found in order.items()}, scores=scores)


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
    # A Reranker's scores may be probabilities, which run into each other near 0 and 1.
    score: Any = getattr(scorer, "logits", None) or getattr(scorer, "score", scorer)
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
