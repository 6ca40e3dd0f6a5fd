from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.evaluation import first_stage_run, measure_run, read_beir, rerank_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "toy"
    path.mkdir()
    queries = [{"_id": "q1", "text": "red"}, {"_id": "q2", "text": "blue"}, {"_id": "q3", "text": "grey"}]
    (path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)) + "\n")
    documents = [
        {"_id": f"d{i}", "title": "T" if i == 0 else "", "text": t} for i, t in enumerate(["red", "blue", "x"])
    ]
    with gzip.open(path / "corpus.jsonl.gz", "wt") as out:
        out.write("\n".join(map(json.dumps, documents)))
    (path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td0\t2\nq1\td1\t1\nq2\td1\t1\nq3\td0\t0\n")
    rows = ["q1\td2\t1\t9", "q1\td1\t2\t8", "q1\td0\t3\t7", "q2\td2\t1\t9", "q2\td1\t2\t8", "q3\td0\t1\t1"]
    (path / "candidates-bm25.tsv").write_text("query-id\tcorpus-id\trank\tscore\n" + "\n".join(rows) + "\n")
    return path


def by_word(query: str, texts: list[str]) -> np.ndarray:
    return np.array([float(query in text) for text in texts], dtype=np.float32)


def test_folder_is_read(folder: Path) -> None:
    dataset = read_beir(folder)

    assert dataset.name == "toy"
    assert dataset.documents["d0"] == "T red"
    assert dataset.candidates["q1"] == ["d2", "d1", "d0"]
    assert dataset.qrels["q1"] == {"d0": 2, "d1": 1}


def test_reranking_is_measured_against_the_first_stage(folder: Path) -> None:
    dataset = read_beir(folder)
    before = measure_run(dataset, first_stage_run(dataset), ["nDCG@10", "RR@10"])
    after = measure_run(dataset, rerank_run(by_word, dataset), ["nDCG@10", "RR@10"])

    assert before["RR@10"] == pytest.approx(0.5)
    assert after["RR@10"] == pytest.approx(1.0)
    # q1: grades 2, 0, 1 in the new order; q2: 1, 0. The third query has nothing relevant and does not count.
    ideal, found = 2 + 1 / np.log2(3), 2 + 1 / np.log2(4)
    assert after["nDCG@10"] == pytest.approx((found / ideal + 1) / 2)


def test_equal_scores_keep_the_first_stage_order(folder: Path) -> None:
    dataset = read_beir(folder)
    run = rerank_run(lambda query, texts: np.zeros(len(texts)), dataset)

    assert list(run["q1"]) == ["d2", "d1", "d0"]
    assert measure_run(dataset, run) == measure_run(dataset, first_stage_run(dataset))


def test_top_k_cuts_before_scoring(folder: Path) -> None:
    seen: list[int] = []

    def count(query: str, texts: list[str]) -> np.ndarray:
        seen.append(len(texts))
        return np.zeros(len(texts))

    run = rerank_run(count, read_beir(folder), top_k=1)

    assert seen == [1, 1, 1]
    assert list(run["q1"]) == ["d2"]


def test_a_reranker_is_used_by_its_score_method(folder: Path) -> None:
    class Fake:
        def score(self, query: str, texts: list[str]) -> np.ndarray:
            return by_word(query, texts)

    dataset = read_beir(folder)

    assert rerank_run(Fake(), dataset) == rerank_run(by_word, dataset)


def test_progress_is_reported(folder: Path) -> None:
    seen: list[tuple[str, float]] = []
    rerank_run(by_word, read_beir(folder), progress=lambda name, share: seen.append((name, share)))

    assert seen[-1] == ("toy", 1.0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("queries.jsonl", '{"_id": "a", "text": "b"}\n{"_id": 1\n', "line 2"),
        ("queries.jsonl", '{"text": "b"}\n', "line 1"),
        ("qrels.tsv", "query-id\tcorpus-id\tscore\nq1\td1\n", "line 2"),
        ("qrels.tsv", "q1\td1\tmany\n", "line 1"),
    ],
)
def test_a_bad_line_is_named(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)

    with pytest.raises(InputError, match=message) as caught:
        read_beir(folder)
    assert file in str(caught.value)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "candidates-bm25.tsv").unlink()

    with pytest.raises(ConfigurationError, match="candidates"):
        read_beir(folder)


def test_an_unknown_measure_is_named(folder: Path) -> None:
    dataset = read_beir(folder)

    with pytest.raises(ConfigurationError, match="nonsense"):
        measure_run(dataset, first_stage_run(dataset), ["nonsense"])
