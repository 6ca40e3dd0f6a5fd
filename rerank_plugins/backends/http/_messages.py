"""What a server says is wrong, without the texts that it may repeat."""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["asked_pause_s", "error_message", "shown"]

LONGEST = 300
"""Characters of a server's message that are passed on."""
REPEATED = 16
"""So many characters in a row of an input are a repetition of it."""


def error_message(body: bytes, inputs: Iterable[str], secret: str | None = None) -> str:
    """The message in an error body of any of the known shapes; empty where there is none.

    ``{"message"}``, ``{"detail"}`` (a string, or FastAPI's list), ``{"error": string}``, ``{"error": {"message"}}``.

    Args:
        body: The body of the answer.
        inputs: Query and texts; a message that repeats one is left out.
        secret: A key that must not be shown.
    """
    try:
        return shown(_find(json.loads(body)), inputs, secret)
    except (ValueError, RecursionError):
        return ""


def shown(message: str, inputs: Iterable[str], secret: str | None = None) -> str:
    """A server's message on one line, of bounded length, without inputs and secret."""
    if secret:
        message = message.replace(secret, "**********")
    beginning = message[:LONGEST]
    if any(_repeats(beginning, text) for text in inputs):
        return "(a message that repeats the input)"
    return " ".join(beginning.split()) + (" ..." if len(message) > LONGEST else "")


def _find(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, list):
        # FastAPI: objects with "msg", where it is wrong, and the input, which is left out.
        return "; ".join(filter(None, (_find(part) for part in answer[:5])))
    if isinstance(answer, Mapping):
        for name in ("message", "msg", "detail", "error", "errors"):
            if answer.get(name):
                found = _find(answer[name])
                where = answer.get("loc")
                if name == "msg" and isinstance(where, list):
                    return f"{'.'.join(map(str, where))}: {found}"
                if found:
                    return found
    return ""


def _repeats(message: str, text: str) -> bool:
    if len(text) < REPEATED:
        return len(text) > 3 and text in message
    return any(message[i : i + REPEATED] in text for i in range(len(message) - REPEATED + 1))


def asked_pause_s(headers: Mapping[str, str]) -> float | None:
    """How long a server asks to wait, from ``Retry-After`` (seconds or a date) or ``retry-after-ms``."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    for given, factor in ((milliseconds, 0.001), (value, 1.0)):
        try:
            seconds = float(given or "") * factor
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, OverflowError, OSError):
            return None
    return None
