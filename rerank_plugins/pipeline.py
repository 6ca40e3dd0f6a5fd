"""Texts to logits: blanks and repeats drop out, then what the cache knows; the rest is scored, in windows if asked."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rerank_plugins import passages, selection
from rerank_plugins._deadline import DeadlineExceeded, deadline, remaining_s
from rerank_plugins._texts import is_blank, scorable
from rerank_plugins.backends import Backend, Pair
from rerank_plugins.cache import ScoreCache, WindowLogits, settings_digest
from rerank_plugins.errors import ConfigurationError, ScoringError
from rerank_plugins.passages import Place
from rerank_plugins.settings import Settings

__all__ = ["TextLogits", "Windows", "cache_digest", "class_column", "score_pairs"]


class Windows(NamedTuple):
    """The windows that a text was scored in."""

    places: NDArray[np.int32]
    """Shape (n_windows, 2): start and end character, without the header."""
    logits: NDArray[np.float64]
    """Shape (n_windows,)."""


class TextLogits(NamedTuple):
    """What is known of each pair's text, input order."""

    logits: NDArray[np.float64]
    """Shape (n_pairs,): the logit to rank by; `selection.BLANK_LOGIT` for a blank text."""
    truncated: NDArray[np.bool_]
    """Shape (n_pairs,): whether the model has not seen the end of the text."""
    scored: NDArray[np.bool_]
    """Shape (n_pairs,): False where time was up before; such a logit is NaN."""
    windows: list[Windows]
    """The windows of each text; none without a `passage_length`, or for a text that was not scored."""

    @classmethod
    def blank(cls, n: int) -> TextLogits:
        """Those of blank texts."""
        flags = np.zeros(n, dtype=np.bool_)
        return cls(np.full(n, selection.BLANK_LOGIT), flags, ~flags, [_NO_WINDOWS] * n)

    def part(self, places: slice) -> TextLogits:
        """Those of some pairs."""
        return TextLogits(self.logits[places], self.truncated[places], self.scored[places], self.windows[places])


_NO_WINDOWS = Windows(np.empty((0, 2), dtype=np.int32), np.empty(0))


def score_pairs(
    backend: Backend,
    cache: ScoreCache | None,
    digest: bytes,
    settings: Settings,
    pairs: Sequence[Pair],
    until: float | None = None,
    headers: Sequence[int] = (),
) -> TextLogits:
    """Score (query, text) pairs, of one query or of several, in shared batches.

    Args:
        backend: A loaded backend, with the maximum length and instruction of `settings`.
        cache: Where scores are kept, or None.
        digest: What the cache knows backend and settings by; see `cache_digest`.
        settings: Windows, label and scale of the backend's logits.
        pairs: Queries that are not blank, and any texts.
        until: Time of `time.monotonic` at which scoring stops; pairs are then scored in their order. None scores all.
        headers: How many characters of each text, at its start, every window of it begins with; empty for none.

    Returns:
        Logits, cuts and what was scored, input order.

    Raises:
        InputError: A query leaves no room for a text.
        ScoringError: The engine failed, or a logit is not finite.
    """
    result = TextLogits.blank(len(pairs))
    # Without windows, a header is text like any other.
    lengths = headers if headers and settings.passage_length is not None else [0] * len(pairs)
    headed: dict[Pair, _Headed] = {}
    places: dict[Pair, list[int]] = {}
    for i, item in enumerate(zip(pairs, lengths, strict=True)):
        if not is_blank(item[0][1]):
            pair = _cached_as(item)
            headed[pair] = item
            places.setdefault(pair, []).append(i)

    def compute(missing: Sequence[Pair]) -> WindowLogits:
        return _window_logits(backend, settings, [headed[pair] for pair in missing])

    distinct = list(places)
    # Without names of classes there is one, unless a column was asked for.
    n_labels = len(backend.labels) or (1 if settings.label is None else None)
    windowed = settings.passage_length is not None
    step = len(distinct) if until is None else backend.pairs_at_a_time or len(distinct)
    for start in range(0, len(distinct), max(1, step)):
        part = distinct[start : start + step]
        try:
            with deadline(until):
                if remaining_s() == 0.0:
                    raise DeadlineExceeded
                windows = (
                    compute(part)
                    if cache is None
                    else cache.scored(digest, part, compute, n_labels=n_labels, windows=windowed)
                )
        except DeadlineExceeded:
            for pair in distinct[start:]:
                result.scored[places[pair]] = False
                result.logits[places[pair]] = np.nan
            break
        rankable = _rankable(backend, settings, windows.logits)
        folded = passages.fold_max(rankable, windows.owners, len(part))
        bounds = np.searchsorted(windows.owners, np.arange(len(part) + 1))
        cut = np.zeros(len(part), dtype=np.bool_)
        np.logical_or.at(cut, windows.owners, windows.truncated)
        for position, pair in enumerate(part):
            result.logits[places[pair]] = max(folded[position], selection.BLANK_LOGIT)
            result.truncated[places[pair]] = cut[position]
            own = slice(bounds[position], bounds[position + 1])
            for place in places[pair] if windowed else ():
                result.windows[place] = Windows(windows.places[own], rankable[own])
    return result


