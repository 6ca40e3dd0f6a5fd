"""Long texts as overlapping token windows, and the way back from window scores to candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rerank_plugins.errors import ConfigurationError

__all__ = ["Place", "check_windows", "fold_max", "headed_windows", "split_windows"]


def check_windows(length: int | None, overlap: int) -> None:
    """Refuse windows that would not move forward.

    Raises:
        ConfigurationError: `length` is below 1, or `overlap` is not in ``0 .. length - 1``.
    """
    if length is None:
        return
    if length < 1:
        raise ConfigurationError(f"passage_length must be at least 1 token, or None for no windows; got {length}.")
    if not 0 <= overlap < length:
        raise ConfigurationError(
            f"passage_overlap must be in 0..{length - 1} (below passage_length={length}); got {overlap}."
        )


Place = tuple[int, int]
"""Start and end character, half-open."""


def split_windows(text: str, offsets: Sequence[Place], length: int, overlap: int) -> list[Place]:
    """Cut a text into windows of at most `length` tokens, each sharing `overlap` tokens with the one before.

    Every token is in at least one window, and the last window is full where the text is long enough: it starts
    earlier instead of being short.

    Args:
        text: The text.
        offsets: Place of each token, ascending, without special tokens.
        length: Tokens per window.
        overlap: Tokens that neighbouring windows share at least.

    Returns:
        The places of the windows, in order; all of `text` where it fits into one.
    """
    if len(offsets) <= length:
        return [(0, len(text))]
    last = len(offsets) - length
    starts = [*range(0, last, length - overlap), last]
    return [(offsets[i][0], offsets[i + length - 1][1]) for i in starts]


def headed_windows(
    header: str,
    header_offsets: Sequence[Place],
    text: str,
    offsets: Sequence[Place],
    length: int,
    overlap: int,
) -> tuple[str, list[Place], bool]:
    """Cut a text into windows that all begin with a header, such as the title of the document.

    Args:
        header: What every window begins with.
        header_offsets: As `offsets`, of the header. Half a window is the most that a header takes.
        text: The text.
        offsets: As for `split_windows`.
        length: Tokens per window, those of the header among them.
        overlap: Tokens that neighbouring windows share beside the header, as far as there is room.

    Returns:
        The header as the windows have it, the places of the windows in `text`, in order, and whether the header was
        cut.
    """
    if len(header_offsets) + len(offsets) <= length:
        return header, [(0, len(text))], False
    room_for_header = length // 2
    cut = len(header_offsets) > room_for_header
    if cut:
        header = header[: header_offsets[room_for_header - 1][1]] + "\n" if room_for_header else ""
    room = length - min(len(header_offsets), room_for_header)
    return header, split_windows(text, offsets, room, min(overlap, room - 1)), cut


def fold_max(scores: NDArray[np.float64], owners: Sequence[int] | NDArray[np.intp], n: int) -> NDArray[np.float64]:
    """The best window of each candidate.

    Taking the maximum over passages is MaxP of Dai and Callan, "Deeper Text Understanding for IR with Contextual
    Neural Language Modeling", SIGIR 2019.

    Args:
        scores: Shape (n_windows,).
        owners: Candidate of each window.
        n: Number of candidates.

    Returns:
        Shape (n,); ``-inf`` for a candidate without a window.
    """
    best = np.full(n, -np.inf)
    np.maximum.at(best, np.asarray(owners, dtype=np.intp), scores)
    return best
