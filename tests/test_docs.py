"""What README and docs say is what happens: snippets run as they stand, links lead somewhere, commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPETS = [
    pytest.param(snippet, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, snippet in enumerate(SNIPPET.findall(page.read_text(encoding="utf-8")))
]


@pytest.mark.bundled
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_runs_as_it_stands(snippet: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if "undo a commit?" in snippet and "print(best[0]" in snippet:
        assert done.stdout.startswith("git revert undoes a commit")


def test_the_readme_shows_both_frameworks_and_stays_short() -> None:
    text = "\n".join(SNIPPET.findall(README))
    assert "rerank_plugins.langchain" in text
    assert "rerank_plugins.llama_index" in text
    assert len(README.split()) <= 900


def test_the_two_commands_of_a_clone_stand_together() -> None:
    part = README.split("## Try it from a clone")[1].split("\n## ")[0].splitlines()
    assert '    pip install -c constraints.txt -e ".[all]" && rerank-plugins demo' in part
    assert '    pip install -c constraints.txt -e ".[all]" -r requirements/test.txt && pytest' in part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for name in re.findall(r"`((?:tests|examples|recipes|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {page.name for page in PAGES[2:]} == set(re.findall(r": ([\w-]+\.md)$", navigation, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_that_is_named_exists(page: Path) -> None:
    from typer.testing import CliRunner

    from rerank_plugins.cli._app import app

    usage = CliRunner().invoke(app, ["--help"]).stdout
    for command in set(re.findall(r"(?:^ +|`)rerank-plugins ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE)):
        assert f" {command} " in usage, command