_Headed = tuple[Pair, int]
"""A pair, and how many characters of its text are a header."""


def _cached_as(item: _Headed) -> Pair:
    """What the cache keeps it by: its windows, and so its logits, depend on where the header ends."""
    (query, text), length = item
    return (query, f"{length}\0{text}" if length else text)


def _window_logits(backend: Backend, settings: Settings, items: Sequence[_Headed]) -> WindowLogits:
    """Finite logits of all windows of distinct pairs."""
    if settings.passage_length is None:
        windows, owners = [pair for pair, _ in items], np.arange(len(items))
        places, cut = _NO_WINDOWS.places, np.zeros(len(items), dtype=np.bool_)
    else:
        windows, owners, places, cut = _windows(backend, items, settings.passage_length, settings.passage_overlap)
    scored = backend.logits(windows)
    _check_logits(backend, settings, scored.logits, windows)
    return WindowLogits(scored.logits, scored.truncated | cut[owners], owners, places)


def _windows(
    backend: Backend, items: Sequence[_Headed], length: int, overlap: int
) -> tuple[list[Pair], NDArray[np.intp], NDArray[np.int32], NDArray[np.bool_]]:
    """The windows of all pairs, the pair and the place of each, and which pairs' headers were cut."""
    windows: list[Pair] = []
    owners: list[int] = []
    places: list[Place] = []
    cut = np.zeros(len(items), dtype=np.bool_)
    headers = [scorable(text[:end]) for (_, text), end in items]
    texts = [scorable(text[end:]) for (_, text), end in items]
    offsets = zip(backend.token_offsets(headers), backend.token_offsets(texts), strict=True)
    for owner, (of_header, of_text) in enumerate(offsets):
        (query, given), end = items[owner]
        text = texts[owner]
        header, found, cut[owner] = passages.headed_windows(headers[owner], of_header, text, of_text, length, overlap)
        found = [place for place in found if not is_blank(header + text[slice(*place)])]
        windows += [(query, header + text[slice(*place)]) for place in found]
        owners += [owner] * len(found)
        places += _in_given(given[end:], text, found)
    return windows, np.asarray(owners, dtype=np.intp), np.asarray(places, dtype=np.int32).reshape(-1, 2), cut


def _in_given(given: str, text: str, places: list[Place]) -> list[Place]:
    """Places in what `scorable` made of a text as places in the text: two surrogates have become one character."""
    if len(given) == len(text):
        return places

    def before(place: int) -> int:
        return bisect.bisect_left(range(len(given) + 1), place, key=lambda end: len(scorable(given[:end])))

    return [(before(start), before(end)) for start, end in places]


