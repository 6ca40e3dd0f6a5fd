"""Table of published cross-encoders (filled in below)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A published cross-encoder."""

    id: str


PUBLISHED: tuple[PublishedModel, ...] = ()
