"""What all remote backends share: pairs by query, requests within the server's limits, a few at once, one budget."""

from __future__ import annotations

import contextvars
import copy
import json
import math
import os
import random
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from rerank_plugins._cancellation import Cancelled, cancellation
from rerank_plugins._deadline import DeadlineExceeded, remaining_s
from rerank_plugins._texts import scorable
from rerank_plugins.backends.base import Backend, Pair, PairLogits
from rerank_plugins.errors import ConfigurationError, QueryError, ServerError, ServerTimeout

__all__ = [
    "Deadline",
    "Failure",
    "Limits",
    "RemoteBackend",
    "check_number",
    "check_scores",
    "restart_in_child",
    "retried",
]

T = TypeVar("T")

THREADS = 64
"""Requests of one backend at the same time, of all its callers."""
RETRIES = 3
"""Requests after the first one."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
RETRIED = frozenset({408, 429, 502, 503, 504, 529})
"""Statuses that pass: the server is busy, starts, or is replaced."""
LASTING = frozenset({501, 505})
"""Statuses from 500 on that say what the server cannot do; all others are retried once."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes in one request; None where there is no limit or none is known.

    Attributes:
        texts: Most texts of a request.
        characters: Most characters of a text; a longer one is cut here.
        body_bytes: Most bytes of a request's body.
    """

    texts: int | None = None
    characters: int | None = None
    body_bytes: int | None = None


class Deadline:
    """The end of a call: `timeout_s` from now, or when the caller wants its ranking, if that is earlier.

    Attributes:
        of_caller: Whether it is the caller's.
    """

    def __init__(self, timeout_s: float) -> None:
        remaining = remaining_s()
        self.of_caller = remaining is not None and remaining < timeout_s
        self.timeout_s = timeout_s
        self._end = time.monotonic() + (timeout_s if remaining is None else min(timeout_s, remaining))

    @property
    def left_s(self) -> float:
        """Seconds until the end; 0 after it."""
        return max(0.0, self._end - time.monotonic())

    def error(self, url: str, status: int | None = None, last: str = "") -> ServerTimeout:
        """That a server did not answer in time."""
        return ServerTimeout(
            f"{url} did not answer within {self.timeout_s:g} s (timeout_s, for all requests and retries of a call). "
            f"{last + ' ' if last else ''}Send fewer texts, or raise timeout_s.",
            url=url,
            status=status,
        )


class Failure(Exception):
    """A request that failed, and what may be done about it.

    Args:
        error: What the caller sees if nothing more is tried.
        retries: How often the same request may be sent again.
        after_s: How long the server asks to wait, where it does.
    """

    def __init__(self, error: ServerError, *, retries: int = 0, after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retries = retries
        self.after_s = after_s


def retries_of(status: int) -> int:
    """How often a request that was answered with this status may be sent again."""
    if status in RETRIED:
        return RETRIES
    return 1 if status >= 500 and status not in LASTING else 0


def pause_s(retry: int) -> float:
    """How long to wait before a retry, counted from 0: random up to a bound that doubles.

    References:
        "Exponential Backoff And Jitter" (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/):
        full jitter.
    """
    return random.uniform(0.0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**retry))


def sleep(seconds: float) -> None:
    """Wait; a cancelled call ends at once.

    Raises:
        Cancelled: The caller has gone.
    """
    stop = cancellation.get()
    if stop is None:
        time.sleep(seconds)
        return
    wake = threading.Event()
    stop.add(wake)
    try:
        if stop.cancelled or wake.wait(seconds):
            raise Cancelled
    finally:
        stop.discard(wake)


def retried(attempt: Callable[[], T], deadline: Deadline) -> T:
    """Call `attempt` until it succeeds, fails for good, or no time is left.

    Args:
        attempt: Sends one request; raises `Failure`.
        deadline: Of the call, pauses and retries included.

    Raises:
        ServerError: What the last request failed with.
    """
    for retry in range(RETRIES + 1):
        try:
            return attempt()
        except Failure as failure:
            pause = pause_s(retry) if failure.after_s is None else failure.after_s
            if retry >= failure.retries or pause >= deadline.left_s:
                raise failure.error from failure.__cause__
            sleep(pause)
    raise AssertionError("a failure has at most RETRIES retries")


def check_number(name: str, value: Any, *, above: float = 0.0, whole: bool = False) -> Any:
    """The value, a finite number above a bound.

    Raises:
        ConfigurationError: It is none.
    """
    kind = int if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or value <= above:
        raise ConfigurationError(f"{name} must be {'an int' if whole else 'a number'} above {above:g}; got {value!r}.")
    return value


def check_scores(rows: Any, n_texts: int, score: str, describe: Callable[[str], ServerError]) -> list[float]:
    """Scores in input order, from the rows of an answer.

    Args:
        rows: What should be a list of objects with ``index`` and `score`, in any order.
        n_texts: How many there must be.
        score: Name of the field with the score.
        describe: Makes the error, out of what is wrong.

    Raises:
        ServerError: An index is missing, doubled or out of range, or a score is no finite number.
    """
    if not isinstance(rows, list):
        raise describe(f"a {type(rows).__name__} where a list of scores is expected")
    scores: dict[int, float] = {}
    for row in rows:
        index, value = (row.get("index"), row.get(score)) if isinstance(row, Mapping) else (None, None)
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < n_texts:
            raise describe(f"the index {index!r:.40}, of {n_texts} texts")
        if index in scores:
            raise describe(f"the index {index} twice")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise describe(f"{value!r:.40} as the {score!r} of text {index}, which must be a finite number")
        scores[index] = float(value)
    if len(scores) != n_texts:
        missing = next(i for i in range(n_texts) if i not in scores)
        raise describe(f"{len(scores)} scores for {n_texts} texts: index {missing} is missing")
    return [scores[i] for i in range(n_texts)]


class _Restarted(Protocol):
    def start_afresh(self) -> None: ...


_everywhere: weakref.WeakSet[_Restarted] = weakref.WeakSet()


def restart_in_child(holder: _Restarted) -> None:
    """Call `holder.start_afresh` in a forked child, which has none of the threads that hold its locks."""
    _everywhere.add(holder)


def _after_fork() -> None:
    for holder in list(_everywhere):
        holder.start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Request(NamedTuple):
    query: str
    texts: list[str]
    positions: list[int]


class RemoteBackend(Backend):
    """A backend that asks a server: `_limits` and `_scores` are what a kind of server adds.

    Args:
        timeout_s: For one call of `logits`: all its requests, retries and pauses.
        max_concurrent: Requests of one call at the same time.

    Raises:
        ConfigurationError: One of them is not above 0.
    """

    precision = "unknown"
    takes_max_length = False
    """Whether a request can say how many tokens are read."""

    def __init__(self, *, timeout_s: float, max_concurrent: int) -> None:
        self.timeout_s = float(check_number("timeout_s", timeout_s))
        self.max_concurrent = int(check_number("max_concurrent", max_concurrent, whole=True))
        self.max_length = None
        self.instruction: str | None = None
        self._process = _Process()

    def configured(self, *, max_length: int | None, instruction: str | None, truncate_query: bool = False) -> Self:
        """This backend with another maximum length or instruction, sharing connections.

        Raises:
            ConfigurationError: The server cannot be told a maximum length.
        """
        if max_length is not None and not self.takes_max_length:
            raise ConfigurationError(
                f"The server at {self.address} decides itself how many tokens it reads: leave max_length at None."
            )
        other = copy.copy(self)
        other.max_length = max_length
        other.instruction = instruction
        return other

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Immutable but for connections and what was learnt of the servers, which copies share.
        return copy.copy(self)

    @property
    @abstractmethod
    def address(self) -> str:
        """What errors name: a URL or an endpoint, without secrets."""

    @abstractmethod
    def _limits(self, deadline: Deadline) -> Limits:
        """What one request may hold."""

    @abstractmethod
    def _scores(self, query: str, texts: Sequence[str], deadline: Deadline) -> list[float]:
        """Scores of the texts of one request, input order."""

    def _overhead(self, query: str) -> int:
        """Bytes of a request's body beside its texts."""
        return len(json.dumps(query)) + 1024

    def _text_overhead(self, query: str) -> int:
        """Bytes of a request's body for each text, beside the text."""
        return 32

    def logits(self, pairs: Sequence[Pair]) -> PairLogits:
        """Score pairs; see `Backend.logits`.

        Raises:
            ServerError: The server failed or answered wrongly.
            ServerTimeout: It did not answer within `timeout_s`.
            DeadlineExceeded: It did not answer when the caller wants its ranking.
            QueryError: A query is longer than what the server takes.
            ConfigurationError: The key that was named is not there.
        """
        scores = np.empty((len(pairs), 1), dtype=np.float32)
        truncated = np.zeros(len(pairs), dtype=np.bool_)
        if not pairs:
            return PairLogits(scores, truncated)
        deadline = Deadline(self.timeout_s)
        limits = self._limits(deadline)
        texts = []
        for i, (_, text) in enumerate(pairs):
            fitting = scorable(text)
            if limits.characters is not None and len(fitting) > limits.characters:
                fitting, truncated[i] = fitting[: limits.characters], True
            texts.append(fitting)
        requests: list[_Request] = []
        by_query: dict[str, list[int]] = {}
        for i, (query, _) in enumerate(pairs):
            by_query.setdefault(query, []).append(i)
        for query, positions in by_query.items():
            requests += self._split(scorable(query), positions, texts, truncated, limits)
        calls = [_Call(self._scores, request, deadline) for request in requests]
        try:
            results = self._all(calls, deadline)
        except ServerTimeout:
            if deadline.of_caller:
                raise DeadlineExceeded from None
            raise
        for request, values in zip(requests, results, strict=True):
            scores[request.positions, 0] = values
        return PairLogits(scores, truncated)

    def _split(
        self, query: str, positions: Sequence[int], texts: list[str], truncated: Any, limits: Limits
    ) -> Iterator[_Request]:
        request = _Request(query, [], [])
        room = limits.body_bytes - self._overhead(query) if limits.body_bytes is not None else None
        if room is not None and room < self._text_overhead(query) + 1024:
            raise QueryError(
                f"{self.address} takes requests of {limits.body_bytes:,} bytes, and the query leaves no room for a "
                "text in them. Shorten the query."
            )
        used, each = 0, self._text_overhead(query)
        for i in positions:
            text, size = texts[i], 0
            if room is not None:
                text, size = _fit(text, room - each)
                size += each
                truncated[i] |= len(text) < len(texts[i])
            full = limits.texts is not None and len(request.texts) >= limits.texts
            if request.texts and (full or (room is not None and used + size > room)):
                yield request
                request, used = _Request(query, [], []), 0
            request.texts.append(text)
            request.positions.append(i)
            used += size
        yield request

    def _all(self, calls: Sequence[Callable[[], list[float]]], deadline: Deadline) -> list[list[float]]:
        """Results of the calls, at most `max_concurrent` at the same time; the first error ends all."""
        stop = cancellation.get()
        wake = threading.Event()
        if stop is not None:
            stop.add(wake)
        pool = self._process.pool()
        futures: list[Future[list[float]]] = []
        try:
            while True:
                wake.clear()
                if stop is not None and stop.cancelled:
                    raise Cancelled
                for future in futures:
                    if future.done() and (error := future.exception()) is not None:
                        raise error
                running = sum(not future.done() for future in futures)
                for call in calls[len(futures) : len(futures) + self.max_concurrent - running]:
                    # In a copy of the context, which knows the trace that the request belongs to.
                    future = pool.submit(contextvars.copy_context().run, call)
                    future.add_done_callback(lambda _: wake.set())
                    futures.append(future)
                if len(futures) == len(calls) and all(future.done() for future in futures):
                    return [future.result() for future in futures]
                # A little longer than the requests may take: what they raise says more.
                if not wake.wait(deadline.left_s + 0.1) and not deadline.left_s:
                    raise deadline.error(self.address)
        finally:
            if stop is not None:
                stop.discard(wake)
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Close connections and end threads. The next use opens new ones."""
        self._process.close()


@dataclass(frozen=True, slots=True)
class _Call:
    scores: Callable[[str, Sequence[str], Deadline], list[float]]
    request: _Request
    deadline: Deadline

    def __call__(self) -> list[float]:
        return self.scores(self.request.query, self.request.texts, self.deadline)


def _fit(text: str, room: int) -> tuple[str, int]:
    """The text, cut so that its JSON has at most `room` bytes, and how many it has."""
    while (size := len(json.dumps(text, ensure_ascii=False).encode())) > room:
        text = text[: max(1, min(len(text) - 1, len(text) * room // size))]
    return text, size


class _Process:
    """What belongs to one process: threads, clients. A fork has none of its parent's."""

    def __init__(self) -> None:
        self.start_afresh()
        restart_in_child(self)

    def start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._client: Any = None

    def pool(self, name: str = "requests", threads: int = THREADS) -> ThreadPoolExecutor:
        with self._lock:
            if name not in self._pools:
                self._pools[name] = ThreadPoolExecutor(threads, thread_name_prefix=f"rerank-plugins-{name}")
            return self._pools[name]

    def client(self, make: Callable[[], T]) -> T:
        """The client of this process, made by `make` where there is none."""
        with self._lock:
            if self._client is None:
                self._client = client = make()
                weakref.finalize(self, client.close)  # type: ignore[attr-defined]
            return self._client  # type: ignore[no-any-return]

    def close(self) -> None:
        with self._lock:
            client, pools = self._client, self._pools
            self._client, self._pools = None, {}
        for pool in pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        if client is not None:
            client.close()
