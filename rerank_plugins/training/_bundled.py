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
from pathlib import Path

import numpy as np

from rerank_plugins._minilm import minilm_directory
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.training._data import (
    Group,
    Pair,
    answered,
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
    distilled_groups,
    labelled_groups,
    pseudo_queries,
)

LABELLED_SETS: dict[str, int] = {
    "squad-sentences": 9000,
    "nq-open-oracle": 4000,
    "medquad": 2800,
    "selqa-dev": 2000,
    "covidqa-deepset": 2000,
    "pubmedqa-labeled": 2000,
    "tatqa-dev": 2000,
    "covid-question-similarity": 1000,
    "multihop-small": 1000,
}
"""The sets with a licence that permits it, and the largest number of their queries to use."""

Questions = list[tuple[str, dict[str, float]]]

PSEUDO_QUERIES = 17000
PSEUDO_SOURCES = {
    "nq-open-oracle": 4500,
    "medquad": 3000,
    "covidqa-deepset": 1500,
    "squad-sentences": 3000,
    "pubmedqa-labeled": 800,
    "tatqa-dev": 1000,
}
"""Passages of the labelled sets that, beside the free collections, pseudo queries are cut from."""

QUESTION_SOURCES = {"squad-sentences": 900, "nq-open-oracle": 500, "medquad": 600}
"""Sets whose questions are compared with each other, and how many of them."""
PASSAGES_PER_SET = 9000


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


def pseudo_groups(
    pool: Sequence[tuple[str, str]],
    vectors: Vectors,
    encode: Callable[[str, Sequence[str]], Vectors],
    forbidden: set[str],
    *,
    count: int,
    size: int,
    seed: int,
) -> list[Group]:
    """Groups of queries cut from a pool of (title, text) whose vectors are given, labelled by the encoder alone."""
    queries = [query for query in pseudo_queries(pool, count, seed) if normalise(query[0]) not in forbidden]
    query_vectors = encode("pseudo queries", [query for query, _, _ in queries])
    return distilled_groups(queries, query_vectors, [text for _, text in pool], vectors, size=size, seed=seed)


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

    Args:
        data_dir: Folder with ``train/``, ``corpus/`` and, to keep evaluation queries out, ``eval/``.
        out_dir: Where ``train-groups.jsonl`` and ``dev-groups.jsonl`` are kept.
        seed: Seed of all sampling.
        device: A torch device for the bi-encoder; None chooses.
        progress: Called with a stage's name and its share done.

    Returns:
        Training groups in random order, and dev groups.
    """
    data, out = Path(data_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "train-groups.jsonl", out / "dev-groups.jsonl"
    if all(path.is_file() for path in kept):
        return read_groups(kept[0]), read_groups(kept[1])
    missing = [name for name in LABELLED_SETS if not (data / "train" / name).is_dir()]
    if missing:
        raise ConfigurationError(f"{data / 'train'} lacks {', '.join(missing)}.")

    rng = random.Random(seed)
    forbidden = evaluation_queries(data)
    sets: dict[str, tuple[Questions, Questions, list[str]]] = {}
    for name, limit in LABELLED_SETS.items():
        train, dev = split_pairs(clean(read_pairs(data / "train" / name), forbidden))
        questions, held_out = some_questions(train, limit, rng), some_questions(dev, 25, rng)
        own = passages_of([*questions, *held_out])
        if len(own) > PASSAGES_PER_SET:
            # Every positive must stay; of the negatives, as many as fit.
            positive = {t for _, labels in [*questions, *held_out] for t, label in labels.items() if label > 0}
            rest = [text for text in own if text not in positive]
            keep = set(rng.sample(rest, max(0, min(len(rest), PASSAGES_PER_SET - len(positive))))) | positive
            own = [text for text in own if text in keep]
            questions = [(q, {t: s for t, s in labels.items() if t in keep}) for q, labels in questions]
            held_out = [(q, {t: s for t, s in labels.items() if t in keep}) for q, labels in held_out]
        sets[name] = questions, held_out, own

    seen = {normalise(text) for _, _, own in sets.values() for text in own}
    documents = [item for item in free_documents(data / "corpus", forbidden) if normalise(item[1]) not in seen]
    titles, texts = [title for title, _ in documents], [text for _, text in documents]
    encode = encoder_with_cache(BiEncoder(minilm_directory("train"), device=device), out / "vectors", progress)
    vectors = {name: encode(name, own) for name, (_, _, own) in sets.items()}
    document_vectors = encode("documents", texts)

    groups: list[Group] = []
    dev_groups: list[Group] = []
    for name, (questions, held_out, own) in sets.items():
        others = [text for other, (_, _, o) in sets.items() if other != name for text in o] + texts
        other_vectors = np.concatenate([*(v for other, v in vectors.items() if other != name), document_vectors])
        for part, size in ((questions, 8), (held_out, 10)):
            query_vectors = encode(f"{name} queries", [query for query, _ in part])
            made = labelled_groups(
                part,
                query_vectors,
                own,
                vectors[name],
                others,
                other_vectors,
                size=size,
                seed=seed,
                kind=name,
            )
            if part is questions:
                groups += made
            else:
                dev_groups += made

    pool = list(zip(titles, texts, strict=True))
    pool_vectors = [document_vectors]
    for name, share in PSEUDO_SOURCES.items():
        rows = rng.sample(range(len(sets[name][2])), min(share, len(sets[name][2])))
        pool += [("", sets[name][2][row]) for row in rows]
        pool_vectors.append(vectors[name][rows])
    everything = np.concatenate(pool_vectors)
    groups += pseudo_groups(pool, everything, encode, forbidden, count=PSEUDO_QUERIES, size=8, seed=seed + 1)
    # One dev measure for them all: each kind alone would be a handful of queries.
    held_out_queries = pseudo_groups(pool, everything, encode, forbidden, count=60, size=12, seed=seed + 2)
    dev_groups += [replace(group, kind="pseudo") for group in held_out_queries]

    # Question to question, as in FAQ search: each training question among all others.
    for name, count in QUESTION_SOURCES.items():
        questions = sets[name][0]
        asked = list(dict.fromkeys(query for query, _ in questions))
        asked_vectors = encode("questions", asked)
        rows = rng.sample(range(len(asked)), min(count, len(asked)))
        groups += distilled_groups(
            [(asked[row], row, "question") for row in rows],
            asked_vectors[rows],
            asked,
            asked_vectors,
            with_source=False,
            seed=seed,
        )
    rng.shuffle(groups)
    write_groups(kept[1], dev_groups)
    write_groups(kept[0], groups)
    return groups, dev_groups
