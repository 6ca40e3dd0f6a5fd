"""Shared batches: pairs of concurrent callers are scored together.

The scheme is flat combining, without a thread of its own. The first caller becomes the leader and runs batches in its
thread at once. Later callers wait while the leader's next batches score their pairs too. A leader whose own pairs are
done hands over to a waiting caller and returns.

References:
    Hendler, Incze, Shavit and Tzafrir, "Flat Combining and the Synchronization-Parallelism Tradeoff", SPAA 2010
    (https://doi.org/10.1145/1810479.1810540).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._cancellation import Cancelled, cancellation
from rerank_plugins._deadline import DeadlineExceeded, remaining_s
from rerank_plugins.backends.pairs import EncodedPair
from rerank_plugins.batching import BatchCost, Waiting, next_batch
from rerank_plugins.errors import ScoringError

__all__ = ["SharedBatches"]

Run: TypeAlias = Callable[[list[EncodedPair]], NDArray[np.float32]]
"""Scores one batch: logits, float32, shape (n_pairs, n_labels)."""


class _Call:
    """Pairs of one caller, with their state. Only the leader changes `waiting`, `logits` and `error`."""

    def __init__(self, pairs: Sequence[EncodedPair], waiting: Waiting, run: Run, cost: BatchCost) -> None:
        self.pairs = pairs
        self.waiting = waiting
        self.run = run
        self.cost = cost
        self.stop = cancellation.get()
        self.logits: NDArray[np.float32] | None = None
        self.error: Exception | None = None
        self.wake = threading.Event()

    @property
    def done(self) -> bool:
        return self.error is not None or not len(self.waiting.positions)

    @property
    def cancelled(self) -> bool:
        return self.stop is not None and self.stop.cancelled


class SharedBatches:
    """Concurrent calls on one set of weights."""

    def __init__(self) -> None:
        self._start_afresh()
        _everywhere.add(self)

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[_Call] = []
        self._leader: _Call | None = None
        self._scored = 0

    def score(self, pairs: Sequence[EncodedPair], run: Run, cost: BatchCost) -> NDArray[np.float32]:
        """Logits of pairs, computed in batches shared with other callers.

        Args:
            pairs: At least one tokenised pair.
            run: Scores one batch, which may hold other callers' pairs.
            cost: Cost of a batch.

        Returns:
            float32, shape (n_pairs, n_labels), input order.

        Raises:
            Cancelled: The caller was cancelled.
            DeadlineExceeded: The caller's deadline has passed.
            Exception: Any error of `run` for these pairs; errors for other callers' pairs stay with them.
        """
        waiting = Waiting.of([len(pair.ids) for pair in pairs], self._scored)
        call = _Call(pairs, waiting, run, cost)
        if call.stop is not None:
            call.stop.add(call.wake)
        try:
            with self._lock:
                self._calls.append(call)
                if self._leader is None:
                    self._leader = call
            while not (call.done or call.cancelled):
                if remaining_s() == 0.0:
                    raise DeadlineExceeded
                if self._leader is call:
                    self._run_one()
                else:
                    call.wake.wait(remaining_s())
        finally:
            # However this call ended, by Ctrl-C too, the others go on.
            self._leave(call)
        if call.error is not None:
            raise call.error
        if call.logits is None or not call.done:
            raise Cancelled
        return call.logits

    def _leave(self, call: _Call) -> None:
        if call.stop is not None:
            call.stop.discard(call.wake)
        with self._lock:
            if call in self._calls:
                self._calls.remove(call)
            if self._leader is not call:
                return
            waiting = [other for other in self._calls if not (other.done or other.cancelled)]
            # The call with the latest turn, so that leaders change seldom.
            self._leader = max(waiting, key=lambda other: other.waiting.due, default=None)
            for other in self._calls:
                # Also calls that are done: this one may have been interrupted before it woke them.
                if other.done or other is self._leader:
                    other.wake.set()

    def _run_one(self) -> None:
        """Run the next batch. Pairs leave `waiting` only once scored, so an interrupted leader loses none."""
        with self._lock:
            calls = [call for call in self._calls if not (call.done or call.cancelled)]
        if calls:
            cost = min((call.cost for call in calls), key=lambda cost: cost.token_budget)
            parts = next_batch([call.waiting for call in calls], cost)
            self._run([(calls[i], part) for i, part in parts])

    def _run(self, parts: list[tuple[_Call, slice]]) -> None:
        pairs = [call.pairs[i] for call, part in parts for i in call.waiting.positions[part]]
        try:
            logits = parts[0][0].run(pairs)
            if logits.ndim != 2 or len(logits) != len(pairs):
                raise ScoringError(
                    f"forward must return shape ({len(pairs)}, n_labels) for {len(pairs)} pairs; it returned "
                    f"{logits.shape}. Correct the backend."
                )
        except Exception as error:
            if len(parts) > 1:
                # Each caller's pairs alone: only the caller whose pairs fail gets the error.
                for alone in parts:
                    self._run([alone])
                return
            call = parts[0][0]
            call.error = error
            call.wake.set()
            return
        start = 0
        for call, part in parts:
            positions = call.waiting.positions[part]
            rows = logits[start : start + len(positions)]
            start += len(positions)
            if call.logits is None:
                call.logits = np.empty((len(call.pairs), logits.shape[1]), dtype=np.float32)
            call.logits[positions] = rows
            self._scored += int(call.waiting.lengths[part].sum())
            call.waiting = call.waiting.without(part)
            if call.done:
                call.wake.set()


_everywhere: weakref.WeakSet[SharedBatches] = weakref.WeakSet()


def _after_fork() -> None:
    # The threads that lead or wait do not exist in a child.
    for batches in list(_everywhere):
        batches._start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
