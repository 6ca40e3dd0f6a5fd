from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny
from typer.testing import CliRunner, Result

from rerank_plugins import Reranker, __version__
from rerank_plugins.backends._files import ModelFiles, converted_directory
from rerank_plugins.cli._app import app
from rerank_plugins.cli._rank import read_rows
from rerank_plugins.testing import FakeBackend

COMMAND = Path(sys.executable).with_name("rerank-plugins")
ROWS = [
    {"text": "blue whale", "id": 7},
    {"text": "a red fox", "id": "b", "tags": ["x", None, 1.5], "score": "old", "rank": -1},
    {"text": "the red barn door", "metadata": {"lang": "日本語", "emoji": "🦊"}},
]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """Every model is a backend that counts common words."""
    backend = FakeBackend()
    monkeypatch.setattr("rerank_plugins.reranker.load_backend", lambda spec: backend)
    return backend


def call(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin, prog_name="rerank-plugins")


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.split("\n") if line]


def as_lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


# -- the command ------------------------------------------------------------------------------------------------


def test_console_script_tells_its_version() -> None:
    done = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"rerank-plugins {__version__}\n")


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("demo", "rank", "models", "convert", "train"))


def test_an_unknown_command_is_a_usage_error() -> None:
    assert call("rerank").exit_code == 2


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_extra_it_says_what_to_install(missing: str) -> None:
    done = python(f"import sys; sys.modules[{missing!r}] = None; from rerank_plugins.cli import main; main()")
    assert done.returncode == 1
    assert 'pip install "rerank-plugins[cli]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_start_up_imports_no_engine_and_no_framework() -> None:
    done = python(
        "import sys; import rerank_plugins.cli._app; "
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'openvino', 'langchain_core', 'llama_index', 'faiss'} "
        "& set(sys.modules)))"
    )
    assert done.stdout == "[]\n", done.stderr


# -- rank -------------------------------------------------------------------------------------------------------


def test_rank_writes_every_candidate_best_first(fake: FakeBackend, tmp_path: Path) -> None:
    file = tmp_path / "candidates.jsonl"
    file.write_text(as_lines(ROWS), encoding="utf-8")
    result = call("rank", "red fox", str(file))
    assert result.exit_code == 0
    assert result.stderr == ""
    ranked = lines(result.stdout)
    assert [row["text"] for row in ranked] == ["a red fox", "the red barn door", "blue whale"]
    assert [row["rank"] for row in ranked] == [1, 2, 3]
    assert [row["first_stage_rank"] for row in ranked] == [2, 3, 1]
    expected = Reranker(FakeBackend()).rank("red fox", [str(row["text"]) for row in ROWS])
    assert [row["score"] for row in ranked] == [item.score for item in expected]
    for row in ranked:
        (source,) = [item for item in ROWS if item["text"] == row["text"]]
        added = {"score", "rank", "first_stage_rank"}
        assert {key: value for key, value in row.items() if key not in added} == {
            key: value for key, value in source.items() if key not in added
        }
    assert "日本語" in result.stdout


def test_rank_reads_plain_lines_from_standard_input(fake: FakeBackend) -> None:
    result = call("rank", "red fox", "-", stdin="blue whale\n  indented red fox\n")
    assert [(row["text"], row["first_stage_rank"]) for row in lines(result.stdout)] == [
        ("  indented red fox", 2),
        ("blue whale", 1),
    ]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b'{"id": 3, "body": "x"}', "keys found: id, body"),
        (b'{"text": 5}', '"text" is 5'),
        (b'{"text": null}', '"text" is None'),
        (b'["red fox"]', "as on the other lines"),
        (b"red fox", "as on the other lines"),
        (b'{"text": "caf\xe9"}', "0xe9"),
        (b'{"a":' * 100_000, ""),
    ],
)
def test_a_malformed_line_is_named_and_the_others_are_ranked(fake: FakeBackend, bad: bytes, why: str) -> None:
    data = b'{"text": "blue"}\n\n' + bad + b'\n{"text": "red fox"}\n'
    result = call("rank", "red fox", "-", stdin=data)
    assert result.exit_code == 2
    assert [row["text"] for row in lines(result.stdout)] == ["red fox", "blue"]
    assert result.stderr.startswith("Error: line 3: ")
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


