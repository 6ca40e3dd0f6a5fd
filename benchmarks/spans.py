"""What compression keeps: the share of tokens, and the share of answers that are still there.

Takes a folder in BEIR layout with a file of answers, JSON lines ``{"_id": QUERY, "answers": [TEXT, ...]}``: texts as
they stand in the relevant documents, such as SQuAD's answers or CLAPNQ's sentences. Or a file of judged sentences, JSON
lines ``{"query", "passage", "label"}``, such as SQuAD's: neighbouring ones of the file are joined to paragraphs.

The first stage's candidates are reranked and the best `--top-n` kept, whole and compressed. Only answers count that the
whole documents hold.

    python benchmarks/spans.py FOLDER --answers answers.jsonl --queries 300
    python benchmarks/spans.py pairs.jsonl.gz --split dev --queries 300
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

from rerank_plugins import Candidate, Ranking, Reranker
from rerank_plugins._judgements import pairs_of_file
from rerank_plugins._lines import read_lines
from rerank_plugins.evaluation import BeirDataset, read_beir
from rerank_plugins.types import RankedCandidate


def main() -> None:
    """Measure one data set, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--answers", type=Path, help="of a folder in BEIR layout")
    parser.add_argument("--split", default=None, help="of a file of judged sentences")
    parser.add_argument("--join", type=int, default=6, help="sentences of a paragraph")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--top-k", type=int, default=10, help="candidates that are reranked")
    parser.add_argument("--top-n", type=int, default=3, help="documents that are kept")
    parser.add_argument("--compress", default="True 0.2 0.5", help="values to compare")
    parser.add_argument("--model", default=None)
    parser.add_argument("--passage-length", type=int, default=None)
    options = parser.parse_args()

    if options.answers is None:
        dataset, answers = joined(options.data, options.split, options.join)
    else:
        dataset, answers = read_beir(options.data), read_answers(options.answers)
    asked = [query for query in dataset.usable if query in answers and dataset.candidates.get(query)]
    random.Random(0).shuffle(asked)
    titles = {} if options.answers is None else read_titles(options.data)
    reranker = Reranker(options.model, passage_length=options.passage_length, cache=1_000_000).prepare()
    requests = [
        (
            dataset.queries[query],
            [
                candidate(dataset.documents[name], titles.get(name, ""))
                for name in dataset.candidates[query][: options.top_k]
            ],
        )
        for query in asked[: options.queries]
    ]
    golds = [answers[query] for query in asked[: options.queries]]
    whole = reranker.rank_many(requests, options.top_n)
    print(f"{options.data.name}: {len(requests)} queries, best {options.top_n} of {options.top_k}, {reranker!r}")
    print(f"{'compress':>10} {'tokens':>8} {'answers':>8} {'a query, ms':>12}")
    for given in options.compress.split():
        value = given == "True" or float(given)
        best = [
            (query, [item.candidate for item in ranking]) for (query, _), ranking in zip(requests, whole, strict=True)
        ]
        started = time.perf_counter()
        cut = reranker.rank_many(best, compress=value)
        seconds = time.perf_counter() - started
        tokens, kept = shares(reranker, whole, cut, golds)
        print(f"{given:>10} {tokens:>8.3f} {kept:>8.3f} {1000 * seconds / len(requests):>12.1f}")


def read_titles(folder: Path) -> dict[str, str]:
    """Titles by document id."""
    path = next(path for path in (folder / "corpus.jsonl.gz", folder / "corpus.jsonl") if path.is_file())
    rows = [json.loads(line) for _, line in read_lines(path)]
    return {str(row["_id"]): (row.get("title") or "").strip() for row in rows}


def candidate(text: str, title: str) -> Candidate:
    """A document; its title, where it has one, is scored with each sentence and is no part of the text."""
    return Candidate(text.removeprefix(f"{title} "), header=f"{title}\n") if title else Candidate(text)


def shares(
    reranker: Reranker, whole: Sequence[Ranking], cut: Sequence[Ranking], golds: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """The share of tokens that is kept, and of the answers that whole documents hold."""
    before = sum(reranker._token_counts([item.text for ranking in whole for item in ranking]))
    after = sum(reranker._token_counts([item.excerpt for ranking in cut for item in ranking]))
    there = still = 0
    for full, short, gold in zip(whole, cut, golds, strict=True):
        for answer in gold:
            if any(answer in item.text for item in full):
                there += 1
                still += any(holds(item, answer) for item in short)
    return after / before, still / there


def holds(item: RankedCandidate, answer: str) -> bool:
    """Whether an answer is left, perhaps over neighbouring sentences."""
    return any(answer in part for part in item.excerpt.split(" ... "))


def read_answers(path: Path) -> dict[str, list[str]]:
    """Answers by query id."""
    rows = [json.loads(line) for _, line in read_lines(path)]
    return {row["_id"]: row["answers"] for row in rows}


def joined(path: Path, split: str | None, n: int) -> tuple[BeirDataset, dict[str, list[str]]]:
    """Relevant sentences in the order of the file as paragraphs of `n`; each query searches those around its own."""
    pairs = [pair for pair in pairs_of_file(path) if pair.label > 0 and split in (None, pair.split)]
    sentences = list(dict.fromkeys(pair.passage for pair in pairs))
    starts = range(0, len(sentences), n)
    documents = {f"p{start // n}": " ".join(sentences[start : start + n]) for start in starts}
    home = {sentence: place // n for place, sentence in enumerate(sentences)}
    names = list(documents)
    queries = {f"q{number}": pair.query for number, pair in enumerate(pairs)}
    around = {f"q{number}": (home[pair.passage], pair.passage) for number, pair in enumerate(pairs)}
    dataset = BeirDataset(
        path.stem,
        queries,
        documents,
        {query: {names[place]: 1} for query, (place, _) in around.items()},
        {query: names[max(0, place - 5) : place + 5] for query, (place, _) in around.items()},
    )
    return dataset, {query: [sentence] for query, (_, sentence) in around.items()}


if __name__ == "__main__":
    main()
