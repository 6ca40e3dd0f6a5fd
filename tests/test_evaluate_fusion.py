"""What fusion with the first stage does, out of the scores that an evaluation has anyway."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rerank_plugins import Candidate, ConfigurationError, Reranker
from rerank_plugins.cli._app import app
from rerank_plugins.evaluation import evaluate, write_report
from rerank_plugins.testing import FakeBackend

DOCUMENTS = {"d1": "red", "d2": "red fox", "d3": "fox red fox bird", "d4": "bird", "d5": "\u200b"}
RUN = {"d4": 9.0, "d5": 8.5, "d1": 8.0, "d3": 2.0, "d2": 1.0}
MEASURES = ("nDCG@10", "RR")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [json.dumps({"_id": name, "text": text}) for name, text in DOCUMENTS.items()]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "red fox"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\nq\td3\t2\n")
    lines = [f"q Q0 {name} {rank} {score} bm25" for rank, (name, score) in enumerate(RUN.items(), 1)]
    (tmp_path / "bm25.run").write_text("\n".join(lines) + "\n")
    (tmp_path / "candidates.tsv").write_text("".join(f"q\t{name}\t{rank}\n" for rank, name in enumerate(RUN, 1)))
    return tmp_path


def reciprocal_rank(order: list[str]) -> float:
    return 1 / (1 + min(order.index(name) for name in ("d1", "d3")))


@pytest.mark.parametrize("first_stage", ["bm25.run", "candidates.tsv"])
@pytest.mark.parametrize("how", ["rrf", 0.0, 0.3, 0.6, 1.0])
def test_the_order_is_that_of_a_reranker_with_fusion(folder: Path, first_stage: str, how: str | float) -> None:
    found = evaluate(folder, Reranker(FakeBackend()), first_stage=first_stage, measures=MEASURES, fusion=[how])
    result = found.datasets[0]
    scores = RUN if first_stage == "bm25.run" else {name: -float(rank) for rank, name in enumerate(RUN)}
    assert result.dataset.scores == ({"q": list(RUN.values())} if first_stage == "bm25.run" else {})
    candidates = [Candidate(DOCUMENTS[name], id=name, first_stage_score=score) for name, score in scores.items()]
    ranking = Reranker(FakeBackend(), fusion=how).rank("red fox", candidates)
    comparison = result.models[0].fused[str(how)]["RR"]
    assert comparison.after == pytest.approx(reciprocal_rank([item.candidate.id or "" for item in ranking]))
    assert comparison.before == result.models[0].comparisons["RR"].after
    assert list(result.models[0].fused[str(how)]) == list(MEASURES)


def test_reports_and_figures_have_a_column_for_each_way(folder: Path, tmp_path: Path) -> None:
    found = evaluate(folder, Reranker(FakeBackend()), measures=MEASURES)
    model = found.datasets[0].models[0]
    assert list(model.fused) == ["rrf", "0.1", "0.3", "0.5"]
    told = json.loads(json.dumps(found.to_dict()))["datasets"][0]["models"][0]["fusion"]
    assert told["0.3"]["RR"]["after"] == model.fused["0.3"]["RR"].after
    write_report(found, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Fusion with the first stage" in html
    assert "here of its ranks" in html
    write_report(evaluate(folder, Reranker(FakeBackend()), first_stage="bm25.run"), tmp_path / "scores.html")
    assert "here of its ranks" not in (tmp_path / "scores.html").read_text(encoding="utf-8")
    write_report(evaluate(folder, Reranker(FakeBackend()), fusion=()), tmp_path / "none.html")
    assert "Fusion with" not in (tmp_path / "none.html").read_text(encoding="utf-8")


def test_searches_know_their_scores(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    for _ in range(2):
        found = evaluate(folder, Reranker(FakeBackend()), first_stage="bm25", work=tmp_path / "work").datasets[0]
        scores = found.dataset.scores["q"]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == len(found.candidates["q"]) == 3


@pytest.mark.parametrize("bad", ["mean", 1.5, -0.1])
def test_a_way_that_is_none_is_refused_before_anything_is_scored(folder: Path, bad: str | float) -> None:
    with pytest.raises(ConfigurationError, match="fusion must be 'rrf', a weight"):
        evaluate(folder, Reranker(FakeBackend()), fusion=[bad])


@pytest.mark.bundled
def test_the_command_shows_them(folder: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(folder), "--work", str(tmp_path / "work"), "--metrics", "RR"]
    shown = CliRunner().invoke(app, [*arguments, "--fusion", "rrf 0.25"])
    assert shown.exit_code == 0, shown.output
    assert "fusion with the first stage" in " ".join(shown.output.split())
    assert "rrf" in shown.output
    assert "0.25" in shown.output
    without = CliRunner().invoke(app, [*arguments, "--fusion", ""])
    assert "fusion with the first stage" not in " ".join(without.output.split())
