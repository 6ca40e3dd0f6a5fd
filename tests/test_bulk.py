from __future__ import annotations

import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from checkpoints import QUERY, TEXTS, tiny
from poison import Poisoned
from typer.testing import CliRunner

from rerank_plugins import Reranker
from rerank_plugins.bulk import BulkResult, ScoringProcess, score_files, source
from rerank_plugins.bulk.process import pickled
from rerank_plugins.cli._app import app
from rerank_plugins.cli._score import with_address
from rerank_plugins.errors import ConfigurationError, InputError, ModelLoadError, ServerError
from rerank_plugins.selection import BLANK_LOGIT
from rerank_plugins.testing import FakeBackend, word_overlap

HERE = Path(__file__).parent
WORDS = ["red", "blue", "green", "fox", "whale", "tree", "runs", "deep", "tall", "old", "new", "small"]


def make_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"id": f"r{i}", "query": " ".join(rng.sample(WORDS, 2)), "text": " ".join(rng.choices(WORDS, k=i % 17 + 1))}
        for i in range(n)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read_out(out: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(out.glob("part-*")):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows += [json.loads(line) for line in content.splitlines()]
    return rows


def fake(**keywords: Any) -> Reranker:
    return Reranker(FakeBackend(fingerprint="fake"), **keywords)


def scored(row: dict[str, Any]) -> bool:
    return row["error"] is None and row["logit"] is not None and row["score"] is not None


# -- rows in, rows out ----------------------------------------------------------------------------------------------


def test_rows_come_out_as_they_were_with_the_scores_of_the_reranker(tmp_path: Path) -> None:
    rows = [
        {"query": QUERY, "text": text, "id": number, "meta": {"a": [1, None]}, "score": "old"}
        for number, text in enumerate([*TEXTS, "  ", "half a pair \ud83d", *TEXTS[:3]])
    ]
    reranker = Reranker(tiny("bert"))
    found = score_files(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", reranker=reranker, shard_rows=4)
    out = read_out(tmp_path / "out")
    logits = reranker.logits(QUERY, [row["text"] for row in rows])
    assert [{**row, "score": "old"} for row in rows] == [
        {name: value for name, value in row.items() if name not in ("logit", "truncated", "error")} | {"score": "old"}
        for row in out
    ]
    assert np.allclose([row["logit"] for row in out], logits, rtol=0, atol=1e-4)
    assert np.allclose([row["score"] for row in out], reranker.score(QUERY, [row["text"] for row in rows]), atol=1e-4)
    ranking = reranker.rank(QUERY, [row["text"] for row in rows])
    assert [row["truncated"] for row in out] == [
        item.truncated for item in sorted(ranking, key=lambda item: item.index)
    ]
    assert out[len(TEXTS)]["logit"] == BLANK_LOGIT
    assert out[len(TEXTS)]["score"] == 0.0
    assert found == BulkResult(
        tmp_path / "out", len(rows), 0, sum(row["truncated"] for row in out), 4, 0, found.seconds, ()
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["fingerprint"] == reranker.fingerprint
    assert (manifest["complete"], manifest["rows"], manifest["errors"]) == (True, len(rows), 0)


def test_a_row_that_cannot_be_scored_says_why_and_costs_no_other(tmp_path: Path) -> None:
    bad = [
        '{"query": "red fox", "text": ',
        "[1, 2]",
        json.dumps({"query": "red fox", "passage": "x"}),
        json.dumps({"query": "red fox", "text": None}),
        json.dumps({"query": " ", "text": "a red fox"}),
        json.dumps({"query": 7, "text": "a red fox"}),
        '{"query": "red fox", "text": "x", "score": NaN}',
        json.dumps({"query": "red fox", "text": "broken"}),
    ]
    rows: list[Any] = make_rows(40)
    for place, line in enumerate(bad):
        rows.insert(5 * place + 3, line)
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    with path.open("ab") as file:
        file.write(b'{"query": "red fox", "text": "caf\xe9"}\n')
    found = score_files(path, tmp_path / "out", reranker=Reranker(Poisoned()), shard_rows=30)
    out = read_out(tmp_path / "out")
    assert (found.rows, found.errors, found.problems) == (49, 9, ())
    wrong = [row for row in out if row["error"] is not None]
    assert all(row["logit"] is None and row["score"] is None and not row["truncated"] for row in wrong)
    reasons = ["not valid JSON", "got list", "lacks 'text'", "NoneType", "visible", "got int", "NaN", "RuntimeError: ",
               "0xe9"]  # fmt: skip
    for row, expected in zip(wrong, reasons, strict=True):
        assert expected in row["error"]
    assert "in.jsonl, line 4" in wrong[0]["error"]
    right = [row for row in out if row["error"] is None]
    assert [row["id"] for row in right] == [row["id"] for row in rows if isinstance(row, dict)]
    assert all(np.isclose(row["logit"], word_overlap(row["query"], row["text"]), atol=1e-5) for row in right)


def test_a_query_that_is_too_long_is_refused_once_for_all_its_rows(tmp_path: Path) -> None:
    rows = make_rows(60)
    for row in rows[10:30]:
        row["query"] = "panda bamboo " * 300
    reranker = Reranker(tiny("bert"))
    found = score_files(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", reranker=reranker)
    out = read_out(tmp_path / "out")
    assert found.errors == 20
    assert {row["id"] for row in out if "QueryError" in (row["error"] or "")} == {row["id"] for row in rows[10:30]}
    alone = [reranker.logits(row["query"], [row["text"]])[0] for row in rows[:10]]
    assert np.allclose([row["logit"] for row in out[:10]], alone, atol=1e-4)


def test_a_pair_without_a_finite_logit_is_found_by_halving(tmp_path: Path) -> None:
    backend = FakeBackend(lambda query, text: float("nan") if "whale whale" in text else word_overlap(query, text))
    rows = make_rows(64)
    rows[37]["text"] = "a whale whale"
    rows = [row for i, row in enumerate(rows) if "whale whale" not in row["text"] or i == 37]
    place = next(i for i, row in enumerate(rows) if row["text"] == "a whale whale")
    found = score_files(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", reranker=Reranker(backend))
    out = read_out(tmp_path / "out")
    assert [i for i, row in enumerate(out) if row["error"]] == [place]
    assert "finite" in out[place]["error"]
    assert found.errors == 1
    # Once together, and twice at each halving.
    assert len(backend.calls) <= 2 * 6 + 1


def test_a_server_that_is_down_fails_the_run_and_no_row(tmp_path: Path) -> None:
    class Down(FakeBackend):
        down = True

        def logits(self, pairs: Any) -> Any:
            if self.down and len(self.calls) >= 2:
                raise ServerError("no connection", url="http://localhost:9")
            return super().logits(pairs)

    rows = make_rows(40)
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    backend = Down(fingerprint="server")
    with pytest.raises(ServerError, match="no connection"):
        score_files(path, tmp_path / "out", reranker=Reranker(backend), shard_rows=10)
    assert len(read_out(tmp_path / "out")) == 20
    backend.down = False
    found = score_files(path, tmp_path / "out", reranker=Reranker(backend), shard_rows=10)
    assert (found.kept_rows, found.errors, found.rows) == (20, 0, 40)


# -- kinds of input -------------------------------------------------------------------------------------------------


def test_csv_with_quotes_line_ends_and_other_delimiters(tmp_path: Path) -> None:
    long = "red " * 60_000
    texts = ["a red fox", 'says "red"', "two\n\nlines, one fox", long, "plain"]
    limit = csv.field_size_limit()
    for delimiter in ",;\t":
        path = tmp_path / "in.csv"
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["id", "query", "text"], *([str(i), "red fox", text] for i, text in enumerate(texts))])
        with path.open("ab") as raw:
            raw.write(b"\r\n5" + delimiter.encode() + b"red fox\r\n")
            raw.write(delimiter.join(["6", "red fox", "caf"]).encode() + b"\xe9\r\n")
            raw.write(delimiter.join(["7", "red fox", "last"]).encode())
        out = tmp_path / f"out{ord(delimiter)}"
        found = score_files(path, out, reranker=fake(), shard_rows=3)
        rows = read_out(out)
        assert [row["text"] for row in rows if row["error"] is None] == [*texts, "last"]
        assert [row["id"] for row in rows] == list("01234567")
        assert (found.rows, found.errors) == (8, 2)
        assert "expected 3 columns, got 2" in rows[5]["error"]
        assert "not UTF-8" in rows[6]["error"]
    assert csv.field_size_limit() == limit


def test_gzip_is_known_by_its_content_and_comes_out_as_gzip(tmp_path: Path) -> None:
    rows = make_rows(25)
    path = write_jsonl(tmp_path / "in.jsonl.gz", rows).rename(tmp_path / "in.jsonl")
    score_files(path, tmp_path / "out", reranker=fake(), shard_rows=10)
    assert len(list((tmp_path / "out").glob("part-*.jsonl.gz"))) == 3
    assert [row["id"] for row in read_out(tmp_path / "out")] == [row["id"] for row in rows]


def test_a_gzip_file_that_is_cut_off_keeps_what_was_scored(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl.gz", make_rows(4000))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        score_files(path, tmp_path / "out", reranker=fake(), shard_rows=100)
    assert len(read_out(tmp_path / "out")) >= 1000
    path.write_bytes(whole)
    assert score_files(path, tmp_path / "out", reranker=fake()).kept_rows >= 1000


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = make_rows(50)
    texts = pa.array([row["text"] for row in rows]).dictionary_encode()
    queries = pa.array([None if i == 7 else row["query"] for i, row in enumerate(rows)])
    when = pa.array(range(50), type=pa.timestamp("us"))
    table = pa.table({"query": queries, "text": texts, "when": when, "logit": pa.array(["old"] * 50)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=9)
    found = score_files(tmp_path / "in.parquet", tmp_path / "out", reranker=fake(), shard_rows=20)
    out = pq.read_table(sorted((tmp_path / "out").glob("part-*.parquet")))
    assert [path.name[:11] for path in sorted((tmp_path / "out").glob("part-*"))] == [f"part-{i:06d}" for i in range(3)]
    assert out.column_names == ["query", "text", "when", "logit", "score", "truncated", "error"]
    assert out.column("when").equals(table.column("when"))
    assert out.column("text").to_pylist() == texts.to_pylist()
    assert (found.rows, found.errors) == (50, 1)
    logits = out.column("logit").to_pylist()
    assert logits[7] is None
    assert "NoneType" in out.column("error").to_pylist()[7]
    expected = [word_overlap(row["query"], row["text"]) for i, row in enumerate(rows) if i != 7]
    assert np.allclose([logit for logit in logits if logit is not None], expected, atol=1e-5)
    assert score_files(tmp_path / "in.parquet", tmp_path / "out", reranker=fake()).kept_rows == 50


def beir(folder: Path) -> Path:
    folder.mkdir()
    write_jsonl(folder / "queries.jsonl", [{"_id": "q1", "text": "red fox"}, {"_id": "q2", "text": "blue whale"}])
    documents = [{"_id": f"d{i}", "text": f"the {word} thing", "title": "red" if i == 2 else ""}
                 for i, word in enumerate(WORDS)]  # fmt: skip
    write_jsonl(folder / "corpus.jsonl.gz", documents)
    (folder / "candidates.tsv").write_text("query-id\tcorpus-id\trank\nq1\td0\t1\nq1\td2\t2\nq2\td4\t1\nq2\tnone\t2\n")
    (folder / "run.trec").write_text("q1 Q0 d3 1 9.5 bm25\nbroken line\nq2 Q0 d1 2 8 bm25\nq9 Q0 d1 1 7 bm25\n")
    return folder


def test_a_beir_folder_with_its_candidates_or_a_run(tmp_path: Path) -> None:
    folder = beir(tmp_path / "set")
    found = score_files(folder, tmp_path / "out", reranker=fake())
    rows = read_out(tmp_path / "out")
    assert [(row["query_id"], row["doc_id"], row["first_stage_rank"]) for row in rows] == [
        ("q1", "d0", 1), ("q1", "d2", 2), ("q2", "d4", 1), ("q2", "none", 2)]  # fmt: skip
    assert rows[1]["text"] == "red the green thing"
    assert np.isclose(rows[1]["logit"], 1 - 0.04)
    assert "'none' is not among the documents" in rows[3]["error"]
    assert (found.rows, found.errors) == (4, 1)
    assert sorted(path.name[:5] for path in (tmp_path / "out").iterdir()) == ["manif", "part-"]

    score_files(folder, tmp_path / "trec", reranker=fake(), run="run.trec")
    rows = read_out(tmp_path / "trec")
    assert [row.get("first_stage_score") for row in rows] == [9.5, None, 8, 7]
    assert np.isclose(rows[0]["logit"], 1 - 0.03)
    assert "six fields" in rows[1]["error"]
    assert "'q9' is not among the queries" in rows[3]["error"]


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = make_rows(30)
    write_jsonl(folder / "b.jsonl", rows[20:])
    write_jsonl(folder / "a.jsonl", rows[:20])
    (folder / "_SUCCESS").touch()
    (folder / "README.md").write_text("no rows")
    score_files(folder, tmp_path / "out", reranker=fake(), shard_rows=7)
    out = read_out(tmp_path / "out")
    assert [row["id"] for row in out] == [row["id"] for row in rows]
    # What came out can go in again.
    score_files(tmp_path / "out", tmp_path / "again", reranker=fake())
    assert read_out(tmp_path / "again") == out
    (folder / "c.csv").write_text("query,text\nred,red\n")
    with pytest.raises(InputError, match=r"a\.jsonl is jsonl, c\.csv is csv"):
        score_files(folder, tmp_path / "mixed", reranker=fake())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"question,passage\na,b\n", "question, passage"),
        ("in.jsonl", b'{"question": "a", "text": "b"}\n' * 3, "lacks 'query'"),
        ("in.json", b'[{"query": "a", "text": "b"}]', "JSON array"),
        ("in.jsonl", '{"query": "a", "text": "b"}'.encode("utf-16"), "UTF-16"),
        ("in.csv", b"query,text,text\na,b,c\n", "two columns"),
        ("in.parquet", b"PAR1 and nothing else", "Parquet"),
        ("in.txt", b"just a text\n", "Expected JSON lines"),
    ],
)
def test_a_file_without_pairs_is_told_before_anything_is_written(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        score_files(tmp_path / name, tmp_path / "out", reranker=fake())
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_missing_or_a_run_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"There is no file .*none\.jsonl"):
        score_files(tmp_path / "none.jsonl", tmp_path / "out")
    with pytest.raises(ConfigurationError, match="go on after an interruption"):
        score_files("-", tmp_path / "out")
    path = write_jsonl(tmp_path / "in.jsonl", make_rows(2))
    with pytest.raises(ConfigurationError, match="belongs to a BEIR folder"):
        score_files(path, tmp_path / "out", run="run.trec")
    with pytest.raises(ConfigurationError, match=r"neither in .* nor here"):
        score_files(beir(tmp_path / "set"), tmp_path / "out", run="none.trec")


def test_a_line_that_is_too_long_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LONGEST_LINE", 1000)
    rows = make_rows(9)
    rows[4]["text"] = "x" * 5000
    score_files(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", reranker=fake())
    assert [i for i, row in enumerate(read_out(tmp_path / "out")) if not scored(row)] == [4]
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["query", "text"], *([row["query"], row["text"]] for row in rows)])
    score_files(tmp_path / "in.csv", tmp_path / "csv", reranker=fake())
    assert [i for i, row in enumerate(read_out(tmp_path / "csv")) if not scored(row)] == [4]


def test_an_empty_file_loads_no_model(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    found = score_files(tmp_path / "in.jsonl", tmp_path / "out", model="no/such-model")
    assert (found.rows, found.shards, found.problems) == (0, 0, ())


# -- interruptions --------------------------------------------------------------------------------------------------

KILLED = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from poison import Poisoned
from rerank_plugins import Reranker
from rerank_plugins.bulk import score_files
path, out, log = map(Path, sys.argv[1:])
score_files(path, out, reranker=Reranker(Poisoned(log, seconds=0.001)), shard_rows=50)
"""


def test_kill_9_loses_no_row_and_scores_at_most_one_shard_twice(tmp_path: Path) -> None:
    rows = make_rows(600)
    for row in rows:
        row["text"] = f"{row['id']} {row['text']}"
    path, out, log = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", tmp_path / "log"
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", KILLED, path, out, log])
        # At a moment that differs, once something was scored: in the midst of a shard, of a write, of the manifest.
        before = log.stat().st_size if log.exists() else 0
        while kills < 3 and process.poll() is None and (not log.exists() or log.stat().st_size < before + 4000):
            time.sleep(0.003 * (kills + 1))
        if kills == 3:
            assert process.wait(60) == 0
            break
        process.kill()
        process.wait()
        kills += 1
    assert [{name: row[name] for name in rows[0]} for row in read_out(out)] == rows
    assert all(scored(row) for row in read_out(out))
    times = Counter(log.read_text().splitlines())
    assert set(times) == {row["text"] for row in rows}
    assert sum(times.values()) - len(rows) <= kills * 50


def test_what_is_there_is_kept_and_what_was_changed_is_scored_anew(tmp_path: Path) -> None:
    rows, backend = make_rows(95), FakeBackend(fingerprint="fake")
    path, out = tmp_path / "in.jsonl", tmp_path / "out"

    def run() -> tuple[int, int]:
        backend.calls.clear()
        found = score_files(write_jsonl(path, rows), out, reranker=Reranker(backend), shard_rows=10)
        assert [row["text"] for row in read_out(out)] == [row["text"] for row in rows]
        assert found.problems == ()
        return found.kept_rows, sum(map(len, backend.calls))

    texts = [dict.fromkeys((row["query"], row["text"]) for row in rows[i : i + 10]) for i in range(0, 95, 10)]
    assert run() == (0, sum(map(len, texts)))
    assert run() == (95, 0)
    rows[42]["text"] = "another text"
    assert run()[0] == 85
    rows += make_rows(20, seed=1)
    assert run()[0] == 90
    del rows[30:]
    assert run() == (30, 0)
    assert len(list(out.glob("part-*"))) == 3


def test_scores_of_another_model_other_settings_or_other_rows_are_not_mixed(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "in.jsonl", make_rows(30)), tmp_path / "out"
    score_files(path, out, reranker=fake(), shard_rows=10)
    before = read_out(out)
    with pytest.raises(ConfigurationError, match="fingerprint 'fake|fingerprint"):
        score_files(path, out, reranker=Reranker(FakeBackend(fingerprint="other")))
    with pytest.raises(ConfigurationError, match="scale 'probability'; this run has 'logit'"):
        score_files(path, out, reranker=fake(scale="logit"))
    with pytest.raises(ConfigurationError, match="shard_rows 10; this run has 7"):
        score_files(path, out, reranker=fake(), shard_rows=7)
    other = write_jsonl(tmp_path / "other.jsonl", make_rows(30, seed=5))
    with pytest.raises(ConfigurationError, match="scores of other rows"):
        score_files(other, out, reranker=fake())
    assert read_out(out) == before
    # Without its first ten rows: other shards, of other sizes, take the place of all.
    score_files(other, out, reranker=fake(scale="logit"), shard_rows=25, overwrite=True)
    assert len(list(out.glob("part-*"))) == 2
    assert [row["score"] for row in read_out(out)] == [row["logit"] for row in read_out(out)]


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", make_rows(3))
    with pytest.raises(ConfigurationError, match=r"holds other files, such as in\.jsonl"):
        score_files(path, tmp_path, reranker=fake(), overwrite=True)
    with pytest.raises(ConfigurationError, match="is a file"):
        score_files(path, path, reranker=fake())
    with pytest.raises(ConfigurationError, match="either reranker or its keywords"):
        score_files(path, tmp_path / "out", reranker=fake(), model="x")
    for size in (0, 1.5, "7", True):
        with pytest.raises(ConfigurationError, match="shard_rows must be an int of at least 1"):
            score_files(path, tmp_path / "out", reranker=fake(), shard_rows=size)  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_audit_finds_a_row_that_is_gone(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "in.jsonl", make_rows(30)), tmp_path / "out"
    score_files(path, out, reranker=fake(), shard_rows=10)
    shards = sorted(out.glob("part-*"))
    shards[1].write_text("".join(shards[1].read_text().splitlines(keepends=True)[:-1]))
    shards[2].write_text(shards[2].read_text().replace('"error": null', '"error": "both"', 1))
    found = score_files(path, out, reranker=fake())
    assert [problem.split(". ")[0] for problem in found.problems] == [
        f"{shards[1].name}: expected 10 rows, found 9",
        f"{shards[2].name}: 1 rows have not one of logit and error",
    ]
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    shards[1].unlink()
    shards[2].unlink()
    assert score_files(path, out, reranker=fake()).problems == ()


def test_a_cache_answers_for_pairs_that_are_known(tmp_path: Path) -> None:
    path, backend = write_jsonl(tmp_path / "in.jsonl", make_rows(30)), FakeBackend(fingerprint="fake")
    for out in ("one", "two"):
        score_files(path, tmp_path / out, reranker=Reranker(backend, cache=tmp_path / "scores.sqlite"))
    assert sum(map(len, backend.calls)) == len({(row["query"], row["text"]) for row in make_rows(30)})
    assert read_out(tmp_path / "one") == read_out(tmp_path / "two")


# -- a process of its own -------------------------------------------------------------------------------------------


def test_a_pair_that_ends_the_process_has_an_error_and_all_others_have_scores(tmp_path: Path) -> None:
    rows = make_rows(40)
    rows[3]["text"], rows[29]["text"], rows[35]["text"] = "poison", "more poison", "broken"
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    found = score_files(path, tmp_path / "out", reranker=Reranker(Poisoned()), shard_rows=20, isolate=True)
    out = read_out(tmp_path / "out")
    assert [i for i, row in enumerate(out) if not scored(row)] == [3, 29, 35]
    assert "process that scored this pair died" in out[3]["error"]
    assert "RuntimeError" in out[35]["error"]
    assert (found.errors, found.problems) == (3, ())
    expected = [word_overlap(row["query"], row["text"]) for row in out if scored(row)]
    assert np.allclose([row["logit"] for row in out if scored(row)], expected, atol=1e-5)


def test_a_process_that_dies_whatever_it_is_given_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rerank_plugins.bulk.process._DEATHS", 3)
    with (
        ScoringProcess(pickled(Reranker(Poisoned()))) as process,
        pytest.raises(ModelLoadError, match="died 3 times in a row"),
    ):
        process.score_rows(["red"] * 8, ["poison"] * 8)


def test_what_cannot_be_given_to_another_process_is_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", make_rows(3))
    with pytest.raises(ConfigurationError, match="cannot be given to another process"):
        score_files(path, tmp_path / "out", reranker=Reranker(FakeBackend(lambda query, text: 0.0)), isolate=True)


ORPHAN = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
from poison import Poisoned
from rerank_plugins import Reranker
from rerank_plugins.bulk import ScoringProcess
from rerank_plugins.bulk.process import pickled
if __name__ == "__main__":
    process = ScoringProcess(pickled(Reranker(Poisoned())))
    process.score_rows(["red"], ["red"])
    print(next(iter(process._pool._processes)), flush=True)
    time.sleep(60)
"""


def test_the_process_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    assert psutil.wait_procs([child], timeout=10)[1] == []


# -- what it costs --------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys
from rerank_plugins import Reranker
from rerank_plugins.bulk import score_files
from rerank_plugins.testing import FakeBackend
class Lengths(FakeBackend):
    def logits(self, pairs):
        found = super().logits(pairs)
        self.calls.clear()
        return found
score_files(sys.argv[1], sys.argv[2], reranker=Reranker(Lengths(lambda query, text: float(len(text)))), shard_rows=1000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    peaks = []
    for n in (3_000, 30_000):
        path = tmp_path / f"{n}.jsonl"
        with path.open("w") as file:
            for i in range(n):
                file.write(json.dumps({"query": "red fox", "text": f"{i} " + "a red fox runs " * 20}) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, path, tmp_path / f"out{n}"], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
    # 9 MB of input more.
    assert peaks[1] < peaks[0] + 4


def test_progress_tells_the_rate_and_the_time_left(tmp_path: Path) -> None:
    news: list[tuple[str, float]] = []
    path = write_jsonl(tmp_path / "in.jsonl", make_rows(100))
    for _ in range(2):
        score_files(path, tmp_path / "out", reranker=fake(), shard_rows=10, progress=lambda *one: news.append(one))
    first, second = news[:10], news[10:]
    assert [share for _, share in first] == sorted(share for _, share in first)
    assert first[-1][1] == second[-1][1] == 1.0
    assert all("pairs/s" in text and "left" in text for text, _ in first)
    assert second[-1][0] == "100 rows"


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    rows = [{"query": QUERY, "text": text} for text in TEXTS[:4]]
    path, out = write_jsonl(tmp_path / "in.jsonl", [*rows, {"query": QUERY, "text": None}]), tmp_path / "out"
    arguments = ["score", str(path), str(out), "--model", tiny("bert"), "--cache", str(tmp_path / "scores.sqlite")]
    done = CliRunner().invoke(app, [*arguments, "--scale", "logit"])
    assert done.exit_code == 0, done.output
    assert "5 rows in 1 shards" in done.output
    assert "1 rows with an error" in done.output
    assert "audit: as many rows as were read" in done.output
    logits = Reranker(tiny("bert")).logits(QUERY, TEXTS[:4])
    assert np.allclose([row["score"] for row in read_out(out)[:4]], logits, atol=1e-4)
    assert (tmp_path / "scores.sqlite").is_file()
    again = CliRunner().invoke(app, [*arguments, "--scale", "logit"])
    assert "5 were there already" in again.output
    other = CliRunner().invoke(app, arguments)
    assert other.exit_code == 2
    assert "--overwrite" in other.output
    (shard,) = out.glob("part-*")
    shard.write_text(shard.read_text().splitlines(keepends=True)[0])
    damaged = CliRunner().invoke(app, [*arguments, "--scale", "logit"])
    assert damaged.exit_code == 1
    assert "audit:" in damaged.output


def test_the_command_fails_where_no_row_could_be_scored(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"query": " ", "text": "a"}] * 3)
    done = CliRunner().invoke(app, ["score", str(path), str(tmp_path / "out"), "--model", tiny("bert")])
    assert done.exit_code == 1
    assert "no row could be scored" in done.output
    actors = CliRunner().invoke(app, ["score", str(path), str(tmp_path / "o"), "--actors", "2"])
    assert actors.exit_code == 2
    assert "--ray" in actors.output


def test_the_option_ray_may_stand_without_an_address() -> None:
    assert with_address(["in", "out", "--ray"]) == ["in", "out", "--ray", "local"]
    assert with_address(["--ray", "in.jsonl", "out"]) == ["--ray", "local", "in.jsonl", "out"]
    assert with_address(["in", "out", "--ray", "--actors", "2"])[2:] == ["--ray", "local", "--actors", "2"]
    for address in ("auto", "10.0.0.1:6379", "ray://head:10001", "local"):
        assert with_address(["in", "out", "--ray", address]) == ["in", "out", "--ray", address]
