from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import typer
from checkpoints import tiny
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from typer.testing import CliRunner, Result

from rerank_plugins import Reranker, __version__
from rerank_plugins._paths import cache_directory, new_file, read_as_umask_says, writable_directory, write_file
from rerank_plugins._printable import json_text, printable
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins._secrets import without_passwords
from rerank_plugins.backends._files import ModelFiles, converted_directory
from rerank_plugins.cli import _progress
from rerank_plugins.cli._app import app, in_options
from rerank_plugins.cli._options import _OF_RERANKER
from rerank_plugins.cli._rank import read_rows
from rerank_plugins.cli._screen import Screen, styled
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.settings import Settings
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
    monkeypatch.setattr("rerank_plugins.scorer.load_backend", lambda spec: backend)
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
    assert done.stderr == 'Error: the command rerank-plugins needs its extra: pip install "rerank-plugins[cli]"\n'
    assert done.stdout == ""


def test_start_up_imports_no_engine_and_no_framework() -> None:
    done = python(
        "import sys; import rerank_plugins.cli._app; "
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'openvino', 'langchain_core', 'llama_index', 'faiss'} "
        "& set(sys.modules)))"
    )
    assert done.stdout == "[]\n", done.stderr


# -- rank -------------------------------------------------------------------------------------------------------


