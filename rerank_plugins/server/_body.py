"""Request bodies, within bounds of size, time and memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from rerank_plugins.server._shapes import Refused

__all__ = ["Bodies"]

DISCARDED = 8
"""How many times the largest body is read and thrown away, so that the client comes to read the answer."""


class Request(Protocol):
    """What is needed of Starlette's request."""

    def stream(self) -> AsyncIterator[bytes]: ...


class Bodies:
    """Reads bodies: none larger, slower or, all together, in more memory than allowed.

    Args:
        largest: Most bytes of a body.
        at_once: Most bytes of all bodies that are read or worked on.
        seconds: Time that a body may take to arrive.
    """

    def __init__(self, largest: int, at_once: int, seconds: float) -> None:
        self.largest = largest
        self.at_once = at_once
        self.seconds = seconds
        self.held = 0

    async def read(self, request: Request) -> bytes:
        """The body; the caller calls `free` with its length when it is done.

        Raises:
            Refused: It is too large, too slow, or there is no room.
        """
        parts: list[bytes] = []
        size = 0
        full = False
        try:
            async with asyncio.timeout(self.seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > self.largest or full:
                        if size > DISCARDED * self.largest:
                            break
                        self._drop(parts)
                        continue
                    if self.held + len(part) > self.at_once:
                        full = True
                        self._drop(parts)
                        continue
                    self.held += len(part)
                    parts.append(part)
        except TimeoutError:
            self._drop(parts)
            raise Refused(408, f"The body did not arrive within {self.seconds:g} s.") from None
        except BaseException:
            self._drop(parts)
            raise
        if size > self.largest:
            raise Refused(413, f"The body may have at most {self.largest:,} bytes. Send fewer texts at a time.")
        if full:
            raise Refused(429, "Too many requests at the same time. Try again.", "Overloaded")
        return b"".join(parts)

    def free(self, size: int) -> None:
        """A body is done with."""
        self.held -= size

    def _drop(self, parts: list[bytes]) -> None:
        self.held -= sum(map(len, parts))
        parts.clear()
