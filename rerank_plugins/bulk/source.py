"""Rows with a query and a text, of JSON lines, CSV, Parquet or a BEIR folder with a run, as shards of so many rows."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rerank_plugins._extras import import_extra
from rerank_plugins._judgements import CANDIDATES, QUERIES, find_file, read_texts
from rerank_plugins._lines import LONGEST_LINE, columns_of_csv, found_keys
from rerank_plugins._printable import parse_json
from rerank_plugins.errors import ConfigurationError, InputError

__all__ = ["Shard", "Source", "open_source"]

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Files that are taken of a folder; each may be followed by ``.gz``."""
_LOOKED_AT = 100
"""Rows at the start of which one at least must have a query and a text."""
_EXPECTED = '{"query", "text", ...}'
_PATIENCE = 1 << 16
"""Rows of a Parquet file that are read at once."""


class Row(NamedTuple):
    """One row as it was read."""

    fields: dict[str, Any]
    """What it holds; empty where it cannot be read."""
    problem: str | None
    """Why it cannot be read."""
    raw: bytes
    """What its shard is known by."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive rows.

    Attributes:
        number: Its place among the shards, from 0.
        rows: The rows: an object each, or a table of Arrow.
        queries: Their queries, as they were read: not every one need be a text.
        texts: Their texts, likewise.
        problems: Why a row cannot be read, or None.
        digest: Of the content of all rows: what was scored for the same digest need not be scored again.
        share: How much of the input was read with it, 0 to 1.
    """

    number: int
    rows: Any
    queries: Sequence[Any]
    texts: Sequence[Any]
    problems: Sequence[str | None]
    digest: str
    share: float

    def __len__(self) -> int:
        return len(self.problems)

    def counted(self) -> Shard:
        """What is known of it, without its rows."""
        return replace(self, rows=None, queries=(), texts=())


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from.

    Attributes:
        paths: Files, all of one kind; of a BEIR folder, its run.
        kind: ``"jsonl"``, ``"csv"``, ``"parquet"`` or ``"run"``.
        folder: The BEIR folder that a run belongs to.
        suffix: What shards of these rows are called: ``".jsonl"``, ``".jsonl.gz"`` or ``".parquet"``.
    """

    paths: tuple[Path, ...]
    kind: str
    folder: Path | None
    suffix: str

    def shards(self, size: int, scratch: Path) -> Generator[Shard, None, None]:
        """All rows, in order.

        Args:
            size: Rows of each shard but the last.
            scratch: A directory for a temporary file: the texts of a BEIR folder by their ids.

        Raises:
            InputError: A file as a whole cannot be read.
        """
        if self.kind == "parquet":
            yield from _table_shards(self.paths, size)
            return
        if self.folder is None:
            yield from _row_shards(_chained(self.paths, _FORMATS[self.kind]), size)
            return
        texts = scratch / ".corpus.sqlite"
        try:
            with closing(_texts_by_id(self.folder, texts)) as found:
                yield from _row_shards(_chained(self.paths, lambda file: _run_rows(file, found)), size)
        finally:
            texts.unlink(missing_ok=True)

    def estimated_rows(self, scratch: Path) -> int:
        """About how many rows there are, by the first ones."""
        if self.kind == "parquet":
            files = [_parquet(path) for path in self.paths]
            return sum(file.metadata.num_rows for file in files)
        # Of a run, its lines alone: neither queries nor corpus need be read.
        read = _FORMATS.get(self.kind) or (lambda file: (Row({}, None, line or b"") for _, line in file.lines()))
        shares = [share for _, share in itertools.islice(_chained(self.paths, read), 1000)]
        return round(len(shares) / shares[-1]) if shares else 0


def open_source(pairs: str | os.PathLike[str], run: str | os.PathLike[str] | None = None) -> Source:
    """Find out what rows a file or folder holds.

    Args:
        pairs: A file of JSON lines or CSV (either may be gzip), a Parquet file, a folder of such files, all of one
            kind, or a BEIR folder.
        run: The run of a BEIR folder: in TREC's format, or, named ``.tsv``, lines of query id, document id and rank.
            Looked for in the folder first. None takes the folder's own candidates.

    Raises:
        ConfigurationError: There is no such file.
        InputError: None of the first rows has a query and a text.
        MissingDependencyError: Parquet without the extra ``bulk``.
    """
    path = Path(pairs).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in QUERIES):
        return _beir_source(path, run)
    if run is not None:
        raise ConfigurationError(f"run={os.fspath(run)!r} belongs to a BEIR folder, with queries.jsonl; got {path}.")
    if not path.exists():
        reason = " A stream cannot be read again to go on after an interruption." if str(path) == "-" else ""
        raise ConfigurationError(f"There is no file {path}.{reason}")
    paths = _files_of(path) if path.is_dir() else [path]
    kinds = {file: _kind(file) for file in paths}
    if len(set(kinds.values())) > 1:
        first, other = paths[0], next(file for file in paths if kinds[file] != kinds[paths[0]])
        raise InputError(
            f"{path} holds files of several kinds: {first.name} is {kinds[first]}, {other.name} is {kinds[other]}. "
            "Expected one kind: put them into a folder each."
        )
    kind = kinds[paths[0]]
    if kind == "parquet":
        suffix = ".parquet"
        for file in paths:
            _check_columns(file)
    else:
        suffix = ".jsonl.gz" if _is_gzip(paths[0]) else ".jsonl"
        _check_beginning(paths, _FORMATS[kind])
    return Source(tuple(paths), kind, None, suffix)


def _files_of(folder: Path) -> list[Path]:
    named = [path for path in sorted(folder.iterdir()) if path.name.removesuffix(".gz").endswith(_SUFFIXES)]
    found = [path for path in named if path.is_file() and not path.name.startswith((".", "_", "manifest."))]
    if not found:
        raise ConfigurationError(
            f"{folder} holds no file of rows. Expected files named {', '.join(_SUFFIXES)}, or a BEIR folder with "
            "queries.jsonl."
        )
    return found


def _beir_source(folder: Path, run: str | os.PathLike[str] | None) -> Source:
    if run is None:
        path = find_file(folder, *CANDIDATES)
    else:
        path = next((place for place in (folder / run, Path(run).expanduser()) if place.is_file()), Path())
        if path == Path():
            raise ConfigurationError(f"There is no file {os.fspath(run)}, neither in {folder} nor here.")
    return Source((path,), "run", folder, ".jsonl.gz" if _is_gzip(path) else ".jsonl")


class _File:
    """A file of lines that is being read, plain or gzip."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        self.path = path
        self._raw = raw
        self._content: Any = gzip.GzipFile(fileobj=raw) if _is_gzip(path) else raw

    def position(self) -> int:
        """Bytes of the file that were read."""
        return self._raw.tell()

    def lines(self, *, blank: bool = False) -> Iterator[tuple[int, bytes | None]]:
        """Number, from 1, and content of each line, of blank ones if asked; None where it is too long for a row."""
        number = 0
        while line := self._content.readline(LONGEST_LINE + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = self._content.readline(LONGEST_LINE)
                yield number, None
            elif blank or line.strip():
                yield number, line


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    try:
        with path.open("rb") as raw:
            yield _File(path, raw)
    except (OSError, EOFError, zlib.error) as error:
        why = "permission denied" if isinstance(error, PermissionError) else str(error)
        raise InputError(f"{path} cannot be read: {why}. What was scored before is kept.") from error


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as raw:
            return raw.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _is_gzip(path: Path) -> bool:
    return _beginning(path).startswith(b"\x1f\x8b")


def _kind(path: Path) -> str:
    """What a file holds, by its first line; ``"jsonl"`` for an empty one."""
    start = _beginning(path)
    if start == b"PAR1":
        return "parquet"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is UTF-16. Expected UTF-8: save it as that.")
    with _opened(path) as file:
        first = next((line or b"" for _, line in file.lines()), b"{").decode("utf-8", "replace")
    if first.lstrip().startswith("{"):
        return "jsonl"
    if {"query", "text"} <= set(_cells(first)):
        return "csv"
    if first.lstrip().startswith("["):
        raise InputError(f"{path} looks like a JSON array. Expected JSON lines: an object {_EXPECTED} on each line.")
    found = ", ".join(columns_of_csv(first)) or repr(first.strip()[:60])
    raise InputError(
        f'{path} has no rows with a query and a text. Expected JSON lines {_EXPECTED}, CSV with the columns "query" '
        f'and "text", or Parquet; its first line has {found}. Rename the columns.'
    )


# -- rows of text -------------------------------------------------------------------------------------------------

_Read = Callable[[_File], Iterable[Row]]


def _chained(paths: Sequence[Path], read: _Read) -> Iterator[tuple[Row, float]]:
    """The rows of all files, and the share of all their bytes that was read with each."""
    sizes = [path.stat().st_size for path in paths]
    total, before = max(1, sum(sizes)), 0
    for path, size in zip(paths, sizes, strict=True):
        with _opened(path) as file:
            for row in read(file):
                yield row, min(1.0, (before + file.position()) / total)
        before += size


def _json_rows(file: _File) -> Iterator[Row]:
    for number, line in file.lines():
        where = f"{file.path.name}, line {number}"
        fields: Any = {}
        if line is None:
            problem: str | None = f"{where}: longer than {LONGEST_LINE >> 20} MiB"
        else:
            try:
                fields, problem = parse_json(line.decode()), None
            except UnicodeDecodeError as error:
                problem = f"{where}: expected UTF-8, got the byte 0x{line[error.start]:02x} at {error.start}"
            except ValueError as error:
                problem = f"{where}: not valid JSON ({error})"
            if problem is None and not isinstance(fields, dict):
                problem = f"{where}: expected an object {_EXPECTED}, got {type(fields).__name__}"
                fields = {}
        yield Row(fields, problem or _lacking(fields, where), line or b"")


def _lacking(fields: dict[str, Any], where: str) -> str | None:
    lacking = found_keys(fields, ["query", "text"])
    return f"{where}: expected an object {_EXPECTED}; this one {lacking}" if lacking else None


_csv_lock = threading.Lock()


def _next_cells(reader: Iterator[list[str]]) -> list[str]:
    # The longest field is a setting of the whole process: it is as it was before anybody else reads.
    with _csv_lock:
        before = csv.field_size_limit(LONGEST_LINE)
        try:
            return next(reader)
        finally:
            csv.field_size_limit(before)


def _delimiter(header: str) -> str:
    return max(",\t;", key=header.count)


def _cells(header: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([header], delimiter=_delimiter(header)), [])]


