from __future__ import annotations

import json

import pytest
from checkpoints import tiny
from typer.testing import CliRunner

from rerank_plugins.cli._app import app


@pytest.mark.bundled
def test_our_engines_take_turns_on_the_bundled_model() -> None:
    found = CliRunner().invoke(app, ["benchmark", "--rounds", "1", "--candidates", "12", "--threads", "1", "--json"])
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert {"rerank-plugins onnx, auto", "rerank-plugins openvino, auto"} <= set(rows)
    assert all(row["documents_per_s"] > 0 and len(row["all_s"]) == 1 for row in rows.values())
    assert rows["rerank-plugins onnx, auto"]["ratio"] == 1.0
    assert any("torch" in note for note in report["notes"])


def test_what_else_is_installed_ranks_alike() -> None:
    arguments = ["benchmark", "--model", tiny("bert"), "--rounds", "1", "--candidates", "12", "--json"]
    report = json.loads(CliRunner().invoke(app, arguments).stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert {"sentence-transformers", "rerank-plugins torch, auto"} <= set(rows)
    assert all(row["same_top_10"] for row in rows.values())
    # LlamaIndex's own cuts at 512 tokens, whatever the model takes: 256 here.
    assert any(note.startswith("LlamaIndex SentenceTransformerRerank") for note in report["notes"])


def test_a_model_that_nothing_can_run_is_an_error() -> None:
    found = CliRunner().invoke(app, ["benchmark", "--model", "no/such-model", "--rounds", "1"])
    assert found.exit_code == 2
    assert "Nothing can run this model here" in found.stderr
