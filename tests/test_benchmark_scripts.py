"""The scripts of benchmarks/ run, each on next to nothing: figures are there, and mean what their names say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny
from test_backends import converted

pytest.importorskip("psutil")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the script of a name with arguments, and gives what it writes."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def call(written: Any) -> Any:
    """As `written`, of a script that writes JSON."""
    return lambda name, *arguments: json.loads(written(name, *arguments, "--json"))


def test_batching(call: Any) -> None:
    given = ("--calls", "1", "--candidates", "3", "--rounds", "1", "--costs", "16")
    found = call("batching", "--model", converted("bert"), "--backends", "onnx", *given)
    (rows,) = found["engines"].values()
    assert set(rows) == {"few", "16"}
    assert rows["few"]["times_as_fast"] == 1.0
    assert all(row["seconds"] > 0 for row in rows.values())


def test_bulk(call: Any) -> None:
    found = call("bulk", "--pairs", "8", "--model", converted("bert"), "--backend", "onnx", "--no-ray")
    assert set(found["rows"]) == {"Reranker.score", "one machine"}
    assert found["rows"]["Reranker.score"]["rate"] == 1.0
    assert all(row["pairs_per_s"] > 0 and row["core_hours_a_million"] > 0 for row in found["rows"].values())


def test_cache(call: Any) -> None:
    found = call("cache", "--candidates", "3", "--rounds", "1", "--backend", "onnx")
    assert found["same_order"] is True
    assert set(found["seconds"]) == {"no cache", "memory", "file"}


def test_concurrency(call: Any) -> None:
    given = ("--callers", "2", "--candidates", "2", "--calls", "1", "--large", "8", "--rounds", "1")
    found = call("concurrency", "--model", converted("bert"), "--backend", "onnx", *given)
    assert set(found["rows"]) == {"uncoordinated", "merged"}
    assert all(row["pairs_per_second"] > 0 and row["p95_s"] >= row["p50_s"] for row in found["rows"].values())
    assert found["large"] == 8


def test_imports(call: Any) -> None:
    found = call("imports", "--rounds", "1")
    assert found["loaded"] == []
    assert 0 < found["seconds"] < 60


def test_memory(call: Any) -> None:
    found = call("memory", "--calls", "2", "--longest", "30", "--engines", "onnx:int8")
    (rows,) = found["engines"].values()
    assert [row["calls"] for row in rows] == [1, 2]
    assert all(row["peak_bytes"] > 1e7 for row in rows)


def test_mining(call: Any, tmp_path: Path) -> None:
    pairs = [
        {"query": f"what is {word}", "passage": f"{word} is the answer to question {row}", "label": float(right)}
        for word in ("git", "water", "bamboo")
        for row, right in ((1, True), (2, False))
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = call("mining", str(file), "--model", tiny("bert"), "--queries", "3", "--rounds", "1")
    assert set(found) == {"mine_hard_negatives", "mine, same cross-encoder in torch", "mine as it comes", "machine"}
    assert all(found[name]["seconds"] > 0 for name in found if name != "machine")


def test_serve(call: Any) -> None:
    given = ("--clients", "1", "--texts", "2", "--calls", "1", "--seconds", "0.1", "--rounds", "1", "--turns", "2")
    found = call("serve", "--model", converted("bert"), "--threads", "1", *given)
    assert set(found["servers"]) == {"serve", "serve, bundled model"}
    for figures in found["servers"].values():
        assert figures["documents_per_s"] > 0
        assert figures["memory_mb"] > 10
    assert set(found["http_backend"]) == {"in_process_ms", "over_http_ms", "added_ms"}


def test_spans(written: Any, tmp_path: Path) -> None:
    facts = [f"The {animal} eats {food} all day long." for animal, food in
             (("panda", "bamboo"), ("koala", "eucalyptus"), ("whale", "krill"), ("cow", "grass"))]  # fmt: skip
    pairs = [{"query": f"what does the {fact.split()[1]} eat", "passage": fact, "label": 1} for fact in facts]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    lines = written("spans", str(file), "--join", "2", "--compress", "True 0.5").splitlines()
    assert lines[0].startswith("pairs.jsonl: 4 queries, best 3 of 10, ")
    assert lines[1].split() == ["compress", "tokens", "answers", "a", "query,", "ms"]
    shares = {row[0]: (float(row[1]), float(row[2])) for row in (line.split() for line in lines[2:])}
    assert set(shares) == {"True", "0.5"}
    # Of every paragraph of two sentences the one with the answer stays.
    assert all(0.2 < tokens < 0.9 and answers == 1.0 for tokens, answers in shares.values())


def test_tools(call: Any, tmp_path: Path) -> None:
    tools = {"get_weather": "tells the weather of a city", "send_mail": "sends a mail to a person",
             "convert_money": "converts an amount of money into another currency"}  # fmt: skip
    asked = {"q1": "what is the weather like in Lisbon", "q2": "send a mail to Anna"}
    rows = {"corpus": {name: f"{name} {text}" for name, text in tools.items()}, "queries": asked}
    for name, texts in rows.items():
        lines = (json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "qrels.tsv").write_text("q1\tget_weather\t1\nq2\tsend_mail\t1\n")
    (tmp_path / "candidates.tsv").write_text("q1\tget_weather\t1\nq2\tget_weather\t1\n")
    found = call("tools", str(tmp_path))
    assert (found["requests"], found["tools"]) == (2, 3)
    # Among the first five are all three.
    assert all(shares == [1.0, 1.0, 1.0] for shares in found["recall"].values())
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_every_script_has_a_test() -> None:
    scripts = {path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py")}
    # The comparison has a file of tests of its own, `test_benchmark`.
    assert {f"test_{name}" for name in scripts - {"compare"}} <= set(globals())
