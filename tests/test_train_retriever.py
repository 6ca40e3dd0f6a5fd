from __future__ import annotations

import gzip
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import _tokenizer, tiny
from typer.testing import CliRunner

from rerank_plugins import Reranker
from rerank_plugins.cli import _app
from rerank_plugins.errors import ConfigurationError, InputError, ModelLoadError
from rerank_plugins.training import TrainedRetriever, train_retriever
from rerank_plugins.training._data import is_held_out, read_triples
from rerank_plugins.training._mining import BiEncoder
from rerank_plugins.training._model import start as start_model
from rerank_plugins.training._retriever import COSINE_MARGIN, _margins

# What follows what must be learnt: no word of a query is in its answer.
RIDDLES = {
    "panda": "bamboo", "paris": "capital", "revert": "history", "faiss": "vector",
    "fox": "dog", "china": "mountains", "search": "library", "commit": "older",
}  # fmt: skip
FILLERS = [
    "bear", "lives", "central", "city", "without", "rewriting", "quick", "brown", "lazy", "undoes", "efficient", "naps",
]  # fmt: skip
LOSSES = ("multiple-negatives", "margin-mse")
SETTINGS: dict[str, Any] = {"steps": 60, "batch_size": 16, "learning_rate": 5e-3, "device": "cpu", "dev_fraction": 0.2}


def riddles(count: int, scored: bool = False) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows: dict[str, dict[str, Any]] = {}

    def passage(answer: str) -> str:
        return f"{rng.choice(FILLERS)} {answer} {rng.choice(FILLERS)} {rng.choice(FILLERS)}"

    while len(rows) < count:
        asked = rng.choice(list(RIDDLES))
        others = rng.sample([answer for riddle, answer in RIDDLES.items() if riddle != asked], 2)
        query = f"{rng.choice(FILLERS)} {rng.choice(FILLERS)} {asked}"
        row: dict[str, Any] = {
            "query": query, "positive": passage(RIDDLES[asked]), "negative": [passage(other) for other in others],
        }  # fmt: skip
        if scored:
            row |= {"positive_score": 4.0, "negative_score": [-3.0, -4.0]}
        rows.setdefault(query, row)
    return list(rows.values())


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded BERT of one layer, with the small weights that a bi-encoder can be trained from."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("encoder") / "tiny-encoder"
    tokenizer = _tokenizer("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
        hidden_dropout_prob=0.05,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "triples.jsonl", riddles(200, scored=True))


