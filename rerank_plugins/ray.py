"""Bulk scoring on Ray Data: files of pairs, or a dataset of your own, on all machines of a cluster (extra ``ray``).

Ray's processes listen on all network interfaces and believe whoever connects: run them in a network of their own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rerank_plugins._extras import import_extra
from rerank_plugins.bulk.files import (
    BulkResult,
    Job,
    Progress,
    check_count,
    given_reranker,
    rendered,
    scored_shard,
    with_results,
)
from rerank_plugins.bulk.process import ScoringProcess
from rerank_plugins.bulk.rows import joined, windows
from rerank_plugins.bulk.source import Source
from rerank_plugins.errors import ConfigurationError, RerankError
from rerank_plugins.reranker import Reranker
from rerank_plugins.settings import Settings

ray: Any = import_extra("ray", "ray")
data: Any = import_extra("ray.data", "ray")
checkpoint: Any = import_extra("ray.data.checkpoint", "ray")
pyarrow: Any = import_extra("pyarrow", "ray")

__all__ = ["audit", "checkpoint_config", "row_ids", "score_dataset", "score_files"]

_RESTARTS = 16
"""Of each actor, whose blocks are tried again as often. By default Ray has no bound, and tries what kills an actor for
ever."""
_SHARDS_AN_ACTOR = 32
"""At least, where no size is asked for: what an interruption loses is a small part of the whole."""
BLOCK_ROWS = 1000
"""Rows of a dataset's block, where nothing else is asked for."""


# -- files ----------------------------------------------------------------------------------------------------------


