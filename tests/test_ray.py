from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import QUERY, TEXTS, tiny
from poison import Poisoned
from test_bulk import make_rows, read_out, scored, write_jsonl

from rerank_plugins import Reranker
from rerank_plugins.bulk import score_files

pytest.importorskip("ray")
pytestmark = pytest.mark.ray

HERE = Path(__file__).parent
INSIDE = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""Runs a command where there is no network but the loopback: Ray listens on all interfaces, and nothing is fetched."""


def _has_namespaces() -> bool:
    try:
        return subprocess.run([*INSIDE, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


if not _has_namespaces():
    pytest.skip("needs a network namespace of its own: unshare and ip, as root", allow_module_level=True)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}


def started(scenario: str, pairs: Path, out: Path, log: Path) -> subprocess.Popen[str]:
    paths = map(str, (pairs, out, log, log.with_name("result.json")))
    command = [*INSIDE, sys.executable, str(HERE / "ray_driver.py"), scenario, *paths]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )


def finished(process: subprocess.Popen[str], log: Path, timeout: float = 240) -> Any:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"not done in {timeout} s:\n{out[-2000:]}\n{err[-4000:]}")
    assert process.returncode == 0, err[-4000:]
    return json.loads(log.with_name("result.json").read_text())


def killed_at(process: subprocess.Popen[str], log: Path, lines: int) -> None:
    """Kill the driver as soon as so many pairs are scored."""
    until = time.monotonic() + 200
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < until
        time.sleep(0.02)
    assert process.stdout is not None
    os.kill(int(process.stdout.readline()), signal.SIGKILL)
    process.communicate()


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Rows of different texts, with one that ends its process and one that its backend cannot read."""
    made = make_rows(600)
    for row in made:
        row["text"] = f"{row['id']} {row['text']}"
    made[77]["text"], made[301]["text"] = "poison", "broken"
    return made


def expected(rows: list[dict[str, Any]], tmp_path: Path) -> list[dict[str, Any]]:
    """What one machine gives."""
    score_files(
        write_jsonl(tmp_path / "one.jsonl", rows), tmp_path / "one", reranker=Reranker(Poisoned()), isolate=True
    )
    return read_out(tmp_path / "one")


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Rows, ids and scores are equal; so are the rows with an error."""
    assert [row["id"] for row in found] == [row["id"] for row in wanted]
    assert [scored(row) for row in found] == [scored(row) for row in wanted]
    assert [not scored(row) for row in found].count(True) == 2
    for name in ("logit", "score"):
        values = [[row[name] for row in some if scored(row)] for some in (found, wanted)]
        assert np.allclose(*values, rtol=0, atol=1e-4)


def test_an_actor_that_is_killed_costs_no_row_and_a_poison_pair_itself_alone(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pairs, out, log = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", tmp_path / "log"
    found = finished(started("files_with_a_killed_actor", pairs, out, log), log)
    assert (found["rows"], found["problems"], found["killed"]) == (600, [], 1)
    assert "pairs/s" in found["news"]
    wanted = expected(rows, tmp_path)
    same(read_out(out), wanted)
    assert [row for row in read_out(out) if scored(row)] == [row for row in wanted if scored(row)]


def test_a_driver_that_is_killed_goes_on_where_it_stopped(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pairs, out, log = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", tmp_path / "log"
    killed_at(started("files", pairs, out, log), log, 250)
    found = finished(started("files", pairs, out, log), log)
    assert (found["rows"], found["problems"]) == (600, [])
    assert found["kept"] >= 150
    same(read_out(out), expected(rows, tmp_path))
    times = Counter(log.read_text().splitlines())
    assert sum(times.values()) - len(times) <= 60


def test_a_machine_that_is_lost_costs_no_row(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pairs, out, log = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", tmp_path / "log"
    found = finished(started("files_with_a_killed_node", pairs, out, log), log)
    assert (found["rows"], found["problems"]) == (600, [])
    assert found["lost"] >= 1
    assert found["machines"] == 1
    same(read_out(out), expected(rows, tmp_path))


def test_a_dataset_of_ones_own_goes_on_after_its_driver_was_killed(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs, out, log = tmp_path / "in.parquet", tmp_path / "out", tmp_path / "log"
    pq.write_table(pa.Table.from_pylist([{"key": row.pop("id"), **row} for row in rows]), pairs)
    killed_at(started("dataset", pairs, out, log), log, 300)
    found = finished(started("dataset", pairs, out, log), log)
    assert found["problems"] == []
    assert found["half"] == ["expected 600 rows, found 300"]
    assert sorted(found["columns"]) == ["key", "query", "text"]
    written = sorted(pq.read_table(out).to_pylist(), key=lambda row: int(row["key"][1:]))
    assert all(len(row["id"]) == 32 for row in written)
    for row, given in zip(written, rows, strict=True):
        given["id"] = row["id"] = row["key"]
    same(written, expected(rows, tmp_path))
    times = Counter(log.read_text().splitlines())
    # Ray keeps some blocks, of 20 rows here, between scoring and writing: those are scored again.
    assert sum(times.values()) - len(times) <= 10 * 20


def test_what_would_wait_for_ever_is_refused(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(rows[:20]), pairs)
    errors = finished(started("refusals", pairs, tmp_path / "out", tmp_path / "log"), tmp_path / "log")["errors"]
    for error, message in zip(
        errors,
        [
            "would take 2 of the 2 CPUs that Ray counts on 1 machines. Reading and writing need 1",
            "need 1 GPUs; the Ray cluster has 0",
            "actors must be an int of at least 1",
            "num_cpus must be a number",
            "either reranker or its keywords",
            "no column 'question'",
            "has a column 'id' already",
            "Start Ray with more: ray.init(num_cpus=4)",
            "ModelLoadError",
            "ray job submit",
        ],
        strict=True,
    ):
        assert message in error, error


def test_the_command_scores_with_a_model_as_one_machine_does(tmp_path: Path) -> None:
    made = [{"id": i, "query": QUERY, "text": text} for i, text in enumerate([*TEXTS, None])]
    pairs, out = write_jsonl(tmp_path / "in.jsonl.gz", made), tmp_path / "out"
    model = shutil.copytree(tiny("bert"), tmp_path / "model")
    command = ["score", str(pairs), str(out), "--ray", "--actors", "1", "--model", str(model)]
    command = [*INSIDE, sys.executable, "-m", "rerank_plugins", *command]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    # Ray's own lines: that there is no network, and how much it logs.
    assert all("network_util.cc" in line or "logging.cc" in line for line in done.stderr.splitlines()), done.stderr
    assert "audit: as many rows as were read" in done.stdout
    found = read_out(out)
    assert np.allclose([row["logit"] for row in found[:-1]], Reranker(str(model)).logits(QUERY, TEXTS), atol=1e-4)
    assert "NoneType" in found[-1]["error"]
    # One machine takes up what Ray left, and finds nothing to do.
    assert score_files(pairs, out, model=str(model)).kept_rows == len(made)
    damaged = next(out.glob("part-*"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240)
    assert done.returncode == 1, done.stderr[-4000:]
    assert "audit:" in done.stderr
