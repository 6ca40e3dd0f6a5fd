from __future__ import annotations

import gzip
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rerank_plugins import Reranker, __version__
from rerank_plugins.cli._app import app
from rerank_plugins.errors import ConfigurationError, InputError, RerankError, ScoringError
from rerank_plugins.evaluation import Evaluation, compare, evaluate, write_report
from rerank_plugins.evaluation._report import report_html
from rerank_plugins.evaluation.measures import holm, parse_measures, split_measures
from rerank_plugins.testing import FakeBackend

QUERIES = {
    "q1": "red fox",
    "q2": "blue whale",
    "q3": "green tree",
    "unjudged": "red",
    "irrelevant": "blue",
    "lost": "yellow sun",
}
DOCUMENTS = {
    "d1": "the red fox runs",
    "d2": "a red door",
    "d3": "blue whale song",
    "d4": "blue paint",
    "d5": "green tree <script>alert('x')</script> & more",
    "d6": "grey stone",
    "d7": "yellow sun",
    "d8": "red fox den",
}
QRELS = {
    "q1": {"d1": 2, "d2": 1, "d8": 1},
    "q2": {"d3": 1, "d4": 0},
    "q3": {"d5": 1},
    "irrelevant": {"d4": 0},
    "lost": {"d7": 1},
}
CANDIDATES = {
    "q1": ["d6", "d2", "d1"],
    "q2": ["d4", "d3", "d6"],
    "q3": ["d5", "d6"],
    "unjudged": ["d1"],
    "irrelevant": ["d4"],
}


def write_folder(path: Path, candidates: dict[str, list[str]] | None = CANDIDATES) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    with gzip.open(path / "corpus.jsonl.gz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"_id": name, "title": "", "text": text}) + "\n" for name, text in DOCUMENTS.items())
    queries = [json.dumps({"_id": name, "text": text}) for name, text in QUERIES.items()]
    (path / "queries.jsonl").write_text("\n".join(queries) + "\n", encoding="utf-8")
    grades = [f"{q}\t{d}\t{grade}" for q, found in QRELS.items() for d, grade in found.items()]
    (path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(grades) + "\n")
    if candidates is not None:
        rows = [f"{q}\t{d}\t{rank}" for q, found in candidates.items() for rank, d in enumerate(found, 1)]
        (path / "candidates.tsv").write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "toy")


