"""What goes into a reranker and what comes out, and the names of its choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, overload

from rerank_plugins.errors import InputError

__all__ = [
    "BackendName",
    "Candidate",
    "Limits",
    "Order",
    "Precision",
    "RankedCandidate",
    "Ranking",
    "Scale",
    "Span",
    "SpanUnit",
]

BackendName = Literal["auto", "onnx", "openvino", "torch"]
"""An engine, or ``"auto"`` for the first that can run the model."""
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
"""The number format of the arithmetic, or ``"auto"`` for one that leaves the order as good as untouched."""
Order = Literal["best_first", "ends"]
"""How what is returned is ordered: the best first, or the best at both ends."""
Scale = Literal["probability", "logit"]
"""What ``score`` means: a probability in 0..1, or the raw logit of the model."""
SpanUnit = Literal["sentences"]
"""What `RankedCandidate.spans` are, beside windows."""
GAP = " ... "
"""Stands between the parts of a text where something is left out."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text that a first stage has found for a query.

    Attributes:
        text: What is scored against the query.
        id: The caller's identifier, if there is one. It is carried, never read.
        metadata: The caller's own data. It is carried, never read.
        first_stage_score: The score that the first stage gave, if known. It is carried, never read.
        header: Scored right before the text, and before each window of a long one: a title with its line end, for
            example. Windows have room for its tokens.
    """

    text: str
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    first_stage_score: float | None = None
    header: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(
                f"Candidate.text must be a str, got {type(self.text).__name__}. "
                "Pass the text itself, for example Candidate(text=document.page_content)."
            )
        if not isinstance(self.header, str):
            raise InputError(f"Candidate.header must be a str, got {type(self.header).__name__}.")

    @property
    def scored_text(self) -> str:
        """The header and the text."""
        return self.header + self.text


class Span(NamedTuple):
    """A part of a text, with a score of its own."""

    start: int
    """The first character, from 0."""
    end: int
    """After the last character."""
    score: float
    """In the scale of the `Reranker`."""


@dataclass(frozen=True, slots=True)
class RankedCandidate:
    """A candidate with its place in the ranking.

    Attributes:
        candidate: The candidate that the caller gave (a plain str is wrapped in a `Candidate`).
        score: The score in the scale of the `Reranker`: a probability (float64 sigmoid or softmax) or a logit; None
            where it was not scored.
        logit: The raw logit that the order is made of; the lowest float32 for a blank text, which no model
            has seen; None where it was not scored.
        index: Position in the caller's list, from 0.
        rank: Place in this ranking, from 1.
        first_stage_rank: Place before reranking, from 1: ``index + 1``.
        truncated: Whether the end of the text was cut off to fit the model.
        duplicates: Positions in the caller's list of candidates that repeat this one and were left out; see
            `Settings.dedup`.
        spans: The parts of the text that were scored by themselves, best first; places are those in `text`, without the
            header. Windows with `Settings.passage_length`, sentences with ``spans="sentences"``, only the relevant ones
            with ``compress``; empty where none were asked for, or where the text is blank or was not scored.
    """

    candidate: Candidate
    score: float | None
    logit: float | None
    index: int
    rank: int
    truncated: bool = False
    duplicates: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()

    @property
    def excerpt(self) -> str:
        """What the spans cover, in the order of the text, with " ... " where something between them is left out.

        The whole text where there are no spans.
        """
        return excerpt(self.text, self.spans)

    @property
    def scored(self) -> bool:
        """Whether it has its place by a score; otherwise it keeps its place of the first stage, and `Ranking.fallback`
        says why."""
        return self.logit is not None

    @property
    def first_stage_rank(self) -> int:
        """Place before reranking, from 1."""
        return self.index + 1

    @property
    def text(self) -> str:
        """The text of the candidate."""
        return self.candidate.text


def excerpt(text: str, spans: Sequence[tuple[int, int, float]]) -> str:
    """The parts of a text that spans cover; see `RankedCandidate.excerpt`."""
    if not spans:
        return text
    parts: list[tuple[int, int]] = []
    for start, end, _ in sorted(spans):
        # Only blanks between them: nothing is left out.
        if parts and not text[parts[-1][1] : start].strip():
            parts[-1] = (parts[-1][0], max(end, parts[-1][1]))
        else:
            parts.append((start, end))
    return GAP.join(text[start:end] for start, end in parts)


class Limits(NamedTuple):
    """What is kept of a ranking; None keeps all."""

    top_n: int | None = None
    """The best so many."""
    min_score: float | None = None
    """Those that score at least this."""
    max_tokens: int | None = None
    """The best ones until their tokens exceed this."""
    compress: bool | float = False
    """Of each text only its relevant spans."""


@dataclass(frozen=True, slots=True)
class Ranking(Sequence[RankedCandidate]):
    """The candidates of one query, best first. A sequence: index it, iterate it, take its length.

    Attributes:
        query: The query as it was asked.
        items: The ranked candidates, best first.
        model: Name of the model that scored.
        scale: What `RankedCandidate.score` means here.
        fallback: None, or why it was not reranked, or not all of it: what is not `RankedCandidate.scored` follows in
            the order of the first stage.
    """

    query: str
    items: tuple[RankedCandidate, ...]
    model: str
    scale: Scale = "probability"
    fallback: str | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[RankedCandidate]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> RankedCandidate: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[RankedCandidate]: ...

    def __getitem__(self, index: int | slice) -> RankedCandidate | Sequence[RankedCandidate]:
        return self.items[index]
