from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import FAMILIES, QUERY, TEXTS, tiny
from sentence_transformers import CrossEncoder

from rerank_plugins.conversion import ConversionReport, convert
from rerank_plugins.conversion import _convert as conversion
from rerank_plugins.conversion._first_token import first_token_only
from rerank_plugins.errors import ConfigurationError, ScoringError

PAIRS = [(QUERY, text) for text in TEXTS]


def source_logits(path: str | Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    model = CrossEncoder(str(path), device="cpu")
    logits = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    return np.asarray(logits).reshape(len(pairs), -1)


def graph_logits(directory: Path, pairs: list[tuple[str, str]], session: object = None) -> np.ndarray:
    from transformers import AutoTokenizer

    session = session or onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    config = json.loads((directory / "config.json").read_text())
    batch = AutoTokenizer.from_pretrained(directory)(
        [q for q, _ in pairs], [t for _, t in pairs], truncation="longest_first", padding=True,
        max_length=config["rerank_plugins"]["max_length"], return_tensors="np",
    )  # fmt: skip
    return session.run(None, {i.name: batch[i.name] for i in session.get_inputs()})[0]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConversionReport]:
    out = tmp_path_factory.mktemp("int8") / "int8"
    return out, convert(tiny("bert"), out, int8=True)


@pytest.mark.parametrize("family", [*FAMILIES, "bert-nli"])
def test_graph_scores_as_its_source(family: str, tmp_path: Path) -> None:
    report = convert(tiny(family), tmp_path / "out")

    assert report.max_difference <= 1e-4
    assert report.n_labels == (3 if family == "bert-nli" else 1)
    expected = source_logits(tiny(family), PAIRS)
    for part in (PAIRS, PAIRS[:1], PAIRS[2:5]):
        rows = [PAIRS.index(pair) for pair in part]
        np.testing.assert_allclose(graph_logits(tmp_path / "out", part), expected[rows], atol=1e-4)


def test_graph_has_the_promised_inputs_and_output(tmp_path: Path) -> None:
    convert(tiny("bert"), tmp_path / "out")

    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(i.name, i.type) for i in session.get_inputs()] == [
        (name, "tensor(int64)") for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert [(o.name, o.type) for o in session.get_outputs()] == [("logits", "tensor(float)")]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "model.onnx",
        "tokenizer.json",
        "config.json",
    }
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert tokenizer["truncation"] is None
    assert tokenizer["padding"] is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_labels"] == 1
    assert config["model_type"] == "bert"
    assert config["rerank_plugins"]["weights"] == "fp32"
    assert config["rerank_plugins"]["checked"]["max_logit_difference"] <= 1e-4


def test_labels_are_kept(tmp_path: Path) -> None:
    convert(tiny("bert-nli"), tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "contradiction", "1": "entailment", "2": "neutral"}


def test_int8_stores_integers_and_keeps_the_order(converted: tuple[Path, ConversionReport]) -> None:
    out, report = converted

    assert report.rank_correlation >= 0.99
    graph = onnx.load(str(out / "model.onnx")).graph
    stored = {i.name: i for i in graph.initializer}
    large = [i for i in stored.values() if len(i.dims) == 2 and min(i.dims) >= 16]
    assert large
    assert {i.data_type for i in large} == {onnx.TensorProto.INT8}


def test_int8_score_does_not_depend_on_its_batch(converted: tuple[Path, ConversionReport]) -> None:
    out, _ = converted
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])

    together = graph_logits(out, PAIRS, session)
    alone = np.concatenate([graph_logits(out, [pair], session) for pair in PAIRS])

    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_causal_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="torch"):
        convert(tiny("causal-qwen3"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_existing_files_are_kept_unless_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")

    with pytest.raises(ConfigurationError, match="overwrite"):
        convert(tiny("bert"), out)
    assert (out / "mine.txt").read_text() == "mine"

    convert(tiny("bert"), out, overwrite=True)
    assert (out / "model.onnx").is_file()
    assert not (out / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_graph_that_scores_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "MAX_LOGIT_DIFFERENCE", -1.0)

    with pytest.raises(ScoringError, match="differ"):
        convert(tiny("bert"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_int8_that_changes_the_order_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "MIN_RANK_CORRELATION", 1.1)

    with pytest.raises(ScoringError, match="Spearman"):
        convert(tiny("bert"), tmp_path / "out", int8=True)
    assert not list(tmp_path.iterdir())


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny("bert")
    capfd.readouterr()

    seen: list[float] = []
    convert(tiny("bert"), tmp_path / "out", progress=lambda stage, share: seen.append(share))

    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_spearman_averages_ties() -> None:
    assert conversion._spearman(np.array([1.0, 1.0, 2.0]), np.array([5.0, 5.0, 9.0])) == pytest.approx(1.0)
    assert conversion._spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "electra"])
def test_the_last_layer_computes_its_first_token_alone_and_scores_the_same(family: str) -> None:
    model = CrossEncoder(tiny(family), device="cpu", model_kwargs={"attn_implementation": "eager"})
    pairs = [
        ("how do I undo a commit", "git revert undoes a commit"),
        ("x", "a much longer text than that, with padding"),
    ]
    features = model[0].tokenizer(pairs, padding=True, return_tensors="pt")
    trunk = model[0].auto_model
    with torch.inference_mode():
        whole = trunk(**features, output_hidden_states=True)
        with first_token_only(model):
            first = trunk(**features, output_hidden_states=True)
        after = trunk(**features, output_hidden_states=True)
    assert whole.hidden_states[-1].shape[1] > 1
    assert first.hidden_states[-1].shape[1] == 1
    assert torch.allclose(first.logits, whole.logits, atol=1e-5)
    assert torch.equal(after.logits, whole.logits)
    assert after.hidden_states[-1].shape == whole.hidden_states[-1].shape
