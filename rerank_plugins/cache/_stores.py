"""Where scores are kept: in memory, or in an SQLite file."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Protocol, TypeVar

from rerank_plugins.errors import ConfigurationError

__all__ = ["FileCache", "MemoryCache", "ScoreStore"]

T = TypeVar("T")

_MIN_BYTES = 64 * 1024
_KEYS_PER_STATEMENT = 500
_BUSY_TIMEOUT_S = 5.0
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

    Args:
        path: The file; it and its directories are made at the first use.
        max_bytes: Most bytes of the file, at least 65536. The log beside it adds a few MB while scores are written.
            When it is full, scores that were not used for long make room; about the most recently used half stays.

    Raises:
        ConfigurationError: `path` is blank, or `max_bytes` is no integer of at least 65536.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = 1 << 28) -> None:
        if not os.fspath(path).strip():
            raise ConfigurationError("The path of a score cache must name a file; got a blank one.")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < _MIN_BYTES:
            raise ConfigurationError(f"max_bytes must be an integer of at least {_MIN_BYTES}; got {max_bytes!r}.")
        self.path = os.path.abspath(os.path.expanduser(os.fspath(path)))
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._promotions: dict[bytes, bytes] = {}
        _live(self)

    def mget(self, keys: Sequence[str], /) -> list[bytes | None]:
        """The values of keys, in their order; None where there is none.

        Args:
            keys: Hexadecimal digests.

        Raises:
            ConfigurationError: The file is an SQLite database of something else.
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
            ConfigurationError: The file is an SQLite database of something else.
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
                    return action(self._connected(notes))
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    damaged = self._identity
                    self._disconnect()
                    with _exclusive(self.path):
                        # Otherwise another process has already set it aside.
                        if damaged is not None and _identity_of(self.path) == damaged:
                            notes.append(_set_aside(self.path, error))
                    return action(self._connected(notes))
        finally:
            for note in notes:
                warnings.warn(note, RuntimeWarning, stacklevel=3)

    def _connected(self, notes: list[str]) -> sqlite3.Connection:
        """The open file; a file that was removed or replaced since is opened anew."""
        if self._connection is not None:
            if self._identity == _identity_of(self.path):
                return self._connection
            self._disconnect()
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        # One process at a time: nobody may open a file that another one is about to set aside.
        with _exclusive(self.path):
            try:
                self._connection = _open(self.path)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                notes.append(_set_aside(self.path, error))
                self._connection = _open(self.path)
            self._identity = _identity_of(self.path)
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
            connection.execute(_TABLE.format("new"))
            connection.execute(f"PRAGMA user_version = {used()}")
        # Python steps through a statement without columns only once, and a step frees one page.
        for _ in range(min(pragma("freelist_count"), pragma("page_count") - max_pages)):
            connection.execute("PRAGMA incremental_vacuum(1)")


_TABLE = "CREATE TABLE IF NOT EXISTS scores_1_{} (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"


def _open(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        # A damaged value may call itself text, and be none.
        connection.text_factory = bytes
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        names = {name.decode("utf-8", "replace") for (name,) in tables}
        if names and not {"scores_1_new", "scores_1_old"} <= names:
            raise ConfigurationError(
                f"{path} is an SQLite database of something else (tables {sorted(names)[:5]}), and stays untouched. "
                "Give the score cache a file of its own."
            )
        if not names:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        # Enough against the death of a process; only FULL would also sync every commit against a loss of power.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA journal_size_limit = 1048576")
        if not names:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_TABLE.format("new"))
            connection.execute(_TABLE.format("old"))
            connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    # Python maps SQLITE_CORRUPT and SQLITE_NOTADB to this class itself, all that can pass to a subclass.
    return type(error) is sqlite3.DatabaseError


def _identity_of(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def _set_aside(path: str, error: Exception) -> str:
    number = 1
    while os.path.exists(f"{path}.damaged-{number}"):
        number += 1
    target = f"{path}.damaged-{number}"
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(path + suffix, target + suffix)
    return f"The score cache {path} is damaged ({error}). It was set aside as {target}, and a new one is begun."


@contextlib.contextmanager
def _exclusive(path: str) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    with open(f"{path}-lock", "ab") as file:
        _lock_file(file)
        yield


def _lock_file(file: IO[bytes]) -> None:
    # Windows has no fcntl; it refuses to rename a file that is open, which is what the lock is for.
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


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
