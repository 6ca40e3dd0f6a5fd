"""Where scores are kept: in memory, or in an SQLite file."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sqlite3
import stat
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from rerank_plugins.cache._tell import tell
from rerank_plugins.errors import ConfigurationError

__all__ = ["FileCache", "MemoryCache", "ScoreStore"]

T = TypeVar("T")

_MIN_BYTES = 64 * 1024
_KEYS_PER_STATEMENT = 500
_BUSY_TIMEOUT_S = 5.0
"""How long a lock is waited for that another process holds: SQLite's, or that of ``PATH-lock``."""
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
        _check_path(os.fspath(path))
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
                    if not _is_damage(error):
                        raise
                    damaged = self._identity
                    self._disconnect()
                    with _exclusive(self.path):
                        # Otherwise another process has already set it aside.
                        if damaged is not None and _identity_of(self.path) == damaged:
                            notes.append(_set_aside(self.path, error))
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
            if self._identity == _identity_of(self.path):
                return self._connection
            self._disconnect()
        if self._given_up is not None and time.monotonic() - self._given_up[0] < _RETRY_S:
            raise self._given_up[1]
        _check_file(self.path)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        # One process at a time: nobody may open a file that another one is about to set aside.
        try:
            with _exclusive(self.path) as ours:
                try:
                    self._connection = _open(self.path, self._limit)
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    if not ours:
                        raise _something_else(self.path, str(error)) from error
                    notes.append(_set_aside(self.path, error))
                    self._connection = _open(self.path, self._limit)
                self._identity = _identity_of(self.path)
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
            connection.execute(_TABLE.format("new"))
            connection.execute(f"PRAGMA user_version = {used()}")
        # Python steps through a statement without columns only once, and a step frees one page.
        for _ in range(min(pragma("freelist_count"), pragma("page_count") - max_pages)):
            connection.execute("PRAGMA incremental_vacuum(1)")


_TABLE = "CREATE TABLE IF NOT EXISTS scores_1_{} (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"


def _open(path: str, limit: Sequence[float]) -> sqlite3.Connection:
    """The file, with exactly the two tables of a score cache in it; made where there are none."""
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        # A damaged value may call itself text, and be none.
        connection.text_factory = bytes
        # Rare enough to cost nothing; a query that goes on without end stops there.
        connection.set_progress_handler(lambda: time.monotonic() > limit[0], 1_000_000)
        connection.execute("PRAGMA trusted_schema = OFF")
        found = {
            tuple(b"" if part is None else part.replace(b'"', b"") for part in row)
            for row in connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master")
        }
        if found and found != _SCHEMA:
            names = sorted(name.decode("utf-8", "replace") for _, name, _, _ in found)
            if any(re.fullmatch("scores_([2-9]|[1-9][0-9]+)_new", name) for name in names):
                raise ConfigurationError(
                    f"The score cache {path} was written by a newer rerank-plugins, and stays untouched. Upgrade this "
                    "one, or give it a file of its own."
                )
            raise _something_else(path, f"it holds {', '.join(names[:5])}")
        if not found:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        # Enough against the death of a process; only FULL would also sync every commit against a loss of power.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA journal_size_limit = 1048576")
        if not found:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_TABLE.format("new"))
            connection.execute(_TABLE.format("old"))
            connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


_SCHEMA = {
    (b"table", name, name, _TABLE.format(age).replace("IF NOT EXISTS ", "").encode())
    for age in ("new", "old")
    for name in (f"scores_1_{age}".encode(),)
}
"""Rows of sqlite_master, without the quotes that renaming a table puts there."""


def _check_path(path: str) -> None:
    if not path.strip():
        raise ConfigurationError("The path of a score cache must name a file; got a blank one.")
    if path.strip() == ":memory:":
        raise ConfigurationError(
            "The path of a score cache must name a file; got ':memory:'. To keep scores in memory, give a number of "
            "pairs: cache=100_000."
        )
    # A scheme has two letters or more: one is a drive.
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/|\s*(file|sqlite):", path)
    if scheme is not None:
        name = scheme[1] or scheme[2]
        raise ConfigurationError(
            f"The path of a score cache must name a file; got an address ({name}:...). For Redis and the like give a "
            "store with mget and mset, such as LangChain's RedisStore; for SQLite the path alone."
        )


def _something_else(path: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is something else than a score cache ({what}), and stays untouched. Give the score cache a file of "
        "its own."
    )


def _check_file(path: str) -> None:
    """Refuse what is there and was never a score cache, before anything is made beside it."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise _something_else(path, "no regular file")
    if found.st_size and not os.path.lexists(f"{path}-lock"):
        with open(path, "rb") as file:
            beginning = file.read(len(_SQLITE))
        if beginning != _SQLITE:
            raise _something_else(path, f"it begins with {beginning!r}")


_SQLITE = b"SQLite format 3\0"
"""How every database of SQLite begins."""


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    # Python maps SQLITE_CORRUPT and SQLITE_NOTADB to this class itself, all that can pass to a subclass.
    return type(error) is sqlite3.DatabaseError


def _identity_of(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _set_aside(path: str, error: Exception) -> str:
    number = 1
    while os.path.exists(f"{path}.damaged-{number}"):
        number += 1
    target = f"{path}.damaged-{number}"
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(path + suffix, target + suffix)
    return f"The score cache {path} is damaged ({error}). It was set aside as {target}, and a new one is begun."


_MARK = b"rerank-plugins score cache\n"


@contextlib.contextmanager
def _exclusive(path: str) -> Iterator[bool]:
    """Hold a lock that ends with the process, however it ends; tells whether it was held for this file before.

    Raises:
        TimeoutError: Another process holds it.
        OSError: It is a link, a pipe or of another user, or cannot be made.
    """
    name = f"{path}-lock"
    # Other users must not be able to hold it, nor make this process write elsewhere or wait for a pipe.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(name, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{name} is no regular file")
        if hasattr(os, "fchmod") and found.st_mode & 0o077 and found.st_uid == os.geteuid():
            os.fchmod(descriptor, 0o600)
        _lock_file(descriptor, name)
        held_before = os.read(descriptor, len(_MARK)) == _MARK
        yield held_before
        if not held_before:
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, _MARK)
    finally:
        os.close(descriptor)


def _lock_file(descriptor: int, name: str) -> None:
    # Windows has no fcntl; it refuses to rename a file that is open, which is what the lock is for.
    try:
        import fcntl
    except ImportError:
        return
    until = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(f"another process holds {name}") from None
            time.sleep(0.01)


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
