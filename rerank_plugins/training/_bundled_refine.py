"""The second stage of the bundled model's recipe: questions against single sentences and whole paragraphs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rerank_plugins._minilm import minilm_directory
from rerank_plugins.training._bundled import (
    LABELLED_SETS,
    Questions,
    clean,
    encoder_with_cache,
    evaluation_queries,
    free_documents,
    passages_of,
    pseudo_groups,
    some_questions,
)
from rerank_plugins.training._data import (
    Group,
    Pair,
    answered,
    groups_from_pairs,
    is_held_out,
    read_groups,
    read_pairs,
    split_pairs,
    write_groups,
)
from rerank_plugins.training._mining import BiEncoder, Progress, labelled_groups

SENTENCES, PARAGRAPHS = 4500, 4500
"""SQuAD questions asked of sentences, and others asked of paragraphs."""
PASSAGES = {
    "nq-open-oracle": 1100,
    "medquad": 400,
    "covidqa-deepset": 150,
    "pubmedqa-labeled": 150,
    "tatqa-dev": 150,
    "multihop-small": 60,
}
"""Questions of the sets with longer passages."""
PSEUDO = 1700
HELD_OUT = {"squad-sentences": 70, "selqa-dev": 50, "nq-open-oracle": 50}
"""Queries held out of each set; 20 of those not named."""

# Where the bi-encoder puts a passage far above the answer, it is likely to be another answer; just above it stand
# the passages that a reranker is there to tell from it.
MARGIN = -0.1


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


def prepare_refinement(
    data_dir: str | Path,
    out_dir: str | Path,
    *,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> tuple[list[Group], list[Group]]:
    """Groups of the second stage and harder dev groups; kept in ``out_dir`` for the next call.

    The release that the SQuAD sentences come from lists them in the order of the articles, so that neighbours make a
    paragraph again: a question is asked of its sentence among others, or of its paragraph among others.

    Args:
        data_dir: Folder with ``train/``, ``corpus/`` and ``eval/``.
        out_dir: Where the groups are kept.
        seed: Seed of all sampling.
        device: A torch device for the bi-encoder; None chooses.
        progress: Called with a stage's name and its share done.
    """
    data, out = Path(data_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "refine-groups.jsonl", out / "refine-dev-groups.jsonl"
    if all(path.is_file() for path in kept):
        return read_groups(kept[0]), read_groups(kept[1])
    rng = random.Random(seed)
    forbidden = evaluation_queries(data)
    encode = encoder_with_cache(BiEncoder(minilm_directory("train"), device=device), out / "vectors", progress)
    groups: list[Group] = []
    dev: list[Group] = []

    documents = free_documents(data / "corpus", forbidden)
    texts = [text for _, text in documents]
    document_vectors = encode("documents", texts)

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
    # The first stage learns from the release's train part alone; of its dev part, a share stays unseen here too.
    held = {pair.query for pair in pairs if pair.split == "dev" and is_held_out(pair.query, 0.1)}
    training = [item for item in asked if item[0] not in held]
    unseen = rng.sample([item for item in asked if item[0] in held], HELD_OUT["squad-sentences"])
    rng.shuffle(training)
    ordered = list(dict.fromkeys(text for _, labels in asked for text, label in labels.items() if label > 0))
    add("squad-sentences", training[:SENTENCES], unseen, passages_of(asked), alone=True)
    whole = paragraphs(ordered)
    of = {sentence: text for text, sentences in whole for sentence in sentences}

    def of_paragraphs(items: Questions) -> Questions:
        return [(q, {of[t]: 1.0 for t, label in labels.items() if label > 0}) for q, labels in items]

    chosen = training[SENTENCES : SENTENCES + PARAGRAPHS]
    add("squad-paragraphs", of_paragraphs(chosen), of_paragraphs(unseen), [text for text, _ in whole])

    selqa, selqa_dev = split_pairs(clean(read_pairs(data / "train" / "selqa-dev"), forbidden))
    add("selqa-dev", answered(selqa), [], passages_of(answered(selqa)), alone=True)
    groups += groups_from_pairs(selqa, 8, seed, "selqa-dev")
    dev += groups_from_pairs(_some(selqa_dev, HELD_OUT["selqa-dev"], rng), 16, seed, "selqa-dev")

    for name in sorted(set(LABELLED_SETS) - {"squad-sentences", "selqa-dev", "covid-question-similarity"}):
        train, held_out = split_pairs(clean(read_pairs(data / "train" / name), forbidden))
        questions = some_questions(train, PASSAGES[name], rng)
        later = some_questions(held_out, HELD_OUT.get(name, 20), rng)
        add(name, questions, later, passages_of([*questions, *later]))

    groups += pseudo_groups(documents, document_vectors, encode, forbidden, count=PSEUDO, size=8, seed=seed + 1)
    unseen_queries = pseudo_groups(documents, document_vectors, encode, forbidden, count=50, size=10, seed=seed + 2)
    dev += [replace(group, kind="pseudo") for group in unseen_queries]

    rng.shuffle(groups)
    write_groups(kept[1], dev)
    write_groups(kept[0], groups)
    return groups, dev


def _some(pairs: Sequence[Pair], count: int, rng: random.Random) -> list[Pair]:
    queries = sorted({pair.query for pair in pairs})
    chosen = set(rng.sample(queries, min(count, len(queries))))
    return [pair for pair in pairs if pair.query in chosen]