def _csv_rows(file: _File) -> Iterator[Row]:
    too_long: list[int] = []

    def decoded() -> Iterator[str]:
        # Blank lines too: they may be part of a text between quotes.
        for number, line in file.lines(blank=True):
            if line is None:
                too_long.append(number)
            # Bytes that are no UTF-8 become lone surrogates, which no UTF-8 has.
            yield "\n" if line is None else line.decode("utf-8", "surrogateescape")

    lines = decoded()
    header = next(line for line in lines if line.strip())
    columns = _cells(header)
    if len(set(columns)) < len(columns):
        raise InputError(f"{file.path}: two columns have the same name: {', '.join(columns)[:200]}. Rename one.")
    reader = csv.reader(lines, delimiter=_delimiter(header), strict=True)
    for number in range(2, 1 << 62):
        where, cells, problem = f"{file.path.name}, row {number}", [], None
        try:
            cells = _next_cells(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"{where}: not valid CSV ({error}) up to line {reader.line_num + 1}"
        if too_long:
            problem = f"{where}: longer than {LONGEST_LINE >> 20} MiB"
            too_long.clear()
        elif problem is None and not any(cell.strip() for cell in cells):
            continue
        elif problem is None and len(cells) != len(columns):
            problem = f"{where}: expected {len(columns)} columns, got {len(cells)}"
        raw = "\0".join(cells).encode("utf-8", "surrogateescape")
        if problem is None and any(map(_broken, cells)):
            problem = f"{where}: not UTF-8"
        yield Row(dict(zip(columns, cells, strict=False)), problem, raw)


def _broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


_FORMATS: dict[str, _Read] = {"jsonl": _json_rows, "csv": _csv_rows}


def _check_beginning(paths: Sequence[Path], read: _Read) -> None:
    first: str | None = None
    for number, (row, _) in enumerate(_chained(paths, read)):
        if row.problem is None:
            return
        first = first or row.problem
        if number + 1 == _LOOKED_AT:
            break
    if first is not None:
        raise InputError(f"None of the first rows has a query and a text. {first}.")


def _row_shards(rows: Iterable[tuple[Row, float]], size: int) -> Iterator[Shard]:
    number, taken, share = 0, [], 0.0
    for row, share in rows:
        taken.append(row)
        if len(taken) == size:
            yield _row_shard(number, taken, share)
            number, taken = number + 1, []
    if taken:
        yield _row_shard(number, taken, share)


def _row_shard(number: int, rows: Sequence[Row], share: float) -> Shard:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.raw).to_bytes(8, "little") + row.raw)
    fields = [row.fields for row in rows]
    queries, texts = ([one.get(name) for one in fields] for name in ("query", "text"))
    return Shard(number, fields, queries, texts, [row.problem for row in rows], digest.hexdigest()[:16], share)


