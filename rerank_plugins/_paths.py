"""Where files are kept, and how they are written: whole or not at all, readable as the umask says."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rerank_plugins.errors import ConfigurationError

__all__ = ["cache_directory", "new_file", "read_as_umask_says", "writable_directory", "write_file"]


def cache_directory() -> Path | None:
    """The user's cache directory of this package, which need not exist.

    ``RERANK_PLUGINS_CACHE`` where it is set, otherwise the directory that platformdirs gives: ``XDG_CACHE_HOME``, or
    what each system has for caches. The rule is written out here because the base install does without platformdirs.

    Returns:
        The directory; None for a user without a home directory, who has set neither variable.
    """
    if given := os.environ.get("RERANK_PLUGINS_CACHE"):
        return Path(given).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "").strip()
    if os.path.isabs(shared) and sys.platform != "win32":
        return Path(shared) / "rerank-plugins"
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
        return Path(base) / "rerank-plugins" / "Cache" if os.path.isabs(base) else None
    if not os.path.isabs(home):
        return None
    return Path(home, "Library/Caches" if sys.platform == "darwin" else ".cache", "rerank-plugins")


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file to write; it takes the place of an old one when the body has ended well.

    A reader, and whoever comes after a kill, sees the old file or the new one, never a part. A link is followed. What
    is no ordinary file, such as ``/dev/stdout``, is written as it is.

    Args:
        path: The file. Its directory must be there.

    Yields:
        The open file, in binary.

    Raises:
        ConfigurationError: It cannot be written; the message says why. An `OSError` of the body counts as that.
    """
    given = os.fspath(path)
    target = Path(os.path.realpath(given))
    special = target.exists() and not target.is_file() and not target.is_dir()
    # /dev/stdout may lead to a file that the shell holds open: to replace it would lose what is written later.
    if special or os.path.abspath(given).startswith(("/dev/", "/proc/")):
        with _told(given), open(given, "ab") as out:
            yield out
        return
    part = target.with_name(f".{target.name[-100:]}.{secrets.token_hex(6)}.part")
    with _told(given):
        if target.is_dir():
            raise IsADirectoryError(21, "it is a directory", given)
        # The mode is cut by the umask; tempfile would make it 0600.
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with _told(given), os.fdopen(number, "wb") as out:
            yield out
        with _told(given):
            part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file as `new_file` does; text in UTF-8, a lone surrogate as ``?``.

    Raises:
        ConfigurationError: It cannot be written; the message says why.
    """
    with new_file(path) as out:
        out.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)


def writable_directory(path: str | os.PathLike[str]) -> Path:
    """Make a directory where there is none, and find out whether files can be made in it.

    For commands that work for minutes before they write.

    Raises:
        ConfigurationError: It cannot be made or written; the message says why.
    """
    given = Path(path)
    with _told(given):
        given.mkdir(parents=True, exist_ok=True)
        _mode_of_new_files(given)
    return given


def read_as_umask_says(directory: Path) -> None:
    """Give all files and folders in a directory, and itself, the modes that the umask gives to new ones.

    Some libraries write files for their owner alone: another user, such as that of a service, then cannot load what
    was trained.
    """
    mode = _mode_of_new_files(directory)
    # Who may read a file may enter its folder.
    enter = mode | (mode & 0o444) >> 2 | 0o700
    for path in [directory, *directory.rglob("*")]:
        if not path.is_symlink():
            path.chmod(enter if path.is_dir() else mode)


def _mode_of_new_files(directory: Path) -> int:
    # Asking for the umask means setting it, which other threads would notice.
    probe = directory / f".{secrets.token_hex(8)}.probe"
    number = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(number).st_mode)
    finally:
        os.close(number)
        probe.unlink()


@contextlib.contextmanager
def _told(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if isinstance(error, PermissionError) and error.filename else ""
        why = "permission denied" if isinstance(error, PermissionError) else error.strerror or str(error)
        raise ConfigurationError(
            f"{os.fspath(path)} cannot be written: {why}{where}. Give a place that you may write to and that has room."
        ) from error
