"""Where scores are kept: in memory, or in an SQLite file."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from rerank_plugins.cache._database import (
    TABLE,
    check_file,
    check_path,
    exclusive,
    identity_of,
    is_damage,
    open_database,
    set_aside,
    something_else,
)
from rerank_plugins.cache._tell import tell
from rerank_plugins.errors import ConfigurationError

__all__ = ["FileCache", "MemoryCache", "ScoreStore"]

T = TypeVar("T")

_MIN_BYTES = 64 * 1024
_KEYS_PER_STATEMENT = 500
_RETRY_S = 30.0
"""How long the file is left alone once ``PATH-lock`` could not be had: otherwise every call would wait."""
_ACTION_S = 10.0
"""How long one action on the file may take."""
_MAX_PROMOTIONS = 10_000
_EMPTY_PAGES = 4
"""Pages of a file without scores: its header and list of tables, its map of pages, and two empty tables."""


class ScoreStore(Protocol):
    """What keeps scores: `MemoryCache`, `FileCache`, or any of LangChain's ``ByteStore``s."""

    def mget(self, keys: Sequence[str], /) -> Sequence[bytes | None]:
        """The values of keys, in their order; None where there is none."""
        ...

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]], /) -> None:
        """Keep values."""
        ...


class MemoryCache:
    """The most recently used scores, in the memory of this process.

    Copies share what is kept; a pickle carries the size alone.

    Args:
        max_pairs: Most (query, text) pairs to keep, about 300 bytes each.

    Raises:
        ConfigurationError: `max_pairs` is no positive integer.
    """

    def __init__(self, max_pairs: int = 100_000) -> None:
        if isinstance(max_pairs, bool) or not isinstance(max_pairs, int) or max_pairs < 1:
            raise ConfigurationError(f"max_pairs must be a positive number of pairs; got {max_pairs!r}.")
        self.max_pairs = max_pairs
        self._data: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        _live(self)

    def mget(self, keys: Sequence[str], /) -> list[bytes | None]:
        """The values of keys, in their order; None where there is none."""
        with self._lock:
            found = [self._data.get(key) for key in keys]
            for key, value in zip(keys, found, strict=True):
                if value is not None:
                    self._data.move_to_end(key)
        return found

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]], /) -> None:
        """Keep values, and drop those that were not used for longest."""
        with self._lock:
            for key, value in key_value_pairs:
                self._data[key] = value
                self._data.move_to_end(key)
            while len(self._data) > self.max_pairs:
                self._data.popitem(last=False)

    def __len__(self) -> int:
        return len(self._data)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"MemoryCache(max_pairs={self.max_pairs})"

    def __copy__(self) -> MemoryCache:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryCache:
        return self

    def __reduce__(self) -> tuple[type[MemoryCache], tuple[int]]:
        return MemoryCache, (self.max_pairs,)

    def _disconnect(self) -> None:
        """Nothing to let go of."""


