"""Bulk scoring of files: shards that are written whole or not at all, a manifest, and an audit at the end."""

from __future__ import annotations

import gzip
import io
import os
import re
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins._paths import writable_directory, write_file
from rerank_plugins._printable import json_text, parse_json
from rerank_plugins.bulk.process import ScoringProcess, pickled
from rerank_plugins.bulk.rows import RowScores, joined, score_rows, windows
from rerank_plugins.bulk.source import Shard, Source, open_source
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.ranking import scores
from rerank_plugins.reranker import Reranker
from rerank_plugins.settings import Settings

__all__ = ["BulkResult", "Job", "Progress", "check_count", "given_reranker", "rendered", "score_files"]

T = TypeVar("T")
Progress = Callable[[str, float], None]
"""Called with a line of news and the share done."""

_FORMAT = 1
_MANIFEST = "manifest.json"
_SHARD = re.compile(r"part-(\d{6,})-([0-9a-f]{16})\.(?:jsonl|jsonl\.gz|parquet)")
_RESULTS = ("logit", "score", "truncated", "error")
SHARD_ROWS = 10_000
"""Rows of a shard, where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class BulkResult:
    """What `score_files` did.

    Attributes:
        path: The directory of the shards.
        rows: Rows in it.
        errors: Rows that could not be scored, and say why.
        truncated: Rows whose end the model has not seen.
        shards: Files in it.
        kept_rows: Rows that an earlier run had scored.
        seconds: What this run took, without loading the model.
        problems: What the audit found: empty where there are as many rows as were read, each once, and each with a
            logit or an error.
    """

    path: Path
    rows: int
    errors: int
    truncated: int
    shards: int
    kept_rows: int
    seconds: float
    problems: tuple[str, ...]


def score_files(
    pairs: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    reranker: Reranker | None = None,
    run: str | os.PathLike[str] | None = None,
    shard_rows: int | None = None,
    isolate: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> BulkResult:
    """Score every row of a file that has a query and a text; go on where an earlier call was interrupted.

    The rows come out in their order, with all they had, and ``logit`` (as `Reranker.logits` gives it), ``score`` (in
    the reranker's scale), ``truncated``, and ``error``: None, or why the row has neither logit nor score. Fields of
    these names that a row had are replaced.

    They are written to ``part-NUMBER-DIGEST.jsonl`` (``.jsonl.gz`` for input that is gzip, ``.parquet`` for Parquet), a
    shard at a time and each whole or not at all. A call that finds shards of the same rows, scored by the same model
    with the same settings, keeps them. A row that was changed has its shard scored anew.

    Args:
        pairs: JSON lines or CSV (either may be gzip) with ``query`` and ``text``, a Parquet file (extra ``bulk``), a
            folder of such files, or a BEIR folder.
        out: The directory of the shards; made where there is none.
        reranker: Scores the rows; None makes one of `settings`.
        run: The run of a BEIR folder: TREC's format, or lines of query id, document id and rank in a ``.tsv``; None
            takes its candidates.tsv.
        shard_rows: Rows of a shard, 10,000 if None: the most that an interruption costs.
        isolate: Score in a process of its own, so that a row that ends the process, such as one that takes all memory,
            has an error like any other. The reranker must be one that can be pickled.
        overwrite: Replace the scores that are in `out`.
        progress: Called with a line of news (rows, pairs/s, time left) and the share done.
        **settings: Keywords of `Reranker`, in place of `reranker`.

    Raises:
        ConfigurationError: A file is missing, or `out` holds something else, or scores of another model, other settings
            or other rows.
        InputError: A file as a whole cannot be read, or none of the first rows has a query and a text.
        MissingDependencyError: Parquet without the extra ``bulk``.
        ModelLoadError: The model cannot be loaded.
        ServerError: A rerank server fails whatever it is asked.

    Example:
        >>> from rerank_plugins.bulk import score_files
        >>> score_files("pairs.jsonl", "scores", cache="scores.sqlite").errors  # doctest: +SKIP
        0
    """
    given = given_reranker(reranker, settings)
    job = Job(pairs, out, given, run=run, shard_rows=shard_rows, overwrite=overwrite, progress=progress)
    process = ScoringProcess(pickled(job.reranker)) if isolate else None
    try:
        # The next shard is read while the engine computes. Each is written before the next is scored: an interruption
        # costs one at most.
        with closing(job.shards()) as shards, ThreadPoolExecutor(1) as reader:
            for shard in _ahead(reader, shards):
                job.start(lambda: process.fingerprint() if process else job.reranker.fingerprint)
                if job.known(shard):
                    job.keep(shard)
                    continue
                found = _scored(job, shard, process)
                job.write(shard, rendered(shard, found, job.reranker.settings, job.source.suffix))
    finally:
        if process is not None:
            process.close()
    return job.finish()


def given_reranker(reranker: Reranker | None, settings: Mapping[str, Any]) -> Reranker:
    """The reranker of a caller who gives either one or its keywords."""
    if reranker is None:
        return Reranker(**settings)
    if settings:
        raise ConfigurationError(f"Give either reranker or its keywords; got both, with {', '.join(settings)}.")
    return reranker


def check_count(name: str, value: Any) -> None:
    """Raise a `ConfigurationError` for a number of things that is neither None nor an int of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigurationError(f"{name} must be an int of at least 1, or None; got {value!r}.")


def _scored(job: Job, shard: Shard, process: ScoringProcess | None) -> RowScores:
    score = process.score_rows if process is not None else lambda *rows: score_rows(job.reranker, *rows)

    def in_parts(queries: Sequence[Any], texts: Sequence[Any]) -> RowScores:
        parts = []
        for part in windows(queries, texts):
            parts.append(score(queries[part], texts[part]))
            job.tell(shard, part.stop - part.start, part.stop / len(shard))
        return joined(parts)

    return scored_shard(shard, in_parts)


def scored_shard(shard: Shard, score: Callable[[Sequence[Any], Sequence[Any]], RowScores]) -> RowScores:
    """The scores of a shard; a row that could not be read has that as its error."""
    found = score(shard.queries, shard.texts)
    return found._replace(errors=[known or error for known, error in zip(shard.problems, found.errors, strict=True)])


def _ahead(pool: ThreadPoolExecutor, items: Iterator[T]) -> Iterator[T]:
    end: Any = object()
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = pool.submit(next, items, end)
        yield item


# -- one run --------------------------------------------------------------------------------------------------------


class Job:
    """A directory of shards that is being filled: what is in it, what is to come, and the audit.

    Args:
        pairs: See `score_files`, as for all others.
        least_shards: Where `shard_rows` is None, make at least about so many shards.
    """

    def __init__(
        self,
        pairs: str | os.PathLike[str],
        out: str | os.PathLike[str],
        reranker: Reranker,
        *,
        run: str | os.PathLike[str] | None,
        shard_rows: int | None,
        overwrite: bool,
        progress: Progress | None,
        least_shards: int = 1,
    ) -> None:
        check_count("shard_rows", shard_rows)
        self.reranker = reranker
        self.source: Source = open_source(pairs, run)
        self.out = Path(out).expanduser()
        self._progress = progress
        _check_place(self.out, overwrite)
        writable_directory(self.out)
        self._before = {} if overwrite else _manifest(self.out)
        if overwrite:
            _remove(self._found().values())
        self.shard_rows = shard_rows or self._before.get("shard_rows") or SHARD_ROWS
        if shard_rows is None and "shard_rows" not in self._before and least_shards > 1:
            rows = self.source.estimated_rows(self.out)
            self.shard_rows = max(1, min(SHARD_ROWS, rows // least_shards))
        self.facts = _facts(self.reranker, self.shard_rows)
        self._check_facts()
        self.done = {number: path for (number, _), path in self._found().items()}
        self.known = KnownShards(frozenset(self._found()), self.out)
        self.fingerprint: str | None = None
        self._started = False
        self._counts: list[int] = []
        self._kept = self._scored = 0
        self._share = self._kept_share = 0.0
        self._since = time.monotonic()

    def shards(self) -> Generator[Shard, None, None]:
        """The shards of the input, in order."""
        return self.source.shards(self.shard_rows, self.out)

    def _found(self) -> dict[tuple[int, str], Path]:
        named = ((_SHARD.fullmatch(path.name), path) for path in self.out.iterdir())
        return {(int(match[1]), match[2]): path for match, path in named if match}

    def _check_facts(self) -> None:
        for name, value in self.facts.items():
            # A fingerprint says more than a name, which may be a path.
            decides = name != "model" or self._before.get("fingerprint") is None
            if decides and name in self._before and self._before[name] != value:
                raise self._other(name, self._before[name], value)

    def _other(self, name: str, before: Any, now: Any) -> ConfigurationError:
        return ConfigurationError(
            f"{self.out} holds scores with {name} {before!r}; this run has {now!r}. Give another directory, or "
            "overwrite=True to replace them."
        )

    def start(self, fingerprint: Callable[[], str | None]) -> None:
        """Say in the manifest what scores from now on, before anything is written.

        Args:
            fingerprint: Tells `Reranker.fingerprint`; the model may be loaded for it.

        Raises:
            ConfigurationError: Another model has scored what is there.
        """
        if self._started:
            return
        self.fingerprint = fingerprint()
        before = self._before.get("fingerprint")
        if before is not None and before != self.fingerprint:
            raise self._other("fingerprint", before, self.fingerprint)
        self._write_manifest(complete=False)
        self._started = True
        self._since = time.monotonic()

    def _write_manifest(self, **more: Any) -> None:
        fingerprint = self.fingerprint or self._before.get("fingerprint")
        content = {**self.facts, "fingerprint": fingerprint, **more}
        write_file(self.out / _MANIFEST, json_text(content, indent=2) + "\n")

    def keep(self, shard: Shard) -> None:
        """Count a shard that was scored before."""
        self._count(shard)
        self._kept += len(shard)
        self._share = self._kept_share = max(self._share, shard.share)
        self._since = time.monotonic()
        self._say(self._share)

    def write(self, shard: Shard, content: bytes) -> None:
        """Write the scored rows of a shard in the place of what was there for its number."""
        write_file(self.out / shard_name(shard.number, shard.digest, self.source.suffix), content)
        old = self.done.get(shard.number)
        if old is not None:
            _remove([old])
        self._count(shard)

    def _count(self, shard: Shard) -> None:
        self._counts += [0] * (shard.number + 1 - len(self._counts))
        self._counts[shard.number] = len(shard)

    def tell(self, shard: Shard, rows: int, part: float) -> None:
        """Report that more rows of a shard are scored, and what part of it that makes."""
        self._scored += rows
        share = self._share + part * max(0.0, shard.share - self._share)
        if part == 1:
            self._share = share
        self._say(share)

    def _say(self, share: float) -> None:
        if self._progress is None:
            return
        news = f"{self._kept + self._scored:,} rows"
        if self._scored:
            seconds = max(1e-9, time.monotonic() - self._since)
            news += f", {self._scored / seconds:,.0f} pairs/s"
            if share > self._kept_share:
                news += f", {_time((1 - share) * seconds / (share - self._kept_share))} left"
        self._progress(news, share)

    def finish(self) -> BulkResult:
        """Remove what no row belongs to any more, audit the shards, and say in the manifest that they are complete."""
        if not self._started:
            self.fingerprint = self._before.get("fingerprint")
        seconds = time.monotonic() - self._since
        last = len(self._counts)
        _remove(path for (number, _), path in self._found().items() if number >= last)
        errors, truncated, problems = _audit(self._found(), self._counts)
        rows = sum(self._counts)
        counts = {"rows": rows, "errors": errors, "truncated": truncated, "shards": last}
        self._write_manifest(complete=not problems, **counts)
        return BulkResult(self.out, rows, errors, truncated, last, self._kept, seconds, tuple(problems))


@dataclass(frozen=True, slots=True)
class KnownShards:
    """Number and digest of the shards that a directory holds."""

    shards: frozenset[tuple[int, str]]
    out: Path

    def __call__(self, shard: Shard) -> bool:
        """Whether these rows were scored before.

        Raises:
            ConfigurationError: The directory holds the scores of other rows.
        """
        if (shard.number, shard.digest) in self.shards:
            return True
        if shard.number == 0 and any(number == 0 for number, _ in self.shards):
            raise ConfigurationError(
                f"{self.out} holds scores of other rows: the first ones differ. Give another directory, or "
                "overwrite=True to replace them."
            )
        return False


def shard_name(number: int, digest: str, suffix: str) -> str:
    """The file of a shard. That it is there, with the digest of its rows in its name, says that it is complete."""
    return f"part-{number:06d}-{digest}{suffix}"


def _check_place(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        others = [path.name for path in out.iterdir() if not _SHARD.fullmatch(path.name) and path.name[0] != "."]
        if others and _MANIFEST not in others:
            raise ConfigurationError(
                f"{out} holds other files, such as {others[0]}. Give a directory of its own for the scores."
            )
    elif out.exists():
        raise ConfigurationError(f"{out} is a file. Give a directory for the scores.")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _manifest(out: Path) -> dict[str, Any]:
    try:
        found = parse_json((out / _MANIFEST).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{out / _MANIFEST} cannot be read: {error}. Give another directory.") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ConfigurationError(f"{out / _MANIFEST} is not of bulk scoring, or of another version. Give another one.")
    return found


def _facts(reranker: Reranker, shard_rows: int) -> dict[str, Any]:
    settings = reranker.settings
    calibration = None if settings.calibration is None else asdict(settings.calibration)
    return {
        "format": _FORMAT,
        "model": settings.model_name,
        "scale": settings.scale,
        "label": settings.label,
        "calibration": calibration,
        "max_length": settings.max_length,
        "instruction": settings.instruction,
        "passage_length": settings.passage_length,
        "passage_overlap": settings.passage_overlap,
        "shard_rows": shard_rows,
    }


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# -- what a shard holds ---------------------------------------------------------------------------------------------


def rendered(shard: Shard, found: RowScores, settings: Settings, suffix: str) -> bytes:
    """The rows of a shard with their scores, as the content of its file."""
    if suffix == ".parquet":
        out = io.BytesIO()
        import_extra("pyarrow.parquet", "bulk").write_table(with_results(shard.rows, found, settings), out)
        return out.getvalue()
    logits, reported, _ = _values(found, settings)
    values = zip(logits.tolist(), reported.tolist(), found.truncated.tolist(), found.errors, strict=True)
    lines = []
    for row, (logit, score, truncated, error) in zip(shard.rows, values, strict=True):
        failed = error is not None
        own = {"query": None, "text": None, **row} if failed else row
        results = (None if failed else logit, None if failed else score, truncated, error)
        lines.append(json_text({**_without_results(own), **dict(zip(_RESULTS, results, strict=True))}) + "\n")
    content = "".join(lines).encode()
    # Without a time in it, so that the same rows give the same bytes.
    return gzip.compress(content, 6, mtime=0) if suffix.endswith(".gz") else content


def _without_results(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _RESULTS}


def _values(found: RowScores, settings: Settings) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Logits, scores, and which rows have neither."""
    wrong = np.array([error is not None for error in found.errors], dtype=np.bool_)
    logits = np.where(wrong, 0.0, found.logits)
    return logits, scores(settings, logits), wrong


def with_results(table: Any, found: RowScores, settings: Settings) -> Any:
    """A table of Arrow with the columns of the results, in place of columns of these names."""
    pyarrow = import_extra("pyarrow", "bulk")
    logits, reported, wrong = _values(found, settings)
    columns = (
        pyarrow.array(logits, mask=wrong),
        pyarrow.array(reported, mask=wrong),
        pyarrow.array(found.truncated),
        pyarrow.array(found.errors, type=pyarrow.string()),
    )
    table = table.drop_columns([name for name in _RESULTS if name in table.column_names])
    for name, column in zip(_RESULTS, columns, strict=True):
        table = table.append_column(name, column)
    return table


_ANEW = "Delete it and start again: it is scored anew."


def _audit(found: dict[tuple[int, str], Path], counts: list[int]) -> tuple[int, int, list[str]]:
    """Rows with an error, rows that were cut, and what is wrong, as read back from the files."""
    problems: list[str] = []
    errors = truncated = 0
    files: dict[int, list[Path]] = {number: [] for number in range(len(counts))}
    for (number, _), path in found.items():
        files[number].append(path)
    for number, paths in files.items():
        if len(paths) != 1:
            problems.append(f"shard {number}: expected one file, found {len(paths)}")
            continue
        rows = wrong = 0
        try:
            for logit, score, cut, error in _results(paths[0]):
                rows += 1
                wrong += (logit is None) != (score is None) or (logit is None) == (error is None)
                errors += error is not None
                truncated += bool(cut)
        except (OSError, EOFError, ValueError, AttributeError, KeyError, zlib.error) as error:
            problems.append(f"{paths[0].name} cannot be read back: {error}. {_ANEW}")
            continue
        if rows != counts[number]:
            problems.append(f"{paths[0].name}: expected {counts[number]} rows, found {rows}. {_ANEW}")
        if wrong:
            problems.append(f"{paths[0].name}: {wrong} rows have not one of logit and error. {_ANEW}")
    return errors, truncated, problems


def _results(path: Path) -> Iterator[tuple[Any, ...]]:
    if path.suffix == ".parquet":
        table = import_extra("pyarrow.parquet", "bulk").read_table(path, columns=list(_RESULTS))
        yield from zip(*(table.column(name).to_pylist() for name in _RESULTS), strict=True)
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for line in lines:
            row = parse_json(line)
            yield tuple(row.get(name) for name in _RESULTS)
