"""`rerank-plugins benchmark`: how fast is it here, and is the order the same?"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, get_args

import typer
from rich import box
from rich.table import Table

from rerank_plugins._machine import processor
from rerank_plugins._printable import json_text
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.cli._options import Json, takes_settings
from rerank_plugins.cli._progress import bar
from rerank_plugins.cli._screen import Screen, write_json
from rerank_plugins.errors import ConfigurationError, RerankError
from rerank_plugins.reranker import Reranker
from rerank_plugins.types import BackendName

__all__ = ["benchmark"]

QUERY = "how do I write a class that can be used in a with statement"
SHORT = 10
"""Texts of a short call, as an agent's tool makes it."""

Order = Callable[[list[str]], list[int]]
"""Ranks texts for the query: their positions, best first."""


@dataclass(slots=True)
class Row:
    """What was measured of one contender: seconds of each round."""

    name: str
    order: Order = field(repr=False)
    all_s: list[float] = field(default_factory=list)
    short_s: list[float] = field(default_factory=list)
    top_10: list[int] = field(default_factory=list)


@takes_settings("model", "threads")
def benchmark(
    candidates: Annotated[int, typer.Option(min=SHORT, help="Paragraphs of Python's manual to rank.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    as_json: Json = False,
    **chosen: Any,
) -> None:
    """Time our engines on a model, and what else is installed that can load it.

    All take turns in one process. Figures are medians over the rounds, and ratios are of the first row. The scripts in
    the repository's benchmarks folder measure more, each contender in a process of its own.
    """
    texts = _paragraphs(candidates)
    with no_progress_bars():
        rows, notes = _contenders(chosen["model"], chosen["threads"], texts)
    if not rows:
        raise ConfigurationError("Nothing can run this model here: " + "; ".join(notes))
    with bar("Measuring") as tell:
        for number, row in itertools.product(range(rounds), rows):
            tell(row.name, number / rounds)
            row.all_s.append(_seconds(row.order, texts))
            row.short_s.append(_seconds(row.order, texts[:SHORT]))
    report = _report(rows, notes, candidates, rounds)
    if as_json:
        write_json(json_text(report, indent=2))
    else:
        _show(report)


def _paragraphs(n: int) -> list[str]:
    from pydoc_data.topics import topics

    parts = (" ".join(part.split()) for topic in sorted(topics) for part in topics[topic].split("\n\n"))
    distinct = list(dict.fromkeys(part for part in parts if len(part.split()) > 20))
    # Equal texts would be scored once.
    numbered = (f"{turn}. {part}" for turn in itertools.count(2) for part in distinct)
    return list(itertools.islice(itertools.chain(distinct[:: max(1, len(distinct) // n)], numbered), n))


def _seconds(order: Order, texts: list[str]) -> float:
    start = time.perf_counter()
    order(texts)
    return time.perf_counter() - start


def _contenders(model: str | None, threads: int | None, texts: list[str]) -> tuple[list[Row], list[str]]:
    """Who can load and run the model, warmed up, and why others cannot."""
    rows: list[Row] = []
    notes: list[str] = []

    def add(name: str, make: Callable[[], Order]) -> None:
        try:
            order = make()
            # The first call compiles and allocates: it is not timed.
            rows.append(Row(name, order, top_10=order(texts)[:10]))
        except RerankError as error:
            notes.append(f"{name}: {error}")
        except Exception as error:
            notes.append(f"{name}: {type(error).__name__}: {error}")

    if model is None:
        notes.append("other packages: the bundled model is an ONNX graph, which they do not load; give --model")
    elif importlib.util.find_spec("sentence_transformers") is not None:
        add("sentence-transformers", lambda: _sentence_transformers(model))
        for module, name, other in (
            ("langchain_community", "LangChain CrossEncoderReranker", _langchain),
            ("llama_index", "LlamaIndex SentenceTransformerRerank", _llama_index),
        ):
            if importlib.util.find_spec(module) is not None:
                add(name, lambda other=other: other(model))  # type: ignore[misc]
    for backend, precision in itertools.product(get_args(BackendName)[1:], ("auto", "int8")):
        name = f"rerank-plugins {backend}, {precision}"
        add(name, lambda b=backend, p=precision: _ours(model, b, p, threads))  # type: ignore[misc]
    return rows, notes


def _ours(model: str | None, backend: Any, precision: Any, threads: int | None) -> Order:
    reranker = Reranker(model, backend=backend, precision=precision, threads=threads).prepare()
    return lambda texts: [item.index for item in reranker.rank(QUERY, texts)]


def _sentence_transformers(model: str) -> Order:
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(model, device="cpu")
    return lambda texts: [int(hit["corpus_id"]) for hit in encoder.rank(QUERY, texts)]


def _langchain(model: str) -> Order:
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
    from langchain_community.cross_encoders import HuggingFaceCrossEncoder
    from langchain_core.documents import Document

    scorer = HuggingFaceCrossEncoder(model_name=model, model_kwargs={"device": "cpu"})
    compressor = CrossEncoderReranker(model=scorer, top_n=10**9)

    def order(texts: list[str]) -> list[int]:
        documents = [Document(text, metadata={"index": i}) for i, text in enumerate(texts)]
        return [found.metadata["index"] for found in compressor.compress_documents(documents, QUERY)]

    return order


def _llama_index(model: str) -> Order:
    from llama_index.core.postprocessor import SentenceTransformerRerank
    from llama_index.core.schema import NodeWithScore, TextNode

    rerank = SentenceTransformerRerank(model=model, top_n=10**9, device="cpu")

    def order(texts: list[str]) -> list[int]:
        nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.0) for i, text in enumerate(texts)]
        return [int(found.node.node_id) for found in rerank.postprocess_nodes(nodes, query_str=QUERY)]

    return order


def _report(rows: list[Row], notes: list[str], candidates: int, rounds: int) -> dict[str, Any]:
    first = rows[0]
    figures = [
        {
            **{key: value for key, value in asdict(row).items() if key != "order"},
            "documents_per_s": candidates / statistics.median(row.all_s),
            "ratio": statistics.median(a / b for a, b in zip(first.all_s, row.all_s, strict=True)),
            "short_p50_s": statistics.median(row.short_s),
            "same_top_10": row.top_10 == first.top_10,
        }
        for row in rows
    ]
    return {"processor": processor()[0], "candidates": candidates, "rounds": rounds, "rows": figures, "notes": notes}


def _show(report: dict[str, Any]) -> None:
    console = Screen()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("documents/s", "x the first", f"{SHORT} texts, ms", "same top 10"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(
            row["name"],
            f"{row['documents_per_s']:,.1f}",
            f"{row['ratio']:.2f}",
            f"{row['short_p50_s'] * 1e3:.1f}",
            "yes" if row["same_top_10"] else "no",
        )
    console.print(table)
    console.print(f"{report['candidates']} candidates, {report['rounds']} rounds, {report['processor']}")
    for note in report["notes"]:
        console.print(f"Left out: {note}", style="yellow", soft_wrap=True)
