"""Every example runs as it stands: in a process of its own, without a network, from another directory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tiny

from rerank_plugins import Reranker

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNNER = """
import runpy, sys
import pytest_socket
pytest_socket.disable_socket(allow_unix_socket=True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PYTHONUTF8", "1")

    def example(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, str(EXAMPLES / name), *arguments],
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return example


def test_every_example_has_a_test() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(re.findall(r'run\("(\w+\.py)"', tests))


def test_nli(run) -> None:  # type: ignore[no-untyped-def]
    lines = run("nli.py", "--model", tiny("bert-nli")).splitlines()
    assert [line.split(":")[0] for line in lines[::5]] == ["entailment", "contradiction"]
    for label, start in (("entailment", 0), ("contradiction", 5)):
        premise = lines[start].split(": ", 1)[1]
        claims = [line.split("  ", 2)[2] for line in lines[start + 1 : start + 5]]
        ranking = Reranker(tiny("bert-nli"), label=label).rank(premise, sorted(claims))
        assert [item.text for item in ranking] == claims
        assert lines[start + 1] == f"  {ranking[0].score:.3f}  {claims[0]}"


def test_chinese_bge(run) -> None:  # type: ignore[no-untyped-def]
    question, *lines = run("chinese_bge.py", "--model", tiny("xlm-roberta")).splitlines()
    assert question == "大熊猫吃什么？"
    assert len(lines) == 3
    texts = [line.split("  ")[1] for line in lines]
    ranking = Reranker(tiny("xlm-roberta")).rank(question, sorted(texts))
    assert lines == [
        f"{item.score:.3f}  {item.text}  {line.split('  ')[2]}" for item, line in zip(ranking, lines, strict=True)
    ]


@pytest.mark.bundled
def test_langchain_faiss(run) -> None:  # type: ignore[no-untyped-def]
    output = run("langchain_faiss.py")
    found = re.findall(r"^\[(\d)\] score (\d\.\d{3})$", output, re.MULTILINE)
    assert [rank for rank, _ in found] == ["1", "2", "3"]
    scores = [float(score) for _, score in found]
    assert scores == sorted(scores, reverse=True)
    assert "finally" in output or '"with" statement' in output


@pytest.mark.bundled
def test_llama_index_faiss(run) -> None:  # type: ignore[no-untyped-def]
    before, after = run("llama_index_faiss.py").split("\nReranked:\n")
    assert len(re.findall(r"^ +\d+  -?\d\.\d{3}  [\w-]+$", before, re.MULTILINE)) == 10
    found = re.findall(r"^ +(\d)  (\d\.\d{3})  ([\w-]+): git ", after, re.MULTILINE)
    assert [rank for rank, _, _ in found] == ["1", "2", "3"]
    assert [score for _, score, _ in found] == sorted((score for _, score, _ in found), reverse=True)
    assert "revert" in [name for _, _, name in found]


@pytest.mark.bundled
def test_agent_tool(run) -> None:  # type: ignore[no-untyped-def]
    in_langchain, in_llama_index = run("agent_tool.py").split("\nLlamaIndex\n")
    assert in_langchain.startswith("LangChain\n[1] relevance score ")
    for output in (in_langchain, in_llama_index):
        assert "\n[2] relevance score " in output
        assert "best: git-revert" in output
        assert "answer: Use git revert" in output
    scores = re.compile(r"relevance score (\d\.\d{3}), source: (\S+)")
    assert scores.findall(in_langchain) == scores.findall(in_llama_index)
    assert len(scores.findall(in_langchain)) == 2


@pytest.mark.bundled
def test_agent_many_tools(run) -> None:  # type: ignore[no-untyped-def]
    text = run("agent_many_tools.py")
    chosen = re.findall(r"^the model sees 9 tools: (.+)$", text, re.MULTILINE)
    assert len(chosen) == 6
    assert all({"search_hr_handbook", "read_tool_result"} <= set(names.split(", ")) for names in chosen)
    read = [int(number) for number in re.findall(r"^of 22,807 characters it reads (\d+):$", text, re.MULTILINE)]
    assert len(read) == 3
    assert max(read) < 700
    assert text.count("In the first year every employee has 25 days of paid vacation.") == 3
    assert text.count("[Shortened: ") == 3
    assert text.count("answer: You have 25 days") == 3
    assert 'without a framework: {"type": "function", "function": {"name": "search_hr_handbook"' in text
