from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from checkpoints import tiny
from test_cli import call
from test_training import RIDDLES, config, riddles, tiny_model, weights, write
from transformers import AutoModel, AutoTokenizer

from rerank_plugins import Reranker
from rerank_plugins.cli._app import app
from rerank_plugins.errors import ConfigurationError, InputError, ModelLoadError
from rerank_plugins.testing import FakeBackend
from rerank_plugins.training import (
    Group,
    Pair,
    RetrieverSettings,
    TrainedModel,
    TrainingConfig,
    TrainingResult,
    TrainSettings,
    fit,
    mine,
    read_triples,
    train,
    train_retriever,
)
from rerank_plugins.training import _api as api
from rerank_plugins.training import _teacher as teacher_module
from rerank_plugins.training._card import command, model_card, named, public_name
from rerank_plugins.training._data import is_held_out, read_data
from rerank_plugins.training._loop import _loss
from rerank_plugins.training._negatives import mined_groups
from rerank_plugins.training._teacher import (
    Teacher,
    as_reranker,
    distilled,
    is_bi_encoder,
    open_teacher,
    teacher_scores,
)
from rerank_plugins.training.settings import options


class Places:
    """An encoder that puts each text at an angle of its own, in degrees."""

    def __init__(self, **angles: float) -> None:
        self.angles = angles

    def encode(self, texts: Sequence[str], progress: object = None) -> np.ndarray:
        angles = np.radians([self.angles[text] for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32).reshape(-1, 2)


def judge(**logits: float) -> tuple[Reranker, FakeBackend]:
    """A cross-encoder that gives -5 to every text that it is not told of."""
    backend = FakeBackend(lambda query, text: logits.get(text, -5.0))
    return Reranker(backend), backend


@pytest.fixture(scope="module")
def bi_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from sentence_transformers import SentenceTransformer

    path = tmp_path_factory.mktemp("bi-encoder") / "tiny-bi"
    SentenceTransformer(tiny("bert"), device="cpu").save_pretrained(str(path), create_model_card=False)
    return str(path)


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Group]]:
    """Calls `train`, and gives the lists that it would have trained on."""

    class Caught(Exception):
        pass

    def refuse(model: object, groups: list[Group], *rest: object, **more: object) -> None:
        raise Caught(groups)

    def groups_of(*arguments: Any, **settings: Any) -> list[Group]:
        monkeypatch.setattr(api, "fit", refuse)
        with pytest.raises(Caught) as found:
            train(*arguments, **{"trunk": tiny("bert"), "steps": 1, "device": "cpu"} | settings)
        monkeypatch.undo()
        return found.value.args[0]  # type: ignore[no-any-return]

    return groups_of


# --- the filter ---

PAIRS = [Pair("query", "answer", 1.0), Pair("query", "judged", 0.0)]
AT = Places(query=0, answer=10, judged=40, twin=30, hard=35, easy=70)
CORPUS = ["twin", "hard", "easy"]


def test_a_false_negative_is_filtered() -> None:
    ((unfiltered,),) = mined_groups([PAIRS], CORPUS, AT, [5])  # type: ignore[arg-type]
    # The judged one stays, whatever the cross-encoder thinks of it.
    reranker, backend = judge(twin=0.1, judged=9.0, hard=-0.1)

    ((filtered,),) = mined_groups([PAIRS], CORPUS, AT, [5], reranker=reranker)  # type: ignore[arg-type]
    ((strict,),) = mined_groups([PAIRS], CORPUS, AT, [5], reranker=reranker, below=0.1)  # type: ignore[arg-type]

    assert set(unfiltered.passages) == {"answer", "judged", "twin", "hard", "easy"}
    assert set(filtered.passages) == {"answer", "judged", "hard", "easy"}
    assert set(strict.passages) == {"answer", "judged", "easy"}
    assert filtered.passages[0] == "answer"
    assert sum(filtered.target) == pytest.approx(1.0, abs=1e-3)
    asked = [text for pairs in backend.calls for _, text in pairs]
    assert asked.count("twin") == 2, "once for each call of mined_groups"
    assert "judged" not in asked


