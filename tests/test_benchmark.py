from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import compare
import numpy as np
import pytest
import typer
from checkpoints import tiny
from harness import AGAINST, Contender, Report, Row, Size, _engines, _process, run, write_plot
from harness._contenders import our_engines
from harness._model import Model, prepare_model
from harness._quality import compare_orders
from harness._work import many_texts, read_work, sample_work, short_calls
from typer.testing import CliRunner, Result

from rerank_plugins.errors import ConfigurationError, ScoringError

ONNX = {"backend": "onnx", "precision": "fp32"}
QUERY = "what do pandas eat"
TEXTS = [
    "Paris is the capital of France.",
    "Giant pandas eat bamboo. " * 20,
    "a b c",
    "git revert undoes a commit",
    "x",
]
SETTINGS: dict[str, Any] = {"backends": ("onnx",), "candidates": 12, "queries": 2, "rounds": 3, "threads": 1}


# -- contenders of the tests' own, loaded in worker processes by their names -------------------------------------


def same(model: str) -> _engines.Engine:
    return _engines.ours(model, **ONNX)


def slow(model: str) -> _engines.Engine:
    engine = same(model)

    def rerank(query: str, texts: list[str]) -> Any:
        time.sleep(0.3)
        return engine.rerank(query, texts)

    return dataclasses.replace(engine, rerank=rerank)


def other(model: str) -> _engines.Engine:
    return same(os.environ["OTHER_MODEL"])


def talkative(model: str) -> _engines.Engine:
    print("loading")
    os.write(1, b"still loading\n")
    return same(model)


def dying(model: str) -> _engines.Engine:
    os.write(2, b"my last words\n")
    os._exit(3)


def dropping(model: str) -> _engines.Engine:
    engine = same(model)
    return dataclasses.replace(engine, order=lambda ranking: engine.order(ranking)[1:])


def tiring(model: str) -> _engines.Engine:
    engine, calls = same(model), iter(range(3))

    def rerank(query: str, texts: list[str]) -> Any:
        next(calls)
        return engine.rerank(query, texts)

    return dataclasses.replace(engine, rerank=rerank)


def greedy(model: str) -> _engines.Engine:
    return _engines.Engine(lambda query, texts: np.ones(2**29), lambda result: list(range(len(TEXTS))))


def mine(name: str) -> Contender:
    return Contender(name, f"test_benchmark:{name}", "onnx")


# -- one run, with all that can happen ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Model:
    work = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RERANK_PLUGINS_CACHE", str(work / "cache"))
        return prepare_model(tiny("bert"), work, int8=True, graph=True, progress=lambda news, share: None)