def _check_logits(backend: Backend, settings: Settings, logits: NDArray[np.float32], pairs: Sequence[Pair]) -> None:
    if logits.ndim != 2 or len(logits) != len(pairs):
        raise ScoringError(
            f"The {backend.name!r} backend must return logits of shape ({len(pairs)}, n_labels); "
            f"it returned {logits.shape}."
        )
    if not np.isfinite(logits).all():
        row = int(np.argwhere(~np.isfinite(logits))[0][0])
        query, text = pairs[row]
        raise ScoringError(
            f"The model {settings.model_name!r} gave {logits[row].tolist()} for the query {query[:80]!r} and the text "
            f"{text[:80]!r}: a score must be a finite number. Half precision can overflow: try "
            "precision='fp32', and check the weights."
        )


def _rankable(backend: Backend, settings: Settings, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """One logit a window, shape (n_windows,), out of what the backend emits."""
    n_labels = logits.shape[1]
    column = class_column(settings, n_labels, backend.labels)
    if backend.emits == "probability":
        return selection.to_logit(logits[:, column])
    if n_labels == 1:
        return logits[:, 0].astype(np.float64)
    return selection.class_logit(logits, column)


_UNNAMED = re.compile(r"(label)?[\W_]*\d+")
_NEGATIVE = re.compile(r"(no|not|non|irrelevant|negative|false|contradiction|unrelated|incorrect|wrong|bad)\b")


def _is_negative(name: str, other: str) -> bool:
    """Whether a class is by its name the negative of the other one."""
    words, others = (re.sub(r"[\W_]+", " ", text.lower()).strip() for text in (name, other))
    return bool(_NEGATIVE.match(words)) or (words != others and others != "" and words.endswith(others))


def _says_second(first: str, second: str) -> bool:
    return _is_negative(first, second) and not _is_negative(second, first)


def class_column(settings: Settings, n_labels: int, names: Sequence[str]) -> int:
    """The column of the logits to rank by.

    Without `label` that is the only one, or the second of two whose names are only numbered, or say that the first
    is the negative one. A class that says "not" is never ranked by unless it is asked for.

    Raises:
        ConfigurationError: `label` names no class, or it is needed and was not given.
    """
    label = settings.label
    listing = ", ".join(f"{i}: {name!r}" for i, name in enumerate(names[:20])) or f"0 .. {n_labels - 1}, without names"
    if label is None:
        if n_labels == 1:
            return 0
        if n_labels == 2 and (all(_UNNAMED.fullmatch(name.lower()) for name in names) or _says_second(*names)):
            return 1
        reason = f"{n_labels} classes"
        if n_labels == 2:
            says = (
                "the second is by its name the negative one"
                if len(names) == 2 and _says_second(*names[::-1])
                else "their names leave it open"
            )
            reason = f"two classes, and {says}"
        raise ConfigurationError(
            f"{settings.model_name!r} has {reason}, so it must be told which one to rank by: label=NAME or COLUMN, one "
            f"of {{{listing}}}."
        )
    if isinstance(label, str):
        matches = [i for i, name in enumerate(names) if name.lower() == label.lower()]
        if len(matches) == 1:
            return matches[0]
    elif 0 <= label < n_labels:
        return label
    raise ConfigurationError(f"{settings.model_name!r} has no class {label!r}; expected one of {{{listing}}}.")


def cache_digest(backend: Backend, settings: Settings) -> bytes:
    """What a cache knows a backend and settings by: digest of all that decides a logit beside query and text.

    Raises:
        ConfigurationError: The backend has no fingerprint.
    """
    told: object = backend.fingerprint
    fingerprint = told() if callable(told) else told
    if not isinstance(fingerprint, str) or not fingerprint:
        raise ConfigurationError(
            f"cache= needs to tell the {backend.name!r} backend from others: give it a string attribute "
            f"`fingerprint` that changes whenever its scores do; got {fingerprint!r}. Or leave cache at None."
        )
    decide = (settings.max_length, settings.instruction, settings.passage_length, settings.passage_overlap)
    return settings_digest(backend.name, backend.precision, fingerprint, *decide, settings.truncate_query)
