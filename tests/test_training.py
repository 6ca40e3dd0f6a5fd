from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from transformers import AutoModel, AutoTokenizer

from rerank_plugins import Reranker
from rerank_plugins._minilm import minilm_directory
from rerank_plugins._printable import parse_json
from rerank_plugins.calibration import Calibration
from rerank_plugins.conversion import convert
from rerank_plugins.errors import ConfigurationError, InputError, ModelLoadError
from rerank_plugins.training import (
    Group,
    Pair,
    TrainingConfig,
    fit,
    read_pairs,
    train,
)
from rerank_plugins.training import _api as api
from rerank_plugins.training import _loop as loop
from rerank_plugins.training._bundled import float_weights
from rerank_plugins.training._data import (
    evaluation_groups,
    groups_from_pairs,
    is_held_out,
    is_trained_on,
    normalise,
    read_data,
    read_groups,
    split_pairs,
    write_groups,
)
from rerank_plugins.training._loop import Scorer, batches, evaluate_groups, ndcg
from rerank_plugins.training._mining import labelled_groups, top
from rerank_plugins.training._model import fold, miner_of, start

# What follows what must be learnt: no word of a query is in its answer.
RIDDLES = {
    "panda": "bamboo", "paris": "capital", "revert": "history", "faiss": "vector",
    "fox": "dog", "china": "mountains", "search": "library", "commit": "older",
}  # fmt: skip


def riddles(count: int, seed: int) -> list[Group]:
    rng = random.Random(seed)
    groups = []
    for _ in range(count):
        query = rng.choice(list(RIDDLES))
        others = rng.sample([answer for q, answer in RIDDLES.items() if q != query], 3)
        passages = (f"the {RIDDLES[query]}", *(f"the {answer}" for answer in others))
        groups.append(Group(f"what of {query}", passages, (1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)))
    return groups


def tiny_model() -> Any:
    return start(tiny("bert"), 0)


def config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "steps": 60, "learning_rate": 3e-3, "head_learning_rate": 1e-2,
        "ema": 0.9, "bf16": False, "evaluations": 3, "checkpoint_s": 0.0, "device": "cpu", "max_length": 32,
    }  # fmt: skip
    return TrainingConfig(**(settings | changes))


def weights(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for part in model for parameter in part.parameters()]


# --- data ---


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


GOOD = '{"query": "q", "passage": "p", "label": 1}'