def score_files(
    pairs: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    reranker: Reranker | None = None,
    address: str | None = None,
    actors: int | None = None,
    threads: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    run: str | os.PathLike[str] | None = None,
    shard_rows: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> BulkResult:
    """As `rerank_plugins.bulk.score_files`, on Ray: the same rows, shards and manifest, whichever of both goes on.

    Files are read and written on the machine that calls, and nothing but shards and their scores travels. A row that
    ends the process that scores it gets an error; actors and machines that are lost are replaced, and their shards
    scored again.

    Args:
        pairs: As there.
        out: As there.
        reranker: Scores the rows. Each actor loads its model: a directory must be there on every machine.
        address: Of a cluster: ``"auto"`` for the one that runs here, or ``"HOST:PORT"``. None takes the one that this
            process is connected to, or starts one here for the time of the call.
        actors: Processes that load the model; None: one for each GPU, where the model uses one, or else for each 4
            CPUs.
        threads: Threads of an actor; None shares the CPUs out.
        num_cpus: CPUs that Ray counts for an actor; None: `threads`, or less, so that one is left for other work.
        num_gpus: GPUs of an actor; None: 1 where the cluster has them and the model uses them.
        run: As there.
        shard_rows: As there; None makes at least 32 shards an actor.
        overwrite: As there.
        progress: As there.
        **settings: As there.

    Raises:
        ConfigurationError: As there; or the actors cannot all have their CPUs or GPUs; or machines score with different
            engines.
    """
    given = given_reranker(reranker, settings)
    with _connected(address):
        plan = _plan(given, actors, threads, num_cpus, num_gpus)
        job = Job(
            pairs,
            out,
            given,
            run=run,
            shard_rows=shard_rows,
            overwrite=overwrite,
            progress=progress,
            least_shards=_SHARDS_AN_ACTOR * plan.actors,
        )
        context = data.DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = False
        # A row of the dataset is a shard; each is a block of its own, so that all actors have one soon.
        context.target_max_block_size = 1
        with data.DataContext.current(context):
            # Where the files are: on the machine that calls.
            here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
            read = data.read_datasource(_Shards(job), override_num_blocks=1, num_cpus=0, label_selector=here)
            actor = (plan.reranker(given), job.source.suffix)
            shards = _mapped(read, _ShardScorer, actor, 1, plan)
            with _told():
                for found in shards.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
                    _take(job, found.to_pylist()[0])
    return job.finish()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raise an error of this package as it was raised on another machine, without Ray's account of the way back."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and (not isinstance(cause, RerankError) or isinstance(cause, ray.exceptions.RayError)):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise cause from None


def _take(job: Job, found: dict[str, Any]) -> None:
    """Write a shard that an actor has scored, or count one that was there."""
    fingerprint = found["fingerprint"]
    job.start(lambda: fingerprint)
    if fingerprint != job.fingerprint:
        raise ConfigurationError(
            "Machines of this cluster score with different engines, so their scores differ. Name one that all have: "
            "backend=... and precision=..."
        )
    shard = pickle.loads(found["shard"])
    if found["content"] is None:
        job.keep(shard)
    else:
        job.write(shard, found["content"])
        job.tell(shard, len(shard), 1.0)


class _Shards(data.Datasource):  # type: ignore[misc]
    """The shards of a job as rows, one each: read by one task, on the machine that has the files."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._source, self._size, self._scratch, self._known = job.source, job.shard_rows, job.out, job.known

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
        block = import_extra("ray.data.block", "ray")
        source, size, scratch, known = self._source, self._size, self._scratch, self._known
        nothing_known = block.BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [data.ReadTask(lambda: _shard_blocks(source, size, scratch, known), nothing_known)]

    def estimate_inmemory_data_size(self) -> None:
        return None


def _shard_blocks(source: Source, size: int, scratch: Any, known: Any) -> Iterator[Any]:
    for shard in source.shards(size, scratch):
        # What was scored before is counted, and not sent about.
        kept = known(shard)
        content = pickle.dumps(shard.counted() if kept else shard)
        yield pyarrow.table({"shard": pyarrow.array([content], pyarrow.large_binary()), "kept": [kept]})


class _Scorer:
    """What an actor holds: a model in a process of its own, which a pair may end without ending the actor."""

    def __init__(self, reranker: bytes) -> None:
        self._process = ScoringProcess(reranker)
        self._reranker = reranker

    # At first use: what is raised while an actor is made comes back without its cause.
    @functools.cached_property
    def settings(self) -> Settings:
        return pickle.loads(self._reranker).settings  # type: ignore[no-any-return]

    def _rows(self, queries: Sequence[Any], texts: Sequence[Any]) -> Any:
        parts = windows(queries, texts)
        return joined([self._process.score_rows(queries[part], texts[part]) for part in parts])


class _ShardScorer(_Scorer):
    def __init__(self, reranker: bytes, suffix: str) -> None:
        super().__init__(reranker)
        self._suffix = suffix

    @functools.cached_property
    def fingerprint(self) -> str | None:
        return self._process.fingerprint()

    def __call__(self, batch: Any) -> Any:
        (given,), (kept,) = batch["shard"].to_pylist(), batch["kept"].to_pylist()
        shard, content = pickle.loads(given), None
        if not kept:
            scores = scored_shard(shard, self._rows)
            content = rendered(shard, scores, self.settings, self._suffix)
            given = pickle.dumps(shard.counted())
        binary = pyarrow.large_binary()
        return pyarrow.table(
            {
                "shard": pyarrow.array([given], binary),
                "content": pyarrow.array([content], binary),
                "fingerprint": pyarrow.array([self.fingerprint], pyarrow.string()),
            }
        )


# -- a dataset ------------------------------------------------------------------------------------------------------


def score_dataset(
    dataset: Any,
    *,
    reranker: Reranker | None = None,
    query: str = "query",
    text: str = "text",
    id_column: str | None = None,
    block_rows: int = BLOCK_ROWS,
    actors: int | None = None,
    threads: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **settings: Any,
) -> Any:
    """Score a `ray.data.Dataset` of your own: a lazy step, of as many actors as load the model.

    Args:
        dataset: Rows with a query and a text. It is not changed.
        reranker: Scores them; None makes one of `settings`. Each actor loads its model.
        query: The column of the queries.
        text: The column of the texts.
        id_column: A column of unique ids. None adds ``id``, see `row_ids`: rows of the same query and text have the
            same one.
        block_rows: Rows of a block, which is what is lost, and written to a file, at a time.
        actors: As for `score_files`.
        threads: As for `score_files`.
        num_cpus: As for `score_files`. At least one CPU must be left, on some machine, for reading and writing.
        num_gpus: As for `score_files`.
        **settings: Keywords of `Reranker`, in place of `reranker`.

    Returns:
        The dataset with the columns ``logit`` (float64), ``score`` (float64), ``truncated`` (bool) and ``error``
        (string), in place of columns of these names, and perhaps ``id``. A row with an error has neither logit nor
        score.

    Raises:
        ConfigurationError: The actors would take all CPUs, and reading would wait for them for ever; or there are fewer
            GPUs than they need; or a column is missing; or a keyword cannot work.

    Example:
        >>> import ray
        >>> from rerank_plugins.ray import checkpoint_config, score_dataset
        >>> ray.data.DataContext.get_current().checkpoint_config = checkpoint_config("/shared/seen")  # doctest: +SKIP
        >>> pairs = ray.data.read_parquet("/shared/pairs")  # doctest: +SKIP
        >>> score_dataset(pairs).write_parquet("/shared/scores")  # doctest: +SKIP
    """
    given = given_reranker(reranker, settings)
    # Before anything runs: errors of blocks may be asked to be passed over.
    if (known := dataset.columns(fetch_if_missing=False)) is not None:
        _check_columns(known, (query, text), id_column)
    # What leaves out finished rows is an actor with a CPU of its own.
    others = 2 if dataset.context.checkpoint_config is not None else 1
    plan = _plan(given, actors, threads, num_cpus, num_gpus, others)
    blocks = dataset.repartition(target_num_rows_per_block=block_rows)
    return _mapped(blocks, _RowScorer, (plan.reranker(given), query, text, id_column), block_rows, plan)


class _RowScorer(_Scorer):
    def __init__(self, reranker: bytes, query: str, text: str, id_column: str | None) -> None:
        super().__init__(reranker)
        self._columns, self._id_column = (query, text), id_column

    def __call__(self, batch: Any) -> Any:
        _check_columns(batch.column_names, self._columns, self._id_column)
        queries, texts = (batch.column(name).to_pylist() for name in self._columns)
        if self._id_column is None:
            batch = _with_ids(batch, queries, texts, "id")
        return with_results(batch, self._rows(queries, texts), self.settings)


def _check_columns(known: Sequence[str], needed: Sequence[str], id_column: str | None) -> None:
    needed = [*needed, *([] if id_column is None else [id_column])]
    if lacking := [name for name in needed if name not in known]:
        raise ConfigurationError(
            f"The dataset has no column {' and no column '.join(map(repr, lacking))}; its columns are "
            f"{', '.join(known)}. Name yours: query=..., text=..., id_column=..."
        )
    if id_column is None and "id" in known:
        raise ConfigurationError(
            "The dataset has a column 'id' already. If its values are unique, name it: id_column='id'. Otherwise "
            "rename it."
        )


def row_ids(queries: Sequence[Any], texts: Sequence[Any]) -> list[str]:
    """Ids that say what a row holds: 32 hexadecimal digits of the SHA-256 digest of its query and text."""
    found = []
    for query, text in zip(queries, texts, strict=True):
        parts = [repr(part).encode("utf-8", "surrogatepass") for part in (query, text)]
        found.append(hashlib.sha256(len(parts[0]).to_bytes(8, "little") + b"".join(parts)).hexdigest()[:32])
    return found


def _with_ids(table: Any, queries: Sequence[Any], texts: Sequence[Any], name: str) -> Any:
    return table.append_column(name, pyarrow.array(row_ids(queries, texts), pyarrow.string()))


def checkpoint_config(path: str, *, id_column: str | None = None, query: str = "query", text: str = "text") -> Any:
    """Ray's `CheckpointConfig` for `score_dataset`: a run whose driver died goes on where it stopped.

    Set it as ``ray.data.DataContext.get_current().checkpoint_config`` before the dataset is made, and write the scored
    rows with ``write_parquet`` or ``write_json``.

    Args:
        path: Where the ids of finished rows are kept: a directory that all machines see, or a bucket.
        id_column: A column of unique ids, as for `score_dataset`. None goes by the content of rows, so that rows of the
            same query and text are one: give ids where each such row matters.
        query: The column of the queries.
        text: The column of the texts.
    """
    if id_column is not None:
        return checkpoint.CheckpointConfig(id_column=id_column, checkpoint_path=path)
    config = checkpoint.CheckpointConfig(id_column="id", checkpoint_path=path, checkpoint_filter_cls=_ContentFilter)
    config.pair_columns = (query, text)
    return config


class _ContentFilter(checkpoint.NumpyArrayBasedCheckpointFilter):  # type: ignore[misc]
    """Leaves out rows whose content is known, where rows get their ids only when they are scored."""

    def __init__(self, checkpoint_config: Any, *others: Any) -> None:
        super().__init__(checkpoint_config, *others)
        self._columns = checkpoint_config.pair_columns

    def filter_rows_for_block(self, block: Any) -> Any:
        if not len(block):
            return block
        queries, texts = (block.column(name).to_pylist() for name in self._columns)
        known = super().filter_rows_for_block(_with_ids(block, queries, texts, self.id_column))
        return known.drop_columns([self.id_column])


def audit(scored: Any, rows: int, *, id_column: str = "id") -> list[str]:
    """What is wrong with scored rows: empty where nothing is.

    Args:
        scored: A dataset of what was written, such as ``ray.data.read_parquet("/shared/scores")``.
        rows: How many rows there were before.
        id_column: The column of the ids. Nine bytes of memory here for each row.
    """
    digests, wrong = [np.empty(0, dtype=np.uint64)], 0
    columns = [id_column, "logit", "score", "error"]
    for batch in scored.select_columns(columns).iter_batches(batch_size=10_000, batch_format="pyarrow"):
        ids, logits, scores, errors = (batch.column(name) for name in columns)
        has = [np.asarray(column.is_valid().to_pylist(), dtype=np.bool_) for column in (logits, scores, errors)]
        wrong += int(np.count_nonzero((has[0] != has[1]) | (has[0] == has[2])))
        digests.append(
            np.array(
                [int.from_bytes(hashlib.sha256(str(one).encode()).digest()[:8], "little") for one in ids.to_pylist()],
                dtype=np.uint64,
            )
        )
    found = np.sort(np.concatenate(digests))
    repeated = int(np.count_nonzero(found[1:] == found[:-1]))
    problems = []
    if len(found) != rows:
        problems.append(f"expected {rows} rows, found {len(found)}")
    if repeated:
        problems.append(f"{repeated} rows have the id of another one")
    if wrong:
        problems.append(f"{wrong} rows have not one of logit and error")
    return problems


# -- the cluster ----------------------------------------------------------------------------------------------------


class _connected:
    """A connection to a cluster for the time of a call, where there is none."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._own = False

    def __enter__(self) -> None:
        if self._address is not None and self._address.startswith("ray://"):
            raise ConfigurationError(
                f"Files are read where the driver runs, which for {self._address!r} is another machine. Run the "
                "command there, as a job: ray job submit --address ... -- rerank-plugins score ... --ray auto"
            )
        if ray.is_initialized():
            return
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self._address is None:
            # Where there is one CPU, a count of two lets Ray read beside the actor: its counts bind nobody.
            options |= {"address": "local", "include_dashboard": False, "num_cpus": max(2, _cpus())}
        else:
            options["address"] = self._address
        try:
            ray.init(**options)
        except ConnectionError as error:
            raise ConfigurationError(
                f"There is no Ray cluster at {self._address!r}: {error}. Start one with `ray start --head`, or leave "
                "the address out."
            ) from error
        self._own = True

    def __exit__(self, *_: object) -> None:
        if self._own:
            ray.shutdown()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the actors get."""

    actors: int
    threads: int
    num_cpus: float
    num_gpus: float

    def reranker(self, given: Reranker) -> bytes:
        """The reranker of an actor, pickled."""
        settings = given.settings
        own = settings.threads is not None or settings.is_address or settings.ready
        config = given.config if own else {**given.config, "threads": self.threads}
        try:
            return ray.cloudpickle.dumps(Reranker(**config))  # type: ignore[no-any-return]
        except Exception as error:
            raise ConfigurationError(
                f"{given!r} cannot be given to other processes ({type(error).__name__}: {error}). Name its model "
                "instead of a ready backend."
            ) from error


def _mapped(dataset: Any, scorer: type[_Scorer], arguments: tuple[Any, ...], batch_size: int, plan: _Plan) -> Any:
    """A dataset, scored by a pool of actors."""
    with warnings.catch_warnings():
        # Bounds on restarts have no name of their own yet.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        return dataset.map_batches(
            scorer,
            batch_size=batch_size,
            batch_format="pyarrow",
            fn_constructor_args=arguments,
            # A second block waits at each actor, so that none idles.
            compute=data.ActorPoolStrategy(size=plan.actors, max_tasks_in_flight_per_actor=2),
            num_cpus=plan.num_cpus,
            num_gpus=plan.num_gpus,
            max_restarts=_RESTARTS,
        )


def _plan(
    reranker: Reranker,
    actors: int | None,
    threads: int | None,
    num_cpus: float | None,
    num_gpus: float | None,
    others: int = 1,
) -> _Plan:
    """Share a cluster out, or say why it cannot be.

    Ray counts CPUs and GPUs and starts nothing that there is no count left for; it waits for ever, and says nothing.
    Reading and writing take a CPU at a time, so one must stay free on some machine whichever way the actors are placed.

    Args:
        reranker: What the actors load.
        actors: As for `score_files`, like those that follow.
        threads: Likewise.
        num_cpus: Likewise.
        num_gpus: Likewise.
        others: CPUs that other work needs at the same time.
    """
    for name, value in (("actors", actors), ("threads", threads)):
        check_count(name, value)
    for name, share in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        if share is not None and (isinstance(share, bool) or not 0 <= share < math.inf):
            raise ConfigurationError(f"{name} must be a number of at least 0, or None; got {share!r}.")
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [machine.get("CPU", 0.0) for machine in machines if machine.get("CPU", 0.0) >= 1]
    gpus = sum(machine.get("GPU", 0.0) for machine in machines)
    if not cpus:
        raise ConfigurationError("The Ray cluster has no CPU. Start machines with `ray start --num-cpus=N`.")
    if num_gpus is None:
        num_gpus = 1.0 if gpus >= 1 and _uses_gpu(reranker) else 0.0
    if actors is None:
        actors = int(gpus // num_gpus) if num_gpus else max(1, int(sum(cpus)) // 4)
    if actors * num_gpus > gpus:
        raise ConfigurationError(
            f"{actors} actors with num_gpus={num_gpus:g} each need {actors * num_gpus:g} GPUs; the Ray cluster has "
            f"{gpus:g}. Take fewer actors, or a fraction of a GPU each."
        )
    # The most that actors can take so that others have a CPU of some machine, however they are placed.
    free = sum(cpus) - len(cpus) - (others - 1)
    largest = max(cpus) - 1
    if threads is None:
        threads = reranker.settings.threads or max(1, min(int(sum(cpus)) // actors, int(max(cpus))))
    most = max(0.0, math.floor(100 * min(float(threads), free / actors, largest)) / 100)
    if num_cpus is None:
        num_cpus = most
    if actors * num_cpus > free or num_cpus > largest or (num_cpus == 0 and not num_gpus):
        remedy = f"num_cpus={most:g} is possible" if most else f"Start Ray with more: ray.init(num_cpus={2 * others})"
        raise ConfigurationError(
            f"{actors} actors with num_cpus={num_cpus:g} each would take {actors * num_cpus:g} of the {sum(cpus):g} "
            f"CPUs that Ray counts on {len(cpus)} machines. Reading and writing need {others} that no actor takes, or "
            f"everything waits for ever. {remedy}; what Ray counts binds nobody, and threads are another count."
        )
    return _Plan(actors, threads, num_cpus, num_gpus)


def _uses_gpu(reranker: Reranker) -> bool:
    settings = reranker.settings
    local = settings.model is not None and not settings.ready and not settings.is_address
    return local and settings.backend in ("auto", "torch") and not (settings.device or "").startswith("cpu")