# -- a BEIR folder ------------------------------------------------------------------------------------------------


def _texts_by_id(folder: Path, path: Path) -> sqlite3.Connection:
    """Queries and documents by id, in a file: a corpus may be larger than the memory."""
    path.unlink(missing_ok=True)
    found = sqlite3.connect(path)
    found.execute("PRAGMA journal_mode = OFF")
    found.execute("PRAGMA synchronous = OFF")
    corpus = find_file(folder, "corpus.jsonl.gz", "corpus.jsonl")
    for table, file in (("queries", find_file(folder, *QUERIES)), ("documents", corpus)):
        found.execute(f"CREATE TABLE {table} (id TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID")
        # Lone surrogates, which SQLite refuses, are bytes there.
        rows = ((_stored(name), _stored(text)) for _, name, text in read_texts(file))
        found.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", rows)
    found.commit()
    return found


def _stored(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _run_rows(file: _File, texts: sqlite3.Connection) -> Iterator[Row]:
    tabs = file.path.name.removesuffix(".gz").endswith(".tsv")
    for number, line in file.lines():
        decoded = (line or b"").decode("utf-8", "replace").rstrip("\r\n")
        parts = decoded.split("\t") if tabs else decoded.split()
        if tabs and number == 1 and parts[0] in {"query-id", "query_id", "qid"}:
            continue
        where = f"{file.path.name}, line {number}"
        if len(parts) < 3 if tabs else len(parts) != 6:
            expected = "query id, document id and rank between tabs" if tabs else "the six fields of a TREC run"
            yield Row({}, f"{where}: expected {expected}, got {len(parts)} fields", line or b"")
            continue
        query, document, place = parts[:3] if tabs else (parts[0], parts[2], parts[4])
        fields: dict[str, Any] = {"query_id": query, "doc_id": document}
        fields["first_stage_rank" if tabs else "first_stage_score"] = _number(place)
        problem = None
        for field, table, name in (("query", "queries", query), ("text", "documents", document)):
            row = texts.execute(f"SELECT text FROM {table} WHERE id = ?", (_stored(name),)).fetchone()
            if row is None:
                problem = problem or f"{where}: {name!r} is not among the {table}"
            fields[field] = None if row is None else row[0].decode("utf-8", "surrogatepass")
        raw = "\0".join([decoded, fields["query"] or "", fields["text"] or ""])
        yield Row(fields, problem, _stored(raw))


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        # As it stands where JSON has no such number.
        return value if abs(value) < 1e300 else text
    return text


# -- Parquet ------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Any:
    parquet = import_extra("pyarrow.parquet", "bulk")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}.") from error