class Overlap:
    """Counts common words, and remembers the queries of whole candidate lists that it was asked."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign
        self.asked: list[str] = []

    def score(self, query: str, texts: Sequence[str]) -> np.ndarray:
        self.asked.append(query)
        words = set(query.split())
        return np.array([self.sign * len(words & set(text.split())) for text in texts], dtype=np.float32)


def counted(model: Overlap) -> list[str]:
    """The queries asked since the last time, without the first calls, which warm up and recognise the model."""
    asked, model.asked = model.asked[min(3, len(model.asked)) :], []
    return asked


# -- statistics and measures ------------------------------------------------------------------------------------


def test_comparison_is_a_paired_t_test() -> None:
    # Differences 0.1, 0.2, 0.3, 0.4: mean 0.25, standard error 0.0645, t = 3.873 with three degrees of freedom.
    found = compare([0.5, 0.4, 0.3, 0.2], [0.6, 0.6, 0.6, 0.6])
    assert found.difference == pytest.approx(0.25)
    assert (found.before, found.after) == (pytest.approx(0.35), pytest.approx(0.6))
    assert (found.low, found.high) == (pytest.approx(0.044574, abs=1e-5), pytest.approx(0.455426, abs=1e-5))
    assert found.p_value == pytest.approx(0.030466, abs=1e-5)


def test_comparison_counts_queries_and_ignores_rounding() -> None:
    found = compare([0.1, 0.5, 0.3, 0.2], [0.2, 0.4, 0.3 + 1e-12, 0.9])
    assert (found.better, found.worse, found.same) == (2, 1, 1)


def test_comparison_claims_nothing_where_a_test_is_not_defined() -> None:
    assert compare([0.1], [0.5]).p_value is None
    assert compare([0.1], [0.1]).p_value is None
    assert compare([0.1, 0.2], [0.3, 0.4]).low is None
    nothing = compare([0.1, 0.2], [0.1, 0.2])
    assert (nothing.low, nothing.high, nothing.p_value) == (0.0, 0.0, 1.0)


def test_names_of_measures_may_hold_blanks_within_parentheses() -> None:
    text = " nDCG@10, MRR(rel=2)@10  P(rel=1, judged_only=True)@5 "
    assert split_measures(text) == ["nDCG@10", "MRR(rel=2)@10", "P(rel=1, judged_only=True)@5"]


def test_holm_corrects_for_the_number_of_tests() -> None:
    # Smallest times 4, next times 3, ... and never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("name", ["nonsense", "nDCG@", "R@0", "nDCG@-1", "P", "AP(foo=1)", "nDCG@10 AP"])
def test_a_measure_that_cannot_be_computed_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(repr(name))):
        parse_measures(["AP", name])


def test_measures_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nonsense"):
        evaluate(tmp_path / "none", Overlap(), measures=["nonsense"])


# -- what is measured -------------------------------------------------------------------------------------------


def test_values_by_hand(folder: Path) -> None:
    found = evaluate(folder, Overlap(), measures=["MRR@10", "R@10", "nDCG@10", "AP(rel=2)"]).datasets[0]
    model = found.models[0]

    assert found.queries == ["q1", "q2", "q3", "lost"]
    assert model.rankings == {"q1": ["d1", "d2", "d6"], "q2": ["d3", "d4", "d6"], "q3": ["d5", "d6"]}
    assert found.first["MRR@10"] == {"q1": 0.5, "q2": 0.5, "q3": 1.0, "lost": 0.0}
    assert model.values["MRR@10"] == {"q1": 1.0, "q2": 1.0, "q3": 1.0, "lost": 0.0}
    # One relevant document of q1 is in the corpus and not among the candidates.
    assert model.values["R@10"]["q1"] == pytest.approx(2 / 3)
    ideal = 2 + 1 / np.log2(3) + 1 / np.log2(4)
    assert model.values["nDCG@10"]["q1"] == pytest.approx((2 + 1 / np.log2(3)) / ideal)
    assert found.first["nDCG@10"]["q1"] == pytest.approx((1 / np.log2(3) + 2 / np.log2(4)) / ideal)
    assert model.values["AP(rel=2)"] == {"q1": 1.0, "q2": 0.0, "q3": 0.0, "lost": 0.0}
    c = model.comparisons["MRR@10"]
    assert (c.before, c.after, c.better, c.worse, c.same) == (0.5, 0.75, 2, 0, 2)


def test_ceiling_is_the_best_order_of_the_candidates(folder: Path) -> None:
    backwards = evaluate(folder, Overlap(sign=-1.0), measures=["nDCG@10", "MRR@10"]).datasets[0]
    forwards = evaluate(folder, Overlap(), measures=["nDCG@10", "MRR@10"]).datasets[0]

    assert backwards.ceiling == forwards.ceiling
    assert forwards.models[0].values == forwards.ceiling
    assert backwards.models[0].values["MRR@10"]["q2"] == pytest.approx(1 / 3)
    # A relevant document that the first stage missed is out of reach.
    assert forwards.ceiling["nDCG@10"]["q1"] < 1.0
    assert forwards.ceiling["nDCG@10"]["lost"] == 0.0


def test_queries_that_cannot_be_measured_are_left_out_and_counted(folder: Path) -> None:
    model = Overlap()
    found = evaluate(folder, model).datasets[0]

    assert (found.unjudged, found.without_relevant, found.without_candidates) == (1, 1, 1)
    assert set(model.asked) == {"red fox", "blue whale", "green tree"}
    assert list(found.first["AP"]) == ["q1", "q2", "q3", "lost"]


def test_top_k_cuts_both_orders(folder: Path) -> None:
    found = evaluate(folder, Overlap(), top_k=2, measures=["R@10"]).datasets[0]

    assert found.candidates["q1"] == ["d6", "d2"]
    assert found.first["R@10"]["q1"] == found.models[0].values["R@10"]["q1"] == pytest.approx(1 / 3)
    with pytest.raises(ConfigurationError, match="top_k"):
        evaluate(folder, Overlap(), top_k=0)


def test_equal_scores_keep_the_first_stage_order(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "many", None)
    names = [f"x{number:02}" for number in range(80, 0, -1)]
    texts = [json.dumps({"_id": name, "text": "even" if int(name[1:]) % 2 else "odd"}) for name in names]
    (path / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    (path / "candidates.tsv").write_text("".join(f"q1\t{name}\t{rank}\n" for rank, name in enumerate(names)))
    scorers = {
        "flat": lambda query, texts: np.zeros(len(texts)),
        "two": lambda query, texts: [t == "odd" for t in texts],
    }
    found = evaluate(path, scorers).datasets[0]

    assert found.models[0].rankings == found.candidates == {"q1": names}
    assert found.models[0].values == found.first
    assert found.models[1].rankings["q1"] == [*names[::2], *names[1::2]]


def test_speed_is_measured_by_query(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def slow(query: str, texts: list[str]) -> np.ndarray:
        nonlocal now
        now += {"red fox": 0.1, "blue whale": 0.2, "green tree": 0.6}[query]
        return np.zeros(len(texts))

    monkeypatch.setattr("rerank_plugins.evaluation._evaluate.time.perf_counter", lambda: now)
    speed = evaluate(folder, slow).datasets[0].models[0].speed
    assert speed is not None
    assert (speed.documents, speed.seconds) == (8, pytest.approx(0.9))
    assert speed.documents_per_s == pytest.approx(8 / 0.9)
    assert (speed.p50_s, speed.p95_s) == (pytest.approx(0.2), pytest.approx(0.56))


def test_a_reranker_its_score_method_and_a_function_give_the_same(folder: Path) -> None:
    reranker = Reranker(FakeBackend())
    found = evaluate(folder, {"whole": reranker, "method": reranker.score}).datasets[0]

    assert found.models[0].values == found.models[1].values
    assert [model.engine for model in found.models] == ["fake, fp32", ""]


def test_several_folders_and_models_and_their_means(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", {"q3": ["d6", "d5"]})
    news: list[tuple[str, float]] = []
    found = evaluate(
        [folder, other],
        {"good": Overlap(), "bad": Overlap(-1.0)},
        measures=["MRR@10"],
        progress=lambda text, share: news.append((text, share)),
    )

    assert [result.name for result in found.datasets] == ["toy", "other"]
    assert found.model_names == ("good", "bad")
    assert found.mean("MRR@10", "good") == pytest.approx((0.75 + 0.25) / 2)
    assert found.mean("MRR@10") == pytest.approx((0.5 + 0.125) / 2)
    assert news[-1] == ("other: bad", 1.0)
    figures = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert figures["means"]["MRR@10"]["models"]["good"] == found.mean("MRR@10", "good")
    assert figures["datasets"][1]["per_query"]["q3"]["MRR@10"] == {
        "first_stage": 0.5,
        "ceiling": 1.0,
        "models": {"good": 1.0, "bad": 0.5},
    }


@pytest.mark.parametrize("scores", [[1.0], [[1.0], [2.0], [3.0]], [1.0, float("nan"), 2.0]])
def test_a_score_that_is_none_is_an_error(folder: Path, scores: Any) -> None:
    with pytest.raises(ScoringError, match="red fox"):
        evaluate(folder, lambda query, texts: np.array(scores))


def test_models_and_folders_are_checked(folder: Path, tmp_path: Path) -> None:
    twice = tmp_path / "again" / "toy"
    write_folder(twice)
    with pytest.raises(ConfigurationError, match="Two models are called 'Overlap'"):
        evaluate(folder, [Overlap(), Overlap()])
    with pytest.raises(ConfigurationError, match="Reranker"):
        evaluate(folder, {"name": "cross-encoder/x"})  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match=r"Reranker\('cross-encoder/x'\)"):
        evaluate(folder, "cross-encoder/x")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="twice"):
        evaluate([folder, folder], Overlap())
    with pytest.raises(ConfigurationError, match="one folder or more"):
        evaluate([], Overlap())
    names = [result.name for result in evaluate([folder, twice], Overlap()).datasets]
    assert names == [str(folder), str(twice)]


# -- resuming ---------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on(folder: Path, tmp_path: Path) -> None:
    class Killed(Overlap):
        def score(self, query: str, texts: Sequence[str]) -> np.ndarray:
            if len(self.asked) == 5:
                raise KeyboardInterrupt
            return super().score(query, texts)

    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, {"model": Killed()}, work=tmp_path / "work")
    (file,) = (tmp_path / "work").iterdir()
    with file.open("a") as out:
        out.write('{"key": "half a li')

    model = Overlap()
    found = evaluate(folder, {"model": model}, work=tmp_path / "work")
    assert counted(model) == ["green tree"]
    assert (
        found.to_dict()["datasets"][0]["per_query"]
        == (evaluate(folder, {"model": Overlap()}).to_dict()["datasets"][0]["per_query"])
    )
    again = evaluate(folder, {"model": model}, work=tmp_path / "work")
    assert counted(model) == []
    # One query was scored by the second run, all were kept for the third.
    speeds = [run.datasets[0].models[0].speed for run in (found, again)]
    assert [(speed.queries, speed.earlier) for speed in speeds if speed] == [(1, False), (3, True)]
    assert again.to_dict()["datasets"][0]["per_query"] == found.to_dict()["datasets"][0]["per_query"]


def test_a_changed_model_is_never_mixed_with_the_old_one(folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    old, new = Overlap(), Overlap(-1.0)
    first = evaluate(folder, {"model": old}, work=work)
    counted(old)
    second = evaluate(folder, {"model": new}, work=work)

    assert counted(new) == ["red fox", "blue whale", "green tree"]
    assert second.datasets[0].models[0].rankings["q1"] == ["d6", "d2", "d1"]
    again = evaluate(folder, {"model": old}, work=work)
    assert again.to_dict()["datasets"][0]["per_query"] == first.to_dict()["datasets"][0]["per_query"]
    assert counted(old) == []
    assert len(list(work.glob("*.scores.jsonl"))) == 2


def test_settings_of_a_reranker_keep_scores_apart(folder: Path, tmp_path: Path) -> None:
    backend = FakeBackend()
    for max_length in (None, 64, None):
        evaluate(folder, {"model": Reranker(backend, max_length=max_length)}, work=tmp_path)
    assert len(list(tmp_path.glob("*.scores.jsonl"))) == 2


def test_only_what_changed_is_scored_again(folder: Path, tmp_path: Path) -> None:
    class Constant(Overlap):
        def score(self, query: str, texts: Sequence[str]) -> np.ndarray:
            return super().score(query, texts) * 0

    more = {**QUERIES, "q4": "grey stone"}
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": q, "text": t}) for q, t in more.items()))
    with (folder / "qrels.tsv").open("a") as out:
        out.write("q4\td6\t1\n")
    rows = (folder / "candidates.tsv").read_text()
    (folder / "candidates.tsv").write_text(rows + "q4\td1\t1\nq4\td6\t2\n")
    model = Constant()
    evaluate(folder, model, work=tmp_path / "work")
    counted(model)
    (folder / "candidates.tsv").write_text(rows + "q4\td2\t1\nq4\td6\t2\n")
    evaluate(folder, model, work=tmp_path / "work")
    assert counted(model) == ["grey stone"]


def test_scores_can_be_made_anew(folder: Path, tmp_path: Path) -> None:
    model = Overlap()
    evaluate(folder, model, work=tmp_path)
    counted(model)
    evaluate(folder, model, work=tmp_path, resume=False)
    assert counted(model) == ["red fox", "blue whale", "green tree"]
    evaluate(folder, model, work=tmp_path)
    assert counted(model) == []


@pytest.mark.parametrize("content", [b"\xff\xfe", b"not json\n", b"[]\n", b'{"probes": 3}\n', b""])
def test_a_damaged_score_file_is_begun_anew(folder: Path, tmp_path: Path, content: bytes) -> None:
    work = tmp_path / "work"
    evaluate(folder, Overlap(), work=work)
    (file,) = work.iterdir()
    file.write_bytes(content)
    model = Overlap()
    evaluate(folder, model, work=work)
    assert counted(model) == ["red fox", "blue whale", "green tree"]


# -- first stages -----------------------------------------------------------------------------------------------


def test_auto_takes_candidates_or_else_bm25(folder: Path, tmp_path: Path) -> None:
    assert evaluate(folder, Overlap()).datasets[0].first_stage == "candidates.tsv"
    bare = write_folder(tmp_path / "bare", None)
    found = evaluate(bare, Overlap()).datasets[0]

    assert found.first_stage == "BM25"
    assert set(found.candidates["q1"]) == {"d1", "d2", "d8"}
    # Both words in the shorter text, both in the longer one, one word.
    assert found.candidates["q1"][2] == "d2"
    assert found.candidates["lost"] == ["d7"]
    assert (found.without_candidates, "unjudged" in found.candidates) == (0, False)


def test_what_bm25_found_is_kept_until_the_texts_change(tmp_path: Path) -> None:
    bare, work = write_folder(tmp_path / "bare", None), tmp_path / "work"
    evaluate(bare, Overlap(), work=work, first_stage="bm25")
    (file,) = work.glob("first-stage-*.json")
    file.write_text(json.dumps({"q1": [["d6", 1.5]]}))
    assert evaluate(bare, Overlap(), work=work).datasets[0].candidates == {"q1": ["d6"]}

    texts = (bare / "queries.jsonl").read_text()
    (bare / "queries.jsonl").write_text(texts.replace("red fox", "red door"))
    assert evaluate(bare, Overlap(), work=work).datasets[0].candidates["q1"][0] == "d2"


def test_bm25_finds_nothing_for_words_that_no_document_has(tmp_path: Path) -> None:
    bare = write_folder(tmp_path / "bare", None)
    texts = (bare / "queries.jsonl").read_text()
    (bare / "queries.jsonl").write_text(texts.replace("red fox", "the ... zebra").replace("blue whale", "of the"))
    found = evaluate(bare, Overlap()).datasets[0]
    assert (found.candidates.get("q1"), found.candidates.get("q2"), found.without_candidates) == (None, None, 2)


def test_faiss_with_vectors_of_the_caller(folder: Path) -> None:
    words = sorted({word for text in (*DOCUMENTS.values(), *QUERIES.values()) for word in text.split()})

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[float(word in text.split()) for word in words] for text in texts])

    found = evaluate(folder, Overlap(), first_stage="faiss", top_k=3, embed=embed).datasets[0]
    assert found.first_stage == "FAISS"
    assert set(found.candidates["q1"]) == {"d1", "d8", "d2"}
    assert found.candidates["q2"][:2] == ["d3", "d4"]
    with pytest.raises(ConfigurationError, match="shape"):
        evaluate(folder, Overlap(), first_stage="faiss", embed=lambda texts: np.zeros(3))


def test_faiss_with_the_embedder_of_the_demo(folder: Path) -> None:
    found = evaluate(folder, Overlap(), first_stage="faiss", top_k=2).datasets[0]
    assert {found.candidates[query][0] for query in ("q2", "q3", "lost")} == {"d3", "d5", "d7"}


def test_a_trec_run_is_ordered_by_its_scores(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "first.run"
    run.write_text("q1 Q0 d2 1 0.5 x\nq1 Q0 d1 2 7.5e0 x\n\nnot-a-query Q0 d9 1 1 x\nq1\tQ0\td6\t3\t-2\tx\n")
    found = evaluate(folder, Overlap(), first_stage=str(run)).datasets[0]
    assert found.candidates == {"q1": ["d1", "d2", "d6"]}
    assert found.first_stage == "first.run"


def test_a_file_of_the_folder_comes_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.tsv").write_text("q1\td6\t1\n")
    monkeypatch.chdir(tmp_path)
    assert evaluate(folder, Overlap(), first_stage="mine.tsv").datasets[0].candidates == {"q1": ["d6"]}
    (folder / "mine.tsv").write_text("qid\tdid\trank\nq1\td2\t2\nq1\td1\t1\nq1\td1\t3\n")
    assert evaluate(folder, Overlap(), first_stage="mine.tsv").datasets[0].candidates == {"q1": ["d1", "d2"]}


def test_judgements_where_beir_has_them(folder: Path) -> None:
    (folder / "qrels").mkdir()
    (folder / "qrels.tsv").rename(folder / "qrels" / "test.tsv")
    assert evaluate(folder, Overlap()).datasets[0].queries == ["q1", "q2", "q3", "lost"]


def write_pairs(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_judged_pairs_are_a_test_set(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"query": "red fox", "passage": "a red door", "label": 0},
        {"query": "red fox", "passage": "the red fox runs", "label": 1},
        {"query": "blue whale", "positive": "blue whale song", "negative": ["blue paint", "a red door"]},
    ]
    file = write_pairs(tmp_path / "pairs.jsonl", *rows)
    found = evaluate(file, Overlap(), measures=["nDCG@10", "R@10"]).datasets[0]

    assert found.first_stage == "BM25"
    assert found.dataset.documents == {
        "p1": "a red door", "p2": "the red fox runs", "p3": "blue whale song", "p4": "blue paint",
    }  # fmt: skip
    assert found.dataset.qrels == {"q1": {"p1": 0, "p2": 1}, "q2": {"p3": 1, "p4": 0, "p1": 0}}
    # Both passages with the word red, by BM25 and by common words.
    assert found.candidates["q1"] == ["p2", "p1"]
    assert found.models[0].comparisons["nDCG@10"].after == pytest.approx(1.0)
    assert evaluate(tmp_path, Overlap()).datasets[0].dataset.qrels == found.dataset.qrels

    file.with_name("run.tsv").write_text("q1\tp1\t1\nq1\tp2\t2\n")
    again = evaluate(file, Overlap(), first_stage="run.tsv", measures=["MRR@10"]).datasets[0].models[0]
    assert (again.comparisons["MRR@10"].before, again.comparisons["MRR@10"].after) == (0.25, 0.5)


def test_the_test_split_of_pairs_is_what_counts(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"query": "red", "passage": "red fox", "label": 1, "split": "train"},
        {"query": "blue", "passage": "blue whale", "label": 0.5, "split": "test"},
        {"query": "blue", "passage": "red fox", "label": 0.25, "split": "test"},
    ]
    found = evaluate(write_pairs(tmp_path / "pairs.jsonl", *rows), Overlap()).datasets[0]
    assert found.dataset.queries == {"q1": "blue"}
    assert list(found.dataset.documents.values()) == ["red fox", "blue whale"]
    # Labels that are no whole numbers count in hundredths, which keeps their proportion in nDCG.
    assert found.dataset.qrels == {"q1": {"p2": 50, "p1": 25}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "text": "b", "score": 1}\n', "keys found: question, text, score"),
        ("query,passage,label\na,b,1\n", "looks like CSV, with the columns query, passage, label"),
        ('{"_id": "q1", "text": "a"}\n', "BEIR folder: give the folder"),
        ('{"query": "a", "passage": "b", "label": 0}\n', "no relevant passage"),
    ],
)
def test_pairs_that_cannot_be_measured_say_why(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path / "pairs.jsonl", Overlap())


@pytest.mark.parametrize(
    "damage",
    [
        '{"key": KEY, "scores": ["x", 1, 2], "seconds": 1}',
        '{"key": KEY, "scores": [NaN, 1, 2], "seconds": 1}',
        '{"key": KEY, "scores": [1e999, 1, 2], "seconds": 1}',
        '{"key": KEY, "scores": [1], "seconds": 1}',
        '{"key": KEY, "scores": [[1], 1, 2], "seconds": 1}',
        '{"key": KEY, "scores": [1, 2, 3], "seconds": "x"}',
        '{"key": KEY, "scores": [1, 2, 3], "seconds": -1}',
        '{"key": [], "scores": [1, 2, 3], "seconds": 1}',
        "5",
        "[" * 100_000,
    ],
)
def test_damaged_scores_are_scored_again(folder: Path, tmp_path: Path, damage: str) -> None:
    model = Overlap()
    whole = evaluate(folder, {"model": model}, work=tmp_path / "work").to_dict()["datasets"][0]["per_query"]
    (file,) = (tmp_path / "work").iterdir()
    header, first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([header, damage.replace("KEY", json.dumps(json.loads(first)["key"])), *rest]) + "\n")
    counted(model)
    again = evaluate(folder, {"model": model}, work=tmp_path / "work").to_dict()["datasets"][0]["per_query"]
    assert again == whole
    assert "red fox" in counted(model)


@pytest.mark.parametrize("damage", ["5", "[" * 100_000, '{"q1": "d1"}', '{"q1": [1]}', '{"q1": ["d1"]}',
                                    '{"q1": [["d1", 1.0], ["d1", 1.0]]}', '{"q1": [["d1", NaN]]}',
                                    '{"q1": [["nowhere", 1.0]]}', '{"q1": [["d1", "1"]]}',
                                    '{"none": []}', '{"q1": null}'])  # fmt: skip
def test_a_damaged_search_is_made_again(tmp_path: Path, damage: str) -> None:
    folder, work = write_folder(tmp_path / "toy", None), tmp_path / "work"
    whole = evaluate(folder, Overlap(), work=work).datasets[0].candidates
    (file,) = work.glob("first-stage-*.json")
    file.write_text(damage)
    assert evaluate(folder, Overlap(), work=work).datasets[0].candidates == whole
    assert json.loads(file.read_text()).keys() == whole.keys()


def test_a_search_that_cannot_be_kept_is_told_before_it_is_made(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy", None)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be kept.*RERANK_PLUGINS_CACHE"):
        evaluate(folder, Overlap(), work=tmp_path / "file" / "work")


def test_scores_are_logits_where_there_are_any(folder: Path) -> None:
    # As probabilities, 40 and 50 are the same float64.
    reranker = Reranker(FakeBackend(lambda query, text: 40.0 + 10 * ("fox" in text)))
    found = evaluate(folder, reranker).datasets[0].models[0]
    assert found.rankings["q1"] == ["d1", "d6", "d2"]
    assert found.scores["q1"] == [50.0, 40.0, 40.0]


# -- bad data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("queries.jsonl", b'{"_id": "q1", "text": "a"}\n{"_id": "q2", "text": " "}\n', "line 2: the query is blank"),
        ("queries.jsonl", b'{"_id": "q1", "text": "a"}\n["q2"]\n', "line 2"),
        ("queries.jsonl", b'{"_id": "other", "text": "a"}\n', "the same query ids"),
        ("corpus.jsonl.gz", b"not gzip", "cannot be read"),
        ("corpus.jsonl.gz", gzip.compress(b'{"_id": "d1", "text": "a"}\n' * 999, mtime=0)[:40], "cannot be read"),
        ("corpus.jsonl.gz", gzip.compress(b"\n", mtime=0), "no document"),
        ("corpus.jsonl.gz", gzip.compress(b'{"_id": "d1"}\n', mtime=0), "line 1.* lacks 'text'; keys found: _id"),
        ("corpus.jsonl.gz", gzip.compress(b'{"_id": "d1", "text": ["a"]}\n', mtime=0), "line 1: expected texts"),
        ("corpus.jsonl.gz", gzip.compress(b'{"_id": "d1", "text": "' + b" " * (1 << 25), mtime=0), "line 1: longer"),
        ("corpus.jsonl.gz", gzip.compress(b"[" * 100_000, mtime=0), "line 1: .*nested too deeply"),
        ("queries.jsonl", b"_id,text\nq1,a\n", "looks like CSV, with the columns _id, text"),
        ("queries.jsonl", b'[\n{"_id": "q1", "text": "a"}\n]', "looks like JSON over several lines"),
        ("queries.jsonl", '{"_id": "q1", "text": "a"}'.encode("utf-16"), "UTF-16"),
        ("qrels.tsv", b"q1\td1\t1\nq1\td2\tnan\n", "line 2: expected a finite number"),
        ("qrels.tsv", b"q1\td1\t0\n", "nothing can be measured"),
        ("qrels.tsv", b"q1\td1\t1e308\n", "line 1: a grade must be a whole number from -1000 to 1000"),
        ("qrels.tsv", b"q1\td1\t99999999999999999999\n", "line 1: a grade must be"),
        ("qrels.tsv", b"q1\td1\t2147483648\n", "line 1: a grade must be"),
        ("qrels.tsv", b"q1\td1\t1\nq1\td2\t0.5\n", "line 2: a grade must be"),
        ("candidates.tsv", b"q1\td1\t1\nq1\tnowhere\t2\n", "line 2: the document 'nowhere'"),
        ("candidates.tsv", b"q1 d1 1\n", "line 1"),
        ("x.run", b"q1 Q0 d1 1 0.5 tag\nq1 Q0 d1 1 0.5\n", "line 2: expected the six fields"),
        ("x.run", b"q1 Q0 d1 1 high tag\n", "line 1: 'high' is not a number"),
    ],
)
def test_bad_data_is_named_by_file_and_line(folder: Path, file: str, content: bytes, message: str) -> None:
    (folder / file).write_bytes(content)
    model = Overlap()
    with pytest.raises(InputError, match=message) as caught:
        evaluate(folder, model, first_stage="x.run" if file == "x.run" else "auto")
    assert file in str(caught.value)
    assert model.asked == []


@pytest.mark.parametrize("file", ["queries.jsonl", "corpus.jsonl.gz", "qrels.tsv"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ConfigurationError, match=re.escape(file)):
        evaluate(folder, Overlap())


def test_a_missing_first_stage_says_what_there_is(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"auto, candidates, bm25 or faiss.*candidates\.tsv"):
        evaluate(folder, Overlap(), first_stage="none.run")
    (folder / "candidates.tsv").unlink()
    with pytest.raises(ConfigurationError, match=r"candidates-bm25\.tsv"):
        evaluate(folder, Overlap(), first_stage="candidates")


# -- what comes out ---------------------------------------------------------------------------------------------


def test_runs_measure_the_same_in_other_tools(folder: Path, tmp_path: Path) -> None:
    def tied(query: str, texts: list[str]) -> np.ndarray:
        blank = np.finfo(np.float32).min
        return np.array([blank if "grey" in text or "door" in text else 2.0 for text in texts])

    found = evaluate(folder, {"a/b": Overlap(), "a b": tied}, measures=["nDCG@10", "AP"])
    files = found.write_runs(tmp_path / "runs")

    assert [file.name for file in files] == ["toy.first-stage.run", "toy.a-b.run", "toy.a-b.2.run"]
    result = found.datasets[0]
    for file, values in zip(files, [result.first, *(model.values for model in result.models)], strict=True):
        run = list(ir_measures.read_trec_run(str(file)))
        qrels = {query: grades for query, grades in QRELS.items() if query in result.queries}
        for metric in ir_measures.iter_calc([ir_measures.nDCG @ 10, ir_measures.AP], qrels, run):
            assert metric.value == pytest.approx(values[str(metric.measure)][metric.query_id])
        for query in result.first["AP"]:
            lines = [line.split() for line in file.read_text().splitlines() if line.startswith(f"{query} ")]
            scores = np.array([line[4] for line in lines], dtype=np.float32)
            assert np.isfinite(scores).all()
            assert (np.diff(scores) < 0).all()
            assert [line[3] for line in lines] == [str(rank) for rank in range(1, len(lines) + 1)]
    logits = [float(line.split()[4]) for line in files[1].read_text().splitlines() if line.startswith("q1 ")]
    assert logits == pytest.approx([2.0, 1.0, 0.0])


def test_an_id_that_a_run_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in ("queries.jsonl", "qrels.tsv", "candidates.tsv"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace("q1", "q 1"))
    with pytest.raises(InputError, match="'q 1'"):
        evaluate(folder, Overlap()).write_runs(tmp_path)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.data.append(data)


@pytest.fixture
def found(folder: Path, tmp_path: Path) -> Evaluation:
    other = write_folder(tmp_path / "<other>", {"q3": ["d6", "d5"]})
    return evaluate([folder, other], {"<good>": Overlap(), "bad & ugly": Overlap(-1.0)}, measures=["nDCG@10", "AP"])


def test_report_opens_offline_and_escapes_every_text(found: Evaluation, tmp_path: Path) -> None:
    write_report(found, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)

    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "good", "other"}
    assert not tags & {"image", "object", "embed"}
    attributes = [item for _, found in page.tags for item in found.items()]
    assert not {name for name, _ in attributes} & {"src", "onload"}
    assert "@import" not in text
    # What a plot refers to stands in the plot.
    assert all(str(value).startswith("#") for name, value in attributes if name.endswith("href"))
    assert "url(" not in text.replace("url(#", "")
    assert "green tree <script>alert('x')</script> & more" in page.data
    assert "<good>" in page.data
    assert "<other>" in page.data


def test_report_says_what_made_it_and_what_was_tested(found: Evaluation, tmp_path: Path) -> None:
    write_report(found, tmp_path / "report.html", command="rerank-plugins evaluate toy --model https://u:PW@h/m")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "rerank-plugins evaluate toy --model https://***@h/m" in page.data
    assert re.search(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d \S+; rerank-plugins {re.escape(__version__)}\.", text)
    known = [value for value in found.corrected().values() if value is not None]
    assert f"{len(known)} differences were tested" in text
    assert "p, Holm" in page.data
    policy = [attributes for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert [item["content"] for item in policy] == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_report_shows_what_could_drive_or_break_it(tmp_path: Path) -> None:
    # A formula that is none, a script that matplotlib's font lacks, and a character that XML lacks.
    hostile = "\x00\x1b[2J\u202e\u2066$x^$中\ufffe" + "w" * 3000
    folder = write_folder(tmp_path / "toy")
    for name in ("queries.jsonl", "qrels.tsv", "candidates.tsv"):
        text = (folder / name).read_text()
        text = text.replace("red fox", json.dumps(hostile)[1:-1]) if name == "queries.jsonl" else text
        (folder / name).write_text(text.replace("q1", "q" * 3000))
    text = report_html(evaluate(folder, {f"model {hostile}": lambda query, texts: np.arange(len(texts))}))
    assert not set(text) & set("\x00\x1b\u202e\u2066")
    assert "\\x1b[2J\\u202e\\u2066" in text
    assert "q" * 100 not in text
    assert "<bdi>" + "q" * 40 + "…" + "q" * 16 + "</bdi>" in text
    style = text.partition("</style>")[0]
    assert "overflow-wrap: anywhere; }" in style
    # Whatever is from the data stands in an element of its own, whose direction ends with it.
    rest = re.sub(r"<bdi>.*?</bdi>|<svg.*?</svg>", "", text, flags=re.DOTALL)
    assert "wwww" not in rest
    assert "qqqq" not in rest


def test_report_shows_plots_and_the_best_and_worst_queries(found: Evaluation) -> None:
    text = report_html(found)
    plots = [ElementTree.fromstring(plot) for plot in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    # Quality against latency for each data set; gains and moves for each model of it.
    assert len(plots) == 2 * (1 + 2 * 2)
    labels = [plot.get("aria-label", "") for plot in plots]
    assert labels[1] == "difference of nDCG@10 by query, 4 queries"

    good = plots[1]
    kinds = [bar.get("class") for bar in good.iter("g") if bar.get("class")]
    assert kinds == ["gain", "gain", "stay", "stay"]
    assert [str(bar.findtext("title"))[:6] for bar in good.iter("g") if bar.get("class") == "stay"] == ["+0.000"] * 2
    dots = [str(dot.findtext("title")) for dot in plots[0].iter("g") if dot.get("class") == "model"]
    assert sorted(dot.split(":")[0] for dot in dots) == ["<good>", "bad & ugly"]
    assert {"first stage", "ceiling of the candidates", "<good>", "bad & ugly"} <= set(plots[0].itertext())
    moves = {
        cell.findtext("title"): cell.get("class")
        for cell in plots[2].iter("g")
        if cell.get("class") and not str(cell.findtext("title")).startswith("0 ")
    }
    assert moves == {
        "1 relevant documents from ranks 1 to 1": "stay",
        "2 relevant documents from ranks 2–3 to 1": "gain",
        "1 relevant documents from ranks 2–3 to 2–3": "stay",
    }
    first, second = text.split("bad &amp; ugly</bdi>: gains and losses")[:2]
    assert first.count("<details>") == 2
    assert "red fox" in first.split("best queries")[1]
    worst = second.split("worst queries")[1].split("best queries")[0]
    assert "green tree" in worst
    assert "Of 4 relevant documents among the candidates 2 moved up, 0 down and 2 stayed; 2 more are not" in first


def test_report_leaves_the_state_of_matplotlib_alone(found: Evaluation) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"text.usetex": True, "svg.fonttype": "path", "savefig.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        text = report_html(found)
        assert dict(matplotlib.rcParams) == before
    assert "ceiling of the candidates</text>" in text
    assert "#ff0000" not in text


def test_report_of_a_first_stage_that_found_nothing(tmp_path: Path) -> None:
    found = evaluate(write_folder(tmp_path / "empty", {}), Overlap())
    assert found.datasets[0].models[0].speed is None
    assert "3 without" not in report_html(found)
    assert "4 without candidates, counted as 0" in report_html(found)


def test_what_cannot_be_written_is_told(found: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_report(found, tmp_path / "none" / "report.html")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        found.write_runs(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="cannot be kept"):
        evaluate(tmp_path / "toy", Overlap(), work=tmp_path / "file")


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """Every model is a backend that counts common words."""
    backend = FakeBackend()
    monkeypatch.setattr("rerank_plugins.scorer.load_backend", lambda spec: backend)
    return backend


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", *arguments], prog_name="rerank-plugins")


def test_command_shows_a_table(fake: FakeBackend, folder: Path, tmp_path: Path) -> None:
    result = call(str(folder), "--metrics", "nDCG@10 MRR@10", "--work", str(tmp_path / "work"))
    assert result.exit_code == 0, result.output
    # The table of fusion comes later.
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines()[::-1] if line.strip()}
    assert rows["MRR@10"][1:4] == ["0.5000", "0.7500", "+0.2500"]
    assert rows["MRR@10"][-4:] == ["2", "0", "2", "0.7500"]
    assert "1 left out for having no judgement" in result.stdout
    assert "rerank-plugins/minilm-l6 (fake, fp32)" in result.stdout
    assert "documents/s" in result.stdout
    assert result.stderr == ""


def test_command_writes_json_report_and_runs(fake: FakeBackend, folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", None)
    paths = {name: tmp_path / name for name in ("report.html", "runs", "work")}
    options = ("--report", str(paths["report.html"]), "--runs", str(paths["runs"]), "--work", str(paths["work"]))
    models = ("--model", "rerank-plugins/minilm-l6", "--model", "org/two")
    result = call(str(folder), str(other), *models, "--json", "-", *options)

    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert [data["first_stage"] for data in figures["datasets"]] == ["candidates.tsv", "BM25"]
    assert [model["model"] for model in figures["datasets"][0]["models"]] == ["rerank-plugins/minilm-l6", "org/two"]
    assert "org/two" in paths["report.html"].read_text()
    assert len(list(paths["runs"].iterdir())) == 6
    calls = len(fake.calls)

    again = call(str(folder), *models, "--json", str(tmp_path / "out.json"), "--work", str(paths["work"]))
    assert again.exit_code == 0, again.output
    assert "All models on toy" in again.stdout
    kept = json.loads((tmp_path / "out.json").read_text())["datasets"][0]
    assert kept["per_query"] == figures["datasets"][0]["per_query"]
    # The times are those of the first run, and say so.
    for before, after in zip(figures["datasets"][0]["models"], kept["models"], strict=True):
        assert before["speed"] | {"earlier": True} == after["speed"]
    assert "times of an earlier run, over 3 queries: --fresh measures anew" in again.stdout
    # Only the calls that recognise the models.
    assert len(fake.calls) - calls == 2 * 3


def test_command_compares_engines(fake: FakeBackend, folder: Path) -> None:
    result = call(str(folder), "--backend", "onnx", "--backend", "openvino", "--json", "-")
    names = [model["model"] for model in json.loads(result.stdout)["datasets"][0]["models"]]
    assert names == ["rerank-plugins/minilm-l6 [onnx]", "rerank-plugins/minilm-l6 [openvino]"]


def test_command_keeps_scores_in_the_cache_unless_fresh(fake: FakeBackend, folder: Path) -> None:
    counts = []
    for arguments in ((), (), ("--fresh",)):
        before = len(fake.calls)
        assert call(str(folder), *arguments).exit_code == 0
        counts.append(len(fake.calls) - before)
    assert counts == [6, 3, 6]


def test_command_takes_judged_pairs(fake: FakeBackend, tmp_path: Path) -> None:
    file = write_pairs(
        tmp_path / "pairs.jsonl",
        {"query": "red fox", "passage": "the red fox", "label": 1},
        {"query": "red fox", "passage": "red red", "label": 0},
    )
    result = call(str(file), "--report", str(tmp_path / "r.html"), "--work", str(tmp_path / "work"))
    assert result.exit_code == 0, result.output
    assert "1 queries, 2 documents; top 100 of BM25" in result.stdout
    assert "over 1 query" in result.stdout
    report = (tmp_path / "r.html").read_text()
    assert f"rerank-plugins evaluate {file} --report" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-folder",), "no-such-folder is no folder"),
        (("toy", "--metrics", "nonsense"), "nonsense"),
        (("toy", "--metrics", " "), "one measure or more"),
        (("toy", "--first-stage", "none.run"), "none.run"),
        (("toy", "--report", "none/report.html"), "none/report.html"),
        (("toy", "--json", "none/out.json"), "none/out.json"),
        (("toy", "--model", "a", "--model", "a"), "twice"),
        (("bad",), "qrels.tsv, line 1"),
    ],
)
def test_bad_usage_ends_with_2(
    fake: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "toy")
    (write_folder(tmp_path / "bad") / "qrels.tsv").write_text("q1\td1\tmany\n")
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert fake.calls == []


def test_a_missing_model_ends_with_1_before_anything_is_scored(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    result = call(str(folder), "--model", str(tmp_path / "model"), "--work", str(tmp_path / "work"))
    assert result.exit_code == 1
    assert "config.json" in result.stderr
    assert not (tmp_path / "work").exists()


def test_a_query_that_the_model_cannot_take_is_named(folder: Path) -> None:
    def refuse(query: str, texts: list[str]) -> np.ndarray:
        if query == "blue whale":
            raise InputError("too long")
        return np.zeros(len(texts))

    with pytest.raises(RerankError, match="toy, query 'q2': too long"):
        evaluate(folder, refuse)


@pytest.mark.bundled
def test_bundled_model_helps_on_the_toy_set(folder: Path) -> None:
    result = call(str(folder), "--metrics", "MRR@10", "--json", "-")
    assert result.exit_code == 0, result.output
    model = json.loads(result.stdout)["datasets"][0]["models"][0]
    reciprocal = []
    for query, judged in QRELS.items():
        if any(judged.values()):
            found = CANDIDATES.get(query, [])
            ranking = Reranker().rank(QUERIES[query], [DOCUMENTS[name] for name in found])
            names = [found[item.index] for item in ranking]
            hits = [rank for rank, name in enumerate(names, 1) if judged.get(name, 0) > 0]
            reciprocal.append(1 / hits[0] if hits else 0.0)
    assert model["measures"]["MRR@10"]["after"] == pytest.approx(sum(reciprocal) / len(reciprocal))
    assert model["speed"]["documents"] == 8