@pytest.fixture(scope="module")
def graph(checkpoint: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without its checkpoint."""
    directory = tmp_path_factory.mktemp("graph") / "model"
    shutil.copytree(checkpoint.path, directory, ignore=shutil.ignore_patterns("*.safetensors", "model_int8.onnx"))
    return directory


@pytest.fixture(scope="module")
def other_model(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: some noise is in its weights."""
    import onnx
    from onnx import numpy_helper

    directory = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(graph, directory)
    loaded = onnx.load(directory / "model.onnx")
    random = np.random.default_rng(0)
    for tensor in loaded.graph.initializer:
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            noise = random.normal(0, 0.3 * values.std(), values.shape)
            tensor.CopyFrom(numpy_helper.from_array((values + noise).astype(np.float32), tensor.name))
    onnx.save(loaded, directory / "model.onnx")
    return directory


@pytest.fixture(scope="module")
def report(graph: Path, other_model: Path) -> Report:
    against = [
        *(Contender(name, f"test_benchmark:{name}", "onnx", reads="graph") for name in ("talkative", "slow", "other")),
        *(Contender(name, f"test_benchmark:{name}", reads="graph") for name in ("dying", "dropping", "tiring")),
        Contender("absent", "absent", reads="graph", modules=("no_such_module.part",), install="no-such-module"),
        "sentence-transformers",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTHER_MODEL", str(other_model))
        patch.setattr("harness._run.SHORT_CALLS", 3)
        return run(str(graph), against=against, short=True, **SETTINGS)


def row(report: Report, name: str) -> Row:
    return next(row for row in report.rows if row.name == name)


def test_the_same_model_gives_the_same_order(report: Report) -> None:
    assert report.reference == "rerank-plugins onnx fp32"
    for name in ("talkative", "slow", "rerank-plugins onnx fp32"):
        found = row(report, name)
        assert (found.overlap, found.same_order, found.ndcg, found.ndcg_difference) == (1.0, True, 1.0, 0.0)
        assert found.logit_difference == pytest.approx(0, abs=1e-5)


def test_two_different_models_are_told_apart(report: Report) -> None:
    found = row(report, "other")
    assert not found.same_order
    assert 0 < found.overlap < 1
    assert found.ndcg_difference < -0.001
    assert found.logit_difference is not None
    assert found.logit_difference > 0.1
    assert [row.name for row in report.differing] == ["other"]


def test_a_slower_contender_is_shown_as_slower(report: Report) -> None:
    assert report.baseline == "talkative"
    found = row(report, "slow")
    assert found.ratio_low <= found.ratio <= found.ratio_high < 1
    assert found.documents_per_s < row(report, "talkative").documents_per_s
    assert found.documents_per_s < 24 / (2 * 0.3)
    assert found.short_p50_s is not None
    assert found.short_p50_s > 0.3
    assert row(report, "talkative").ratio == 1


def test_all_take_turns_and_each_round_begins_with_another_one(report: Report) -> None:
    names = ["talkative", "slow", "other", "rerank-plugins onnx fp32"]
    turns = [name for name in report.turns if name != "tiring"]
    rounds = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert len(rounds) == 3
    assert all(sorted(turn) == sorted(names) for turn in rounds)
    assert len({turn[0] for turn in rounds}) == 3
    assert all(len(row.seconds) == 3 for row in report.rows)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("absent", "no_such_module not installed: pip install no-such-module"),
        ("sentence-transformers", "needs safetensors"),
        ("dying", "the process ended with code 3: my last words"),
        ("dropping", "did not return every candidate once"),
        ("tiring", "StopIteration"),
    ],
)
def test_who_cannot_take_part_is_named_with_the_reason(report: Report, name: str, why: str) -> None:
    assert name not in [row.name for row in report.rows]
    assert [note for note in report.notes if note.startswith(f"{name}: ") and why in note]


def test_the_report_is_json_with_all_figures(report: Report) -> None:
    found = json.loads(json.dumps(report.to_dict()))
    assert set(found) == {field.name for field in dataclasses.fields(Report)}
    assert set(found["rows"][0]) == {field.name for field in dataclasses.fields(Row)}
    assert (found["queries"], found["documents"], found["threads"], found["rounds"]) == (2, 24, 1, 3)
    assert found["versions"]["onnxruntime"]
    assert found["machine"]["cpu"]
    engine = row(report, "rerank-plugins onnx fp32")
    assert engine.short_p95_s is not None
    assert engine.short_p50_s is not None
    assert engine.short_p95_s >= engine.short_p50_s
    names = ["Reranker.score", "Reranker.rank", "LangChain adapter", "LlamaIndex adapter"]
    assert [overhead.name for overhead in report.overheads] == names
    assert report.overheads[0].added_s == 0


