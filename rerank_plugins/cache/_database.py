"""The SQLite file of scores: opened, checked, locked, and set aside where it is damaged."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence

from rerank_plugins.errors import ConfigurationError

__all__ = [
    "TABLE",
    "check_file",
    "check_path",
    "exclusive",
    "identity_of",
    "is_damage",
    "open_database",
    "set_aside",
    "something_else",
]

BUSY_TIMEOUT_S = 5.0
"""How long a lock is waited for that another process holds: SQLite's, or that of ``PATH-lock``."""

TABLE = "CREATE TABLE IF NOT EXISTS scores_1_{} (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"


def open_database(path: str, limit: Sequence[float]) -> sqlite3.Connection:
    """The file, with exactly the two tables of a score cache in it; made where there are none."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
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
            raise something_else(path, f"it holds {', '.join(names[:5])}")
        if not found:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        # Enough against the death of a process; only FULL would also sync every commit against a loss of power.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA journal_size_limit = 1048576")
        if not found:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(TABLE.format("new"))
            connection.execute(TABLE.format("old"))
            connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


_SCHEMA = {
    (b"table", name, name, TABLE.format(age).replace("IF NOT EXISTS ", "").encode())
    for age in ("new", "old")
    for name in (f"scores_1_{age}".encode(),)
}
"""Rows of sqlite_master, without the quotes that renaming a table puts there."""


def check_path(path: str) -> None:
    """Refuse what names no file.

    Raises:
        ConfigurationError: It is blank, an address, or SQLite's name for memory.
    """
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


def something_else(path: str, what: str) -> ConfigurationError:
    """The error for a file that is no score cache."""
    return ConfigurationError(
        f"{path} is something else than a score cache ({what}), and stays untouched. Give the score cache a file of "
        "its own."
    )


def check_file(path: str) -> None:
    """Refuse what is there and was never a score cache, before anything is made beside it."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise something_else(path, "no regular file")
    if found.st_size and not os.path.lexists(f"{path}-lock"):
        with open(path, "rb") as file:
            beginning = file.read(len(_SQLITE))
        if beginning != _SQLITE:
            raise something_else(path, f"it begins with {beginning!r}")


_SQLITE = b"SQLite format 3\0"
"""How every database of SQLite begins."""


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether an error of SQLite says that the file is damaged."""
    # Python maps SQLITE_CORRUPT and SQLITE_NOTADB to this class itself, all that can pass to a subclass.
    return type(error) is sqlite3.DatabaseError


def identity_of(path: str) -> tuple[int, int] | None:
    """Device and inode of a file; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def set_aside(path: str, error: Exception) -> str:
    """Rename a damaged file and its logs, and say so."""
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
def exclusive(path: str) -> Iterator[bool]:
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
    until = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(f"another process holds {name}") from None
            time.sleep(0.01)
