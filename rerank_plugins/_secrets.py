"""Addresses without the part that is nobody else's business."""

from __future__ import annotations

import re

__all__ = ["without_passwords"]


def without_passwords(text: str) -> str:
    """A text in which the user's part of every address is hidden: ``redis://***@host/0``."""
    return re.sub(r"(\w:/{1,2})[^/\s'\"]*@", r"\1***@", text)