def test_the_plot_is_a_picture(report: Report, tmp_path: Path) -> None:
    write_plot(report, tmp_path / "out.png")
    content = (tmp_path / "out.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


# -- fresh processes ---------------------------------------------------------------------------------------------


def test_fresh_processes_tell_import_start_and_memory(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_process, "MEMORY_CANDIDATES", 20)
    settings = {**SETTINGS, "queries": 1, "rounds": 1}
    found = run(str(graph), against=(), process=True, sizes=(5, 20), **settings)
    (engine,) = found.rows
    assert engine.import_s is not None
    assert engine.first_score_s is not None
    assert 0 < engine.import_s < engine.first_score_s
    assert [size.candidates for size in found.sizes] == [5, 20]
    assert found.sizes[0].tokens < found.sizes[1].tokens
    for size in found.sizes:
        assert size.per_token_s == size.seconds / size.tokens
    if _engines.peak_bytes() is not None:
        assert engine.peak_bytes == found.sizes[1].peak_bytes
        assert 30e6 < engine.peak_bytes < 3e9


@pytest.mark.skipif(_engines.peak_bytes() is None, reason="this system limits no process")
def test_who_needs_too_much_memory_fails_alone(checkpoint: Model) -> None:
    contender = Contender("greedy", "test_benchmark:greedy")
    with pytest.raises(ScoringError, match=r"[Mm]emory"):
        _process.measure_size(contender, checkpoint, 5, 1, memory=2**30)


def test_a_size_that_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(contender: Contender, model: Any, size: int, threads: int, memory: int | None) -> Size:
        return Size(contender.name, size, size * 10, size / 10, 0.01, None)

    monkeypatch.setattr(_process, "measure_size", measured)
    found, note = _process.measure_sizes(mine("same"), None, (10, 100, 1000), 1, 60.0)  # type: ignore[arg-type]
    assert [size.candidates for size in found] == [10, 100]
    assert note == "same: 1000 candidates would take about 100 s, and were left out"
    found, note = _process.measure_sizes(mine("same"), None, (10, 100, 1000), 1, 100.0)  # type: ignore[arg-type]
    assert [size.candidates for size in found] == [10, 100, 1000]
    assert note is None


# -- everybody on one checkpoint ---------------------------------------------------------------------------------


_ENGINES = {
    **AGAINST,
    **{contender.name: contender for contender in our_engines(("onnx", "openvino", "torch"), ("fp32", "int8"))},
}


@pytest.mark.parametrize("name", _ENGINES)
def test_every_contender_reranks_the_same_weights(checkpoint: Model, name: str) -> None:
    contender = _ENGINES[name]
    for module in contender.modules:
        pytest.importorskip(module)
    reference = _engines.sentence_transformers(str(checkpoint.path), dtype="float32")
    assert reference.logits is not None
    expected = np.asarray(reference.logits(QUERY, TEXTS), dtype=np.float64)
    keywords = {**contender.keywords, **({"threads": 1} if contender.takes_threads else {})}
    engine = getattr(_engines, contender.load)(str(checkpoint.path), **keywords)
    order = engine.order(engine.rerank(QUERY, engine.prepare(TEXTS)))
    found = np.asarray([float(value) for value in engine.logits(QUERY, TEXTS)])
    if contender.precision == "fp32":
        assert order == np.argsort(-expected).tolist()
        assert np.abs(found - expected).max() < 1e-3
    else:
        assert sorted(order) == list(range(len(TEXTS)))
        assert 1e-5 < np.abs(found - expected).max() < 1.0


def test_everybody_cuts_at_the_same_length(checkpoint: Model) -> None:
    assert checkpoint.max_length == 256
    texts = ["bamboo " * 400, "bamboo " * 400 + "is what giant pandas eat", "panda"]
    assert checkpoint.lengths(QUERY, texts)[:2] == [256, 256]
    for make, keywords in (
        (_engines.ours, ONNX),
        (_engines.flashrank, {}),
        (_engines.fastembed, {"threads": 1}),
        (_engines.rerankers, {}),
    ):
        engine = make(str(checkpoint.path), **keywords)
        assert engine.logits is not None
        logits = [float(value) for value in engine.logits(QUERY, texts)]
        assert logits[0] == pytest.approx(logits[1], abs=1e-5)
        assert logits[0] != pytest.approx(logits[2], abs=1e-3)


# -- the command -------------------------------------------------------------------------------------------------


def call(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(compare.benchmark)
    return CliRunner().invoke(app, list(arguments))


SMALL = ("--backends", "onnx", "--candidates", "12", "--queries", "1", "--rounds", "1", "--threads", "1")


def test_the_command_says_that_the_order_differs(
    graph: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_MODEL", str(other_model))
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    found = call(
        "--model", str(graph), *SMALL, "--against", "test_benchmark:other", "--json", str(out), "--plot", str(plot)
    )
    assert found.exit_code == 0, found.output
    assert "The order differs from that of rerank-plugins onnx fp32:" in found.stdout
    figures = json.loads(out.read_text())
    (differing,) = [row for row in figures["rows"] if not row["same_order"]]
    assert f"test_benchmark:other: top-10 overlap {differing['overlap']:.3f}" in found.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_command_says_that_the_order_is_the_same_and_who_is_missing(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = dataclasses.replace(AGAINST["flashrank"], modules=("no_such_module",))
    monkeypatch.setitem(AGAINST, "flashrank", absent)  # type: ignore[arg-type]
    found = call("--model", str(graph), *SMALL, "--against", "flashrank")
    assert found.exit_code == 0, found.output
    assert "The order is the same everywhere" in found.stdout
    assert "Left out: flashrank: no_such_module not installed: pip install flashrank" in found.stdout
    assert "12 candidates" in found.stdout
    assert "documents/s" in found.stdout


def test_json_to_standard_output_is_all_that_is_there(graph: Path) -> None:
    found = call("--model", str(graph), *SMALL, "--against", "", "--json", "-")
    assert found.exit_code == 0, found.output
    assert [row["name"] for row in json.loads(found.stdout)["rows"]] == ["rerank-plugins onnx fp32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "nobody"), "There is no contender 'nobody': expected all, langchain"),
        (("--backends", "cuda"), "There is no backend 'cuda'"),
        (("--precision", "fp8"), "There is no precision 'fp8'"),
        (("--backends", "onnx", "--precision", "bf16"), "None of the backends onnx computes in bf16"),
        (("--plot", "out.bmp"), "ends in .png"),
        (("--json", "no/such/place.json"), "cannot be written"),
        (("--data", "no-such-folder"), "no-such-folder"),
        (("--rounds", "0"), "rounds"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_measured(arguments: tuple[str, ...], message: str) -> None:
    found = call(*arguments)
    assert found.exit_code != 0
    assert message in f"{found.stderr}{found.exception}"


# -- the work ----------------------------------------------------------------------------------------------------


def test_the_built_in_work_is_always_the_same_and_without_doubles() -> None:
    work = sample_work(12, 50)
    assert work.calls == sample_work(12, 50).calls
    assert [len(texts) for _, texts in work.calls] == [50] * 12
    assert len({query for query, _ in work.calls}) == 12
    everything = [text for _, texts in work.calls for text in texts]
    assert len(set(everything)) == 600
    assert max(map(len, everything)) > 5 * min(map(len, everything))
    assert len(set(many_texts(10_000))) == 10_000


def test_short_calls_have_ten_candidates_of_fifty_tokens(checkpoint: Model) -> None:
    for _, texts in short_calls(checkpoint, 3):
        assert [len(checkpoint.tokenizer().encode(text, add_special_tokens=False).ids) for text in texts] == [50] * 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "beir"
    path.mkdir()
    (path / "queries.jsonl").write_text("".join(f'{{"_id": "q{i}", "text": "question {i}"}}\n' for i in range(3)))
    (path / "corpus.jsonl").write_text("".join(f'{{"_id": "d{i}", "text": "text {i}"}}\n' for i in range(6)))
    (path / "qrels.tsv").write_text("q1\td4\t1\nq2\td1\t1\n")
    rows = [f"q{q}\td{d}\t{d + 1}" for q in range(3) for d in range(6)]
    (path / "candidates.tsv").write_text("\n".join(rows) + "\n")
    return path


def test_a_beir_folder_brings_queries_candidates_and_judgements(folder: Path) -> None:
    work = read_work(folder, queries=1, candidates=5)
    assert work.calls == [("question 1", [f"text {i}" for i in range(5)])]
    best = compare_orders(work, [[4, 0, 1, 2, 3]], None, [[0, 4, 1, 2, 3]], None)
    assert best.ndcg == 1
    assert best.ndcg_difference == pytest.approx(1 - 1 / np.log2(3))
    assert (best.overlap, best.same_order, best.logit_difference) == (1.0, False, None)


def test_without_judgements_the_reference_is_the_measure() -> None:
    work = sample_work(1, 20)
    order, back = list(range(20)), list(range(19, -1, -1))
    logits = [[float(-i) for i in order]]
    assert compare_orders(work, [order], logits, [order], logits).ndcg == 1
    found = compare_orders(work, [back], [[*logits[0][:-1], 3.0]], [order], logits)
    assert (found.ndcg, found.ndcg_difference, found.overlap, found.same_order) == (0.0, -1.0, 0.0, False)
    assert found.logit_difference == 22
    assert compare_orders(work, [order], [[None, *logits[0][1:]]], [order], logits).logit_difference is None


def test_a_multi_class_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="one logit"):
        prepare_model(tiny("bert-nli"), tmp_path, int8=False, graph=False, progress=lambda news, share: None)
