from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from rerank_plugins import Reranker
from rerank_plugins.cli._app import app
from rerank_plugins.models import BUNDLED_NAME, bundled_directory, published


def table(columns: int, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["models", *arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    assert result.stderr == ""
    return result.stdout


def test_ids_are_hub_ids_and_listed_once() -> None:
    ids = [model.id for model in published()]
    assert len(set(ids)) == len(ids)
    assert all(len(model_id.split("/")) == 2 and " " not in model_id for model_id in ids)


def test_every_family_of_the_backends_is_listed() -> None:
    families = {model.family for model in published()}
    assert {"bert", "electra", "roberta", "xlm-roberta", "deberta-v2", "modernbert", "qwen3", "gemma"} <= families


def test_figures_are_percentages_with_a_source() -> None:
    for model in published():
        figures = [model.ndcg_dl19, model.mrr_msmarco, model.figure]
        assert all(20 < figure < 100 for figure in figures if figure is not None), model
        assert (model.figure is None) == (model.measure is None), model
        assert (model.source is None) == all(figure is None for figure in figures), model


def test_figures_are_those_of_the_published_tables() -> None:
    by_id = {model.id: model for model in published()}
    small = by_id["cross-encoder/ms-marco-MiniLM-L6-v2"]
    assert (small.ndcg_dl19, small.mrr_msmarco, small.docs_per_second) == (74.30, 39.01, 1800)
    assert by_id["cross-encoder/stsb-roberta-base"].figure == 90.17
    assert by_id["Alibaba-NLP/gte-reranker-modernbert-base"].figure == 56.19
    assert by_id["BAAI/bge-reranker-v2-gemma"].figure is None


def test_what_one_must_know_is_noted() -> None:
    for model in published():
        if model.head == "causal yes/no":
            assert model.backends == ("torch",), model
        if model.head == "three-class NLI":
            assert "label" in (model.note or ""), model
        if model.licence.startswith("CC-BY-NC"):
            assert "commercial" in (model.note or ""), model


def test_a_pipe_gets_one_line_for_each_model() -> None:
    shown = table(80).splitlines()
    for model in published():
        (line,) = [line for line in shown if line.startswith(f"{model.id} ")]
        assert all(value in line for value in (model.family, model.head, str(model.max_length), model.licence))
    assert "74.30" in "\n".join(shown)
    assert "\x1b" not in "\n".join(shown)


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_a_terminal_gets_no_line_that_is_too_long(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", table(columns))
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown
    assert all(model.id in shown for model in published())
    assert all(model.measure in " ".join(shown.split()) for model in published()[:9] if model.measure)
    assert BUNDLED_NAME in shown


def test_json_has_every_field() -> None:
    rows = json.loads(table(80, "--json"))
    assert [row["id"] for row in rows] == [model.id for model in published()]
    assert rows[0] == {
        "id": "cross-encoder/ms-marco-TinyBERT-L2-v2",
        "family": "bert",
        "languages": "en",
        "head": "one logit",
        "max_length": 512,
        "ndcg_dl19": 69.84,
        "mrr_msmarco": 32.56,
        "docs_per_second": 9000,
        "measure": None,
        "figure": None,
        "source": "sbert.net",
        "licence": "Apache-2.0",
        "backends": ["onnx", "openvino", "torch"],
        "note": None,
    }


@pytest.mark.bundled
def test_the_bundled_model_is_complete() -> None:
    assert {"model.onnx", "tokenizer.json", "config.json"} <= {file.name for file in bundled_directory().iterdir()}


@pytest.mark.bundled
def test_the_bundled_model_goes_by_its_name_too() -> None:
    named = Reranker(BUNDLED_NAME)
    assert named.model_name == Reranker().model_name == BUNDLED_NAME
    assert named.config == Reranker().config
    assert named.logits("q", ["a text"]).tolist() == Reranker().logits("q", ["a text"]).tolist()
