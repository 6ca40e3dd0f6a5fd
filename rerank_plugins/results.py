"""A tool's long answer, cut to the parts that fit the request."""

from __future__ import annotations

from typing import NamedTuple

from rerank_plugins.errors import ConfigurationError
from rerank_plugins.reranker import Reranker
from rerank_plugins.sentences import fitting, split_sentences
from rerank_plugins.tools import plain, requests
from rerank_plugins.types import Span, excerpt

__all__ = ["Shortened", "about_tokens", "check_max_tokens", "page", "shorten_result"]

BYTES_PER_TOKEN = 4
"""About as many UTF-8 bytes has a token of the large language models; which one reads the answer is not known here."""


class Shortened(NamedTuple):
    """What is left of a text."""

    text: str
    """Its relevant parts, in their order, with " ... " where something is left out."""
    spans: tuple[Span, ...]
    """Where they are in the whole text, best first."""
    left_out: int
    """How many characters of sentences are missing."""


def about_tokens(text: str) -> int:
    """About how many tokens a language model reads."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)


def check_max_tokens(max_tokens: object) -> None:
    """Raise a `ConfigurationError` for a budget that no answer can be cut to."""
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ConfigurationError(f"max_tokens must be an int of at least 1; got {max_tokens!r}.")


def shorten_result(
    query: str | list[str], text: str, max_tokens: int = 1_500, reranker: Reranker | None = None
) -> Shortened | None:
    """Cut a text to its sentences that fit a request best.

    Args:
        query: What was asked for, or several such texts: a sentence counts by the one that it fits best.
        text: The whole answer. Its sentences are scored one by one.
        max_tokens: About the most tokens that are left; a token is counted as four bytes.
        reranker: Scores the sentences; None takes the bundled model.

    Returns:
        What is left; None where all of the text fits.

    Raises:
        ConfigurationError: `max_tokens` is below 1.
        QueryError: The request is blank.
        ScoringError: Scoring failed.
    """
    check_max_tokens(max_tokens)
    if about_tokens(text) <= max_tokens:
        return None
    places = split_sentences(text)
    sentences = [text[start:end] for start, end in places]
    best: dict[int, tuple[float, float]] = {}
    for ranking in plain(reranker).rank_many([(one, sentences) for one in requests(query)]):
        for item in ranking:
            if item.logit is not None and item.score is not None:
                best[item.index] = max(best.get(item.index, (item.logit, item.score)), (item.logit, item.score))
    left = max_tokens
    spans: list[Span] = []
    for i in sorted(best, key=lambda i: (-best[i][0], i)):
        # The first is kept whatever its length: something must be left.
        left -= about_tokens(sentences[i])
        if left < 0 and spans:
            break
        spans.append(Span(*places[i], best[i][1]))
    if not spans:
        return None
    missing = sum(end - start for start, end in places) - sum(span.end - span.start for span in spans)
    return Shortened(excerpt(text, spans), tuple(spans), missing)


def page(text: str, start: int, max_tokens: int) -> tuple[int, int]:
    """The part of a text from a character on that has about so many tokens, cut at a line end or blank where it can be.

    Returns:
        Its first character, and the one after its last.
    """
    start = min(max(0, start), len(text))
    room = max_tokens * BYTES_PER_TOKEN
    end = start + fitting(text[start : start + room], room)
    if end < len(text):
        cut = max(text.rfind("\n", start + (end - start) // 2, end), text.rfind(" ", start + (end - start) // 2, end))
        end = cut + 1 if cut > start else max(end, start + 1)
    return start, end
