"""From requests to rankings: all pairs of all queries scored together, then each query ordered, cut and told where."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from rerank_plugins import selection, spans
from rerank_plugins._requests import Request, checked_candidates, checked_query
from rerank_plugins._texts import is_blank
from rerank_plugins.errors import is_passing
from rerank_plugins.pipeline import TextLogits, Windows
from rerank_plugins.ranking import as_ranking, best_first, scores
from rerank_plugins.scorer import Scorer
from rerank_plugins.settings import Settings
from rerank_plugins.telemetry import reranking
from rerank_plugins.types import Candidate, Limits, RankedCandidate, Ranking

__all__ = ["rank_requests"]

_Jobs = Sequence[tuple[str, Sequence[Candidate]]]


def rank_requests(scorer: Scorer, requests: Iterable[Request], limits: Limits, until: float | None) -> list[Ranking]:
    """Rank the candidates of several queries; see `Reranker.rank_many`.

    Args:
        scorer: The model and its settings.
        requests: (query, candidates) pairs.
        limits: What is kept of each.
        until: Time of `time.monotonic` at which scoring stops; None scores all.
    """
    selection.check_limits(*limits)
    jobs = [(checked_query(query), checked_candidates(candidates)) for query, candidates in requests]
    with reranking(scorer.settings, jobs, limits) as done:
        rankings = _rank(scorer, jobs, limits, until)
        done(rankings)
    return rankings


def _rank(scorer: Scorer, jobs: _Jobs, limits: Limits, until: float | None) -> list[Ranking]:
    settings = scorer.settings
    pairs = [(query, item.scored_text) for query, items in jobs for item in items]
    failed = None
    try:
        scored = scorer._pair_logits(pairs, until, [len(item.header) for _, items in jobs for item in items])
    except Exception as error:
        failed = _failure(scorer, error)
        if settings.on_error != "keep_order":
            return _ranked_by_other(scorer, jobs, limits, until, failed)
        scored = TextLogits.blank(len(pairs))
        scored.scored[[not is_blank(text) for _, text in pairs]] = False
    parts = [scored.part(own) for own in _slices(len(items) for _, items in jobs)]
    kept = [best_first(settings, items, part, limits) for (_, items), part in zip(jobs, parts, strict=True)]
    if limits.max_tokens is not None and not limits.compress:
        kept = [_within_tokens(scorer, items, limits.max_tokens) for items in kept]
    reasons = [_reason(failed, part) for part in parts]
    if settings.spans is not None or (limits.compress and settings.passage_length is None):
        kept, without = _with_sentences(scorer, jobs, kept, until)
        reasons = [reason or other for reason, other in zip(reasons, without, strict=True)]
    elif settings.passage_length is not None:
        kept = _with_windows(settings, kept, parts)
    if limits.compress:
        cut = (settings.scale, limits.compress, limits.max_tokens, scorer._token_counts)
        kept = [spans.compressed(items, *cut) for items in kept]
    return [
        as_ranking(settings, query, items, reason)
        for (query, _), items, reason in zip(jobs, kept, reasons, strict=True)
    ]


def _slices(lengths: Iterable[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *accumulate(lengths)])]


def _within_tokens(scorer: Scorer, items: list[RankedCandidate], most: int) -> list[RankedCandidate]:
    def count(some: Sequence[int]) -> list[int]:
        return scorer._token_counts([items[i].candidate.scored_text for i in some])

    return [items[i] for i in selection.within_tokens(range(len(items)), count, most)]


# -- when it fails ---------------------------------------------------------------------------------------------


def _failure(scorer: Scorer, error: Exception) -> str:
    """What is said of an error that passes; another one is raised, as all are unless `on_error` says otherwise."""
    if scorer.settings.on_error == "raise" or not is_passing(error):
        raise error
    failed = f"{scorer.settings.model_name} failed ({type(error).__name__}: {error})"
    _say(failed)
    return failed


def _ranked_by_other(scorer: Scorer, jobs: _Jobs, limits: Limits, until: float | None, failed: str) -> list[Ranking]:
    left = None if until is None else max(1e-3, until - time.monotonic())
    rank_many: Callable[..., list[Ranking]] = scorer.settings.on_error.rank_many
    more = {"compress": limits.compress} if limits.compress else {}
    ranked = rank_many(jobs, *limits[:2], max_tokens=limits.max_tokens, deadline_s=left, **more)
    return [replace(one, fallback=f"{failed}; {one.fallback or 'ranked by ' + one.model}") for one in ranked]


def _reason(failed: str | None, part: TextLogits) -> str | None:
    late = int((~part.scored).sum())
    if not late:
        return None
    return failed or f"time was up: {late} of {len(part.scored)} candidates were not scored"


_last_said = -math.inf


def _say(failed: str) -> None:
    """One warning a minute: a server that is down is no news with every call."""
    global _last_said
    if time.monotonic() - _last_said > 60:
        _last_said = time.monotonic()
        logging.getLogger("rerank_plugins").warning("Not reranked: %s", failed)


# -- spans -----------------------------------------------------------------------------------------------------


def _with_windows(
    settings: Settings, kept: Sequence[Sequence[RankedCandidate]], parts: Sequence[TextLogits]
) -> list[list[RankedCandidate]]:
    """The kept candidates with the windows that their logits are of."""

    def with_own(item: RankedCandidate, found: Windows) -> RankedCandidate:
        reported = scores(settings, found.logits).tolist()
        return replace(item, spans=spans.as_spans(item.text, found.places.tolist(), found.logits.tolist(), reported))

    return [
        [with_own(item, part.windows[item.index]) for item in items] for items, part in zip(kept, parts, strict=True)
    ]


def _with_sentences(
    scorer: Scorer, jobs: _Jobs, kept: Sequence[Sequence[RankedCandidate]], until: float | None
) -> tuple[list[list[RankedCandidate]], list[str | None]]:
    """The kept candidates with their sentences, and why some are without; all sentences share batches."""
    read = [[item for item in items if item.scored and not is_blank(item.text)] for items in kept]
    split = [[spans.sentence_pairs(item.candidate) for item in items] for items in read]
    pairs = [
        (query, text)
        for (query, _), of_query in zip(jobs, split, strict=True)
        for sentences in of_query
        for text in sentences.texts
    ]
    headers = [of.header for of_query in split for of in of_query for _ in of.texts]
    try:
        scored = scorer._pair_logits(pairs, until, headers)
    except Exception as error:
        # The order is known: only the spans are missing.
        failed = _failure(scorer, error)
        return [list(items) for items in kept], [f"no spans: {failed}" if items else None for items in read]
    reported = scores(scorer.settings, scored.logits)
    result, reasons = [], []
    places = iter(_slices(len(sentences.texts) for of_query in split for sentences in of_query))
    for items, having, of_query in zip(kept, read, split, strict=True):
        found = {}
        for item, sentences in zip(having, of_query, strict=True):
            own = next(places)
            if scored.scored[own].all():
                logits, values = scored.logits[own].tolist(), reported[own].tolist()
                found[item.index] = spans.as_spans(item.text, sentences.places, logits, values)
        late = len(having) - len(found)
        reasons.append(f"time was up: {late} of {len(items)} results have no spans" if late else None)
        result.append([replace(item, spans=found.get(item.index, ())) for item in items])
    return result, reasons
