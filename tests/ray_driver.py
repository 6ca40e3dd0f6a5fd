"""What the tests of Ray run, each in a process of its own and without a network. What comes out goes to a file."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from poison import Poisoned

from rerank_plugins import Reranker
from rerank_plugins.errors import RerankError
from rerank_plugins.ray import audit, checkpoint_config, score_dataset, score_files

STORE = 100 * 2**20


def start(num_cpus: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    ray.init("local", num_cpus=num_cpus, object_store_memory=STORE, include_dashboard=False, **quiet)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def scored_lines(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def once(log: Path, lines: int, act: Callable[[], None]) -> threading.Thread:
    """Do something as soon as so many pairs are scored."""

    def wait() -> None:
        while scored_lines(log) < lines:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def workers() -> list[psutil.Process]:
    """The processes of the actors that score."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::MapWorker(MapBatches(_" in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def files_with_a_killed_actor(pairs: Path, out: Path, log: Path) -> Any:
    start(3)
    killed: list[int] = []

    def kill() -> None:
        worker = workers()[0]
        killed.append(worker.pid)
        worker.send_signal(signal.SIGKILL)

    once(log, 100, kill)
    news: list[str] = []
    reranker = Reranker(Poisoned(log, seconds=0.004))
    found = score_files(pairs, out, reranker=reranker, actors=2, progress=lambda text, share: news.append(text))
    return {"rows": found.rows, "problems": found.problems, "killed": len(killed), "news": news[-1]}


def files(pairs: Path, out: Path, log: Path) -> Any:
    start(3)
    found = score_files(pairs, out, reranker=Reranker(Poisoned(log, seconds=0.004)), actors=2)
    return {"rows": found.rows, "kept": found.kept_rows, "problems": found.problems}


def files_with_a_killed_node(pairs: Path, out: Path, log: Path) -> Any:
    from ray.cluster_utils import Cluster

    sooner = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    head = {"num_cpus": 2, "object_store_memory": STORE, "_system_config": sooner}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    # First, so that this process belongs to the machine that stays.
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    node = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    lost: list[int] = []

    def kill() -> None:
        there = next(
            info.process.pid for kind, infos in node.all_processes.items() for info in infos if kind == "raylet"
        )
        children = {process.pid for process in psutil.Process(there).children(recursive=True)}
        lost.append(len(children & {worker.pid for worker in workers()}))
        cluster.remove_node(node, allow_graceful=False)

    thread = once(log, 100, kill)
    reranker = Reranker(Poisoned(log, seconds=0.004))
    found = score_files(pairs, out, reranker=reranker, actors=2, threads=1)
    thread.join()
    machines = sum(node["Alive"] for node in ray.nodes())
    # Before its machines: a driver that finds them gone ends with an error.
    ray.shutdown()
    cluster.shutdown()
    return {"rows": found.rows, "problems": found.problems, "lost": lost[0], "machines": machines}


def dataset(pairs: Path, out: Path, log: Path) -> Any:
    start(4)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # What an error would drop is missing in the audit.
    context.max_errored_blocks = -1
    context.checkpoint_config = checkpoint_config(str(out.parent / "seen"))
    given = ray.data.read_parquet(str(pairs))
    scored = score_dataset(given, reranker=Reranker(Poisoned(log, seconds=0.004)), actors=2, block_rows=20)
    scored.write_parquet(str(out))
    context.checkpoint_config = None
    written = ray.data.read_parquet(str(out))
    rows = given.count()
    half = written.limit(rows // 2)
    return {"problems": audit(written, rows), "half": audit(half, rows), "columns": given.columns()}


def refusals(pairs: Path, out: Path, log: Path) -> Any:
    start(2)
    given = ray.data.read_parquet(str(pairs))
    found = []
    for keywords in (
        {"id_column": "id", "actors": 2, "num_cpus": 1},
        {"id_column": "id", "actors": 1, "num_gpus": 1},
        {"id_column": "id", "actors": 0},
        {"id_column": "id", "num_cpus": float("nan")},
        {"reranker": Reranker(Poisoned()), "model": "x"},
        {"query": "question", "id_column": "id", "actors": 1},
        {"actors": 1},
    ):
        try:
            score_dataset(given, **keywords)
        except RerankError as error:
            found.append(f"{type(error).__name__}: {error}")
    ray.data.DataContext.get_current().checkpoint_config = checkpoint_config(str(out.parent / "seen"))
    try:
        score_dataset(ray.data.read_parquet(str(pairs)), id_column="id", actors=1)
    except RerankError as error:
        found.append(str(error))
    ray.data.DataContext.get_current().checkpoint_config = None
    ray.data.DataContext.get_current().enable_progress_bars = False
    for call in (
        lambda: score_files(pairs, out, model=str(out / "no-such-model"), actors=1),
        lambda: score_files(pairs, out, address="ray://head:10001"),
    ):
        try:
            call()
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return {"errors": found}


if __name__ == "__main__":
    scenario, *paths = sys.argv[1:]
    print(os.getpid(), flush=True)
    result = globals()[scenario](*map(Path, paths[:-1]))
    Path(paths[-1]).write_text(json.dumps(result))
