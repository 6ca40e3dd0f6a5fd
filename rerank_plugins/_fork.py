"""What native engines need so that a forked child of their process can score and end.

A child of `os.fork` has the memory of its parent and one thread of it: locks that other threads held stay locked, and
the threads of engines are gone. Hence

- a fork waits until no thread loads a model or runs a batch (`fork_waits`) and the threads of engines have gone to
  sleep, so that no such lock is held;
- a child makes engines of its own, and never destroys those of its parent, which would wait for their threads
  (`PerProcess`);
- what uses OpenMP runs in another thread than the one that forked, whose team is gone (`with_a_team`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rerank_plugins.errors import ScoringError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["PerProcess", "fork_waits", "with_a_team"]

T = TypeVar("T")

LIMIT_S = 300.0
"""How long a fork waits for the threads that load or score."""
SETTLE_S = 0.05
"""How long the threads of an engine look for more work when a batch is done, before they sleep."""


class _State:
    """Of this process; a child begins with a new one."""

    def __init__(self, forked_thread: int | None = None, *, broken: bool = False) -> None:
        self.changed = threading.Condition()
        self.inside: dict[object, int] = {}
        """Threads, by identifier, that are in a block of `fork_waits`."""
        self.left_at = -math.inf
        """When a thread last left such a block, in seconds of `time.monotonic`."""
        self.forks = 0
        self.overrun = False
        """A fork went on though a thread was still inside."""
        self.forked_thread = forked_thread
        """The thread that went on in this child, if this is one."""
        self.broken = broken
        """This child was forked while engines were busy."""


_state = _State()
_living: weakref.WeakSet[PerProcess[Any]] = weakref.WeakSet()


@contextlib.contextmanager
def fork_waits(*, joins: bool = False) -> Iterator[None]:
    """While a thread is in this block, a fork by another thread waits, for `LIMIT_S` at most.

    Args:
        joins: Go in although a fork waits: another thread that is inside waits for this one.

    Raises:
        ScoringError: This process was forked after that time: nothing tells in what state its engines are.
    """
    _register()
    state = _state
    if state.broken:
        raise ScoringError(
            f"This process was forked while another thread of its parent had been loading or running a model for over "
            f"{LIMIT_S:.0f} seconds, so no engine can be used in it. Fork before, or start processes with the method "
            "'spawn'."
        )
    me, token = threading.get_ident(), object()
    with state.changed:
        # Whoever is inside already must be able to finish.
        while state.forks and not joins and me not in state.inside.values():
            state.changed.wait()
        state.inside[token] = me
    try:
        yield
    finally:
        with state.changed:
            state.inside.pop(token, None)
            state.left_at = time.monotonic()
            state.changed.notify_all()


class PerProcess(Generic[T]):
    """A native object that each process makes for itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: T | None = None
        _register()
        _living.add(self)

    @contextlib.contextmanager
    def use(self, make: Callable[[], T]) -> Iterator[T]:
        """The object of this process; a fork waits for who uses it.

        Args:
            make: Makes it at the first use, and at the first use in a forked child. Everything that holds the native
                object must be reachable from what it returns alone.
        """
        with fork_waits():
            if self._made is None:
                with self._lock:
                    if self._made is None:
                        self._made = make()
            yield self._made

    def _leave_to_the_parent(self) -> None:
        if self._made is not None:
            import ctypes

            # One reference more than anyone ever drops, not even the end of the interpreter.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._made))
        self._made = None
        self._lock = threading.Lock()


def with_a_team(call: Callable[[], T]) -> T:
    """Call a function that uses OpenMP, in a thread whose team of threads is there.

    GNU's OpenMP keeps a team for each thread that has used it. In a child, the one of the thread that forked has no
    threads any more, and would be waited for without end. A fork waits for the call.
    """
    if threading.get_ident() != _state.forked_thread:
        with fork_waits():
            return call()

    def inside() -> T:
        with fork_waits(joins=True):
            return call()

    with fork_waits():
        return _other_thread().submit(inside).result()


@functools.cache
def _other_thread() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="rerank-plugins-forked")


@functools.cache
def _register() -> None:
    if not hasattr(os, "register_at_fork"):
        return
    # Modules whose hooks hold locks that a thread inside may need: those registered first run after ours. One that is
    # imported while a fork waits would only run its second half.
    for name in ("logging", "concurrent.futures.thread", "filelock"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # For the child, which cannot count on an import.
    importlib.import_module("ctypes")
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


def _before() -> None:
    state, me = _state, threading.get_ident()
    with state.changed:
        state.forks += 1
        state.overrun = not state.changed.wait_for(lambda: not set(state.inside.values()) - {me}, LIMIT_S)
    _settle(state.left_at)


def _settle(since: float) -> None:
    """Wait until the threads of engines sleep: those of OpenVINO hold locks as long as they look for work."""
    if time.monotonic() - since > 1:
        return
    time.sleep(max(0.0, since + SETTLE_S - time.monotonic()))
    # On a busy machine they may not have had their turn.
    while _others_run() and time.monotonic() - since < 1:
        time.sleep(SETTLE_S / 10)


def _others_run() -> bool:
    """Whether another thread of this process runs or is ready to; False where the system does not tell."""
    me = str(threading.get_native_id())
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            # A thread may end meanwhile.
            with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/stat", "rb") as file:
                # After the name in parentheses, which may have any character in it.
                if thread != me and file.read().rpartition(b")")[2].split()[0] == b"R":
                    return True
    return False


def _after_in_parent() -> None:
    with _state.changed:
        _state.forks -= 1
        _state.changed.notify_all()


def _after_in_child() -> None:
    global _state
    _state = _State(threading.get_ident(), broken=_state.broken or _state.overrun)
    _other_thread.cache_clear()
    for native in list(_living):
        native._leave_to_the_parent()