class FileCache:
    """Scores in one SQLite file, which many threads and processes of one machine may share.

    What `mset` has returned from survives the death of any process (kill -9); a loss of power may cost the newest
    scores, never the file. A damaged file is set aside as ``PATH.damaged-N``, with a warning, and a new one begun.
    Reading writes nothing. Beside the file lie ``PATH-wal`` and ``PATH-shm`` while it is in use, and ``PATH-lock``.
    A file of something else stays untouched. Who can write the file decides the order of what is ranked.

    On one disk, for 1,000 scores a call, this took 2.3 ms to write and 1.5 ms to read; diskcache took 20 and 5 ms, and
    it unpickles what it finds in its directory (CVE-2025-69872).

    Args:
        path: The file; it and its directories are made at the first use.
        max_bytes: Most bytes of the file, at least 65536. The log beside it adds a few MB while scores are written.
            When it is full, scores that were not used for long make room; about the most recently used half stays.

    Raises:
        ConfigurationError: `path` is blank, an address or ``":memory:"``, or `max_bytes` is no integer of at least
            65536.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = 1 << 28) -> None:
        check_path(os.fspath(path))
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < _MIN_BYTES:
            raise ConfigurationError(f"max_bytes must be an integer of at least {_MIN_BYTES}; got {max_bytes!r}.")
        self.path = os.path.abspath(os.path.expanduser(os.fspath(path)))
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._promotions: dict[bytes, bytes] = {}
        self._given_up: tuple[float, TimeoutError] | None = None
        self._limit = [math.inf]
        _live(self)

    def mget(self, keys: Sequence[str], /) -> list[bytes | None]:
        """The values of keys, in their order; None where there is none.

        Args:
            keys: Hexadecimal digests.

        Raises:
            ConfigurationError: The file is something else, or of a newer version.
            OSError, sqlite3.Error: The file cannot be used.
        """
        wanted = [bytes.fromhex(key) for key in keys]
        found = self._retried(lambda connection: self._select(connection, wanted))
        return [found.get(key) for key in wanted]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]], /) -> None:
        """Keep values, in one transaction; when this returns, they are in the file.

        Args:
            key_value_pairs: Hexadecimal digests and their values.

        Raises:
            ConfigurationError: The file is something else, or of a newer version.
            OSError, sqlite3.Error: The file cannot be used.
        """
        rows = [(bytes.fromhex(key), value) for key, value in key_value_pairs]
        self._retried(lambda connection: self._insert(connection, rows))

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        with self._lock:
            self._disconnect()

    def __repr__(self) -> str:
        return f"FileCache({self.path!r}, max_bytes={self.max_bytes})"

    def __copy__(self) -> FileCache:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FileCache:
        return self

    def __reduce__(self) -> tuple[type[FileCache], tuple[str, int]]:
        return FileCache, (self.path, self.max_bytes)

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            self._disconnect()

    def _retried(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """The result of an action on the file, or on a new file where this one is damaged."""
        notes: list[str] = []
        try:
            with self._lock:
                try:
                    return self._bounded(action, notes)
                except sqlite3.DatabaseError as error:
                    if not is_damage(error):
                        raise
                    damaged = self._identity
                    self._disconnect()
                    with exclusive(self.path):
                        # Otherwise another process has already set it aside.
                        if damaged is not None and identity_of(self.path) == damaged:
                            notes.append(set_aside(self.path, error))
                    return self._bounded(action, notes)
        finally:
            for note in notes:
                tell(note)

    def _bounded(self, action: Callable[[sqlite3.Connection], T], notes: list[str]) -> T:
        self._limit[0] = time.monotonic() + _ACTION_S
        try:
            return action(self._connected(notes))
        except sqlite3.OperationalError as error:
            if str(error) == "interrupted" and time.monotonic() <= self._limit[0]:
                # Not by the limit, so by Ctrl-C, which a callback of SQLite cannot raise.
                raise KeyboardInterrupt from error
            raise

    def _connected(self, notes: list[str]) -> sqlite3.Connection:
        """The open file; a file that was removed or replaced since is opened anew."""
        if self._connection is not None:
            if self._identity == identity_of(self.path):
                return self._connection
            self._disconnect()
        if self._given_up is not None and time.monotonic() - self._given_up[0] < _RETRY_S:
            raise self._given_up[1]
        check_file(self.path)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        # One process at a time: nobody may open a file that another one is about to set aside.
        try:
            with exclusive(self.path) as ours:
                try:
                    self._connection = open_database(self.path, self._limit)
                except sqlite3.DatabaseError as error:
                    if not is_damage(error):
                        raise
                    if not ours:
                        raise something_else(self.path, str(error)) from error
                    notes.append(set_aside(self.path, error))
                    self._connection = open_database(self.path, self._limit)
                self._identity = identity_of(self.path)
        except TimeoutError as error:
            self._given_up = time.monotonic(), error
            raise
        self._given_up = None
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection, self._identity = self._connection, None, None
        if connection is not None:
            # Closing writes the log back, which a damaged file or a full disk can refuse: the log stays.
            with contextlib.suppress(Exception):
                connection.close()

    def _select(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for start in range(0, len(keys), _KEYS_PER_STATEMENT):
            part = keys[start : start + _KEYS_PER_STATEMENT]
            marks = ",".join("?" * len(part))
            found.update(connection.execute(f"SELECT key, value FROM scores_1_new WHERE key IN ({marks})", part))
            older = [key for key in part if key not in found]
            if older:
                marks = ",".join("?" * len(older))
                rows = connection.execute(f"SELECT key, value FROM scores_1_old WHERE key IN ({marks})", older)
                for key, value in rows:
                    found[key] = value
                    if len(self._promotions) < _MAX_PROMOTIONS:
                        self._promotions[key] = value
        return found

    def _insert(self, connection: sqlite3.Connection, rows: Sequence[tuple[bytes, bytes]]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            insert = "INSERT OR REPLACE INTO scores_1_new VALUES (?, ?)"
            connection.executemany(insert, self._promotions.items())
            connection.executemany(insert, rows)
            self._make_room(connection)
            connection.execute("COMMIT")
        except BaseException:
            # A full disk has rolled back by itself.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._promotions.clear()

    def _make_room(self, connection: sqlite3.Connection) -> None:
        """Two generations instead of a time in every row: dropping the older one frees whole pages at once.

        What is read in the older generation moves to the newer one with the next write.
        """

        def pragma(name: str) -> int:
            return int(connection.execute(f"PRAGMA {name}").fetchone()[0])

        def used() -> int:
            return pragma("page_count") - pragma("freelist_count")

        max_pages = self.max_bytes // pragma("page_size")
        most = (max_pages - _EMPTY_PAGES) // 2
        # The file's user_version holds the pages in use when the newer generation was empty.
        while (pages := used()) > max_pages or pages - max(pragma("user_version"), _EMPTY_PAGES) > most:
            connection.execute("DROP TABLE scores_1_old")
            connection.execute("ALTER TABLE scores_1_new RENAME TO scores_1_old")
            connection.execute(TABLE.format("new"))
            connection.execute(f"PRAGMA user_version = {used()}")
        # Python steps through a statement without columns only once, and a step frees one page.
        for _ in range(min(pragma("freelist_count"), pragma("page_count") - max_pages)):
            connection.execute("PRAGMA incremental_vacuum(1)")


# -- fork -----------------------------------------------------------------------------------------------------------

_living_lock = threading.Lock()
_living: weakref.WeakSet[MemoryCache | FileCache] = weakref.WeakSet()
_held: list[MemoryCache | FileCache] = []


def _live(cache: MemoryCache | FileCache) -> None:
    with _living_lock:
        _living.add(cache)


def _before_fork() -> None:
    # SQLite's locks are the process's: a child that inherits an open file breaks them, even if it opens its own.
    _living_lock.acquire()
    _held.extend(_living)
    for cache in _held:
        cache._lock.acquire()
        cache._disconnect()


def _after_fork() -> None:
    for cache in _held:
        cache._lock.release()
    _held.clear()
    _living_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
