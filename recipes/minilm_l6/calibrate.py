"""Measures the probabilities on lists as a retriever gives them, and whether a fitted map would be better.

    python recipes/minilm_l6/calibrate.py OUT/onnx DATA NOVEL.txt OUT/calibration.json

The map is fitted by logistic regression on half of the kinds of text, each with the same weight.

NOVEL.txt is "The Adventures of Sherlock Holmes" (Project Gutenberg, number 1661). Candidates are the nearest passages
by all-MiniLM-L6-v2; a passage counts as relevant if it was judged so, or holds the answer of ``prose.jsonl``. The lists
are kept beside OUT/calibration.json, in ``lists.jsonl``, and taken from there if they are.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pool import Encoder, lines_of

from rerank_plugins import Reranker
from rerank_plugins.calibration import expected_calibration_error, fit_calibration
from rerank_plugins.evaluation import read_beir

FITTED = ("squad-paragraphs", "nq-open-oracle", "medquad", "pubmedqa-labeled", "tatqa-dev", "novel")
HELD_OUT = ("clapnq-dev", "selqa-test", "mtrag-un", "xquad-en-retrieval", "covidqa-deepset", "speech")
Kind = tuple[list[str], list[tuple[str, set[str]]]]
"""Passages; questions with the passages that answer them."""


def prose(name: str, text: str) -> Kind:
    """A long text in passages of about 100 words."""
    words = text.split()
    passages = [" ".join(words[start : start + 100]) for start in range(0, len(words), 80)]
    rows = [row for row in lines_of(Path(__file__).parent / "prose.jsonl") if row["text"] == name]
    return passages, [(row["question"], {text for text in passages if row["answer"] in text}) for row in rows]


def judged(folder: Path, trained: set[str], rng: random.Random, count: int) -> Kind:
    """Questions of a training set that were not trained on, and passages of the set."""
    rows = [row for row in lines_of(folder / "pairs.jsonl.gz") if row["query"] not in trained]
    questions: dict[str, set[str]] = {}
    for row in rows:
        if row["label"] > 0:
            questions.setdefault(row["query"], set()).add(row["passage"])
    asked = rng.sample(sorted(questions.items()), min(count, len(questions)))
    others = sorted({row["passage"] for row in rows})
    passages = {text for _, texts in asked for text in texts} | set(rng.sample(others, min(250, len(others))))
    return sorted(passages), asked


def paragraphs(kind: Kind) -> Kind:
    """The same with sentences put together, each with its three neighbours in the order of the release."""
    passages, questions = kind
    whole = {
        text: " ".join(passages[start : start + 4])
        for start in range(0, len(passages), 4)
        for text in passages[start : start + 4]
    }
    return list(dict.fromkeys(whole.values())), [
        (query, {whole[text] for text in texts if text in whole}) for query, texts in questions
    ]


def kinds(data: Path, novel: Path, trained: set[str], count: int) -> Iterator[tuple[str, Kind]]:
    """All kinds of text."""
    rng = random.Random(1)
    for name in (*FITTED, *HELD_OUT):
        if name == "novel":
            yield name, prose(name, re.split(r"\*\*\* (?:START|END) OF .*", novel.read_text(encoding="latin-1"))[1])
        elif name == "speech":
            yield (
                name,
                prose(name, (data / "corpus/state-of-the-union/state_of_the_union.txt").read_text(encoding="utf-8")),
            )
        elif name == "squad-paragraphs":
            rows = list(lines_of(data / "train/squad-sentences/pairs.jsonl.gz"))
            start = rng.randrange(len(rows) // 2)
            near = [row for row in rows[start : start + 9000] if row["label"] > 0]
            asked: dict[str, set[str]] = {}
            for row in near:
                if row["query"] not in trained:
                    asked.setdefault(row["query"], set()).add(row["passage"])
            sentences = list(dict.fromkeys(row["passage"] for row in near))
            yield name, paragraphs((sentences, rng.sample(sorted(asked.items()), count)))
        elif (data / "eval" / name).is_dir():
            dataset = read_beir(data / "eval" / name)
            names = rng.sample(dataset.usable, count)
            answers = {
                query: {dataset.documents[d] for d, grade in dataset.qrels[query].items() if grade > 0}
                for query in names
            }
            others = rng.sample(sorted(dataset.documents.values()), min(250, len(dataset.documents)))
            passages = sorted(set(others).union(*answers.values()))
            yield name, (passages, [(dataset.queries[query], answers[query]) for query in names])
        else:
            yield name, judged(data / "train" / name, trained, rng, count)


def main() -> None:
    """Fits and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("novel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pool", type=Path, help="folder with train.jsonl: its queries are not taken")
    parser.add_argument("--questions", type=int, default=30, help="of each kind")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    path = arguments.out.with_name("lists.jsonl")
    if not path.is_file():
        trained = {row["query"] for row in lines_of(arguments.pool / "train.jsonl")} if arguments.pool else set()
        encode, made = Encoder(128), []
        for name, (passages, questions) in kinds(arguments.data, arguments.novel, trained, arguments.questions):
            cosines = encode([query for query, _ in questions]) @ encode(passages).T
            for row, (query, answers) in enumerate(questions):
                found = [passages[column] for column in np.argsort(-cosines[row])[: arguments.candidates]]
                labels = [int(text in answers) for text in found]
                made.append({"kind": name, "query": query, "passages": found, "labels": labels})
        path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    reranker = Reranker(str(arguments.model), threads=arguments.threads)
    lists: dict[str, list[tuple[Any, Any]]] = {}
    for listed in lines_of(path):
        logits = np.asarray(reranker.logits(listed["query"], listed["passages"]), dtype=float)
        lists.setdefault(listed["kind"], []).append((logits, np.asarray(listed["labels"], dtype=float)))
    joined = {name: tuple(map(np.concatenate, zip(*found, strict=True))) for name, found in lists.items()}
    weights = [np.full(len(joined[name][0]), 1 / len(joined[name][0])) for name in FITTED]
    parts = [np.concatenate([joined[name][part] for name in FITTED]) for part in (0, 1)]
    fitted = fit_calibration(parts[0], parts[1], np.concatenate(weights) * 1e4)
    figures: dict[str, Any] = {}
    for name, found in lists.items():
        whole, relevant = joined[name]
        firsts = np.array([logits.max() for logits, labels in found if labels[int(logits.argmax())] > 0])
        figures[name] = {
            "fitted": name in FITTED,
            "lists": len(found),
            "relevant": round(float(relevant.mean()), 3),
            "answer first": round(len(firsts) / len(found), 2),
            "ECE": round(expected_calibration_error(whole, relevant), 3),
            "kept": round(float((firsts >= 0).mean()), 2),
            "ECE, fitted": round(expected_calibration_error(fitted(whole), relevant), 3),
            "kept, fitted": round(float((fitted(firsts) >= 0).mean()), 2),
        }
        print(name, figures[name], flush=True)
    result = {"slope": fitted.slope, "intercept": fitted.intercept, "kinds": figures}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(fitted)


if __name__ == "__main__":
    main()
