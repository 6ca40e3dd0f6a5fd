"""What agents read: retrieved passages, shortened results, and what is wrong with what they asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rerank_plugins._adapters import checked_query, value_text
from rerank_plugins.errors import QueryError

__all__ = [
    "NOTHING_FOUND",
    "READ_DESCRIPTION",
    "READ_TOOL",
    "asked_for",
    "heading",
    "no_such_result",
    "part_of_result",
    "refusal",
    "shortened_note",
]

NOTHING_FOUND = "No relevant passages were found. Try another query."

_LABELS = {
    "title": ("title",),
    "source": ("source", "file_path", "file_name", "filename"),
    "page": ("page", "page_label"),
    "url": ("url", "link"),
}


def heading(rank: int, score: float | None, metadata: Mapping[str, Any], name: str | None = None) -> str:
    """The line above a passage, for a language model.

    Args:
        rank: From 1.
        score: The relevance score; None for a passage that keeps its place of the first stage.
        metadata: What the model may see. Title, source, page and URL are shown, where they are there.
        name: Shown as the source where there is no title, source or URL.
    """
    found: dict[str, str] = {}
    for label, keys in _LABELS.items():
        texts = (" ".join(value_text(metadata.get(key)).split()) for key in keys)
        text = next(filter(None, texts), "")
        if text and text not in found.values():
            found[label] = text
    if name and not found.keys() & {"title", "source", "url"}:
        found = {"source": name, **found}
    told = "not reranked" if score is None else f"relevance score {score:.3f}"
    return ", ".join([f"[{rank}] {told}", *(f"{label}: {text}" for label, text in found.items())])


def refusal(query: object) -> str:
    """What a language model is told whose query cannot be used."""
    try:
        long = checked_query(query)
    except QueryError as error:
        reason = str(error)
    else:
        reason = f"the query is too long ({len(long.split())} words, {len(long)} characters); ask in one sentence"
    return f"Nothing was searched: {reason}. Call this tool again with another query."


READ_TOOL = "read_tool_result"
READ_DESCRIPTION = (
    "Reads the whole of an earlier tool result that was shortened: give the id that its note names, and start to go on "
    "where a part ended."
)


def asked_for(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments of a tool's call that are words to search for, not one name, path or address."""
    return [value for value in arguments.values() if isinstance(value, str) and len(value.split()) > 1]


def shortened_note(left_out: int, whole: int, result_id: str | None) -> str:
    """What a language model reads below a tool's result that was shortened.

    Args:
        left_out: Characters that are missing.
        whole: Characters of the result.
        result_id: What the reading tool knows the result by; None where there is no such tool.
    """
    told = f"[Shortened: {left_out:,} of {whole:,} characters do not fit the request as well and were left out"
    if result_id is None:
        return f"{told}.]"
    return f'{told}. To read the whole result, call {READ_TOOL} with id="{result_id}".]'


def part_of_result(text: str, start: int, end: int, result_id: str) -> str:
    """A part of a result as the reading tool answers with it."""
    told = f"[Characters {start:,} to {end:,} of {len(text):,}"
    more = f'; the next part: {READ_TOOL} with id="{result_id}", start={end}' if end < len(text) else ", the end"
    return f"{text[start:end]}\n\n{told}{more}.]"


def no_such_result(result_id: str, known: Sequence[str]) -> str:
    """What the reading tool answers where no result has this id."""
    ids = f" Shortened results have the ids {', '.join(known)}." if known else " No result was shortened."
    return f"There is no shortened result with the id {result_id!r}.{ids}"