def test_rank_tells_spans_and_what_compression_leaves(fake: FakeBackend, tmp_path: Path) -> None:
    file = tmp_path / "candidates.jsonl"
    text = "A whale swims in the sea. The red fox runs. Nobody of them can know why."
    file.write_text(as_lines([{"text": text, "id": 1}, {"text": "Nothing."}]), encoding="utf-8")
    best = lines(call("rank", "red fox", str(file), "--spans", "sentences").stdout)[0]
    assert len(best["spans"]) == 3  # type: ignore[arg-type]
    assert best["spans"][0][:2] == [26, 43]  # type: ignore[index]
    assert "excerpt" not in best
    best, other = lines(call("rank", "red fox", str(file), "--compress").stdout)
    assert (best["excerpt"], best["text"], best["id"]) == ("The red fox runs.", text, 1)
    assert other["excerpt"] == "Nothing."
    assert "spans" not in lines(call("rank", "red fox", str(file)).stdout)[0]


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


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ('[{"text": "a red fox", "id": 1}, {"text": "blue"}]', ["a red fox", "blue"]),
        ('[\n  {"text": "blue"},\n  {"text": "a red fox"}\n]\n', ["a red fox", "blue"]),
        ('["blue", "a red fox"]', ["a red fox", "blue"]),
        ('\ufeff[{"text": "blue"}]', ["blue"]),
        ('{\n  "text": "blue",\n  "id": 1\n}', ["blue"]),
        ('id,text\n1,blue\n2,"a red\nfox, indeed"\n', ["a red\nfox, indeed", "blue"]),
        ("text;id\nblue;1\na red fox;2\n", ["a red fox", "blue"]),
        ("id\ttext\r\n1\tblue\r\n2\ta red fox\r\n", ["a red fox", "blue"]),
        ("[1] Introduction\n[2] The red fox\n", ["[2] The red fox", "[1] Introduction"]),
        ("blue, not green\na red fox, it seems\n", ["a red fox, it seems", "blue, not green"]),
    ],
)
def test_arrays_csv_and_lines_are_told_apart(fake: FakeBackend, data: str, texts: list[str]) -> None:
    result = call("rank", "red fox", "-", stdin=data)
    assert result.exit_code == 0, result.stderr
    assert [row["text"] for row in lines(result.stdout)] == texts


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'[{"text": "a"}, {"text": "b"', "look like a JSON array, which is not valid JSON"),
        (b'[{"text": "a", "x": NaN}]', "NaN is no JSON value"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', "look like a JSON array"),
        (b"id,body\n1,blue\n2,red\n", "columns found: id, body"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-16"),
        (b"\x1f\x8b\x08", "gzip -dc"),
        (b"PAR1\x00\x01", "zero bytes"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_none_of_them_is_refused_whole(fake: FakeBackend, data: bytes, why: str) -> None:
    result = call("rank", "red", "-", stdin=data)
    assert (result.exit_code, result.stdout, fake.calls) == (2, "", [])
    assert why in result.stderr


def test_a_name_that_ends_in_csv_is_believed(fake: FakeBackend, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text\nblue\nred\n")
    (tmp_path / "two.csv").write_text("A title,The body\nx,red\n")
    assert [row["text"] for row in lines(call("rank", "red", str(tmp_path / "one.csv")).stdout)] == ["red", "blue"]
    refused = call("rank", "red", str(tmp_path / "two.csv"))
    assert refused.exit_code == 2
    assert "columns found: A title, The body" in refused.stderr


def test_items_of_an_array_are_named(fake: FakeBackend) -> None:
    result = call("rank", "red", "-", stdin='[{"text": "red"}, 5, {"page_content": "x"}, null]')
    assert result.exit_code == 2
    assert [row["text"] for row in lines(result.stdout)] == ["red"]
    assert [line.split(":")[1] for line in result.stderr.splitlines()] == [" item 2", " item 3", " item 4"]
    assert "keys found: page_content" in result.stderr


def test_numbers_that_json_cannot_hold_never_come_out(fake: FakeBackend) -> None:
    data = '{"text": "red", "x": NaN}\n{"text": "blue", "x": 1e999}\n{"text": "ok", "x": 1e308}\n'
    result = call("rank", "red", "-", stdin=data)
    assert result.exit_code == 2
    assert [row["x"] for row in lines(result.stdout)] == [1e308]
    assert "line 1: not valid JSON: NaN" in result.stderr
    assert "line 2: not valid JSON: the number 1e999 is too large" in result.stderr


# -- foreign texts ----------------------------------------------------------------------------------------------

HOSTILE = "a\x1b]0;T\x1b[2J \x9b8m \x7f\x07\r \u202eb\u2066 \u2028[/b] [red]c :smile: é🦊"
SHOWN = "a\\x1b]0;T\\x1b[2J \\x9b8m \\x7f\\x07\\r \\u202eb\\u2066 \\u2028[/b] [red]c :smile: é🦊"


def harmless(text: str) -> bool:
    return printable(text) == text.replace("\t", "\\t")


def test_control_characters_are_shown() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("a\nb\tc\ud800") == "a\nb\\tc\\ud800"
    assert printable("a\nb", one_line=True) == "a\\nb"
    kept = "naïve 日本語 עברית नमस्ते 👩\u200d🚀 \u00ad\u200b"
    assert printable(kept) == kept


@given(st.text())
def test_what_is_shown_has_no_control_character_left(text: str) -> None:
    categories = {unicodedata.category(character) for character in printable(text).replace("\n", "")}
    assert not categories & {"Cc", "Cs", "Zl", "Zp"}
    assert json.loads(json_text(text)) == text
    assert not {unicodedata.category(character) for character in json_text(text)} & {"Cc", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://user:p@ss@host:6379/0", "redis://***@host:6379/0"),
        ("see https://bob:PW@x.org/a?b and http://tok@y", "see https://***@x.org/a?b and http://***@y"),
        ("https://x.org/a@b mail a@b.org", "https://x.org/a@b mail a@b.org"),
    ],
)
def test_passwords_of_urls_are_not_shown(text: str, shown: str) -> None:
    assert without_passwords(text) == shown


def test_rank_escapes_what_drives_a_terminal(fake: FakeBackend) -> None:
    result = call("rank", "a", "-", stdin=as_lines([{"text": HOSTILE, HOSTILE: 1}]))
    assert result.exit_code == 0, result.stderr
    assert harmless(result.stdout)
    (row,) = lines(result.stdout)
    assert (row["text"], row[HOSTILE]) == (HOSTILE, 1)


@pytest.mark.parametrize("width", [40, 200])
def test_tables_and_lines_show_texts_as_they_are(width: int) -> None:
    out = io.StringIO()
    screen = Screen(width=width)
    screen.file = out
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(styled(HOSTILE, "bold"))
    screen.print(table)
    screen.print(HOSTILE, style="dim")
    assert harmless(out.getvalue())
    assert "".join(SHOWN.split()) in "".join(out.getvalue().split())


def test_a_bar_takes_any_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with _progress.bar(HOSTILE) as tell:
        tell(f"[/b] {HOSTILE}\nsecond line", 0.5)
    with _progress.spinner(f"[/b] {HOSTILE}"):
        pass
    written = capsys.readouterr().err
    assert "[/b]" in written
    assert "\x1b]0;" not in written
    assert not {"\x9b", "\x07", "\u202e"} & set(written)


@pytest.mark.parametrize(
    "arguments",
    [
        ("rank", "q", "no\x1b[2J\u202efile"),
        ("rank", "q", "-", "--model", "no\x1b[2J\u202emodel/at/all"),
        ("train", "no\x1b[2J\u202efile", "--out", "x", "--steps", "1"),
        ("evaluate", "no\x1b[2J\u202efolder"),
        ("demo", "q", "--docs", "no\x1b[2J\u202edocs"),
        ("convert", "no\x1b[2J\u202emodel", "x"),
        ("no\x1b[2J\u202ecommand",),
        ("rank", "--no\x1b[2J\u202eoption"),
        ("--no\x1b[2J\u202eoption",),
    ],
)
def test_errors_show_names_as_they_are(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments, stdin="text\n")
    assert result.exit_code in (1, 2)
    assert "\\x1b[2J" in result.stderr
    assert harmless(result.stderr)


@pytest.mark.filterwarnings("default")
def test_warnings_are_lines_like_errors(fake: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(self: Reranker) -> Reranker:
        warnings.warn(f"The cache redis://u:PW@h is slow {HOSTILE}", RuntimeWarning, stacklevel=2)
        return self

    monkeypatch.setattr(Reranker, "rank", lambda self, *rest, **more: warn(self) and [])
    result = call("rank", "q", "-", stdin="text\n")
    assert result.stderr == f"Warning: The cache redis://***@h is slow {SHOWN}\n"


# -- options ----------------------------------------------------------------------------------------------------


def test_options_for_keywords_of_reranker_have_its_defaults() -> None:
    defaults = {keyword.name: keyword.default for keyword in fields(Settings)}
    assert set(_OF_RERANKER) <= set(defaults)
    commands = typer.main.get_command(app).commands
    for name in ("rank", "serve"):
        given = {str(option.name): option for option in commands[name].params}
        shared = set(given) & set(_OF_RERANKER)
        assert {"model", "backend", "label", "revision", "trust_remote_code"} <= shared
        assert {key: given[key].default for key in shared} == {key: defaults[key] for key in shared}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Give another one, or overwrite=True to replace it.", "Give another one, or --overwrite to replace it."),
        ("with mine=True; with mine=False there are none", "with --mine; with --no-mine there are none"),
        ("Give one of minutes=... and steps=...; got neither.", "Give one of --minutes and --steps; got neither."),
        ("teacher_share must be from 0 to 1", "--teacher-share must be from 0 to 1"),
        ("loss must be one of mix", "--loss must be one of mix"),
        ("device='gpu' is unknown", "--device 'gpu' is unknown"),
        ("'loss' must be a text, in loss.jsonl or a/device=x", "'loss' must be a text, in loss.jsonl or a/device=x"),
        ("group_size.jsonl, my_group_size and a/group_size", "group_size.jsonl, my_group_size and a/group_size"),
        ("a dev_fraction", "a dev_fraction"),
    ],
)
def test_messages_name_options(message: str, told: str) -> None:
    (command,) = [command for name, command in typer.main.get_command(app).commands.items() if name == "train"]
    assert in_options(message, command) == told


@pytest.mark.parametrize(
    "arguments",
    [
        ("rank", "q", "-", "--min-score", "nan"),
        ("rank", "q", "-", "--min-score", "inf"),
        ("rank", "q", "-", "--max-length", "0"),
        ("train", "x", "--out", "y", "--minutes", "inf"),
        ("train", "x", "--out", "y", "--minutes", "nan"),
        ("train", "x", "--out", "y", "--steps", "1", "--learning-rate", "nan"),
        ("train", "x", "--out", "y", "--steps", "1", "--learning-rate", "-1"),
        ("train", "x", "--out", "y"),
        ("mine", "x", "--out", "y", "--margin", "nan"),
        ("calibrate", "x", "--out", "y", "--precision", "1.5"),
    ],
)
def test_options_are_checked(fake: FakeBackend, arguments: tuple[str, ...]) -> None:
    result = call(*arguments, stdin="text\n")
    assert (result.exit_code, result.stdout, fake.calls) == (2, "", [])
    assert "--" in result.stderr


def test_an_error_of_the_system_is_one_line(fake: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Reranker, *rest: object, **more: object) -> None:
        raise OSError(28, "No space left on device", "x\x1b[2J")

    monkeypatch.setattr(Reranker, "rank", full)
    result = call("rank", "q", "-", stdin="text\n")
    assert (result.exit_code, result.stderr) == (1, "Error: [Errno 28] No space left on device: 'x\\x1b[2J'\n")


def test_python_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rerank_plugins", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"rerank-plugins {__version__}\n")


def test_bars_of_transformers_stay_away_until_the_last_body_has_ended() -> None:
    logging = pytest.importorskip("transformers").utils.logging
    logging.enable_progress_bar()
    first, second = no_progress_bars(), no_progress_bars()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not logging.is_progress_bar_enabled()
    second.__exit__(None, None, None)
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with no_progress_bars():
        pass
    assert not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()


# -- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "variables", "found"),
    [
        ("linux", {"HOME": "/home/u"}, "/home/u/.cache/rerank-plugins"),
        ("linux", {"HOME": "/home/u", "XDG_CACHE_HOME": "/x"}, "/x/rerank-plugins"),
        ("linux", {"HOME": "/home/u", "XDG_CACHE_HOME": "relative"}, "/home/u/.cache/rerank-plugins"),
        ("darwin", {"HOME": "/Users/u"}, "/Users/u/Library/Caches/rerank-plugins"),
        ("darwin", {"HOME": "/Users/u", "RERANK_PLUGINS_CACHE": "/r"}, "/r"),
    ],
)
def test_there_is_one_cache_directory(
    monkeypatch: pytest.MonkeyPatch, system: str, variables: dict[str, str], found: str
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "RERANK_PLUGINS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert cache_directory() == Path(found)
    if "RERANK_PLUGINS_CACHE" not in variables:
        module = pytest.importorskip("platformdirs.macos" if system == "darwin" else "platformdirs.unix")
        kind = module.MacOS if system == "darwin" else module.Unix
        assert kind("rerank-plugins", appauthor=False).user_cache_dir == found


def test_without_a_home_there_is_no_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "RERANK_PLUGINS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cache_directory() is None


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_whole_and_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    target = tmp_path / "real"
    (tmp_path / "link").symlink_to(target)
    before = os.umask(umask)
    try:
        write_file(tmp_path / "link", "é\ud800\n")
        with pytest.raises(TypeError), new_file(tmp_path / "link") as out:
            out.writelines([b"half", "no bytes"])  # type: ignore[list-item]
        (tmp_path / "made").mkdir(0o700)
        (tmp_path / "made" / "weights").touch(0o600)
        read_as_umask_says(tmp_path / "made")
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink()
    assert target.read_bytes() == "é?\n".encode()
    assert target.stat().st_mode & 0o777 == mode
    assert (tmp_path / "made" / "weights").stat().st_mode & 0o777 == mode
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o777 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "made", "real"]


def test_a_permission_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests may run as root, who may write anywhere.
    def refuse(path: object, *rest: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    for write in (lambda: write_file(tmp_path / "x", ""), lambda: writable_directory(tmp_path)):
        with pytest.raises(ConfigurationError, match=f"{tmp_path.name}.* cannot be written: permission denied"):
            write()


def test_what_is_no_place_for_a_file_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "x"):
        with pytest.raises(ConfigurationError, match="cannot be written"):
            write_file(path, "")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be written"):
        writable_directory(tmp_path / "file" / "below")


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


def test_a_plain_line_after_a_json_line_is_a_broken_one() -> None:
    rows, problems = read_rows(b'{"text": "a"}\nnot json\n')
    assert rows == [{"text": "a"}]
    assert [where for where, _ in problems] == ["line 2"]