def _check_columns(path: Path) -> None:
    schema = _parquet(path).schema_arrow
    types = import_extra("pyarrow.types", "bulk")
    for name in ("query", "text"):
        places = schema.get_all_field_indices(name)
        if len(places) != 1:
            raise InputError(
                f'{path}: expected the columns "query" and "text", each once; columns found: '
                f"{', '.join(schema.names)[:200]}. Rename the columns."
            )
        kind = schema.field(places[0]).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise InputError(f"{path}: the column {name!r} must hold texts, got {kind}.")


def _table_shards(paths: Sequence[Path], size: int) -> Iterator[Shard]:
    pyarrow = import_extra("pyarrow", "bulk")
    total = max(1, sum(_parquet(path).metadata.num_rows for path in paths))
    number = read = 0
    for path in paths:
        # A file has a schema of its own, so a shard never has rows of two.
        left: Any = None
        try:
            for batch in _parquet(path).iter_batches(min(size, _PATIENCE)):
                part = pyarrow.Table.from_batches([batch])
                left = part if left is None else pyarrow.concat_tables([left, part])
                while len(left) >= size:
                    read += size
                    yield _table_shard(number, left.slice(0, size), read / total)
                    number, left = number + 1, left.slice(size)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}. What was scored before is kept.") from error
        if left is not None and len(left):
            read += len(left)
            yield _table_shard(number, left, read / total)
            number += 1


def _table_shard(number: int, table: Any, share: float) -> Shard:
    pyarrow = import_extra("pyarrow", "bulk")
    # In buffers of its own: a slice would carry the whole it was cut from.
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    content = sink.getvalue()
    own = pyarrow.ipc.open_stream(content).read_all()
    queries, texts = (own.column(name).to_pylist() for name in ("query", "text"))
    digest = hashlib.sha256(content).hexdigest()[:16]
    return Shard(number, own, queries, texts, [None] * len(own), digest, share)
