"""The recipe of the bundled model: which data, mixed how."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._minilm import minilm_directory
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.evaluation._pairs import Pair
from rerank_plugins.training._data import (
    Group,
    answered,
    groups_from_pairs,
    is_held_out,
    normalise,
    read_groups,
    read_pairs,
    split_pairs,
    write_groups,
)
from rerank_plugins.training._mining import (
    BiEncoder,
    Progress,
    Vectors,
    count_words,
    distilled_groups,
    labelled_groups,
    pseudo_queries,
)

LABELLED_SETS: dict[str, int] = {
    "squad-sentences": 9000,
    "nq-open-oracle": 2500,
    "medquad": 1000,
    "selqa-dev": 1500,
    "covidqa-deepset": 400,
    "pubmedqa-labeled": 300,
    "tatqa-dev": 400,
    "covid-question-similarity": 300,
    "multihop-small": 150,
}
"""The sets with a licence that permits it, and the largest number of their questions to use. Half of SQuAD's are asked
of sentences, the others of paragraphs."""

HELD_OUT = {"squad-sentences": 70, "selqa-dev": 50, "nq-open-oracle": 50}
"""Queries held out of each set; 20 of those not named."""

PSEUDO_QUERIES = 5100
QUESTION_SOURCES = {"squad-sentences": 250, "nq-open-oracle": 250, "medquad": 400}
"""Sets whose questions are compared with each other, and how many of them."""

MARGIN = -0.1
"""A passage that the bi-encoder puts so far above the answer is likely to be another answer; just above it stand the
passages that a reranker is there to tell from it."""

SHARED_WORDS = 0.4
"""What BM25, divided by the query's largest, counts beside the cosine where both are the teacher: about what it counts
in an untrained head."""

Questions = list[tuple[str, dict[str, float]]]
Bonus = Callable[[str, Sequence[str]], NDArray[np.float32]]


def _chunks(text: str, title: str, words: int = 90) -> list[tuple[str, str]]:
    made, current = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if not re.search(r"[A-Za-z]{3}", paragraph):
            continue
        current = f"{current} {paragraph}".strip()
        if len(current.split()) >= words // 2:
            made.append((title, " ".join(current.split()[: 2 * words])))
            current = ""
    if len(current.split()) >= 12:
        made.append((title, current))
    return made


def _documentation() -> list[tuple[str, str]]:
    """(title, text) of CPython's manual and of the docstrings of its standard library."""
    from pydoc_data.topics import topics

    found: list[tuple[str, str]] = []
    for name in sorted(topics):
        text = topics[name]
        found += _chunks(text, text.strip().split("\n", 1)[0].strip(" *="))
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.rglob("*.py")):
        parts = source.relative_to(library).parts
        if {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"} & set(parts):
            continue
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(parts)[:-3].removesuffix(".__init__")
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= 20:
                    name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                    found += [(name.split(".", 1)[-1], f"{name}: {t}") for _, t in _chunks(text, "")[:2]]
    return found


def _documents(corpus: Path) -> list[tuple[str, str]]:
    """(title, text) of the free text collections."""
    found: list[tuple[str, str]] = []
    with gzip.open(corpus / "wikipedia-passages" / "passages.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            # Half with their title in front, as retrievers often index them.
            text = f"{row['title']}. {row['text']}" if len(row["text"]) % 2 else row["text"]
            found.append((row["title"], text))
    for path in sorted((corpus / "python-peps").glob("*.rst")):
        text = path.read_text(encoding="utf-8")
        match = re.search(r"^Title: (.+)$", text, re.M)
        found += _chunks(text, match.group(1) if match else "")[:10]
    for folder in ("langchain-docs", "state-of-the-union"):
        for path in sorted((corpus / folder).rglob("*")):
            if path.suffix in {".md", ".rst", ".txt"} and not path.name.startswith("README"):
                text = path.read_text(encoding="utf-8")
                heading = re.search(r"^#* *([A-Z][^\n]{3,60})$", text, re.M)
                found += _chunks(text, heading.group(1) if heading and folder == "langchain-docs" else "")
    return found + _documentation()


def free_documents(corpus: Path, without: set[str]) -> list[tuple[str, str]]:
    """(title, text) of the free text collections, each text once.

    Args:
        corpus: Folder of the collections.
        without: Normalised texts to leave out; such a title becomes empty.
    """
    found = {normalise(text): (title, text) for title, text in _documents(corpus)}
    return [
        (title if normalise(title) not in without else "", text)
        for key, (title, text) in found.items()
        if key not in without
    ]


def encoder_with_cache(
    encoder: BiEncoder, folder: Path, progress: Progress | None
) -> Callable[[str, Sequence[str]], Vectors]:
    """A function of a name for the news and texts that gives their vectors, kept in ``folder``."""

    def encode(name: str, items: Sequence[str]) -> Vectors:
        digest = hashlib.sha256("\0".join(items).encode()).hexdigest()[:16]
        cached = folder / f"{digest}.npy"
        if cached.is_file():
            return np.asarray(np.load(cached), dtype=np.float32)
        found = encoder.encode(items, (lambda _, share: progress(f"encode {name}", share)) if progress else None)
        folder.mkdir(exist_ok=True)
        np.save(cached.with_suffix(".part.npy"), found)
        cached.with_suffix(".part.npy").replace(cached)
        return found

    return encode


def evaluation_queries(data_dir: Path) -> set[str]:
    """Normalised queries of every evaluation set under ``data_dir/eval``: nothing of these may be trained
    on."""
    found: set[str] = set()
    for path in sorted((data_dir / "eval").glob("*/queries.jsonl")):
        with path.open(encoding="utf-8") as lines:
            found.update(normalise(json.loads(line)["text"]) for line in lines)
    for path in sorted((data_dir / "eval").glob("*/pairs.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found.update(normalise(json.loads(line)["query"]) for line in lines)
    return found


def clean(pairs: list[Pair], forbidden: set[str]) -> list[Pair]:
    """The pairs without forbidden queries and passages, and with one question mark where there are several."""
    kept = []
    for pair in pairs:
        query = re.sub(r"\s*\?[\s?]*$", "?", pair.query).strip()
        if normalise(query) not in forbidden and normalise(pair.passage) not in forbidden and normalise(query):
            kept.append(Pair(query, pair.passage, pair.label, pair.split))
    return kept


def some_questions(pairs: list[Pair], limit: int, rng: random.Random) -> Questions:
    found = answered(pairs)
    return rng.sample(found, limit) if len(found) > limit else found


def passages_of(questions: Questions) -> list[str]:
    """Every judged passage once, in order."""
    return list(dict.fromkeys(text for _, labels in questions for text in labels))


def shared_words(tokenizer: Any, corpus: Sequence[str]) -> Bonus:
    """A function of a query and passages that gives what BM25 adds to the cosine of each, float32 (n,).

    Args:
        tokenizer: The trunk's.
        corpus: Texts that say how rare each token is.
    """
    from rerank_plugins.backends._late_interaction import LateInteractionScore

    head = LateInteractionScore(1, len(tokenizer))
    count_words(head, tokenizer, corpus)

    def bonus(query: str, passages: Sequence[str]) -> NDArray[np.float32]:
        pairs = tokenizer(
            [query] * len(passages),
            list(passages),
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
            verbose=False,
        )
        mask, second = pairs["attention_mask"].float(), pairs["token_type_ids"].float()
        lexical = head.lexical(pairs["input_ids"], mask * (1 - second), mask * second)
        found: NDArray[np.float32] = (SHARED_WORDS * lexical).numpy()
        return found

    return bonus


def pseudo_groups(
    pool: Sequence[tuple[str, str]],
    vectors: Vectors,
    encode: Callable[[str, Sequence[str]], Vectors],
    bonus: Bonus,
    forbidden: set[str],
    *,
    count: int,
    size: int,
    seed: int,
    held_out: bool = False,
) -> list[Group]:
    """Groups of queries cut from a pool of (title, text) whose vectors are given, labelled by the encoder and BM25.

    A tenth of the pool, by titles, is there for ``held_out`` queries alone, the same whatever the seed; ``count`` is
    taken of all the pool, before the others are left out.
    """
    queries = [
        query
        for query in pseudo_queries(pool, count, seed)
        if is_held_out(next(filter(None, pool[query[1]]))) == held_out and normalise(query[0]) not in forbidden
    ]
    query_vectors = encode("pseudo queries", [query for query, _, _ in queries])
    texts = [text for _, text in pool]
    return distilled_groups(queries, query_vectors, texts, vectors, size=size, seed=seed, bonus=bonus)


def paragraphs(sentences: Sequence[str], words: int = 70) -> list[tuple[str, list[str]]]:
    """Runs of neighbouring sentences of about so many words, and the sentences in each."""
    found: list[tuple[str, list[str]]] = []
    current: list[str] = []
    for sentence in sentences:
        current.append(sentence)
        if sum(len(text.split()) for text in current) >= words:
            found.append((" ".join(current), current))
            current = []
    return [*found, (" ".join(current), current)] if current else found


def prepare(
    data_dir: str | Path,
    out_dir: str | Path,
    *,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> tuple[list[Group], list[Group]]:
    """Reads, cleans, mines and mixes the training set of the bundled model; kept in ``out_dir`` for the next
    call.

    The release that the SQuAD sentences come from lists them in the order of the articles, so that neighbours make a
    paragraph again: a question is asked of its sentence among others, or of its paragraph among others.

    Args:
        data_dir: Folder with ``train/``, ``corpus/`` and, to keep evaluation queries out, ``eval/``.
        out_dir: Where the groups of each seed, and vectors for all seeds, are kept.
        seed: Seed of all sampling.
        device: A torch device for the bi-encoder; None chooses.
        progress: Called with a stage's name and its share done.

    Returns:
        Training groups in random order, and dev groups.
    """
    data, out = Path(data_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / f"train-groups-{seed}.jsonl", out / f"dev-groups-{seed}.jsonl"
    if all(path.is_file() for path in kept):
        return read_groups(kept[0]), read_groups(kept[1])
    missing = [name for name in LABELLED_SETS if not (data / "train" / name).is_dir()]
    if missing:
        raise ConfigurationError(f"{data / 'train'} lacks {', '.join(missing)}.")

    rng = random.Random(seed)
    forbidden = evaluation_queries(data)
    encoder = BiEncoder(minilm_directory("train"), device=device)
    encode = encoder_with_cache(encoder, out / "vectors", progress)
    groups: list[Group] = []
    dev: list[Group] = []

    documents = free_documents(data / "corpus", forbidden)
    texts = [text for _, text in documents]
    document_vectors = encode("documents", texts)
    bonus = shared_words(encoder.tokenizer, texts)

    def add(kind: str, training: Questions, held_out: Questions, own: list[str], *, alone: bool = False) -> None:
        own_vectors = encode(f"{kind} passages", own)
        for part, size, target in ((training, 8, groups), (held_out, 10, dev)):
            vectors = encode(f"{kind} questions", [query for query, _ in part])
            target += labelled_groups(
                part,
                vectors,
                own,
                own_vectors,
                [] if alone else texts,
                document_vectors[:0] if alone else document_vectors,
                size=size,
                margin=MARGIN,
                teacher_share=0.15,
                seed=seed,
                kind=kind,
            )

    pairs = clean(read_pairs(data / "train" / "squad-sentences"), forbidden)
    asked = answered(pairs)
    held = {pair.query for pair in pairs if pair.split == "dev" and is_held_out(pair.query, 0.1)}
    training = [item for item in asked if item[0] not in held]
    unseen = rng.sample([item for item in asked if item[0] in held], HELD_OUT["squad-sentences"])
    rng.shuffle(training)
    half = LABELLED_SETS["squad-sentences"] // 2
    ordered = list(dict.fromkeys(text for _, labels in asked for text, label in labels.items() if label > 0))
    add("squad-sentences", training[:half], unseen, passages_of(asked), alone=True)
    whole = paragraphs(ordered)
    of = {sentence: text for text, sentences in whole for sentence in sentences}

    def of_paragraphs(items: Questions) -> Questions:
        return [(q, {of[t]: 1.0 for t, label in labels.items() if label > 0}) for q, labels in items]

    chosen = training[half : 2 * half]
    add("squad-paragraphs", of_paragraphs(chosen), of_paragraphs(unseen), [text for text, _ in whole])
    questions = {"squad-sentences": training[: 2 * half]}

    # Every one of these lists is judged: they come as they are too.
    selqa, selqa_dev = split_pairs(clean(read_pairs(data / "train" / "selqa-dev"), forbidden))
    add(
        "selqa-dev",
        some_questions(selqa, LABELLED_SETS["selqa-dev"], rng),
        [],
        passages_of(answered(selqa)),
        alone=True,
    )
    groups += groups_from_pairs(selqa, 8, seed, "selqa-dev")
    later = {query for query, _ in some_questions(selqa_dev, HELD_OUT["selqa-dev"], rng)}
    dev += groups_from_pairs([pair for pair in selqa_dev if pair.query in later], 16, seed, "selqa-dev")

    for name in sorted(set(LABELLED_SETS) - {"squad-sentences", "selqa-dev"}):
        train, held_out = split_pairs(clean(read_pairs(data / "train" / name), forbidden))
        questions[name] = some_questions(train, LABELLED_SETS[name], rng)
        others = some_questions(held_out, HELD_OUT.get(name, 20), rng)
        add(name, questions[name], others, passages_of([*questions[name], *others]))

    cut = partial(pseudo_groups, documents, document_vectors, encode, bonus, forbidden)
    groups += cut(count=PSEUDO_QUERIES, size=8, seed=seed + 1)
    unseen_queries = cut(count=500, size=10, seed=seed + 2, held_out=True)
    # One dev measure for them all: each kind alone would be a handful of queries.
    dev += [replace(group, kind="pseudo") for group in unseen_queries]

    # Question to question, as in FAQ search: each training question among all others.
    for name, count in QUESTION_SOURCES.items():
        alike = list(dict.fromkeys(query for query, _ in questions[name]))
        vectors = encode("questions", alike)
        rows = rng.sample(range(len(alike)), min(count, len(alike)))
        groups += distilled_groups(
            [(alike[row], row, "question") for row in rows],
            vectors[rows],
            alike,
            vectors,
            with_source=False,
            seed=seed,
            bonus=bonus,
        )
    rng.shuffle(groups)
    write_groups(kept[1], dev)
    write_groups(kept[0], groups)
    return groups, dev
