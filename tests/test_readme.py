"""What the README says is what happens: every snippet runs as it stands, and the commands are those of CI."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.bundled
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_every_snippet_runs_as_it_stands(number: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[number]], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    if "print(" in SNIPPETS[number]:
        assert done.stdout.startswith("git revert undoes a commit")


def test_there_are_snippets_for_both_frameworks() -> None:
    text = "\n".join(SNIPPETS)
    assert "rerank_plugins.langchain" in text
    assert "rerank_plugins.llama_index" in text


def test_the_first_screen_has_the_two_commands() -> None:
    screen = README.splitlines()[:22]
    assert '    pip install -c constraints.txt -e ".[all]" && rerank-plugins demo' in screen
    assert '    pip install -c constraints.txt -e ".[all,test]" && pytest' in screen


def test_links_and_named_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for name in re.findall(r"`((?:tests|examples|scripts|benchmarks)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_every_command_that_is_named_exists() -> None:
    from typer.testing import CliRunner

    from rerank_plugins.cli._app import app

    usage = CliRunner().invoke(app, ["--help"]).stdout
    for command in set(re.findall(r"^ +rerank-plugins (\w+)", README, re.MULTILINE)):
        assert f" {command} " in usage, command
