"""`rerank-plugins inspect`: what it prints of a model, and what it says every engine would do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import tiny
from test_backends import converted
from typer.testing import CliRunner

from rerank_plugins.cli._app import app


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def facts(*arguments: str) -> dict[str, object]:
    return json.loads(shown(*arguments, "--json"))  # type: ignore[no-any-return]


def test_a_graph_shows_what_stands_in_it_and_who_would_run_it() -> None:
    found = facts(converted("bert"))
    assert found["family"] == "bert, BertForSequenceClassification"
    assert found["classes"] == "1: LABEL_0"
    assert found["graphs"] == ["model.onnx: fp32, input_ids, attention_mask, token_type_ids -> logits"]
    assert found["tokens"] == "256 at most"
    engines = found["engines"]
    assert isinstance(engines, dict)
    assert engines["onnx"] == "yes: model.onnx, stored as fp32, in fp32"
    assert engines["torch"].startswith("no: ")
    assert "only an ONNX graph" in engines["torch"]
    assert found["auto"] == "openvino"


def test_a_checkpoint_without_a_graph_says_how_to_get_one() -> None:
    output = shown(tiny("roberta"))
    assert "weights:" in output
    assert "model.safetensors (" in output
    assert "rerank-plugins convert" in output
    assert 'backend="auto" takes torch.' in output


def test_a_decoder_shows_its_template() -> None:
    assert facts(tiny("causal-qwen3"))["prompt"] == "chat template"


def test_a_model_that_nothing_can_run_still_says_why(tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny("bert"), model)
    (model / "model.safetensors").unlink()
    output = shown(str(model))
    assert "no weights" in output
    assert "finds no engine" in output


def test_a_missing_directory_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["inspect", "./no-such-directory"])
    assert result.exit_code == 1
    assert "There is no directory" in result.output