@pytest.mark.parametrize(
    "line",
    [
        '{"query": "q", "passage": "p"',
        "[1, 2]",
        '{"passage": "p", "label": 1}',
        '{"query": " ", "passage": "p", "label": 1}',
        '{"query": "q", "passage": 3, "label": 1}',
        '{"query": "q", "passage": "p", "label": "yes"}',
        '{"query": "q", "passage": "p", "label": true}',
        '{"query": "q", "passage": "p", "label": 2}',
        '{"query": "q", "passage": "p", "label": NaN}',
        '{"query": "q", "passage": "p", "label": 1, "split": "training"}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD, "", line)

    with pytest.raises(InputError, match=r"pairs\.jsonl, line 3"):
        read_pairs(path)


def test_bad_data_is_told_before_any_training(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD, "{}")

    with pytest.raises(InputError, match="line 2"):
        train(path, tmp_path / "out", trunk=tiny("bert"), steps=1)
    assert not (tmp_path / "out").exists()


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", GOOD)
    folder = tmp_path / "two"
    folder.mkdir()
    with gzip.open(folder / "pairs.jsonl.gz", "wt") as out:
        out.write('{"query": "r", "passage": "p", "label": 0, "split": "dev", "more": 1}\n')

    assert read_pairs([tmp_path / "one.jsonl", folder]) == [Pair("q", "p", 1.0), Pair("r", "p", 0.0, "dev")]
    with pytest.raises(ConfigurationError, match="missing"):
        read_pairs(tmp_path / "missing.jsonl")


def test_own_splits_are_used_and_never_overlap() -> None:
    pairs = [
        Pair("a", "x", 1, "train"),
        Pair("A?", "y", 1, "dev"),
        Pair("b", "z", 1, "train"),
        Pair("c", "z", 1, "test"),
    ]

    training, dev = split_pairs(pairs)

    assert [pair.query for pair in training] == ["b"]
    assert [pair.query for pair in dev] == ["A?"]


def test_without_splits_a_tenth_of_the_queries_is_held_out() -> None:
    pairs = [Pair(f"question {n}", passage, 1) for n in range(1000) for passage in ("x", "y")]

    training, dev = split_pairs(pairs)

    assert 60 < len({pair.query for pair in dev}) < 140
    assert not {normalise(pair.query) for pair in dev} & {normalise(pair.query) for pair in training}
    assert is_held_out("Some  question?") == is_held_out("some question")


def test_groups_have_one_positive_and_no_duplicate() -> None:
    pairs = [
        Pair("q", "good", 1),
        Pair("q", "good", 1),
        Pair("q", "fine", 0.5),
        *(Pair("q", f"bad {n}", 0) for n in range(9)),
    ]

    groups = groups_from_pairs(pairs, 4)

    assert [group.passages[0] for group in groups] == ["good", "fine"]
    for group in groups:
        assert len(set(group.passages)) == 4
        assert group.gains[0] > max(group.gains[1:])
        assert group.target == pytest.approx([gain / sum(group.gains) for gain in group.gains])
    assert groups_from_pairs([Pair("q", "good", 1)], 4) == []
    assert groups_from_pairs([Pair("q", "good", 1), Pair("q", "fine", 0.5)], 4)[0].gains == (1.0, 0.5)
    (measured,) = evaluation_groups(pairs)
    assert len(measured.passages) == 11


def test_groups_survive_writing(tmp_path: Path) -> None:
    groups = [Group("q", ("ü", "b"), (0.9, 0.1), (1.0, 0.0))]
    write_groups(tmp_path / "groups.jsonl", groups)

    assert read_groups(tmp_path / "groups.jsonl") == groups


# --- mining ---


def unit(*rows: list[float]) -> np.ndarray:
    matrix = np.array(rows, dtype=np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def test_top_is_sorted_and_may_be_empty() -> None:
    passages = unit([1, 0], [1, 1], [0, 1])

    indices, values = top(unit([0, 1]), passages, 2)

    assert indices.tolist() == [[2, 1]]
    assert values[0, 0] == pytest.approx(1.0)
    assert top(unit([0, 1]), passages[:0], 5)[0].shape == (1, 0)


def test_likely_false_negatives_are_left_out() -> None:
    texts = ["answer", "as good an answer", "hard", "harder", "easy"]
    vectors = unit([1, 0.5], [1, 0.45], [1, 1.6], [1, 1.2], [0, 1])
    question = [("question", {"answer": 1.0})]

    (group,) = labelled_groups(question, unit([1, 0.1]), texts, vectors, size=4)

    assert group.passages[0] == "answer"
    assert "as good an answer" not in group.passages
    assert sum(group.target) == pytest.approx(1.0, abs=1e-3)
    assert group.target[0] > 0.6


# --- measuring and calibrating ---


def test_ndcg_counts_ties_against_the_model() -> None:
    assert ndcg([3.0, 2.0, 1.0], [1, 0, 0]) == pytest.approx(1.0)
    assert ndcg([1.0, 1.0], [1, 0]) == pytest.approx(1 / np.log2(3))
    assert ndcg([1.0, 2.0, 3.0], [0.7, 0.2, 0.1]) < ndcg([3.0, 2.0, 1.0], [0.7, 0.2, 0.1])


# --- the loop ---


def test_settings_are_checked() -> None:
    for wrong in ({}, {"steps": 1, "minutes": 1.0}, {"steps": 0}, {"minutes": -1.0}):
        with pytest.raises(ConfigurationError):
            TrainingConfig(**wrong)  # type: ignore[arg-type]


def test_an_epoch_has_every_group_once() -> None:
    groups = riddles(101, 0)

    seen = [id(group) for batch in batches(groups, 8, 0, 0) for group in batch]

    assert sorted(seen) == sorted(map(id, groups))
    assert seen != [id(group) for batch in batches(groups, 8, 0, 1) for group in batch]


def test_scores_do_not_depend_on_micro_batches() -> None:
    model = tiny_model()
    queries, texts = ["panda"] * 5, ["the " * n for n in (1, 20, 3, 9, 14)]
    scores = [
        Scorer(model, max_length=32, micro_batch=size, bf16=False, device="cpu")(queries, texts).detach()
        for size in (1, 2, 8)
    ]

    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_training_improves_and_can_be_repeated(tmp_path: Path) -> None:
    model = tiny_model()
    result = fit(model, riddles(160, 0), riddles(40, 1), config(), tmp_path / "a")

    assert result.steps == 60
    assert max(result.measures) > result.measures[0] + 0.1
    assert result.best == max(result.measures)
    scorer = Scorer(model, max_length=32, micro_batch=32, bf16=False, device="cpu")
    assert evaluate_groups(scorer, riddles(40, 1))[0] == pytest.approx(result.best, abs=1e-6)

    again = tiny_model()
    fit(again, riddles(160, 0), riddles(40, 1), config(), tmp_path / "b")
    for one, other in zip(weights(model), weights(again), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    groups = riddles(96, 0)
    whole = tiny_model()
    fit(whole, groups, [], config(steps=40), tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(news: str, share: float) -> None:
        if news.startswith("step 20:"):
            raise Killed

    with pytest.raises(Killed):
        fit(tiny_model(), groups, [], config(steps=40), tmp_path / "cut", kill)
    resumed = tiny_model()
    seen: list[str] = []
    result = fit(resumed, groups, [], config(steps=40), tmp_path / "cut", lambda news, share: seen.append(news))

    assert result.steps == 40
    assert len(seen) == 2  # steps 20 and 40: the checkpoint is of step 19
    for one, other in zip(weights(whole), weights(resumed), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with pytest.raises(ConfigurationError, match="other settings"):
        fit(tiny_model(), groups, [], config(steps=41), tmp_path / "cut")


def test_time_budget_is_kept(tmp_path: Path) -> None:
    result = fit(tiny_model(), riddles(32, 0), [], config(steps=None, minutes=0.02), tmp_path)

    assert result.steps > 0
    assert 1.0 < result.seconds < 5.0
    assert (result.measures, result.best) == ((), None)


@pytest.mark.parametrize(("last_s", "measured"), [(1.0, 3), (40.0, 2)])
def test_evaluations_are_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_s: float, measured: int
) -> None:
    clock = {"now": 0.0}

    def tick() -> float:
        clock["now"] += 1.0
        return clock["now"]

    seconds = iter([10.0, last_s, 10.0])

    def evaluate(scorer: Scorer, groups: list[Group]) -> tuple[float, np.ndarray]:
        clock["now"] += next(seconds)
        return evaluate_groups(scorer, groups)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=tick))
    monkeypatch.setattr(loop, "evaluate_groups", evaluate)
    settings = config(steps=None, minutes=2.0, evaluations=1, checkpoint_s=1e9)
    result = fit(tiny_model(), riddles(64, 0), riddles(8, 1), settings, tmp_path)

    # The mean of the best and the last weights is tried only where there is time left for it.
    assert len(result.measures) == measured
    assert result.best == max(result.measures)
    # The training itself ends early enough for what follows.
    assert 100.0 < result.seconds < (120.0 if measured == 3 else 150.0)


# --- from data to a model ---


def test_train_makes_a_model_that_loads(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        for query, answer in RIDDLES.items():
            rows.append({"query": f"{number} what of {query}", "passage": f"{number} the {answer}", "label": 1})
    path = write(tmp_path / "pairs.jsonl", *map(json.dumps, rows))
    news: list[float] = []

    trained = train(
        path, tmp_path / "model", trunk=tiny("bert"), steps=6, max_length=32, device="cpu",
        progress=lambda stage, share: news.append(share),
    )  # fmt: skip

    assert trained.result.steps == 6
    assert trained.conversion is not None
    assert trained.conversion.weights == "int8"
    assert trained.ece_after is not None
    assert news
    # Any library loads it.
    loaded = CrossEncoder(str(tmp_path / "model"), device="cpu")
    theirs = loaded.predict([("panda", "the bamboo")], show_progress_bar=False)
    ours = Reranker(tmp_path / "model", backend="torch", device="cpu").score("panda", ["the bamboo"])
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert trained.calibration is not None
    assert (tmp_path / "model" / "onnx" / "model.onnx").is_file()
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert facts["result"]["steps"] == 6
    assert facts["result"]["best"] == trained.result.best

    with pytest.raises(ConfigurationError, match="overwrite"):
        train(path, tmp_path / "model", trunk=tiny("bert"), steps=1)
    again = train(
        path,
        tmp_path / "second",
        trunk=tmp_path / "model",
        steps=1,
        max_length=32,
        device="cpu",
        export=False,
    )
    assert again.conversion is None
    # Where nothing was held out, there is no measure, and JSON has no NaN.
    pair = write(
        tmp_path / "one.jsonl", *(json.dumps({"query": "q", "passage": p, "label": n}) for n, p in enumerate("ab"))
    )
    assert not is_held_out("q")
    alone = train(pair, tmp_path / "third", trunk=tiny("bert"), steps=1, mine=False, export=False, device="cpu")
    facts = parse_json((tmp_path / "third" / "training.json").read_text())
    assert (alone.result.best, facts["result"]["best"], facts["bundled"], facts["held_out"]) == (None, None, None, 0)
    assert "nothing was measured" in (tmp_path / "third" / "README.md").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files")
def test_a_trained_model_is_true_and_readable(tmp_path: Path) -> None:
    rows = [
        {"query": f"{number} what of {query}", "passage": f"{number} the {text}", "label": int(text == answer)}
        for number in range(30)
        for query, answer in RIDDLES.items()
        for text in RIDDLES.values()
    ]
    path = write(tmp_path / "pairs.jsonl", *map(json.dumps, rows))
    out = tmp_path / "model"
    trained = train(path, out, trunk=tiny("bert"), steps=2, mine=False, export=False, max_length=32, device="cpu")

    for file in [out, *out.rglob("*")]:
        assert file.stat().st_mode & 0o044 == 0o044, file
    dev = evaluation_groups(split_pairs(read_data(path).pairs)[1])
    assert trained.held_out == len(dev)
    with Reranker() as bundled:
        logits = [bundled.logits(group.query, group.passages) for group in dev]
    expected = np.mean([ndcg(values, group.gains) for values, group in zip(logits, dev, strict=True)])
    assert trained.bundled == pytest.approx(expected)
    card = (out / "README.md").read_text()
    assert f"On the same queries rerank-plugins/minilm-l6 has nDCG@10 {expected:.4f}." in card
    assert (f"**{len(dev)} held-out queries are few" in card) == (len(dev) < 50)

    # The model knows these judgements, and no others.
    other = write(tmp_path / "other.jsonl", *map(json.dumps, rows[1:]))
    tested = write(tmp_path / "tested.jsonl", *map(json.dumps, [{**row, "split": "test"} for row in rows]))
    assert [is_trained_on(out, file) for file in (path, other, tested, tmp_path)] == [True, False, False, True]
    assert not is_trained_on(tmp_path, path)


def test_minutes_are_those_of_the_whole_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        *(json.dumps({"query": f"q {n}", "positive": f"good {n}", "negative": "bad"}) for n in range(30)),
    )
    budgets = []

    class Caught(Exception):
        pass

    def stop(*arguments: object, budget_s: float | None) -> None:
        budgets.append(budget_s)
        raise Caught

    monkeypatch.setattr(api, "fit", stop)
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr(api, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    for settings in ({"minutes": 10.0}, {"minutes": 10.0, "export": False}, {"minutes": 1.0}, {"steps": 1}):
        with pytest.raises(Caught):
            train(path, tmp_path / "model", trunk=tiny("bert"), mine=False, device="cpu", **settings)  # type: ignore[arg-type]
    # What went before took 100 s, the export is expected to take 30; a quarter is for training in any case.
    assert budgets == [470.0, 500.0, 15.0, None]


def test_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        *(json.dumps({"query": f"q{n}", "passage": "p", "label": 0}) for n in range(5)),
    )

    with pytest.raises(InputError, match="relevant"):
        train(path, tmp_path / "out", trunk=tiny("bert"), steps=1)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_weights_of_an_int8_graph_are_read_back(family: str, tmp_path: Path) -> None:
    convert(tiny(family), tmp_path / "graph", int8=True)
    found = float_weights(tmp_path / "graph" / "model.onnx")
    expected = load_file(Path(tiny(family)) / "model.safetensors")

    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # A weight is rounded to one of 255 steps between the smallest and the largest of its channel.
        np.testing.assert_allclose(found[name], values, atol=float(values.abs().max()) / 100, err_msg=name)


def test_training_starts_from_the_bundled_graph_if_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tmp_path / "graph"
    convert(tiny("bert"), graph, int8=True)
    monkeypatch.setattr("rerank_plugins.models.bundled_directory", lambda: graph)
    monkeypatch.setenv("RERANK_PLUGINS_CACHE", str(tmp_path / "cache"))
    expected = start(tiny("bert"), 0).state_dict()
    for _ in ("made", "kept"):
        for name, values in start("bundled", 0).state_dict().items():
            torch.testing.assert_close(values, expected[name], rtol=0, atol=float(expected[name].abs().max()) / 100)
    (graph / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelLoadError, match=r"cannot be trained further: .* Start from a checkpoint"):
        start("bundled", 0)


def test_training_starts_from_minilm_if_nothing_is_given() -> None:
    model = start(None, 0)
    expected = load_file(minilm_directory("train") / "model.safetensors")
    weights = model[0].auto_model.bert.state_dict()
    name = "encoder.layer.5.output.dense.weight"
    torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=0)
    assert model.num_labels == 1


def test_an_encoder_gets_a_fresh_head_and_mines(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    AutoModel.from_pretrained(tiny("bert")).save_pretrained(encoder)
    AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(encoder)
    one, same, other = start(encoder, 0), start(encoder, 0), start(encoder, 1)
    heads = [model[0].auto_model.classifier.weight for model in (one, same, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert miner_of(encoder) == encoder
    assert miner_of(tiny("bert")) == minilm_directory("train")
    assert miner_of(None) == minilm_directory("train")


@pytest.mark.parametrize("family", ["bert-nli", "bert-2class"])
def test_a_model_with_several_classes_is_refused(family: str) -> None:
    with pytest.raises(ConfigurationError, match="classes; expected a cross-encoder with one logit"):
        start(tiny(family), 0)


def test_an_encoder_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    AutoModel.from_pretrained(tiny("bert")).save_pretrained(encoder)
    AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(encoder)
    tensors = load_file(encoder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "encoder.layer.1." not in name}
    save_file(kept, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="layer"):
        start(encoder, 0)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert"])
def test_a_calibration_becomes_part_of_the_last_layer(family: str) -> None:
    model = start(tiny(family), 0)
    pairs = [("what of panda", "the bamboo"), ("what of panda", "the capital")]
    before = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    assert fold(model, Calibration(2.0, -3.0))
    after = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    np.testing.assert_allclose(after, 2 * before - 3, atol=1e-4)
