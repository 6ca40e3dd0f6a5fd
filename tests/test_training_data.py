from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.training import Pair, Triple, read_pairs, read_triples
from rerank_plugins.training._data import read_data, split_pairs


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def beir(folder: Path, **files: list[object]) -> Path:
    """A BEIR folder with two queries and four documents, where no file says otherwise."""
    content: dict[str, list[object]] = {
        "queries.jsonl": [{"_id": "1", "text": "first"}, {"_id": "2", "text": "second"}],
        "corpus.jsonl": [
            {"_id": "a", "title": "Title", "text": "of a"},
            {"_id": "b", "title": "", "text": "only b"},
            {"_id": "c", "text": "only c"},
            {"_id": "blank", "title": "", "text": " "},
        ],
        "qrels.tsv": ["query-id\tcorpus-id\tscore", "1\ta\t2", "1\tb\t1", "2\tb\t-1", "2\tc\t4"],
    }
    for name, rows in (content | {key.replace("__", "/"): rows for key, rows in files.items()}).items():
        if rows:
            write(folder / name, *rows)
    return folder


GOOD = {"query": "q", "positive": "p", "negative": "n"}


# --- triples ---


def test_triples_and_pairs_are_told_apart_line_by_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mixed.jsonl",
        {**GOOD, "positive_score": 3, "negative_score": -1.5, "split": "dev"},
        {"query": "q", "passage": "x", "label": 0.5, "positive": "of no concern"},
        {"query": "r", "positive": "p", "negative": ["n", "m"], "negative_score": [0.5, 1]},
    )

    assert read_pairs(path) == [
        Pair("q", "p", 1.0, "dev"), Pair("q", "n", 0.0, "dev"), Pair("q", "x", 0.5),
        Pair("r", "p", 1.0), Pair("r", "n", 0.0), Pair("r", "m", 0.0),
    ]  # fmt: skip


def test_triples_keep_their_scores(tmp_path: Path) -> None:
    path = tmp_path / "triples.jsonl.gz"
    with gzip.open(path, "wt") as out:
        out.write(json.dumps({**GOOD, "positive_score": 3, "negative_score": -1.5}) + "\n\n")
        out.write(json.dumps({**GOOD, "negative": ["n", "m"], "negative_score": [0.5, 1], "split": "dev"}) + "\n")
        out.write(json.dumps({**GOOD, "positive_score": None}) + "\n")

    assert read_triples(path) == [
        Triple("q", "p", ("n",), 3.0, (-1.5,)),
        Triple("q", "p", ("n", "m"), None, (0.5, 1.0), "dev"),
        Triple("q", "p", ("n",)),
    ]
    with pytest.raises(ConfigurationError, match="missing"):
        read_triples(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": ""}, "'query'"),
        ({"positive": None}, "'positive'"),
        ({"negative": None}, "'negative'"),
        ({"negative": []}, "at least one"),
        ({"negative": ["n", " "]}, "'negative'"),
        ({"negative": ["n", "p"]}, "same text"),
        ({"positive_score": "high"}, "'positive_score'"),
        ({"positive_score": True}, "'positive_score'"),
        ({"positive_score": float("nan")}, "NaN is no JSON"),
        ({"positive_score": 10**400}, "'positive_score'"),
        ({"negative_score": float("inf")}, "Infinity is no JSON"),
        ({"negative_score": [1.0]}, "'negative_score'"),
        ({"negative": ["n", "m"], "negative_score": 1.0}, "for each of 2"),
        ({"negative": ["n", "m"], "negative_score": [1.0]}, "for each of 2"),
        ({"negative": ["n", "m"], "negative_score": [1.0, None]}, "'negative_score'"),
        ({"split": "training"}, "'split'"),
        ({"split": ["dev"]}, "'split'"),
    ],
)
def test_a_bad_triple_is_named(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    path = write(tmp_path / "triples.jsonl", GOOD, {**GOOD, **change})

    for read in (read_pairs, read_triples):
        with pytest.raises(InputError, match=rf"triples\.jsonl, line 2: .*{reason}"):
            read(path)


def test_a_pair_is_no_triple(tmp_path: Path) -> None:
    path = write(tmp_path / "triples.jsonl", GOOD, {"query": "q", "passage": "p", "label": 1})

    with pytest.raises(InputError, match="lacks .positive. and .negative.; keys found: query, passage, label"):
        read_triples(path)


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"query": "q", "passage": "p", "label": 1}\n' * 50)[:40])

    with pytest.raises(InputError, match=r"pairs\.jsonl\.gz cannot be read"):
        read_pairs(path)


