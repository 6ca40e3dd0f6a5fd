"""Score caches that are something else, that others have written, that others hold, or that cannot be used."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cache import TEXTS, digest, fake

from rerank_plugins import Reranker
from rerank_plugins.cache import FileCache, MemoryCache, ScoreCache, _database, _scored, _stores, as_store
from rerank_plugins.errors import ConfigurationError

KEY_VALUE = "(key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
EXPECTED = Reranker(fake()).logits("red fox", TEXTS).tolist()


def scores(cache: Any) -> list[float]:
    found: list[float] = Reranker(fake(), cache=cache).logits("red fox", TEXTS).tolist()
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_database, "BUSY_TIMEOUT_S", 0.2)


# -- what is no path of a file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (":memory:", "cache=100_000"),
        ("redis://u:secret@localhost:6379/0", "mget and mset"),
        ("rediss://:secret@h", "address"),
        ("sqlite:///scores.db", "the path alone"),
        ("sqlite:scores.db", "the path alone"),
        ("file:scores.db?mode=ro", "address"),
        ("postgresql+psycopg://u:secret@h/db", "address"),
        ("s3://bucket/scores", "address"),
        ("1000", "cache=1000"),
        (" 100_000 ", "cache=100000"),
        ("", "blank"),
        ("  ", "blank"),
    ],
)
def test_what_looks_like_something_else_is_refused_with_what_is_meant(
    cache: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        Reranker(fake(), cache=cache)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["1000", "a:b.sqlite", "scores", "~tilde", "with space.db", "ä.db", "c.d/e"])
def test_a_path_of_a_file_is_taken_whatever_its_name(name: str, tmp_path: Path) -> None:
    assert scores(str(tmp_path / name)) == EXPECTED
    assert (tmp_path / name).read_bytes().startswith(b"SQLite format 3")


def test_no_password_is_shown() -> None:
    class Store(MemoryCache):
        def __repr__(self) -> str:
            return "Store('redis://bob:secret@host:6379/0')"

        def mget(self, keys: Any) -> Any:
            raise OSError("no connection to redis://bob:secret@host:6379/0")

    reranker = Reranker(fake(), cache=Store())
    assert "secret" not in repr(reranker) + repr(reranker.settings)
    assert "host:6379" in repr(reranker.settings)
    with pytest.warns(RuntimeWarning, match="cannot be read") as told:
        reranker.logits("red fox", TEXTS)
    assert "secret" not in str(told[0].message)
    assert "host:6379" in str(told[0].message)


# -- files of something else -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"my notes\n" * 999, b"x", b"\x7fELF" + bytes(5000), b"PK\x03\x04", b"[1, 2]"])
def test_a_file_of_something_else_is_never_renamed_or_changed(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "typo.txt"
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="something else"):
            scores(path)
        with pytest.raises(ConfigurationError, match="something else"):
            Reranker(fake(), cache=path).prepare()
    assert path.read_bytes() == content
    assert [found.name for found in tmp_path.iterdir()] == ["typo.txt"]


def test_a_damaged_database_of_something_else_is_not_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "app.sqlite"
    with sqlite3.connect(path) as theirs:
        theirs.execute("CREATE TABLE users (name TEXT)")
        theirs.executemany("INSERT INTO users VALUES (?)", [("x" * 500,)] * 100)
    theirs.close()
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * 900 + content[1000:])
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="something else"):
            scores(path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.damaged-*"))


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.mkdir()], ids=["pipe", "directory"])
def test_what_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "cache")
    with pytest.raises(ConfigurationError, match="no regular file"):
        scores(tmp_path / "cache")


def written(path: Path, *statements: str) -> Path:
    with sqlite3.connect(path) as theirs:
        for statement in statements:
            theirs.execute(statement)
    theirs.close()
    return path


TABLES = (f"CREATE TABLE scores_1_new {KEY_VALUE}", f"CREATE TABLE scores_1_old {KEY_VALUE}")
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 100000000000) SELECT x FROM c"

HOSTILE = {
    "trigger": (
        *TABLES,
        "CREATE TRIGGER t AFTER INSERT ON scores_1_new BEGIN "
        f"INSERT INTO scores_1_old SELECT randomblob(16), x'00' FROM ({ENDLESS}); END",
    ),
    "view": (f"CREATE VIEW scores_1_new AS SELECT x AS key, x AS value FROM ({ENDLESS})", TABLES[1]),
    "check": (
        "CREATE TABLE scores_1_new (key BLOB PRIMARY KEY, value BLOB NOT NULL CHECK (length(hex(zeroblob(4e8))) > 0)) "
        "WITHOUT ROWID",
        TABLES[1],
    ),
    "generated": (
        "CREATE TABLE scores_1_new (key BLOB PRIMARY KEY, value BLOB NOT NULL, more AS (zeroblob(9e8))) WITHOUT ROWID",
        TABLES[1],
    ),
    "index": (*TABLES, "CREATE INDEX i ON scores_1_new (length(hex(zeroblob(4e8))))"),
    "another table": (*TABLES, "CREATE TABLE more (x)"),
    "one table": TABLES[:1],
    "other columns": ("CREATE TABLE scores_1_new (key, value)", "CREATE TABLE scores_1_old (key, value)"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_only_exactly_our_tables_are_a_score_cache(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "cache.sqlite", *HOSTILE[kind])
    before = path.read_bytes()
    started = time.monotonic()
    for use in (lambda: scores(path), lambda: Reranker(fake(), cache=path).prepare()):
        with pytest.raises(ConfigurationError, match="something else"):
            use()
    assert time.monotonic() - started < 5
    assert path.read_bytes() == before


def test_our_tables_are_a_score_cache_also_when_they_were_renamed(tmp_path: Path) -> None:
    path = written(tmp_path / "cache.sqlite", TABLES[0], "ALTER TABLE scores_1_new RENAME TO scores_1_old", TABLES[0])
    backend = fake()
    for _ in range(2):
        assert Reranker(backend, cache=path).logits("red fox", TEXTS).tolist() == EXPECTED
    assert len(backend.calls) == 1


def test_the_file_of_a_newer_version_is_named_as_such(tmp_path: Path) -> None:
    tables = [f"CREATE TABLE scores_2_{age} {KEY_VALUE}" for age in ("new", "old")]
    path = written(tmp_path / "cache.sqlite", *tables)
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="written by a newer rerank-plugins"):
        scores(path)
    assert path.read_bytes() == before


def test_an_action_on_the_file_is_bounded_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stores, "_ACTION_S", 0.3)
    cache = FileCache(tmp_path / "cache.sqlite")
    cache.mset([(digest("a"), b"1")])
    started = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        cache._retried(lambda connection: connection.execute(f"SELECT count(*) FROM ({ENDLESS})").fetchone())
    assert time.monotonic() - started < 5
    assert cache.mget([digest("a")]) == [b"1"]


# -- rows that cannot be ours ------------------------------------------------------------------------------------------


def rows_of(path: Path, change: Callable[[str, Any], Any], only: int | None = None) -> None:
    """Change the rows of a file, with right checksums."""
    with sqlite3.connect(path) as theirs:
        for i, (key, value) in enumerate(theirs.execute("SELECT key, value FROM scores_1_new").fetchall()):
            if only is None or i == only:
                row = _scored._decode(key.hex(), value)
                changed = _scored._encode(key.hex(), change(key.hex(), row))
                theirs.execute("UPDATE scores_1_new SET value = ? WHERE key = ?", (changed, key))
    theirs.close()


WRONG_ROWS: dict[str, Callable[[str, Any], Any]] = {
    "two classes": lambda key, row: _scored._Row(2, row[1] * 2, row[2]),
    "no class": lambda key, row: _scored._Row(0, b"", row[2]),
    "no window": lambda key, row: _scored._Row(1, b"", b""),
    "no window of two classes": lambda key, row: _scored._Row(2, b"", b""),
    "three windows": lambda key, row: _scored._Row(1, row[1] * 3, row[2] * 3),
    "many classes": lambda key, row: _scored._Row(4096, row[1] * 4096, row[2]),
    "places of windows": lambda key, row: row._replace(places=bytes(8)),
}


@pytest.mark.parametrize("only", [None, 1])
@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_rows_that_no_scoring_gives_are_misses(kind: str, only: int | None, tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    assert scores(path) == EXPECTED
    rows_of(path, WRONG_ROWS[kind], only)
    backend = fake()
    for _ in range(2):
        assert Reranker(backend, cache=path).logits("red fox", TEXTS).tolist() == EXPECTED
    # Scored again, and kept rightly.
    assert len(backend.calls) == 1


@pytest.mark.parametrize("labels", [(), ("no", "yes"), ("a", "b", "c")])
def test_rows_of_another_number_of_classes_are_misses(labels: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"

    def backend() -> Any:
        return fake(logit=lambda query, text: np.arange(max(1, len(labels))) * len(text), labels=labels)

    def logits(made: Any) -> list[float]:
        found: list[float] = (
            Reranker(made, cache=path, label=labels[-1] if labels else None).logits("q", TEXTS).tolist()
        )
        return found

    expected = logits(backend())
    for change in (
        WRONG_ROWS["many classes"],
        WRONG_ROWS["no class"],
        lambda key, row: _scored._Row(row[0] + 1, row[1] + row[1][:4], row[2]),
    ):
        rows_of(path, change)
        made = backend()
        assert [logits(made), logits(made)] == [expected] * 2
        assert len(made.calls) == 1


# -- the lock ----------------------------------------------------------------------------------------------------------


def test_a_lock_that_another_process_holds_is_waited_for_once_and_costs_no_result(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.sqlite"
    with open(f"{path}-lock", "wb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        reranker = Reranker(fake(), cache=path)
        with pytest.warns(RuntimeWarning, match="another process holds .*-lock.*goes on without") as told:
            assert reranker.logits("red fox", TEXTS).tolist() == EXPECTED
        started = time.monotonic()
        for i in range(5):
            reranker.logits(f"red fox {i}", TEXTS)
        assert time.monotonic() - started < 0.2, "each call waited anew"
        assert len(told) == 1
    monkeypatch.setattr(_stores, "_RETRY_S", 0.0)
    reranker.logits("red fox", TEXTS)
    # Once it is had again, the file is used.
    with sqlite3.connect(path) as theirs:
        assert theirs.execute("SELECT count(*) FROM scores_1_new").fetchone()[0] > 0
    theirs.close()


def test_a_lock_that_is_given_back_in_time_is_had(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with open(f"{path}-lock", "wb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        threading.Timer(0.3, theirs.close).start()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            FileCache(path).mset([(digest("a"), b"1")])
    assert FileCache(path).mget([digest("a")]) == [b"1"]


def dangling(path: Path) -> Path:
    path.symlink_to(path.parent / "elsewhere")
    return path.parent / "elsewhere"


def linked(path: Path) -> Path:
    (path.parent / "theirs").write_bytes(b"")
    path.symlink_to(path.parent / "theirs")
    return path.parent / "elsewhere"


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path.parent / "elsewhere"


@pytest.mark.parametrize("make", [dangling, linked, pipe])
def test_a_lock_is_never_a_link_or_a_pipe(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    elsewhere = make(Path(f"{path}-lock"))
    started = time.monotonic()
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert scores(path) == EXPECTED
    assert time.monotonic() - started < 3
    assert not elsewhere.exists()
    assert not path.exists()


def test_other_users_cannot_open_the_lock(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        path = tmp_path / "cache.sqlite"
        scores(path)
        assert Path(f"{path}-lock").stat().st_mode & 0o777 == 0o600
        Path(f"{path}-lock").chmod(0o644)
        scores(path)
        assert Path(f"{path}-lock").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)


# -- caches that cannot be used ----------------------------------------------------------------------------------------


def below_a_file(tmp_path: Path) -> Any:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "scores.sqlite"


def broken_store(tmp_path: Path) -> Any:
    class Store(MemoryCache):
        def mget(self, keys: Any) -> Any:
            raise OSError("no connection")

        mset = mget

    return Store()


def held_for_writing(tmp_path: Path) -> Any:
    path = tmp_path / "scores.sqlite"
    FileCache(path).mset([])
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    holders.append(holder)
    return path


holders: list[sqlite3.Connection] = []


@pytest.fixture
def released() -> Iterator[None]:
    yield
    while holders:
        holders.pop().close()


UNUSABLE = [below_a_file, broken_store, held_for_writing]


@pytest.mark.parametrize("make", UNUSABLE)
def test_an_unusable_cache_is_told_when_the_model_is_prepared(
    make: Callable[[Path], Any], tmp_path: Path, quick: None, released: None
) -> None:
    reranker = Reranker(fake(), cache=make(tmp_path))
    with pytest.warns(RuntimeWarning, match="cannot be used.*goes on without it") as told:
        reranker.prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reranker.logits("red fox", TEXTS).tolist() == EXPECTED
    assert len(told) == 1


@pytest.mark.parametrize("make", UNUSABLE)
def test_an_unusable_cache_fails_nothing_where_warnings_are_errors(
    make: Callable[[Path], Any], tmp_path: Path, quick: None, released: None, caplog: pytest.LogCaptureFixture
) -> None:
    reranker = Reranker(fake(), cache=make(tmp_path))
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "rerank_plugins"):
        warnings.simplefilter("error")
        assert reranker.logits("red fox", TEXTS).tolist() == EXPECTED
        assert reranker.prepare().rank("red fox", TEXTS)[0].scored
    assert sum("goes on without it" in record.getMessage() for record in caplog.records) == 1


def test_a_damaged_file_fails_nothing_where_warnings_are_errors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "scores.sqlite"
    scores(path)
    path.write_bytes(b"not a database at all\n" * 500)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "rerank_plugins"):
        warnings.simplefilter("error")
        assert scores(path) == EXPECTED
    assert "set aside as" in caplog.text


def test_a_cache_that_can_be_used_is_told_nothing_of(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cache in (tmp_path / "scores.sqlite", MemoryCache(), 100):
            backend = fake()
            Reranker(backend, cache=cache).prepare()
            assert backend.calls == []


# -- objects that are made anew ----------------------------------------------------------------------------------------


def test_a_number_becomes_a_store_that_can_be_kept() -> None:
    store = as_store(1000)
    assert isinstance(store, MemoryCache)
    assert store.max_pairs == 1000
    assert as_store(store) is store
    backend = fake()
    for _ in range(3):
        # As a framework does that makes its objects anew for each call.
        assert Reranker(backend, cache=store).logits("red fox", TEXTS).tolist() == EXPECTED
    assert len(backend.calls) == 1
    assert ScoreCache(store).store is store