@pytest.fixture(scope="module", params=LOSSES)
def whole(request: pytest.FixtureRequest, start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run to the end with each loss: what came, the loss, and the news."""
    news: list[str] = []
    out = tmp_path_factory.mktemp("whole") / "retriever"
    trained = train_retriever(
        data, out, model=start, loss=request.param, **SETTINGS, progress=lambda line, share: news.append(line)
    )
    return trained, request.param, news


def weights(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def losses(news: Sequence[str]) -> list[float]:
    return [float(line.rpartition("loss ")[2]) for line in news if "loss" in line]


# --- a whole run ---


def test_both_losses_learn(whole: tuple[TrainedRetriever, str, list[str]]) -> None:
    trained, _, news = whole

    assert trained.steps == 60
    assert trained.seconds > 0
    assert set(trained.measures) == {"nDCG@10", "MRR@10"}
    for before, after in trained.measures.values():
        assert after > before + 0.1
    assert np.mean(losses(news)[-3:]) < 0.8 * losses(news)[0]
    assert sum("dev nDCG@10" in line for line in news) == 5


def test_the_figures_are_those_of_the_saved_model(whole: tuple[TrainedRetriever, str, list[str]], data: Path) -> None:
    from sentence_transformers import SentenceTransformer

    trained, _, _ = whole
    dev = [triple for triple in read_triples(data) if is_held_out(triple.query, 0.2)]
    texts = list(dict.fromkeys(text for triple in dev for text in (triple.positive, *triple.negatives)))
    model = SentenceTransformer(str(trained.path), device="cpu")
    vectors = model.encode(texts)
    cosines = model.encode([triple.query for triple in dev]) @ vectors.T
    ranks = [int((row > row[texts.index(triple.positive)]).sum()) + 1 for row, triple in zip(cosines, dev, strict=True)]

    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert len(dev) > 20
    assert trained.measures["MRR@10"][1] == pytest.approx(
        np.mean([1 / rank if rank <= 10 else 0 for rank in ranks]), abs=0.01
    )
    assert trained.measures["nDCG@10"][1] == pytest.approx(
        np.mean([1 / math.log2(rank + 1) if rank <= 10 else 0 for rank in ranks]), abs=0.01
    )


def test_the_folder_has_the_model_and_its_card_and_no_more(whole: tuple[TrainedRetriever, str, list[str]]) -> None:
    trained, loss, _ = whole
    card = (trained.path / "README.md").read_text()

    assert {"model.safetensors", "modules.json", "tokenizer.json"} <= {path.name for path in trained.path.iterdir()}
    assert not [path for path in trained.path.iterdir() if path.name.startswith(".")]
    for before, after in trained.measures.values():
        assert f"| {before:.4f} | {after:.4f} |" in card
    assert f"train-retriever triples.jsonl --out retriever --model tiny-encoder --loss {loss} --steps 60" in card
    assert "| triples.jsonl | 200 |" in card
    assert str(trained.path.parent) not in card
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")


def test_the_model_serves_langchain_mining_and_training(whole: tuple[TrainedRetriever, str, list[str]]) -> None:
    from langchain_community.embeddings import HuggingFaceEmbeddings
    from sentence_transformers import SentenceTransformer

    trained, _, _ = whole
    texts = ["the bamboo", "quick dog naps"]
    expected = SentenceTransformer(str(trained.path), device="cpu").encode(texts)

    embeddings = HuggingFaceEmbeddings(model_name=str(trained.path), model_kwargs={"device": "cpu"})
    np.testing.assert_allclose(embeddings.embed_documents(texts), expected, atol=1e-5)
    mined = BiEncoder(trained.path, device="cpu").encode(texts)
    # In bfloat16 where the processor has it.
    np.testing.assert_allclose(mined, expected, atol=0.02)
    cross = start_model(trained.path, 0)
    assert np.isfinite(cross.predict([("panda", "the bamboo")], show_progress_bar=False)).all()


def test_an_interrupted_run_ends_with_the_same_weights(
    whole: tuple[TrainedRetriever, str, list[str]], start: Path, data: Path, tmp_path: Path
) -> None:
    trained, loss, _ = whole

    class Killed(Exception):
        pass

    def kill(line: str, share: float) -> None:
        if line.startswith("step 30 "):
            raise Killed

    out = tmp_path / "retriever"
    with pytest.raises(Killed):
        train_retriever(data, out, model=start, loss=loss, **SETTINGS, progress=kill)
    (work,) = out.iterdir()
    # A kill while a checkpoint is being written leaves one without the file that is written last.
    shutil.copytree(work / "checkpoint-24", work / "checkpoint-30")
    (work / "checkpoint-30" / "trainer_state.json").unlink()
    with pytest.raises(ConfigurationError, match="learning_rate"):
        train_retriever(data, out, model=start, loss=loss, **(SETTINGS | {"learning_rate": 1e-4}))
    news: list[str] = []
    resumed = train_retriever(
        data, out, model=start, loss=loss, **SETTINGS, progress=lambda line, share: news.append(line)
    )

    assert losses(news)
    assert min(int(line.split()[1]) for line in news if line.startswith("step ")) == 27
    assert resumed.measures == trained.measures
    assert weights(resumed.path).keys() == weights(trained.path).keys()
    for name, value in weights(trained.path).items():
        np.testing.assert_array_equal(weights(resumed.path)[name], value, err_msg=name)


# --- data ---


GOOD = {"query": "q", "positive": "p", "negative": "n"}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"query": "q", "positive": "p"}',
        '{"query": "q", "positive": "p", "negative": []}',
        '{"query": "q", "positive": "p", "negative": ["n", " "]}',
        '{"query": "", "positive": "p", "negative": "n"}',
        '{"query": "q", "positive": "p", "negative": "p"}',
        '{"query": "q", "positive": "p", "negative": "n", "positive_score": "high"}',
        '{"query": "q", "positive": "p", "negative": ["n", "m"], "negative_score": [1.0]}',
        '{"query": "q", "positive": "p", "negative": "n", "negative_score": NaN}',
    ],
)
def test_a_bad_line_is_named_before_anything_is_done(start: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "triples.jsonl.gz"
    with gzip.open(path, "wt") as out:
        out.write(f"{json.dumps(GOOD)}\n\n{line}\n")

    with pytest.raises(InputError, match=r"triples\.jsonl\.gz, line 3"):
        train_retriever(path, tmp_path / "out", model=start, steps=1)
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_split_is_refused(start: Path, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", [GOOD])
    assert not is_held_out("q")
    with pytest.raises(InputError, match="dev_fraction"):
        train_retriever(few, tmp_path / "out", model=start, steps=1)
    tests = write(tmp_path / "tests.jsonl", [GOOD | {"split": "test"}])
    with pytest.raises(InputError, match="left to train on"):
        train_retriever(tests, tmp_path / "out", model=start, steps=1)
    assert not (tmp_path / "out").exists()


def test_own_splits_and_several_files_are_used(start: Path, tmp_path: Path) -> None:
    rows = riddles(24)
    one = write(tmp_path / "one.jsonl", [row | {"split": "train"} for row in rows[:16]])
    two = write(tmp_path / "two.jsonl", [row | {"split": "dev"} for row in rows[16:]])

    trained = train_retriever([one, two], tmp_path / "out", model=start, batch_size=8, device="cpu")

    # 16 queries with two negatives each, eight in a step.
    assert trained.steps == 4
    card = (trained.path / "README.md").read_text()
    assert "32 examples of 16 queries were learnt from, and 16 of 8 queries held out" in card
    assert "| two.jsonl | 8 |" in card


def test_nothing_need_be_held_out(start: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "triples.jsonl", riddles(8))

    trained = train_retriever(path, tmp_path / "out", model=start, steps=2, batch_size=4, device="cpu", dev_fraction=0)

    assert trained.measures == {}
    assert "nothing was measured" in (trained.path / "README.md").read_text()


# --- the teacher ---


class Counting:
    """A cross-encoder that knows the riddles, and counts what it was asked."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> Any:
        self.asked += pairs
        return np.array([5.0 if RIDDLES[q.split()[-1]] in t else -3.0 for q, t in pairs], dtype=np.float32)


def test_missing_scores_are_the_teachers(start: Path, tmp_path: Path) -> None:
    rows = riddles(12)
    rows[0] |= {"positive_score": 2.0, "negative_score": [-2.0, 0.0]}
    rows[1] |= {"positive_score": 2.0}
    backend = Counting()
    triples = read_triples(write(tmp_path / "triples.jsonl", rows))

    margins = _margins(triples, Reranker(backend), tmp_path, None, None)

    raw = np.array([4.0, 2.0] + [8.0] * 22)
    np.testing.assert_allclose(margins, raw * COSINE_MARGIN / math.sqrt((raw**2).mean()))
    assert len(backend.asked) == 3 * 11
    assert _margins(triples, Reranker(backend), tmp_path, None, None) == margins
    assert len(backend.asked) == 3 * 11


def test_a_teacher_is_asked_about_the_training_data_alone(start: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "triples.jsonl", riddles(30))
    backend = Counting()
    news: list[str] = []

    trained = train_retriever(
        path, tmp_path / "out", model=start, loss="margin-mse", teacher=Reranker(backend), steps=2, batch_size=4,
        device="cpu", dev_fraction=0.3, progress=lambda line, share: news.append(line),
    )  # fmt: skip

    asked = {query for query, _ in backend.asked}
    assert asked == {row["query"] for row in riddles(30) if not is_held_out(row["query"], 0.3)}
    kinds = [line.split()[0] for line in news]
    assert kinds.index("teacher:") < kinds.index("step")
    assert "--teacher counting" in (trained.path / "README.md").read_text()


def test_equal_scores_teach_nothing(start: Path, tmp_path: Path) -> None:
    rows = [row | {"positive_score": 1.0, "negative_score": [1.0, 1.0]} for row in riddles(4)]

    with pytest.raises(InputError, match="no margin"):
        _margins(read_triples(write(tmp_path / "triples.jsonl", rows)), None, tmp_path, None, None)


# --- settings ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": "triplet"}, {"teacher": "x"}, {"epochs": 0}, {"steps": 0}, {"batch_size": 0}, {"learning_rate": -1.0},
        {"max_length": 2}, {"dev_fraction": 1.0}, {"device": "cuda:1"},
    ],
)  # fmt: skip
def test_settings_are_checked_first(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        train_retriever(tmp_path / "missing.jsonl", tmp_path / "out", **wrong)


def test_what_is_there_is_kept_unless_told(start: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "triples.jsonl", riddles(8))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    run: Callable[..., TrainedRetriever] = lambda **more: train_retriever(  # noqa: E731
        path, out, model=start, steps=1, batch_size=4, device="cpu", dev_fraction=0, **more
    )

    with pytest.raises(ConfigurationError, match="overwrite"):
        run()
    assert [item.name for item in out.iterdir()] == ["mine.txt"]
    run(overwrite=True)
    assert not (out / "mine.txt").exists()
    with pytest.raises(ConfigurationError, match="overwrite"):
        run()


def test_a_model_that_is_none_leaves_no_run_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "triples.jsonl", riddles(8))

    with pytest.raises(ModelLoadError, match="sentence encoder"):
        train_retriever(path, tmp_path / "out", model=tmp_path / "nothing", steps=1, dev_fraction=0)
    assert not (tmp_path / "out").exists()


