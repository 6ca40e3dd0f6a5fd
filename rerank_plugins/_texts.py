"""What counts as a text that a model can read."""

from __future__ import annotations

import unicodedata

__all__ = ["is_blank", "scorable"]

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"})
"""Categories without a visible character: control, format, surrogates, private use, separators. Unassigned code points
are visible here, so that no answer depends on the Unicode version of the Python that runs."""


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: white space, zero-width and control characters, private use."""
    return all(unicodedata.category(character) in _INVISIBLE for character in text)


def scorable(text: str) -> str:
    """A text that every tokenizer takes: lone surrogates, as broken PDFs have them, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