def test_only_what_stands_in_a_list_is_scored() -> None:
    many = {f"passage {n}": 20.0 + n / 2 for n in range(100)}
    reranker, backend = judge()

    ((group,),) = mined_groups([PAIRS], list(many), Places(**AT.angles, **many), [4], reranker=reranker)  # type: ignore[arg-type]

    assert [text for pairs in backend.calls for _, text in pairs] == [t for t in group.passages if t in many]


def test_a_query_with_nothing_but_answers_is_left_out() -> None:
    many = {f"passage {n}": 20.0 + n / 2 for n in range(60)}
    reranker, _ = judge(**dict.fromkeys(many, 5.0))
    places = Places(**AT.angles, **many)

    assert mined_groups([PAIRS[:1]], list(many), places, [4], reranker=reranker) == [[]]  # type: ignore[arg-type]
    ((group,),) = mined_groups([PAIRS], list(many), places, [4], reranker=reranker)  # type: ignore[arg-type]
    assert group.passages == ("answer", "judged")
    assert sum(group.target) == pytest.approx(1.0)


def test_grades_reach_the_mined_lists() -> None:
    pairs = [*PAIRS, Pair("query", "hard", 0.5)]

    ((group,),) = mined_groups([pairs], CORPUS, AT, [5], teacher_share=0.0)  # type: ignore[arg-type]

    gains = dict(zip(group.passages, group.gains, strict=True))
    assert gains["answer"] == 1.0
    assert gains["hard"] == 0.5
    assert gains["judged"] == 0.0
    assert group.target == pytest.approx([gain / 1.5 for gain in group.gains], abs=1e-4)


def test_train_filters_and_keeps_what_it_mined(tmp_path: Path, caught: Callable[..., list[Group]]) -> None:
    rows = [{"query": f"q{n} {q}", "passage": f"{n} {a}", "label": 1} for n in range(6) for q, a in RIDDLES.items()]
    path = write(tmp_path / "pairs.jsonl", *map(json.dumps, rows))
    reranker, backend = judge(**{f"{n} {a}": 3.0 for n in range(3) for a in RIDDLES.values()})

    filtered = caught(path, tmp_path / "out", filter=reranker, group_size=4)
    calls = len(backend.calls)
    again = caught(path, tmp_path / "out", filter=reranker, group_size=4)

    assert {text[0] for group in filtered for text in group.passages[1:]} == {"3", "4", "5"}
    assert again == filtered
    assert len(backend.calls) == calls, "the second call takes the lists of the first"
    unfiltered = caught(path, tmp_path / "other", group_size=4)
    assert {text[0] for group in unfiltered for text in group.passages[1:]} >= {"0", "1", "2"}


