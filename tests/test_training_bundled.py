"""The recipe of the bundled model, on a small copy of its data."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny
from test_training import RIDDLES, config, riddles, tiny_model

from rerank_plugins.backends._late_interaction import load_cross_encoder
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.models import bundled_directory
from rerank_plugins.training import _api as api
from rerank_plugins.training import _bundled, fit, train_bundled
from rerank_plugins.training._data import Group, normalise
from rerank_plugins.training._loop import Scorer, TrainingResult, average, evaluate_groups
from rerank_plugins.training._warm_start import from_graph


def test_frozen_layers_stay(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model[0].auto_model.named_parameters()}

    fit(model, riddles(40, 0), [], config(steps=3, freeze_embeddings=True, freeze_layers=1), tmp_path)

    moved = {name for name, p in model[0].auto_model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("encoder.layer.1.") for name in moved)
    assert not any(name.startswith(("embeddings.", "encoder.layer.0.")) for name in moved)


@pytest.mark.parametrize(
    "settings", [{"freeze_layers": 1, "freeze_embeddings": False}, {"freeze_layers": -1, "freeze_embeddings": True}]
)
def test_layers_are_frozen_from_below_only(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="freeze_layers"):
        config(**settings)


def test_more_layers_than_there_are_cannot_be_frozen(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="2 layers"):
        fit(tiny_model(), riddles(8, 0), [], config(freeze_layers=3, freeze_embeddings=True), tmp_path)


def test_the_mean_of_runs_is_measured_on_the_lists_of_each() -> None:
    models = [tiny_model(), tiny_model()]
    with torch.no_grad():
        for model, value in zip(models, (1.0, 3.0), strict=True):
            model[1].linear.weight.fill_(value)
            model[1].idf.fill_(value)
    dev = [riddles(40, 1), riddles(20, 2)]
    runs = [TrainingResult(5, 40, 1.5, (0.2, 0.4), 0.4), TrainingResult(7, 56, 2.0, (0.3, 0.1), 0.1)]

    mean = tiny_model()
    found = average(mean, [model.state_dict() for model in models], dev, config(), runs)

    assert (mean[1].linear.weight == 2).all()
    assert (mean[1].idf == 2).all()
    scorer = Scorer(mean, max_length=32, micro_batch=32, bf16=False, device="cpu")
    expected = np.mean([evaluate_groups(scorer, groups)[0] for groups in dev])
    assert found.best == pytest.approx(expected, abs=1e-6)
    assert found.measures == pytest.approx((0.25, expected), abs=1e-6)
    assert (found.steps, found.pairs, found.seconds) == (12, 96, 3.5)


def test_paragraphs_are_neighbouring_sentences() -> None:
    sentences = [f"sentence {number} has five words" for number in range(8)]

    found = _bundled.paragraphs(sentences, words=15)

    assert [len(part) for _, part in found] == [3, 3, 2]
    assert [text for _, part in found for text in part] == sentences
    assert found[0][0] == " ".join(sentences[:3])


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every set of the recipe with a few questions, and one evaluation query that must not be learned."""
    folder = tmp_path / "data"
    for name in _bundled.LABELLED_SETS:
        rows = []
        for number in range(12 if name == "squad-sentences" else 3):
            split = "dev" if number % 2 else "train"
            for query, answer in RIDDLES.items():
                asked = f"{name} {number}: what of {query}?"
                rows.append({"query": asked, "passage": f"{name} {number} the {answer}", "label": 1, "split": split})
                wrong = f"{name} {number} nothing of {query}"
                rows.append({"query": asked, "passage": wrong, "label": 0, "split": split})
        (folder / "train" / name).mkdir(parents=True)
        with gzip.open(folder / "train" / name / "pairs.jsonl.gz", "wt") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "eval" / "set").mkdir(parents=True)
    secret = "squad-sentences 0: what of panda?"
    (folder / "eval" / "set" / "queries.jsonl").write_text(json.dumps({"_id": "1", "text": secret}) + "\n")
    documents = [
        (f"Title {n} of {q}", f"Text {n} is of the {a}. It has a second sentence {n} on {q}, of a good many words.")
        for n in range(5)
        for q, a in RIDDLES.items()
    ]
    monkeypatch.setattr(_bundled, "_documents", lambda corpus: documents)
    for module in (_bundled, api):
        monkeypatch.setattr(module, "minilm_directory", lambda extra: tiny("bert"))
    for name, few in (
        ("LABELLED_SETS", {**dict.fromkeys(_bundled.LABELLED_SETS, 4), "squad-sentences": 64}),
        ("HELD_OUT", {"squad-sentences": 2, "selqa-dev": 2}),
        ("PSEUDO_QUERIES", 8),
        ("QUESTION_SOURCES", {"squad-sentences": 5}),
    ):
        monkeypatch.setattr(_bundled, name, few)
    return folder


