"""What the contenders have to do: queries with candidates of real lengths, and short calls."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from harness._model import Model
from rerank_plugins.errors import InputError
from rerank_plugins.evaluation import BeirDataset
from rerank_plugins.evaluation._beir import read_collection
from rerank_plugins.evaluation._first_stage import with_first_stage

__all__ = [
    "QUESTIONS",
    "Call",
    "Work",
    "many_texts",
    "paragraphs",
    "read_work",
    "sample_work",
    "short_calls",
    "shuffled_paragraphs",
]

Call = tuple[str, list[str]]
"""A query and its texts."""

SHORT_CANDIDATES = 10
SHORT_TOKENS = 50

QUESTIONS = (
    "how do I write a class that can be used in a with statement",
    "what is the difference between a list and a tuple",
    "when is the finally clause of a try statement executed",
    "how are names resolved in nested scopes",
    "what does yield do in a function",
    "how can an object define what happens when it is compared with another",
    "how does the import statement find a module",
    "how are keyword arguments passed to a function",
    "format a number with two decimals",
    "what is the order in which operators are evaluated",
)


@dataclass(frozen=True, slots=True)
class Work:
    """What is reranked.

    Attributes:
        name: What it is called.
        dataset: Its queries and candidates; without judgements where `judged` is False.
        judged: Whether its judgements are people's.
    """

    name: str
    dataset: BeirDataset
    judged: bool

    @property
    def calls(self) -> list[Call]:
        """One call for each query."""
        data = self.dataset
        return [(data.queries[q], [data.documents[d] for d in found]) for q, found in data.candidates.items()]


def read_work(folder: str | os.PathLike[str], queries: int, candidates: int) -> Work:
    """The first queries of a BEIR folder, with the first of its candidates, or of BM25's where it brings none.

    Raises:
        ConfigurationError: A file is missing.
        InputError: A line is not valid, or no query has both a relevant document and candidates.
    """
    dataset, _ = with_first_stage(read_collection(folder), Path(folder), "auto", candidates)
    chosen = [query for query in dataset.usable if dataset.candidates.get(query)][:queries]
    if not chosen:
        raise InputError(f"{folder} has no query with both a relevant document and candidates. Check its query ids.")
    return Work(dataset.name, _cut(dataset, chosen, candidates), judged=True)


def sample_work(queries: int, candidates: int) -> Work:
    """Questions, and paragraphs of Python's own manual, short and long as they come."""
    texts = many_texts(queries * candidates)
    asked = [
        question if turn == 0 else f"{question} ({turn + 1})"
        for turn in range(queries // len(QUESTIONS) + 1)
        for question in QUESTIONS
    ][:queries]
    dataset = BeirDataset(
        name="python-manual",
        queries={f"q{i}": question for i, question in enumerate(asked)},
        documents={f"d{i}": text for i, text in enumerate(texts)},
        qrels={},
        # Dealt out like cards, so that each query gets short and long ones.
        candidates={f"q{i}": [f"d{j}" for j in range(i, len(texts), queries)] for i in range(queries)},
    )
    return Work("paragraphs of Python's manual", dataset, judged=False)


def paragraphs() -> list[str]:
    """Distinct paragraphs of Python's manual, short and long as they come, always the same ones in the same order."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for topic in sorted(topics):
        for part in topics[topic].split("\n\n"):
            if len(words := part.split()) > 20:
                found[" ".join(words)] = None
    return list(found)


def shuffled_paragraphs() -> list[str]:
    """`paragraphs` in a seeded order."""
    found = paragraphs()
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def many_texts(n: int) -> list[str]:
    """Some of the `paragraphs`, from all over the manual; numbered where there are not enough."""
    found = paragraphs()
    step = max(1, len(found) // n)
    first = found[::step][:n]
    # Equal texts would be scored once.
    more = (f"{number}. {text}" for number in itertools.count(2) for text in found)
    return [*first, *itertools.islice(more, n - len(first))]


def short_calls(model: Model, n: int) -> list[Call]:
    """Calls with few candidates, each cut to `SHORT_TOKENS` tokens."""
    tokenizer = model.tokenizer()
    texts = []
    for text in many_texts(n * SHORT_CANDIDATES):
        # Thrice, for paragraphs that have fewer tokens.
        offsets = tokenizer.encode(f"{text} {text} {text}", add_special_tokens=False).offsets
        texts.append(f"{text} {text} {text}"[: offsets[:SHORT_TOKENS][-1][1]])
    return [(QUESTIONS[i % len(QUESTIONS)], texts[i * SHORT_CANDIDATES : (i + 1) * SHORT_CANDIDATES]) for i in range(n)]


def _cut(dataset: BeirDataset, queries: Sequence[str], candidates: int) -> BeirDataset:
    kept = {query: dataset.candidates[query][:candidates] for query in queries}
    used = {document for found in kept.values() for document in found}
    return replace(
        dataset,
        queries={query: dataset.queries[query] for query in queries},
        documents={name: text for name, text in dataset.documents.items() if name in used},
        qrels={query: dataset.qrels[query] for query in queries},
        candidates=kept,
    )
