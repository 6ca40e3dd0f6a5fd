from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from rerank_plugins import Reranker
from rerank_plugins.calibration import Calibration, expected_calibration_error, fit_calibration
from rerank_plugins.cli._app import app
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.evaluation.thresholds import Threshold, roc_auc, threshold_for
from rerank_plugins.testing import FakeBackend


def sample(n: int = 4000, scale: float = 0.5, shift: float = -1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are too sure of themselves, and labels drawn from the true probabilities."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 4, n)
    return logits, (random.random(n) < 1 / (1 + np.exp(-(scale * logits + shift)))).astype(float)


def test_fit_finds_the_map_that_made_the_labels() -> None:
    found = fit_calibration(*sample())
    assert found.slope == pytest.approx(0.5, abs=0.05)
    assert found.intercept == pytest.approx(-1.0, abs=0.1)


def test_calibration_lowers_the_expected_calibration_error() -> None:
    logits, labels = sample()
    before = expected_calibration_error(logits, labels)
    after = expected_calibration_error(fit_calibration(logits, labels)(logits), labels)
    assert before > 0.1
    assert after < 0.02


def test_expected_calibration_error_of_known_cases() -> None:
    assert expected_calibration_error([0.0] * 4, [0, 1, 0, 1]) == 0.0
    assert expected_calibration_error([40.0, -40.0], [1, 0]) == pytest.approx(0.0, abs=1e-12)
    assert expected_calibration_error([40.0, 40.0], [0, 0]) == pytest.approx(1.0)
    assert expected_calibration_error([math.log(3)] * 4, [1, 1, 1, 1]) == pytest.approx(0.25)


@given(st.lists(st.tuples(st.floats(-30, 30), st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=40))
def test_a_fit_never_turns_the_order(pairs: list[tuple[float, float]]) -> None:
    logits, labels = map(list, zip(*pairs, strict=True))
    if min(labels) == max(labels):
        with pytest.raises(InputError, match="all labels are the same"):
            fit_calibration(logits, labels)
        return
    found = fit_calibration(logits, labels)
    assert found.slope > 0
    assert math.isfinite(found.intercept)


def test_weights_count() -> None:
    logits, labels = [-1.0, -1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]
    assert (
        fit_calibration(logits, labels, [1, 9, 1, 9]).intercept
        > fit_calibration(logits, labels, [9, 1, 9, 1]).intercept
    )


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match="one label and weight for each logit"):
        fit_calibration([1.0, 2.0], [1.0])


def test_a_reranker_reports_calibrated_scores_in_the_same_order(tmp_path: Path) -> None:
    calibration = Calibration(0.5, -1.0)
    calibration.save(tmp_path / "calibration.json")
    texts = ["4", "-2", "9", "4"]
    plain = Reranker(FakeBackend(lambda query, text: float(text))).rank("q", texts)
    for given_as in (
        calibration,
        tmp_path / "calibration.json",
        str(tmp_path / "calibration.json"),
        {"slope": 0.5, "intercept": -1},
    ):
        ranking = Reranker(FakeBackend(lambda query, text: float(text)), calibration=given_as).rank("q", texts)
        assert [item.index for item in ranking] == [item.index for item in plain]
        assert [item.logit for item in ranking] == [item.logit for item in plain]
        assert ranking[0].score == pytest.approx(1 / (1 + math.exp(-3.5)))
    logit = Reranker(FakeBackend(lambda query, text: float(text)), calibration=calibration, scale="logit")
    assert [item.score for item in logit.rank("q", texts)] == [3.5, 1.0, 1.0, -2.0]
    assert [item.text for item in logit.rank("q", texts, min_score=0)] == ["9", "4", "4"]


def test_a_blank_text_stays_at_zero_and_last() -> None:
    ranking = Reranker(FakeBackend(), calibration=Calibration(1e-3, 5.0)).rank("q", ["", "x"])
    assert [(item.index, item.score > 0.5) for item in ranking] == [(1, True), (0, False)]
    assert ranking[1].score == 0.0


def test_the_configuration_holds_plain_data() -> None:
    reranker = Reranker(FakeBackend(), calibration=Calibration(2.0, 1.0))
    assert reranker.config["calibration"] == {"slope": 2.0, "intercept": 1.0}
    json.dumps(reranker.config["calibration"])
    assert Reranker(**reranker.config).config == reranker.config


@pytest.mark.parametrize(
    "bad",
    [{"slope": 0, "intercept": 0}, {"slope": -1.0, "intercept": 0}, {"slope": math.nan, "intercept": 0}, {"slope": 1},
     [1, 2], {"slope": 1, "intercept": 0, "more": 1}, {"slope": "1", "intercept": 0}, "no/such/file.json"],
)  # fmt: skip
def test_what_is_no_calibration_is_refused(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="calibration"):
        Reranker(FakeBackend(), calibration=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("framework", ["langchain", "llama_index"])
def test_adapters_take_a_calibration(framework: str, tmp_path: Path) -> None:
    import importlib

    rerank = importlib.import_module(f"rerank_plugins.{framework}").CrossEncoderRerank
    Calibration(0.5, -1.0).save(tmp_path / "calibration.json")
    adapter = rerank(model=FakeBackend(), calibration=tmp_path / "calibration.json")
    assert adapter.calibration == {"slope": 0.5, "intercept": -1.0}
    assert adapter._own is adapter._own
    assert adapter._own.config["calibration"] == adapter.calibration
    shared = Reranker(FakeBackend(), calibration=Calibration(2.0, 0.0))
    assert rerank(reranker=shared).calibration == {"slope": 2.0, "intercept": 0.0}
    with pytest.raises(ConfigurationError, match="calibration"):
        rerank(calibration=tmp_path / "missing.json")


def test_the_command_fits_reports_and_saves(tmp_path: Path) -> None:
    from checkpoints import tiny

    random = np.random.default_rng(1)
    words = ["panda", "bamboo", "paris", "france", "china", "git", "commit", "river", "mountain", "bear"]
    reranker = Reranker(tiny("bert"), backend="torch")
    texts = {f"{word} {i}": [" ".join(random.choice(words, 4)) for _ in range(10)] for i, word in enumerate(words * 2)}
    logits = {query: reranker.logits(query, passages) for query, passages in texts.items()}
    centre = float(np.mean(list(logits.values())))
    lines = []
    for query, passages in texts.items():
        for text, logit in zip(passages, logits[query], strict=True):
            label = int(random.random() < 1 / (1 + math.exp(-2 * (logit - centre))))
            lines.append(json.dumps({"query": query, "passage": text, "label": label}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    command = ["calibrate", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "c.json"), "--model", tiny("bert")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "200 pairs of 20 queries" in done.output
    assert re.search(r"AUC 0\.9\d{3} .* calibrated scores from 0\.\d{4} to [01]\.\d{4}", done.output)
    assert re.search(r"for precision 0\.9: min_score=0\.\d+ \(precision 0\.9", done.output)
    assert re.search(r"for recall 0\.95: min_score=0\.\d+ \(precision 0\.\d+, recall 0\.9[5-9]", done.output)
    found = Calibration.of(tmp_path / "c.json")
    assert found.slope == pytest.approx(2.0, rel=0.5)
    assert found.intercept == pytest.approx(-2 * centre, rel=0.5)
    assert "exists" in CliRunner().invoke(app, command).output
    (tmp_path / "bad.jsonl").write_text(lines[0] + "\n{}\n")
    bad = CliRunner().invoke(app, ["calibrate", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "d.json")])
    assert bad.exit_code == 2
    assert "bad.jsonl" in bad.output


def calibrate(tmp_path: Path, logits: dict[str, list[tuple[float, float]]], *options: str) -> Result:
    """Calls the command on pairs whose passages are their logits."""
    rows = [
        {"query": query, "passage": repr(logit), "label": label}
        for query, pairs in logits.items()
        for logit, label in pairs
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["calibrate", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "c.json"), *options]
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model gives the logit that a text spells."""
    backend = FakeBackend(lambda query, text: float(text))
    monkeypatch.setattr("rerank_plugins.scorer.load_backend", lambda settings: backend)


def queries(pairs: list[tuple[float, float]]) -> dict[str, list[tuple[float, float]]]:
    return {f"q{number}": pairs[number::10] for number in range(10)}


@pytest.mark.usefixtures("by_name")
def test_the_proposed_min_score_reaches_what_was_asked(tmp_path: Path) -> None:
    logits, labels = sample(1000, 1.0, 0.0)
    pairs = list(zip(logits.tolist(), labels.tolist(), strict=True))
    done = calibrate(tmp_path, queries(pairs), "--precision", "0.97")
    assert done.exit_code == 0, done.output
    assert "for recall" not in done.output
    found = re.search(r"min_score=(\S+) \(precision (\S+), recall (\S+), keeps (\d+) of 1000\)", done.output)
    assert found is not None
    reranker = Reranker(calibration=tmp_path / "c.json")
    kept = reranker.rank("q", [repr(logit) for logit in logits.tolist()], min_score=float(found[1]))
    relevant = [labels[item.index] for item in kept]
    assert len(kept) == int(found[4])
    assert np.mean(relevant) == pytest.approx(float(found[2]), abs=1e-3)
    assert np.mean(relevant) >= 0.97
    assert sum(relevant) / labels.sum() == pytest.approx(float(found[3]), abs=1e-3)
    # One more would be too many: the best recall that this precision allows.
    assert threshold_for(logits, labels, precision=0.97).kept == len(kept)  # type: ignore[union-attr]


@pytest.mark.usefixtures("by_name")
@pytest.mark.parametrize(
    ("slope", "why"),
    [(0.0, "does not tell relevant from irrelevant"), (-1.0, "does not tell relevant from irrelevant")],
)
def test_a_useless_calibration_is_refused(tmp_path: Path, slope: float, why: str) -> None:
    logits, labels = sample(191, slope, 0.0)
    done = calibrate(tmp_path, queries(list(zip(logits.tolist(), labels.tolist(), strict=True))))
    assert done.exit_code == 2
    assert "does not tell relevant from irrelevant" in done.stderr
    assert f"AUC is {roc_auc(logits, labels):.3f}" in done.stderr
    assert not (tmp_path / "c.json").exists()


@pytest.mark.usefixtures("by_name")
def test_scores_that_no_threshold_parts_are_refused(tmp_path: Path) -> None:
    # 3,000 pairs show that an AUC of 0.54 is no chance; a threshold is of no use all the same.
    logits, labels = sample(3000, 0.03, -4.0)
    done = calibrate(tmp_path, queries(list(zip(logits.tolist(), labels.tolist(), strict=True))))
    assert done.exit_code == 2
    assert not (tmp_path / "c.json").exists()


@pytest.mark.usefixtures("by_name")
def test_a_weak_model_is_warned_of(tmp_path: Path) -> None:
    logits, labels = sample(3000, 0.15, 0.0)
    done = calibrate(tmp_path, queries(list(zip(logits.tolist(), labels.tolist(), strict=True))))
    assert done.exit_code == 0, done.output
    assert f"Warning: an AUC of {roc_auc(logits, labels):.3f} is weak" in done.stderr
    assert "no min_score reaches precision 0.9" in done.output or "for precision 0.9: min_score" in done.output


@pytest.mark.usefixtures("by_name")
@pytest.mark.parametrize("label", [0, 1])
def test_pairs_that_are_judged_alike_are_refused(tmp_path: Path, label: int) -> None:
    done = calibrate(tmp_path, queries([(float(number), label) for number in range(50)]))
    assert done.exit_code == 2
    assert "both relevant and irrelevant" in done.stderr


def test_the_area_under_the_curve_counts_ties_half() -> None:
    assert roc_auc([1, 2, 3, 4], [0, 0, 1, 1]) == 1.0
    assert roc_auc([4, 3, 2, 1], [0, 0, 1, 1]) == 0.0
    assert roc_auc([1, 1, 1, 1], [0, 1, 0, 1]) == 0.5
    # Of the four twos, 2 against 1 and 3 against 1 and 2 are right, and 2 against 2 is half right.
    assert roc_auc([1, 2, 2, 3], [0, 0, 1, 1]) == pytest.approx(3.5 / 4)
    with pytest.raises(InputError, match="judged alike"):
        roc_auc([1, 2], [1, 1])


def test_thresholds_keep_equal_scores_together() -> None:
    scores, truth = [0.9, 0.8, 0.8, 0.5, 0.1], [1, 1, 0, 1, 0]
    assert threshold_for(scores, truth, precision=1.0) == Threshold(0.9, 1.0, pytest.approx(1 / 3), 1)
    assert threshold_for(scores, truth, precision=0.7) == Threshold(0.5, 0.75, 1.0, 4)
    assert threshold_for(scores, truth, recall=0.6) == Threshold(0.8, pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert threshold_for(scores, truth, recall=0.0) == Threshold(0.9, 1.0, pytest.approx(1 / 3), 1)
    assert threshold_for([0.9, 0.1], [0, 1], precision=0.9) is None
