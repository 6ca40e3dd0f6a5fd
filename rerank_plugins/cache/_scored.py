"""The cache as `Reranker` uses it: keys, rows, and each pair computed once however many callers ask for it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rerank_plugins.cache._stores import FileCache, MemoryCache, ScoreStore
from rerank_plugins.cache._tell import tell
from rerank_plugins.errors import ConfigurationError

__all__ = ["Pair", "ScoreCache", "WindowLogits", "as_store", "settings_digest"]

_SCORING_VERSION = 1
"""Raised by a release that scores the same files and settings otherwise than the one before."""

Pair = tuple[str, str]
"""A query and a text."""


class WindowLogits(NamedTuple):
    """What an engine says of the windows of several pairs."""

    logits: NDArray[np.float32]
    """Shape (n_windows, n_labels)."""
    truncated: NDArray[np.bool_]
    """Shape (n_windows,): whether the window was cut."""
    owners: NDArray[np.intp]
    """Shape (n_windows,): the pair of each window, ascending."""
    places: NDArray[np.int32]
    """Shape (n_windows, 2): start and end character of each window; (0, 2) where each text is one window."""


class _Row(NamedTuple):
    """Of one text, as bytes: float32 and int32 are little-endian."""

    n_labels: int
    floats: bytes
    """float32 logits of its windows."""
    cuts: bytes
    """One byte a window that says if it was cut."""
    places: bytes = b""
    """int32 start and end of each window; empty where the text is one."""


class _Flight:
    """Pairs that one caller computes now; others wait for `done`. A failed flight lands without its rows."""

    __slots__ = ("done", "rows", "store")

    def __init__(self, store: ScoreStore) -> None:
        self.done = threading.Event()
        self.rows: dict[str, _Row] = {}
        self.store = store


_lock = threading.Lock()
_flights: dict[str, _Flight] = {}
"""By key, of all stores: a key says all that decides the logits, so two stores may share what flies."""
_landed = 0
_n_labels: dict[bytes, int] = {}
"""Columns of the logits of what was scored in this process, by settings."""


class ScoreCache:
    """A store behind `Reranker`: keys, single flight over all rerankers of the process, and what to do when it fails.

    Args:
        cache: A number of pairs for a `MemoryCache`, a path for a `FileCache`, or a `ScoreStore`.

    Raises:
        ConfigurationError: `cache` is none of these.
    """

    def __init__(self, cache: int | str | os.PathLike[str] | ScoreStore) -> None:
        self.store = as_store(cache)
        self._warned = False

    def prepare(self) -> None:
        """Open the store now; one that cannot be used is told by a warning.

        Raises:
            ConfigurationError: The file is something else, or of a newer version.
        """
        try:
            if isinstance(self.store, FileCache):
                # Writes nothing, and fails where nothing could be written.
                self.store.mset([])
            else:
                list(self.store.mget(["0" * 64]))
        except ConfigurationError:
            raise
        except Exception as error:
            self._warn("used", error)

    def close(self) -> None:
        """Let go of a file; the next use opens it again."""
        if isinstance(self.store, FileCache):
            self.store.close()

    def scored(
        self,
        settings: bytes,
        pairs: Sequence[Pair],
        compute: Callable[[list[Pair]], WindowLogits],
        *,
        n_labels: int | None = None,
        windows: bool = True,
    ) -> WindowLogits:
        """The logits of distinct pairs: kept ones, those that another thread computes now, and `compute` for the rest.

        Args:
            settings: Digest of all that decides a logit beside the pair; see `settings_digest`.
            pairs: Distinct (query, text) pairs.
            compute: Called at most once at a time with the pairs that nobody has scored; its error is the caller's.
            n_labels: Columns of the logits, as far as they are known before anything is scored. Kept rows with others
                are misses.
            windows: False if each text is one window. Kept rows with more are misses.
        """
        keys = _keys(settings, pairs)
        before = _landed

        def read(wanted: Sequence[str]) -> dict[str, _Row]:
            return _plausible(self._read(wanted), _n_labels.get(settings, n_labels), windows)

        rows = read(keys)
        while missing := {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in rows}:
            rows.update(self._fly(missing, before, read, compute))
            computed = [rows[key].n_labels for key in missing if key in rows]
            if computed:
                _n_labels[settings] = computed[0]
                # One that was kept for another number of classes is scored anew.
                rows = {key: row for key, row in rows.items() if row.n_labels == computed[0]}
        return _joined([rows[key] for key in keys])

    def _fly(
        self,
        missing: dict[str, Pair],
        before: int,
        read: Callable[[Sequence[str]], dict[str, _Row]],
        compute: Callable[[list[Pair]], WindowLogits],
    ) -> dict[str, _Row]:
        """Compute what no other caller does, then wait for the others; leaves out what they failed at."""
        global _landed
        mine = _Flight(self.store)
        own: dict[str, Pair] = {}
        theirs: dict[str, _Flight] = {}
        try:
            with _lock:
                for key, pair in missing.items():
                    flight = _flights.setdefault(key, mine)
                    if flight is mine:
                        own[key] = pair
                    else:
                        theirs[key] = flight
                landed_since = _landed != before
            # A flight may have landed between the look into the store and the claim.
            known = read(list(own)) if own and landed_since else {}
            todo = {key: pair for key, pair in own.items() if key not in known}
            fresh = dict(zip(todo, _rows(compute(list(todo.values())), len(todo)), strict=True)) if todo else {}
            mine.rows = {**known, **fresh}
            mine.done.set()
            self._write(fresh)
        finally:
            with _lock:
                for key in missing:
                    if _flights.get(key) is mine:
                        del _flights[key]
                _landed += 1
            mine.done.set()
        result = dict(mine.rows)
        # Only now that its own are done: two callers that wait for each other's pairs would wait for ever.
        for key, flight in theirs.items():
            flight.done.wait()
            if key in flight.rows:
                result[key] = flight.rows[key]
        self._write({key: result[key] for key in theirs if key in result and theirs[key].store is not self.store})
        return result

    def _read(self, keys: Sequence[str]) -> dict[str, _Row]:
        try:
            values = list(self.store.mget(keys))
        except ConfigurationError:
            raise
        except Exception as error:
            self._warn("read", error)
            return {}
        if len(values) != len(keys):
            self._warn("read", ValueError(f"mget gave {len(values)} values for {len(keys)} keys"))
            return {}
        rows = {key: row for key, value in zip(keys, values, strict=True) if (row := _decode(key, value)) is not None}
        if not np.isfinite(_floats(rows.values())).all():
            rows = {key: row for key, row in rows.items() if np.isfinite(_floats([row])).all()}
        return rows

    def _write(self, rows: dict[str, _Row]) -> None:
        if not rows:
            return
        try:
            self.store.mset([(key, _encode(key, row)) for key, row in rows.items()])
        except ConfigurationError:
            raise
        except Exception as error:
            self._warn("written", error)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            # What others write into their repr is not known.
            store = self.store if isinstance(self.store, FileCache | MemoryCache) else type(self.store).__name__
            tell(
                f"The score cache {store} cannot be {what} ({type(error).__name__}: {error}). Scoring goes on without "
                "it where it fails; this is said once."
            )


def as_store(cache: int | str | os.PathLike[str] | ScoreStore) -> ScoreStore:
    """What keeps scores: a number of pairs in memory, the file of a path, or the store that was given.

    An object that is made anew again and again, as a framework does with its configurable ones, keeps its scores if
    it holds what this returns in place of a number.

    Raises:
        ConfigurationError: `cache` is none of these.
    """
    if isinstance(cache, int) and not isinstance(cache, bool):
        return MemoryCache(cache)
    if isinstance(cache, str) and re.fullmatch(r"\s*[+-]?[0-9][0-9_.,]*\s*", cache):
        raise ConfigurationError(
            f"cache={cache!r} is a text: for a number of pairs in memory give an int, "
            f"cache={re.sub('[^0-9]', '', cache)}; for a file of that name its directory too."
        )
    if isinstance(cache, str | os.PathLike):
        return FileCache(cache)
    if not isinstance(cache, int) and all(callable(getattr(cache, name, None)) for name in ("mget", "mset")):
        return cache
    raise ConfigurationError(
        "cache must be None, a number of pairs, the path of a file, a MemoryCache, a FileCache, or a store of "
        f"bytes with mget and mset, such as LangChain's ByteStore; got {type(cache).__name__}."
    )


def _plausible(rows: dict[str, _Row], n_labels: int | None, windows: bool) -> dict[str, _Row]:
    """Without rows that no scoring of the same settings gives."""
    if n_labels is None and rows:
        # Nothing of this model was scored yet: what most say.
        n_labels = Counter(row.n_labels for row in rows.values()).most_common(1)[0][0]
    return {
        key: row
        for key, row in rows.items()
        if row.n_labels == n_labels
        and row.n_labels >= 1
        and (len(row.cuts) >= 1 if windows else len(row.cuts) == 1)
        and bool(row.places) == windows
    }


def settings_digest(*parts: str | int | bool | None) -> bytes:
    """Digest of all that decides a logit beside query and text."""
    return hashlib.sha256(json.dumps([_SCORING_VERSION, *parts]).encode()).digest()


def _keys(settings: bytes, pairs: Sequence[Pair]) -> list[str]:
    # Lone surrogates are told apart, though models read them all as U+FFFD.
    beginnings: dict[str, Any] = {}
    keys = []
    for query, text in pairs:
        if query not in beginnings:
            asked = query.encode("utf-8", "surrogatepass")
            beginnings[query] = hashlib.sha256(settings + len(asked).to_bytes(8, "little") + asked)
        digest = beginnings[query].copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        keys.append(digest.hexdigest())
    return keys


_HEADER = struct.Struct("<IIH")
"""Checksum, n_windows, n_labels."""


def _encode(key: str, row: _Row) -> bytes:
    body = _HEADER.pack(0, len(row.cuts), row.n_labels)[4:] + row.floats + row.cuts + row.places
    return zlib.crc32(body, zlib.crc32(key.encode())).to_bytes(4, "little") + body


def _decode(key: str, value: object) -> _Row | None:
    """The row that was encoded under this key; None for all else."""
    if not isinstance(value, bytes) or len(value) < _HEADER.size:
        return None
    checksum, n_windows, n_labels = _HEADER.unpack_from(value)
    cuts = _HEADER.size + 4 * n_windows * n_labels
    places = cuts + n_windows
    if len(value) not in (places, places + 8 * n_windows):
        return None
    if checksum != zlib.crc32(value[4:], zlib.crc32(key.encode())):
        return None
    return _Row(n_labels, value[_HEADER.size : cuts], value[cuts:places], value[places:])


def _rows(windows: WindowLogits, n: int) -> list[_Row]:
    """One row a pair out of the logits of all windows."""
    matrix = np.ascontiguousarray(windows.logits, dtype="<f4")
    flags = np.asarray(windows.truncated, dtype=np.uint8)
    places = np.ascontiguousarray(windows.places, dtype="<i4")
    bounds = np.searchsorted(windows.owners, np.arange(n + 1)).tolist()
    own = [slice(*pair) for pair in itertools.pairwise(bounds)]
    return [_Row(matrix.shape[1], *(part[of].tobytes() for part in (matrix, flags, places))) for of in own]


def _joined(rows: Sequence[_Row]) -> WindowLogits:
    floats = _floats(rows)
    owners = np.repeat(np.arange(len(rows)), [len(row.cuts) for row in rows])
    cut = np.frombuffer(b"".join(row.cuts for row in rows), dtype=np.uint8).astype(np.bool_)
    places = np.frombuffer(b"".join(row.places for row in rows), dtype="<i4").astype(np.int32).reshape(-1, 2)
    return WindowLogits(floats.reshape(len(owners), max(row.n_labels for row in rows)), cut, owners, places)


def _floats(rows: Iterable[_Row]) -> NDArray[np.float32]:
    return np.frombuffer(b"".join(row.floats for row in rows), dtype="<f4").astype(np.float32)


def _after_fork_in_child() -> None:
    # The threads that flew them are not here.
    _flights.clear()
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork_in_child)