@pytest.mark.parametrize(
    "settings",
    [
        {"negatives_below": 0.0}, {"negatives_below": 1.5}, {"negatives_below": 0.5, "mine": False},
        {"teacher_share": 1.1}, {"temperature": 0.0}, {"loss": "hinge"}, {"loss": "binary", "teacher": "trunk"},
        {"patience": 0}, {"evaluations": 0}, {"group_size": 1}, {"licences": ["MIT", "MIT"]},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_first(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        train(tmp_path / "missing.jsonl", tmp_path / "out", steps=1, **settings)
    assert not (tmp_path / "out").exists()


# --- the losses ---


@pytest.mark.parametrize("loss", ["listwise", "binary", "mix"])
def test_losses_are_what_their_names_say(loss: str) -> None:
    groups = [Group("q", ("a", "b"), (0.75, 0.25), (0.9, 0.3)), Group("r", ("c",), (1.0,), (0.6,))]
    logits = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)

    found = _loss(torch, lambda queries, texts: logits, groups, config(loss=loss), "cpu")  # type: ignore[arg-type]

    total = math.exp(0.5) + math.exp(-1.0)
    listwise = -(0.75 * math.log(math.exp(0.5) / total) + 0.25 * math.log(math.exp(-1.0) / total)) / 2
    shares = [1 / (1 + math.exp(-value)) for value in (0.5, -1.0, 2.0)]
    gains = (0.9, 0.3, 0.6)
    binary = -sum(g * math.log(p) + (1 - g) * math.log(1 - p) for g, p in zip(gains, shares, strict=True)) / 2
    expected = {"listwise": listwise, "binary": binary, "mix": listwise + 0.1 * binary}[loss]
    assert found.item() == pytest.approx(expected, abs=1e-6)
    found.backward()


def test_each_loss_learns(tmp_path: Path) -> None:
    for loss in ("listwise", "binary"):
        result = fit(
            tiny_model(),
            riddles(160, 0),
            riddles(40, 1),
            config(steps=40, loss=loss, checkpoint_s=99.0),
            tmp_path / loss,
        )
        assert max(result.measures) > result.measures[0] + 0.1
    with pytest.raises(ConfigurationError, match="nothing to train on"):
        fit(tiny_model(), [], [], config(), tmp_path)


# --- early stopping ---


def test_patience_ends_a_run_that_does_not_improve(tmp_path: Path) -> None:
    still = {"learning_rate": 1e-12, "head_learning_rate": 1e-12, "evaluations": 30, "patience": 2}
    result = fit(tiny_model(), riddles(64, 0), riddles(20, 1), config(**still, checkpoint_s=99.0), tmp_path / "a")

    assert result.stopped_early
    assert result.steps == 4, "two evaluations, two steps apart, after the first one"
    whole = fit(tiny_model(), riddles(64, 0), riddles(20, 1), config(steps=8, patience=9), tmp_path / "b")
    assert not whole.stopped_early
    assert whole.steps == 8
    with pytest.raises(ConfigurationError, match="patience"):
        fit(tiny_model(), riddles(64, 0), [], config(patience=1), tmp_path / "c")


def test_an_interrupted_run_with_evaluations_ends_the_same(tmp_path: Path) -> None:
    groups, dev = riddles(96, 0), riddles(20, 1)
    # Only evaluations write checkpoints here.
    settings = config(steps=24, evaluations=6, patience=3, checkpoint_s=1e9)
    whole = tiny_model()
    expected = fit(whole, groups, dev, settings, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(news: str, share: float) -> None:
        if news.startswith("step 20:"):
            raise Killed

    with pytest.raises(Killed):
        fit(tiny_model(), groups, dev, settings, tmp_path / "cut", kill)
    for first in ("step 20: loss", None):  # the second time all is done, and nothing is done again
        resumed, news = tiny_model(), []
        result = fit(resumed, groups, dev, settings, tmp_path / "cut", lambda line, share: news.append(line))  # noqa: B023
        assert news[:1] == [] if first is None else news[0].startswith(first), news
        assert (result.steps, result.measures, result.best) == (expected.steps, expected.measures, expected.best)
        for one, other in zip(weights(whole), weights(resumed), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    with pytest.raises(ConfigurationError, match="other settings or data"):
        fit(tiny_model(), riddles(96, 2), dev, settings, tmp_path / "cut")


# --- the teacher ---


def test_targets_follow_the_formula() -> None:
    groups = [Group("q", ("a", "b", "c"), (1.0, 0.0, 0.0), (1.0, 0.5, 0.0))]
    scores = np.array([2.0, -1.0, 4.0])

    (made,) = distilled(groups, [scores], 0.3, 2.0)

    powers = np.exp(scores / 2)
    assert made.target == pytest.approx(0.7 * np.array([2 / 3, 1 / 3, 0]) + 0.3 * powers / powers.sum())
    assert (made.passages, made.gains) == (groups[0].passages, groups[0].gains)


def test_teachers_are_told_apart(tmp_path: Path, bi_encoder: str) -> None:
    group = Group("what of panda", ("the bamboo", "the capital"), (1.0, 0.0), (1.0, 0.0))
    tiny_model().save_pretrained(str(tmp_path / "ours"), create_model_card=False)

    assert is_bi_encoder(Path(bi_encoder))
    assert not is_bi_encoder(Path(tiny("bert")))
    assert not is_bi_encoder(tmp_path / "ours")
    old = tmp_path / "old"
    old.mkdir()
    write(old / "modules.json", json.dumps([{"type": "sentence_transformers.models.Pooling"}]))
    assert is_bi_encoder(old)

    cross = open_teacher(tiny("bert"), Path(bi_encoder), "cpu")
    expected = Reranker(tiny("bert"), device="cpu").logits(group.query, list(group.passages))
    np.testing.assert_allclose(cross.score([group])[0], expected, atol=1e-5)
    cosines = open_teacher(bi_encoder, Path(bi_encoder), "cpu")
    miner = open_teacher("miner", Path(bi_encoder), "cpu")
    np.testing.assert_allclose(cosines.score([group])[0], miner.score([group])[0], atol=2e-2)  # the miner's are bf16
    assert (cross.temperature, cosines.temperature, miner.temperature) == (1.0, 0.05, 0.05)
    assert len({cross.name, cosines.name, miner.name}) == 3
    with pytest.raises(ModelLoadError):
        open_teacher(str(tmp_path / "missing"), Path(bi_encoder))


def test_teacher_scores_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [Group(f"q{n}", ("a", "b", "c")[: 2 + n % 2], (1.0, 0.0), (1.0, 0.0)) for n in range(5)]
    monkeypatch.setattr(teacher_module, "_CHUNK", 2)
    seen: list[str] = []

    def score(chunk: Sequence[Group]) -> list[np.ndarray]:
        if len(seen) >= stop:
            raise KeyboardInterrupt
        seen.extend(group.query for group in chunk)
        return [np.arange(len(group.passages)) + float(group.query[1:]) for group in chunk]

    teacher = Teacher("one", score, 1.0)
    stop = 4
    with pytest.raises(KeyboardInterrupt):
        teacher_scores(teacher, groups, tmp_path)
    stop = 99
    news: list[str] = []
    found = teacher_scores(teacher, groups, tmp_path, lambda line, share: news.append(line))
    again = teacher_scores(teacher, groups, tmp_path)

    assert seen == ["q0", "q1", "q2", "q3", "q4"]
    assert news == ["teacher: 5 of 5 lists"]
    assert [values.tolist() for values in found] == [[0, 1], [1, 2, 3], [2, 3], [3, 4, 5], [4, 5]]
    assert [values.tolist() for values in again] == [values.tolist() for values in found]
    teacher_scores(Teacher("other", score, 1.0), groups, tmp_path)
    assert len(seen) == 10


def test_train_learns_from_a_teacher(tmp_path: Path, caught: Callable[..., list[Group]]) -> None:
    lines = [json.dumps({"query": f"q{n}", "positive": "good", "negative": ["bad", "worse"]}) for n in range(20)]
    path = write(tmp_path / "triples.jsonl", *lines)
    teacher, _ = judge(good=1.0, bad=2.0, worse=-3.0)
    settings = {"mine": False, "teacher_share": 0.5, "temperature": 2.0}

    plain = caught(path, tmp_path / "out", mine=False)
    taught = caught(path, tmp_path / "out", teacher=teacher, **settings)

    powers = {text: math.exp(logit / 2) for text, logit in (("good", 1.0), ("bad", 2.0), ("worse", -3.0))}
    for before, after in zip(plain, taught, strict=True):
        assert before.target == (1.0, 0.0, 0.0)
        soft = [powers[text] / sum(powers.values()) for text in after.passages]
        assert after.target == pytest.approx([0.5 * t + 0.5 * s for t, s in zip(before.target, soft, strict=True)])
    by_miner = caught(path, tmp_path / "out", teacher="miner", mine=False)
    assert all(0.6 < group.target[0] < 1.0 for group in by_miner)


# --- the card ---


def test_the_card_says_what_was_done_and_measured(tmp_path: Path) -> None:
    folder = tmp_path / "beir-set"
    folder.mkdir()
    names = list(RIDDLES)
    queries = [{"_id": f"{n}-{q}", "text": f"{n} what of {q}"} for n in range(12) for q in names]
    write(folder / "queries.jsonl", *map(json.dumps, queries))
    corpus = [{"_id": f"{n}-{a}", "title": "", "text": f"{n} the {a}"} for n in range(12) for a in RIDDLES.values()]
    write(folder / "corpus.jsonl", *map(json.dumps, corpus))
    write(folder / "qrels.tsv", *(f"{n}-{q}\t{n}-{a}\t2" for n in range(12) for q, a in RIDDLES.items()))
    pairs = write(tmp_path / "pairs.jsonl", '{"query": "panda", "passage": "the bamboo", "label": 1}')

    trained = train(
        [folder, pairs], tmp_path / "riddle-model", trunk=tiny("bert"), steps=4, max_length=32, seed=7, device="cpu",
        group_size=4, evaluations=2, patience=5, licences=["CC BY 4.0", "CC0 | mine"],
    )  # fmt: skip

    card = (tmp_path / "riddle-model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: rerank-plugins\npipeline_tag: text-ranking\n")
    assert "\n# riddle-model\n" in card
    assert f"held-out queries | {trained.result.measures[0]:.4f} | {trained.result.best:.4f} |" in card
    assert f"| {trained.ece_before:.4f} | {trained.ece_after:.4f} |" in card
    assert trained.conversion is not None
    assert f"Spearman correlation {trained.conversion.rank_correlation:.4f}" in card
    assert f"logits {trained.conversion.max_difference:.3g}" in card
    sources = read_data([folder, pairs]).sources
    assert f"| beir-set | 96 | 96 | 96 | {sources[0].sha256[:12]} | CC BY 4.0 |" in card
    assert f"| pairs.jsonl | 1 | 1 | none | {sources[1].sha256[:12]} | CC0 \\| mine |" in card
    assert "    rerank-plugins train beir-set pairs.jsonl --out riddle-model --trunk bert --steps 4 --seed 7 " in card
    assert "--patience 5" in card
    assert "groups_per_step 8" in card
    assert f"{trained.result.steps} steps, {trained.result.pairs} pairs" in card
    assert "seed: 7" in card
    assert f"torch {torch.__version__.split('+')[0]}" in card
    assert str(tmp_path) not in card


def test_the_card_hides_nothing() -> None:
    result = TrainingResult(3, 24, 200.0, (0.9, 0.8), 0.9, True)

    card = model_card(TrainedModel(Path("name"), result, held_out=3), TrainSettings(trunk="bundled", steps=3), (), ())

    assert "base_model" not in card
    assert "fine-tuned from rerank-plugins' rerank-plugins/minilm-l6" in card
    assert "did not improve" in card
    assert "3 held-out queries are few" in card
    assert "3 min 20 s of training, stopped early by patience" in card
    assert "onnx" not in card
    unmeasured = TrainedModel(Path("name"), TrainingResult(3, 24, 200.0, (), None))
    card = model_card(unmeasured, TrainSettings(trunk="some/model", steps=3), (), ())
    assert "nothing was measured" in card
    assert "base_model: some/model" in card
    card = model_card(unmeasured, TrainSettings(steps=3), (), ())
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2" in card
    assert "fine-tuned from sentence-transformers/all-MiniLM-L6-v2:" in card


def test_the_command_can_be_pasted(tmp_path: Path) -> None:
    settings = TrainSettings(
        minutes=2.5, filter=Path(tiny("bert")), teacher=Reranker(), export=False, licences=["CC BY 4.0", "MIT"],
        device="cpu", overwrite=True,
    )  # fmt: skip
    made = command("train", [tmp_path / "my data.jsonl"], tmp_path / "out", options(named(settings)))

    assert made.startswith("rerank-plugins train 'my data.jsonl' --out out --minutes 2.5 --seed 0 ")
    assert f"--filter bert --loss mix --teacher {Reranker().model_name} --teacher-share 0.4 " in made
    assert made.endswith("--evaluations 4 --license 'CC BY 4.0' --license MIT --no-export")
    assert "mine" not in made.replace("minilm", "")
    values = {"--a": None, "--b": False, "--c": True, "--d": 0}
    assert command("mine", ["x"], tmp_path, values) == f"rerank-plugins mine x --out {tmp_path.name} --c --d 0"
    assert public_name(Reranker()) == Reranker().model_name
    assert public_name("some/model") == "some/model"


@pytest.mark.parametrize(
    ("name", "function", "settings"),
    [("train", train, TrainSettings), ("train-retriever", train_retriever, RetrieverSettings)],
)
def test_each_keyword_is_held_once(name: str, function: Any, settings: Any) -> None:
    keywords = {keyword.name: keyword for keyword in fields(settings)}
    _, _, *given = inspect.signature(function).parameters.values()
    assert [(p.name, p.default, p.kind) for p in given] == [
        (keyword.name, keyword.default, inspect.Parameter.KEYWORD_ONLY) for keyword in keywords.values()
    ]
    for keyword in keywords.values():
        assert f"        {keyword.name}: {keyword.metadata['doc']}" in function.__doc__
    command = typer.main.get_command(app).commands[name]
    told = {option.name: option for option in command.params if option.name not in {"data", "triples", "out"}}
    assert told.keys() == keywords.keys() - {"progress"}
    for option in told.values():
        default = keywords[option.name].default
        assert option.default == ([] if default == () else default), option.name
        assert option.help == keywords[option.name].metadata["help"]
    with pytest.raises(TypeError, match="no_such"):
        function("data", "out", no_such=1)


def test_the_settings_of_the_loop_are_those_of_train() -> None:
    given = TrainSettings(steps=3, seed=7, learning_rate=1e-4, max_length=99, loss="binary", evaluations=2, patience=1)
    assert given.loop() == TrainingConfig(
        steps=3, seed=7, learning_rate=1e-4, max_length=99, loss="binary", evaluations=2, patience=1
    )
    assert (TrainSettings(steps=1, negatives_below=0.3).below, TrainSettings(steps=1).below) == (0.3, 0.5)
    assert [TrainSettings(steps=1, filter=name).filtered for name in (None, "some/model")] == [False, True]


# --- mine ---


def mining_data(folder: Path) -> Path:
    rows = [
        {"query": "what of panda", "passage": "the bamboo", "label": 1},
        {"query": "what of panda", "passage": "some bamboo", "label": 0.5},
        {"query": "what of panda", "passage": "the dog", "label": 0},
        {"query": "what of paris", "passage": "the capital", "label": 1, "split": "dev"},
        {"query": "what of paris", "passage": "The capital!", "label": 1, "split": "dev"},
        {"query": "what of fox", "passage": "the dog", "label": 0},
        {"query": "what of china", "passage": "the test", "label": 1, "split": "test"},
        {"query": "lone", "passage": "the history", "label": 1},
    ]
    return write(folder / "pairs.jsonl", *map(json.dumps, rows))


def test_mine_writes_what_a_cross_encoder_lets_through(tmp_path: Path, bi_encoder: str) -> None:
    # For "lone" all others are relevant, and "the dog" is so for everyone but was judged once.
    relevant = {"the bamboo", "some bamboo", "the capital", "The capital!"}

    def logit(query: str, text: str) -> float:
        return 4.0 if query == "lone" or text == "the dog" or text in relevant else -1.5

    found = mine(
        mining_data(tmp_path), tmp_path / "out" / "triples.jsonl", encoder=bi_encoder, negatives=9, margin=-2.0,
        filter=Reranker(FakeBackend(logit)), device="cpu",
    )  # fmt: skip

    triples = read_triples(found.path)
    negatives = {(t.query, t.positive): set() for t in triples}
    for triple in triples:
        negatives[triple.query, triple.positive] |= set(triple.negatives)
    assert negatives == {
        ("what of panda", "the bamboo"): {"the dog", "the history"},
        ("what of paris", "the capital"): {"the history"},
        ("what of paris", "The capital!"): {"the history"},
    }
    by_text = {(t.query, t.negatives[0]): t.negative_scores for t in triples}
    assert by_text["what of panda", "the dog"] == (4.0,)
    assert by_text["what of panda", "the history"] == (-1.5,)
    assert {t.split for t in triples if t.query == "what of paris"} == {"dev"}
    assert (found.triples, found.queries, found.without) == (4, 2, 1)
    # panda: one of two capitals; paris: two of bamboo and the dog; lone: all four others, copies once.
    assert found.rejected == 1 + 3 + 4

    everything = mine(
        mining_data(tmp_path), tmp_path / "all.jsonl.gz", encoder=bi_encoder, negatives=2, margin=-2.0,
        negatives_below=1, filter=Reranker(FakeBackend(logit)), limit=1, device="cpu",
    )  # fmt: skip
    assert (everything.queries, everything.rejected) == (1, 0)
    assert len(read_triples(everything.path)) == everything.triples


def test_mine_goes_on_with_the_scores_of_a_call_that_was_interrupted(tmp_path: Path, bi_encoder: str) -> None:
    backend = FakeBackend(lambda query, text: -1.5)
    out = tmp_path / "triples.jsonl"

    def interrupt(news: str, share: float) -> None:
        if "queries" in news:
            raise KeyboardInterrupt

    def run(progress: Callable[[str, float], None] | None) -> int:
        backend.calls.clear()
        settings = {"encoder": bi_encoder, "margin": -2.0, "device": "cpu"}
        mine(mining_data(tmp_path), out, filter=Reranker(backend), overwrite=True, progress=progress, **settings)
        return sum(map(len, backend.calls))

    whole = run(None)
    triples = out.read_text()
    out.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(interrupt)
    scored = sum(map(len, backend.calls))
    assert 0 < scored < whole
    assert run(None) == whole - scored
    assert out.read_text() == triples
    assert not list(tmp_path.glob(".*"))


def test_mine_keeps_its_distance_from_the_relevant_passage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"query": "query", "passage": "answer", "label": 1},
        *({"query": "other", "passage": text, "label": 1} for text in ("twin", "hard", "easy")),
    ]
    path = write(tmp_path / "pairs.jsonl", *map(json.dumps, rows))
    places = Places(**(AT.angles | {"other": 180, "twin": 12}))
    monkeypatch.setattr(
        "rerank_plugins.training._negatives._encoders", lambda *arguments: (places.encode, places.encode)
    )

    def negatives(**settings: Any) -> list[str]:
        mine(path, tmp_path / "triples.jsonl", filter=judge()[0], overwrite=True, **settings)
        return [t.negatives[0] for t in read_triples(tmp_path / "triples.jsonl") if t.query == "query"]

    assert negatives() == ["hard", "easy"]
    assert negatives(margin=0.0) == ["twin", "hard", "easy"]
    assert negatives(negatives=1) == ["hard"]


def test_mined_triples_train_a_model(tmp_path: Path, bi_encoder: str) -> None:
    rows = [
        {"query": f"{n} what of {q}", "passage": f"{n} the {a}", "label": 1}
        for n in range(4)
        for q, a in RIDDLES.items()
    ]
    path = write(tmp_path / "pairs.jsonl", *map(json.dumps, rows))
    mine(path, tmp_path / "triples.jsonl", encoder=bi_encoder, filter=judge()[0], margin=-2.0, device="cpu")

    trained = train(
        tmp_path / "triples.jsonl", tmp_path / "model", trunk=tiny("bert"), steps=1, max_length=32, mine=False,
        device="cpu", export=False,
    )  # fmt: skip

    assert trained.result.pairs > 0
    assert trained.result.pairs % 5 == 0, "a positive and four negatives in each list"
    assert Reranker(str(tmp_path / "model"), backend="torch").logits("panda", ["the bamboo"]).shape == (1,)


def test_mine_refuses_what_cannot_work(tmp_path: Path) -> None:
    path = mining_data(tmp_path)
    (tmp_path / "there.jsonl").touch()
    for settings in ({"negatives": 0}, {"limit": 0}, {"negatives_below": 0.0}):
        with pytest.raises(ConfigurationError):
            mine(path, tmp_path / "new.jsonl", **settings)
    with pytest.raises(ConfigurationError, match="overwrite"):
        mine(path, tmp_path / "there.jsonl")
    with pytest.raises(InputError, match="line 1"):
        mine(write(tmp_path / "bad.jsonl", "{}"), tmp_path / "new.jsonl")
    with pytest.raises(InputError, match="no.* relevant|None of"):
        mine(write(tmp_path / "none.jsonl", '{"query": "q", "passage": "p", "label": 0}'), tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()


# --- the commands ---


def test_mine_command_takes_the_bundled_filter(tmp_path: Path, bi_encoder: str) -> None:
    out = tmp_path / "triples.jsonl"
    arguments = ("mine", str(mining_data(tmp_path)), "--out", str(out), "--encoder", bi_encoder, "--margin", "-2")

    result = call(*arguments, "--negatives", "2", "--device", "cpu")

    assert result.exit_code == 0, result.stderr
    triples = read_triples(out)
    assert f"{len(triples)} triples of {len({t.query for t in triples})} queries" in result.stdout
    bundled = as_reranker(None).logits("what of panda", ["the bamboo"])[0]
    scores = [t.positive_score for t in triples if t.positive == "the bamboo"]
    assert scores == pytest.approx([float(bundled)] * len(scores), abs=1e-2)
    assert scores
    again = call(*arguments)
    assert again.exit_code == 2
    assert "or --overwrite to replace it" in again.stderr


def test_train_command_takes_its_options(tmp_path: Path) -> None:
    lines = [json.dumps({"query": f"q{n}", "positive": f"good {n}", "negative": ["bad", "worse"]}) for n in range(30)]
    path = write(tmp_path / "triples.jsonl", *lines)
    options = "--steps 2 --no-mine --no-export --max-length 32 --loss listwise --teacher miner --teacher-share 0.2 "
    options += "--temperature 0.1 --patience 1 --evaluations 2 --group-size 3 --license MIT --device cpu"

    result = call("train", str(path), "--out", str(tmp_path / "model"), "--trunk", tiny("bert"), *options.split())

    assert result.exit_code == 0, result.stderr
    held_out = sum(is_held_out(f"q{n}") for n in range(30))
    assert f"nDCG@10 of {held_out} held-out queries" in result.stdout
    assert "nDCG@10 of the bundled model on them" in result.stdout
    assert f"Warning: {held_out} held-out queries are few" in result.stderr
    card = (tmp_path / "model" / "README.md").read_text()
    assert "--loss listwise --teacher miner --teacher-share 0.2 --temperature 0.1 --evaluations 2 --patience 1" in card
    assert "| MIT |" in card


def test_train_command_says_nothing_of_a_new_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"query": f"q{n}", "positive": f"good {n}", "negative": ["bad", "worse"]} for n in range(30)]
    path = write(tmp_path / "triples.jsonl", *map(json.dumps, rows))
    encoder = tmp_path / "encoder"
    AutoModel.from_pretrained(tiny("bert")).save_pretrained(encoder)
    AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(encoder)
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    before = logger.level
    logger.setLevel(logging.WARNING)
    caplog.clear()

    options = "--steps 1 --no-mine --no-export --max-length 32 --device cpu"
    result = call("train", str(path), "--out", str(tmp_path / "model"), "--trunk", str(encoder), *options.split())

    logger.setLevel(before)
    assert result.exit_code == 0, result.stderr
    assert [record.getMessage() for record in caplog.records if record.name.startswith("transformers")] == []