def test_the_recipe_asks_of_sentences_and_paragraphs(data: Path, tmp_path: Path) -> None:
    groups, dev = _bundled.prepare(data, tmp_path / "kept", device="cpu")

    kinds = Counter(group.kind for group in groups)
    assert kinds["squad-sentences"] == kinds["squad-paragraphs"] == 32
    assert kinds["selqa-dev"] > 0
    assert kinds["nq-open-oracle"] == 4
    assert kinds["question"] == 5
    assert sum(kinds[kind] for kind in ("title", "keywords", "span", "sentence")) > 0
    asked = {group.query for group in groups}
    assert not asked & {group.query for group in dev if group.judged}
    assert "squad-sentences 0: what of panda?" not in asked
    for group in groups:
        assert len(set(map(normalise, group.passages))) == len(group.passages)
        assert sum(group.target) == pytest.approx(1, abs=1e-3)
    asked_of = [group for group in groups if group.kind == "squad-paragraphs"]
    assert all(group.gains[0] == 1 for group in asked_of)
    lengths = {len(group.passages[0].split()) for group in asked_of}
    # Eighteen sentences of four words each, and what was left at the end.
    assert lengths == {72, 20}

    again = _bundled.prepare(data, tmp_path / "kept", device="cpu")
    assert again == (groups, dev)

    other, other_dev = _bundled.prepare(data, tmp_path / "kept", seed=1, device="cpu")
    assert other != groups
    # Another seed's run may be averaged with this one: what one held out, the other must not learn.
    held_out = {group.query for group in [*dev, *other_dev]}
    # Of these few words, the same keywords come out of more than one text.
    cut = {"title", "span", "sentence"}
    assert {group.kind for group in dev} >= {"pseudo", "selqa-dev"}
    learned = {group.query for group in [*groups, *other] if group.judged or group.kind in cut}
    assert held_out & learned == set()


def test_there_is_at_least_one_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="runs"):
        train_bundled(tmp_path, tmp_path / "out", runs=0)


def test_the_recipe_makes_a_model(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(model: Any, groups: list[Group], dev: list[Group], *rest: Any) -> Any:
        return fit(model, groups[:8], dev[:8], *rest)

    def few(model: Any, states: Any, dev: list[list[Group]], *rest: Any) -> Any:
        assert len(states) == len(dev) == 2
        return average(model, states, [groups[:8] for groups in dev], *rest)

    monkeypatch.setattr(api, "fit", short)
    monkeypatch.setattr(api, "average", few)
    made = train_bundled(data, tmp_path / "out", minutes=0.02, device="cpu")

    loaded = load_cross_encoder(made.path, device="cpu")
    assert float(loaded[1].scale) == pytest.approx(made.scale)
    assert loaded[1].idf.any()
    assert (made.path / "onnx" / "model.onnx").is_file()
    runs = json.loads((made.path / "training.json").read_text())["runs"]
    assert [run["steps"] for run in runs] != [0, 0]
    assert made.result.steps == sum(run["steps"] for run in runs)
    card = (made.path / "README.md").read_text()
    assert "--bundled" in card
    assert "--minutes 0.02 --runs 2" in card


def test_the_recipe_goes_on_from_a_model(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def refuse(model: Any, groups: list[Group], *rest: Any) -> Any:
        raise Started(model, groups)

    monkeypatch.setattr(api, "fit", refuse)
    with pytest.raises(Started) as started:
        train_bundled(data, tmp_path / "out", trunk="bundled", device="cpu")

    model, groups = started.value.args
    assert "squad-paragraphs" in {group.kind for group in groups}
    start = from_graph(bundled_directory() / "model.onnx", seed=0)
    pairs = [("what of paris", "the capital"), ("what of paris", "the bamboo")]
    expected = start.predict(pairs, activation_fn=torch.nn.Identity())
    scorer = Scorer(model, max_length=32, micro_batch=8, bf16=False, device="cpu")
    got = scorer(["what of paris"] * 2, ["the capital", "the bamboo"]).detach().numpy()
    assert np.abs(got - expected).max() < 1e-3