def test_every_malformed_line_is_named(fake: FakeBackend) -> None:
    result = call("rank", "q", "-", stdin='{"text": "a"}\n{"text": 1}\n{"text": "b"}\n{}\n')
    assert result.exit_code == 2
    assert [line.split(":")[1] for line in result.stderr.splitlines()] == [" line 2", " line 4"]


def test_byte_order_mark_line_ends_and_blank_lines_are_no_text() -> None:
    rows, problems = read_rows(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n \t\r\n{"text": "c"}')
    assert rows == [{"text": "a\u2028b"}, {"text": "c"}]
    assert problems == []
    assert read_rows(b"\xef\xbb\xbfplain\r\ntext") == ([{"text": "plain"}, {"text": "text"}], [])


def test_a_text_file_may_hold_a_json_line() -> None:
    rows, problems = read_rows(b'plain\nlines\n{"text": "c", "id": 1}\n')
    assert rows == [{"text": "plain"}, {"text": "lines"}, {"text": "c", "id": 1}]
    assert problems == []


def test_a_lone_surrogate_survives(fake: FakeBackend) -> None:
    result = call("rank", "red", "-", stdin='{"text": "red \\ud800"}\n')
    assert result.exit_code == 0
    assert lines(result.stdout)[0]["text"] == "red \ud800"


def test_rank_cuts(fake: FakeBackend) -> None:
    data = as_lines(ROWS)
    assert len(lines(call("rank", "red fox", "-", "--top-n", "2", stdin=data).stdout)) == 2
    assert len(lines(call("rank", "red fox", "-", "--min-score", "0.8", stdin=data).stdout)) == 1
    assert call("rank", "red fox", "-", "--top-n", "0", stdin=data).exit_code == 2


def test_no_candidates_give_no_lines_and_load_no_model(fake: FakeBackend) -> None:
    result = call("rank", "red fox", "-", stdin="\n")
    assert (result.exit_code, result.stdout, fake.calls) == (0, "", [])


def test_logits_and_blank_texts_are_valid_json(fake: FakeBackend) -> None:
    data = '{"text": " "}\n{"text": "red"}\n'
    logits = lines(call("rank", "red", "-", "--scale", "logit", stdin=data).stdout)
    assert [(row["text"], row["score"]) for row in logits] == [
        ("red", pytest.approx(0.99)),
        (" ", pytest.approx(np.finfo(np.float32).min)),
    ]
    assert lines(call("rank", "red", "-", stdin=data).stdout)[1]["score"] == 0.0


@pytest.mark.parametrize("arguments", [(" ", "-"), ("red", "no-such-file.jsonl"), ("red", "-", "--backend", "gpu")])
def test_bad_input_ends_with_2_and_no_output(fake: FakeBackend, arguments: tuple[str, ...]) -> None:
    result = call("rank", *arguments, stdin="text\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


def test_errors_are_messages_without_a_traceback(tmp_path: Path) -> None:
    result = call("rank", "red", "-", "--model", str(tmp_path), stdin="text\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert "config.json" in result.stderr
    assert "Traceback" not in result.stderr
    assert call("rank", "red", "-", "--revision", "main", stdin="text\n").exit_code == 2


@pytest.mark.parametrize("label", ["entailment", "1"])
def test_label_by_name_or_column(label: str) -> None:
    settings = ("--model", tiny("bert-nli"), "--backend", "torch", "--scale", "logit", "--max-length", "64")
    result = call("rank", "pandas eat", "-", *settings, "--label", label, stdin="bamboo\nParis\n")
    assert result.exit_code == 0, result.stderr
    expected = Reranker(tiny("bert-nli"), backend="torch", scale="logit", max_length=64, label="entailment").logits(
        "pandas eat", ["bamboo", "Paris"]
    )
    by_place = sorted(lines(result.stdout), key=lambda row: int(str(row["first_stage_rank"])))
    assert [row["score"] for row in by_place] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_model_with_classes_lists_them() -> None:
    result = call("rank", "q", "-", "--model", tiny("bert-nli"), "--backend", "torch", stdin="text\n")
    assert result.exit_code == 2
    assert "entailment" in result.stderr


def test_console_script_ranks_utf8_whatever_the_locale(tmp_path: Path) -> None:
    file = tmp_path / "candidates.jsonl"
    file.write_text(as_lines([{"text": "大熊猫吃竹子"}, {"text": "Paris é"}]), encoding="utf-8")
    done = subprocess.run(
        [COMMAND, "rank", "pandas", file, "--model", tiny("bert"), "--backend", "torch"],
        capture_output=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert {row["text"] for row in lines(done.stdout.decode("utf-8"))} == {"大熊猫吃竹子", "Paris é"}


@pytest.mark.bundled
def test_console_script_ranks_with_the_bundled_model() -> None:
    done = subprocess.run(
        [COMMAND, "rank", "how do I undo a commit", "-"],
        input='git add stages files\n{"text": "broken\ngit revert undoes a commit\n',
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert [row["text"] for row in lines(done.stdout)] == ["git revert undoes a commit", "git add stages files"]
    assert "line 2" in done.stderr


# -- convert ----------------------------------------------------------------------------------------------------


def test_convert_into_the_cache_is_found_by_auto() -> None:
    source = tiny("bert")
    assert Reranker(source).backend_name == "torch"
    result = call("convert", source)
    assert result.exit_code == 0, result.stderr
    directory = converted_directory(ModelFiles(Path(source), source))
    assert str(directory) in result.stdout
    assert Reranker(source).backend_name in ("onnx", "openvino")
    again = call("convert", source)
    assert again.exit_code == 2
    assert "overwrite" in again.stderr
    assert call("convert", source, "--overwrite").exit_code == 0


def test_convert_into_a_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("convert", tiny("electra"), str(out), "--int8")
    assert result.exit_code == 0, result.stderr
    assert "int8" in result.stdout
    assert Reranker(str(out), backend="onnx").logits("pandas", ["bamboo"]).shape == (1,)


def test_convert_refuses_a_causal_model(tmp_path: Path) -> None:
    result = call("convert", tiny("causal-qwen3"), str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "causal" in result.stderr


# -- train ------------------------------------------------------------------------------------------------------


def test_train_makes_a_model_that_ranks(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"query": f"question {i}", "passage": f"{word} {i}", "label": label}
        for i in range(12)
        for word, label in (("answer", 1), ("noise", 0), ("other", 0))
    ]
    data.write_text(as_lines(rows), encoding="utf-8")
    settings = ("--trunk", tiny("bert"), "--steps", "2", "--no-mine", "--no-export", "--max-length", "32")
    result = call("train", str(data), "--out", str(tmp_path / "model"), *settings)
    assert result.exit_code == 0, result.stderr
    assert "2 steps" in result.stdout
    assert Reranker(str(tmp_path / "model"), backend="torch").logits("question 1", ["answer 1"]).shape == (1,)


def test_train_names_a_bad_line_of_the_data(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"query": "q", "passage": "p", "label": 1}\n{"query": "q"}\n', encoding="utf-8")
    result = call("train", str(data), "--out", str(tmp_path / "model"), "--steps", "1")
    assert result.exit_code == 2
    assert "pairs.jsonl" in result.stderr
    assert "2" in result.stderr


def test_train_bundled_takes_its_own_settings_only(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "model"))
    refused = call("train", str(tmp_path), *out, "--bundled", "--steps", "5", "--no-mine")
    assert refused.exit_code == 2
    assert "--steps, --no-mine" in refused.stderr
    missing = call("train", str(tmp_path), *out, "--bundled", "--minutes", "1")
    assert missing.exit_code == 2
    assert "squad-sentences" in missing.stderr
    alone = call("train", str(tmp_path), *out, "--minutes", "1", "--runs", "3")
    assert alone.exit_code == 2
    assert "--runs" in alone.stderr
    unable = call("train", str(tmp_path), *out, "--bundled", "--runs", "0")
    assert unable.exit_code == 2


def test_a_plain_line_after_a_json_line_is_a_broken_one() -> None:
    rows, problems = read_rows(b'{"text": "a"}\nnot json\n')
    assert rows == [{"text": "a"}]
    assert [where for where, _ in problems] == ["line 2"]