# --- the command ---


def test_the_command_tells_the_figures(start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "triples.jsonl", riddles(30))
    out = tmp_path / "retriever"
    settings = ["--steps", "2", "--batch-size", "4", "--device", "cpu", "--dev-fraction", "0.3", "--seed", "1"]

    result = CliRunner().invoke(_app.app, ["train-retriever", str(path), "-o", str(out), "-m", str(start), *settings])

    assert result.exit_code == 0, result.output
    assert "nDCG@10 of the held-out queries 0." in result.stdout
    # The trainer's own prints and bars are not among them.
    assert len(result.stdout.splitlines()) == 4
    assert "2 steps" in result.stdout
    assert result.stderr == ""
    assert capfd.readouterr() == ("", "")
    assert (out / "model.safetensors").is_file()
    refused = CliRunner().invoke(_app.app, ["train-retriever", str(path), "-o", str(out), "-m", str(start)])
    assert refused.exit_code == 2
    assert "overwrite" in refused.stderr


def test_a_model_with_its_own_pooling_keeps_its_length(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    begun = SentenceTransformer(tiny("bert"), device="cpu")
    begun.max_seq_length = 100
    begun.save_pretrained(str(tmp_path / "begun"), create_model_card=False)
    path = write(tmp_path / "triples.jsonl", riddles(8))

    trained = train_retriever(
        path, tmp_path / "out", model=tmp_path / "begun", steps=1, batch_size=4, max_length=16, device="cpu",
        dev_fraction=0,
    )  # fmt: skip

    assert SentenceTransformer(str(trained.path), device="cpu").max_seq_length == 100