# --- BEIR ---


def test_a_beir_folder_is_read(tmp_path: Path) -> None:
    read = read_data([beir(tmp_path / "set"), write(tmp_path / "more.jsonl", GOOD)])

    assert read.pairs[:4] == [
        Pair("first", "Title of a", 0.5), Pair("first", "only b", 0.25),
        Pair("second", "only b", 0.0), Pair("second", "only c", 1.0),
    ]  # fmt: skip
    assert read.passages == ["Title of a", "only b", "only c"]
    assert [(s.name, s.rows, s.queries, s.passages) for s in read.sources] == [
        ("set", 4, 2, 3),
        ("more.jsonl", 2, 1, 0),
    ]
    before = read.sources[0].sha256
    beir(tmp_path / "set", **{"qrels.tsv": ["1\ta\t1"]})
    assert read_data(tmp_path / "set").sources[0].sha256 != before


def test_the_splits_of_a_beir_folder_are_used_and_its_test_set_never(tmp_path: Path) -> None:
    splits = {"qrels__train.tsv": ["1\ta\t1"], "qrels__dev.tsv": ["2\tc\t2"], "qrels__test.tsv": ["2\tb\t3"]}
    folder = beir(tmp_path / "set", **{"qrels.tsv": []}, **splits)

    assert split_pairs(read_pairs(folder)) == (
        [Pair("first", "Title of a", 0.5, "train")],
        [Pair("second", "only c", 1.0, "dev")],
    )
    (folder / "qrels" / "train.tsv").unlink()
    with pytest.raises(ConfigurationError, match=r"qrels/train\.tsv"):
        read_pairs(folder)


@pytest.mark.parametrize(
    ("file", "rows", "reason"),
    [
        ("queries.jsonl", [{"_id": "1", "text": "first"}, {"_id": "2"}], r"queries\.jsonl, line 2"),
        ("queries.jsonl", [{"_id": "1", "text": "first"}, {"_id": "2", "text": " "}], r"queries\.jsonl, line 2"),
        ("corpus.jsonl", [{"_id": "a", "text": "of a"}, "{"], r"corpus\.jsonl, line 2"),
        ("qrels.tsv", ["1\ta\t1", "1\tb"], r"qrels\.tsv, line 2"),
        ("qrels.tsv", ["1\ta\t1", "1\tb\tyes"], r"qrels\.tsv, line 2: 'yes'"),
        ("qrels.tsv", ["1\ta\t1", "9\tb\t1"], r"qrels\.tsv, line 2: the query '9'"),
        ("qrels.tsv", ["1\ta\t1", "1\tz\t1"], r"qrels\.tsv, line 2: the document 'z'"),
        ("qrels.tsv", ["1\ta\t1", "1\tblank\t1"], r"qrels\.tsv, line 2: the document 'blank'"),
        ("qrels.tsv", ["1\ta\t0"], r"qrels\.tsv has no relevant document"),
    ],
)
def test_a_bad_line_of_a_beir_folder_is_named(tmp_path: Path, file: str, rows: list[object], reason: str) -> None:
    folder = beir(tmp_path / "set", **{file: rows})

    with pytest.raises(InputError, match=reason):
        read_pairs(folder)


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"pairs\.jsonl.*queries\.jsonl"):
        read_pairs(tmp_path)
