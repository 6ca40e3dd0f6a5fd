"""Which parts of the kept texts it was, and what of them is left where a result is compressed: pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rerank_plugins._texts import is_blank
from rerank_plugins.passages import Place
from rerank_plugins.selection import to_logit
from rerank_plugins.sentences import split_sentences
from rerank_plugins.types import GAP, Candidate, RankedCandidate, Scale, Span

__all__ = ["LARGEST_SHARE", "as_spans", "compressed", "sentence_pairs", "shown"]

LARGEST_SHARE = 0.35
"""Most of the characters that ``compress=True`` keeps."""
MARGIN = 12.0
"""With ``compress=True``: how far a relevant span may be behind the best one, in logits of the span and its text."""
_HEADER = 256
"""Characters of the header that stand before each sentence: room for a title, and the cost stays that of the text."""


class Sentences(NamedTuple):
    """The sentences of a candidate, and the texts that are scored for them."""

    places: list[Place]
    texts: list[str]
    header: int
    """How many characters of each text, at its beginning, are the header."""


def sentence_pairs(candidate: Candidate) -> Sentences:
    """The sentences of a candidate, each after the first lines of its header."""
    header = candidate.header
    if len(header) > _HEADER:
        lines = header[:_HEADER].rpartition("\n")
        header = lines[0] + lines[1] or header[:_HEADER] + "\n"
    places = split_sentences(candidate.text)
    return Sentences(places, [header + candidate.text[start:end] for start, end in places], len(header))


def as_spans(text: str, places: Sequence[Place], logits: Sequence[float], scores: Sequence[float]) -> tuple[Span, ...]:
    """Spans, best first, without the blanks around them; equal ones in the order of the text."""
    found = []
    for number in sorted(range(len(places)), key=lambda i: (-logits[i], places[i])):
        start, end = places[number]
        part = text[start:end]
        if not is_blank(part):
            left = len(part) - len(part.lstrip())
            found.append(Span(start + left, start + len(part.rstrip()), float(scores[number])))
    return tuple(found)


def compressed(
    items: Sequence[RankedCandidate],
    scale: Scale,
    share: bool | float,
    max_tokens: int | None,
    count_tokens: Callable[[Sequence[str]], Sequence[int]],
) -> list[RankedCandidate]:
    """Leave of each candidate its relevant spans.

    Spans of all candidates are in one order: by their logit and that of the best span of their text, added. Relevant
    are the best one, and those after it that fit into a share of the characters of all texts; with ``True`` that share
    is `LARGEST_SHARE`, and they end `MARGIN` below the best one. Candidates of one span, of which nothing can be left
    out, stay, and count for nothing. A candidate without a relevant span is left out.

    With `max_tokens`, relevant spans are taken in that order until the next one does not fit. What has no spans counts
    as a whole, after all that have, in its order.

    Args:
        items: Best first, with all their spans.
        scale: Of the spans' scores.
        share: The largest share of the characters, or True.
        max_tokens: Most tokens of the result: of the spans, of the header of each candidate and of each gap; None for
            any number.
        count_tokens: Tokens of some texts.
    """
    kept = _relevant(items, _in_order(items, scale), share)
    if max_tokens is not None:
        kept = _within(items, kept, max_tokens, count_tokens)
    spans: dict[int, list[Span]] = {number: [] for number, _ in kept}
    for number, span in kept:
        if span is not None:
            spans[number].append(span)
    return [replace(items[number], spans=tuple(of)) for number, of in sorted(spans.items())]


_Kept = list[tuple[int, Span | None]]
"""Number of the candidate, and the span of it that is kept; None for all of it."""


def _in_order(items: Sequence[RankedCandidate], scale: Scale) -> list[tuple[float, int, Span]]:
    """The spans of all candidates, best first: what they are ordered by, the number of the candidate, and the span."""
    found = []
    for number, item in enumerate(items):
        scores = np.array([span.score for span in item.spans])
        logits = scores if scale == "logit" else to_logit(scores)
        found += [(float(logit + logits[0]), number, span) for logit, span in zip(logits, item.spans, strict=True)]
    return sorted(found, key=lambda of: -of[0])


def _relevant(
    items: Sequence[RankedCandidate], ranked: Sequence[tuple[float, int, Span]], share: bool | float
) -> _Kept:
    several = {number for number, item in enumerate(items) if len(item.spans) > 1}
    room = (LARGEST_SHARE if share is True else float(share)) * sum(len(items[number].text) for number in several)
    kept: _Kept = []
    best: float | None = None
    for logit, number, span in ranked:
        if number in several:
            size = span.end - span.start
            if best is not None and (size > room or (share is True and logit < best - MARGIN)):
                continue
            best = logit if best is None else best
            room -= size
        kept.append((number, span))
    return [*kept, *((number, None) for number, item in enumerate(items) if not item.spans)]


def _within(
    items: Sequence[RankedCandidate],
    kept: _Kept,
    max_tokens: int,
    count_tokens: Callable[[Sequence[str]], Sequence[int]],
) -> _Kept:
    texts = [items[number].text[slice(*(span or (None, None))[:2])] for number, span in kept]
    headers = [items[number].candidate.header for number, _ in kept]
    counts = iter(count_tokens([*texts, *headers, GAP]))
    of_texts, of_headers = ([next(counts) for _ in kept] for _ in range(2))
    of_gap = next(counts)
    left = max_tokens
    begun: set[int] = set()
    result: _Kept = []
    for place, tokens, header in zip(kept, of_texts, of_headers, strict=True):
        left -= tokens + (of_gap if place[0] in begun else header)
        if left < 0:
            break
        begun.add(place[0])
        result.append(place)
    return result


def shown(item: RankedCandidate, text: str) -> tuple[Span, ...]:
    """The spans of a candidate as places in the text that a caller's object shows.

    That may be another one than what was scored: with a template around it, or without the blanks at its ends.

    Args:
        item: With spans in ``item.text``.
        text: The text that is shown.

    Returns:
        The spans, in their order; those outside of it are left out, all where it is not in what was scored.
    """
    core = text.strip()
    begin = item.text.find(core)
    if begin < 0 or not core:
        return ()
    offset = text.find(core) - begin
    return tuple(_inside(item.spans, begin, begin + len(core), offset))


def _inside(spans: Sequence[Span], begin: int, end: int, offset: int) -> Iterator[Span]:
    for span in spans:
        start, stop = max(span.start, begin), min(span.end, end)
        if start < stop:
            yield Span(start + offset, stop + offset, span.score)
