"""`rerank-plugins score`: every pair of a file with its score, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rerank_plugins.cli._options import Overwrite, takes_settings
from rerank_plugins.cli._screen import echo
from rerank_plugins.errors import ConfigurationError

if TYPE_CHECKING:
    from rerank_plugins.bulk import BulkResult

__all__ = ["score", "with_address"]

LOCAL = "local"
_ADDRESS = re.compile(r"auto|local|ray://.+|[^/\s]+:\d+")


def with_address(args: list[str]) -> list[str]:
    """The arguments with an address after each ``--ray`` that has none."""
    found = []
    for place, argument in enumerate(args):
        found.append(argument)
        if argument == "--ray" and not _ADDRESS.fullmatch(" ".join(args[place + 1 : place + 2])):
            found.append(LOCAL)
    return found


@takes_settings(
    "model",
    "backend",
    "scale",
    "label",
    "max_length",
    "passage_length",
    "precision",
    "instruction",
    "device",
    "threads",
    "revision",
    "trust_remote_code",
)
def score(
    pairs: Annotated[
        Path,
        typer.Argument(
            help='JSON lines {"query", "text", ...} or CSV, plain or gzip, a Parquet file, a folder of such files, or '
            "a BEIR folder."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The directory of the scored rows.")],
    run: Annotated[
        str | None,
        typer.Option(
            help="Run of a BEIR folder, looked for there first: TREC's format, or, named .tsv, lines of query id, "
            "document id and rank. Its candidates.tsv if not given."
        ),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="SQLite file of scores that are known and become known.")] = None,
    shard_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a shard, the most that an interruption costs; 10000 if not given."),
    ] = None,
    isolate: Annotated[
        bool,
        typer.Option("--isolate", help="Score in a process of its own: a row that ends it gets an error."),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Score on Ray: on a new one on this machine, or on the cluster at HOST:PORT, or the one that runs "
            "here (auto). Extra ray.",
        ),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="With --ray: processes that load the model; one for each GPU, or 4 CPUs.")
    ] = None,
    overwrite: Overwrite = False,
    **chosen: Any,
) -> None:
    """Score every row that has a query and a text.

    The rows come out in OUT, in their order, with "logit", "score", "truncated" and "error": null, or why the row could
    not be scored. An interrupted run goes on where it stopped when it is started again.

    At the end all that was written is read back: as many rows as were read, each once, each with a logit or an error.
    The exit code is 1 where that is not so, or where no row at all could be scored.
    """
    from rerank_plugins import Reranker
    from rerank_plugins.bulk import score_files
    from rerank_plugins.cli._progress import bar

    if actors is not None and ray is None:
        raise ConfigurationError("actors=... belongs to Ray. Add --ray.")
    if isolate and ray is not None:
        raise ConfigurationError("isolate=True is for one machine: on Ray, each actor scores so anyway. Leave it out.")
    files: dict[str, Any] = {"run": run, "shard_rows": shard_rows, "overwrite": overwrite}
    reranker = Reranker(cache=cache, **chosen)
    with bar("Scoring") as tell:
        files |= {"reranker": reranker, "progress": tell}
        if ray is None:
            found = score_files(pairs, out, isolate=isolate, **files)
        else:
            address = None if ray == LOCAL else ray
            found = _ray_scoring()(pairs, out, address=address, actors=actors, **files)
    _tell(found)


def _ray_scoring() -> Callable[..., BulkResult]:
    # Before Ray is imported: what it logs is for its files; and no news of our usage to others.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from rerank_plugins.ray import score_files

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return score_files


def _tell(found: BulkResult) -> None:
    new = found.rows - found.kept_rows
    rate = f", {new / found.seconds:,.0f} pairs/s" if new and found.seconds > 0 else ""
    kept = f"; {found.kept_rows:,} were there already" if found.kept_rows else ""
    echo(f"{found.path}: {found.rows:,} rows in {found.shards:,} shards{rate}{kept}")
    echo(f"{found.errors:,} rows with an error, {found.truncated:,} longer than the model reads")
    if found.problems:
        for problem in found.problems:
            echo(f"Error: audit: {problem}", err=True)
        raise typer.Exit(1)
    echo("audit: as many rows as were read, each once, each with a logit or an error")
    if found.rows and found.errors == found.rows:
        echo("Error: no row could be scored; each says why in its field error.", err=True)
        raise typer.Exit(1)
