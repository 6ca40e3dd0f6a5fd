"""Documents per second of each engine against what LangChain and LlamaIndex ship, same weights, in one run.

    python benchmarks/engines.py [--documents 200] [--rounds 5] [--threads 2]

The weights are a MiniLM-L6 with a seeded head, the texts paragraphs of CPython's manual. All contestants take turns in
every round; the table gives medians, ratios of medians, and how many of the top 10 agree with LangChain's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pydoc_data.topics
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--documents", type=int, default=200)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
parser.add_argument("--json", action="store_true")
QUERY = "how do I write a class that can be used in a with statement"


def checkpoint(directory: Path) -> str:
    """MiniLM-L6 under a head that spreads its logits, as a trained one does."""
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification

    from rerank_plugins._minilm import minilm_directory

    torch.manual_seed(0)
    source = minilm_directory("demo")
    model = BertForSequenceClassification.from_pretrained(source, num_labels=1)
    with torch.no_grad():
        model.classifier.weight.normal_(0, 1)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, model_max_length=512).save_pretrained(directory)
    return str(directory)


def texts(n: int) -> list[str]:
    """Paragraphs of the manual, short and long as they come."""
    paragraphs = [
        " ".join(part.split())
        for topic in sorted(pydoc_data.topics.topics)
        for part in pydoc_data.topics.topics[topic].split("\n\n")
        if len(part.split()) > 20
    ]
    step = max(1, len(paragraphs) // n)
    return paragraphs[::step][:n]


def contestants(model: str, graphs: dict[str, str]) -> dict[str, Callable[[list[str]], list[float]]]:
    """Functions from texts to scores, by name; the first is what all others are compared with."""
    import torch
    from langchain_community.cross_encoders import HuggingFaceCrossEncoder
    from llama_index.core.postprocessor import SentenceTransformerRerank
    from llama_index.core.schema import NodeWithScore, TextNode
    from sentence_transformers import CrossEncoder

    from rerank_plugins import Reranker

    shipped = HuggingFaceCrossEncoder(model_name=model)
    half = CrossEncoder(model, model_kwargs={"dtype": torch.bfloat16})

    def llama(documents: list[str]) -> list[float]:
        rerank = llama_rerank
        nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.0) for i, text in enumerate(documents)]
        ranked = rerank.postprocess_nodes(nodes, query_str=QUERY)
        scores = [0.0] * len(documents)
        for node in ranked:
            scores[int(node.node.node_id)] = float(node.score or 0.0)
        return scores

    llama_rerank = SentenceTransformerRerank(model=model, top_n=10**6, trust_remote_code=False)
    found: dict[str, Callable[[list[str]], list[float]]] = {
        "LangChain HuggingFaceCrossEncoder": lambda d: list(shipped.score([(QUERY, text) for text in d])),
        "LlamaIndex SentenceTransformerRerank": llama,
        "sentence-transformers bf16": lambda d: half.predict([(QUERY, text) for text in d]).tolist(),
    }
    for name, keywords in {
        "rerank-plugins torch fp32": {"model": model, "backend": "torch"},
        "rerank-plugins onnx fp32": {"model": graphs["fp32"], "backend": "onnx"},
        "rerank-plugins onnx int8 weights": {"model": graphs["int8"], "backend": "onnx"},
        "rerank-plugins openvino fp32": {"model": graphs["fp32"], "backend": "openvino"},
        "rerank-plugins openvino int8 weights": {"model": graphs["int8"], "backend": "openvino"},
        "rerank-plugins openvino bf16": {"model": graphs["fp32"], "backend": "openvino", "precision": "bf16"},
    }.items():
        reranker = Reranker(**keywords)  # type: ignore[arg-type]
        try:
            reranker.prepare()
        except ValueError as error:
            print(f"{name}: {error}")
            continue
        found[name] = lambda d, reranker=reranker: reranker.score(QUERY, d).tolist()  # type: ignore[misc]
    return found


def main() -> None:
    """Run it."""
    arguments = parser.parse_args()
    import torch

    from rerank_plugins.conversion import convert

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as work:
        model = checkpoint(Path(work) / "model")
        graphs = {"fp32": f"{work}/fp32", "int8": f"{work}/int8"}
        convert(model, graphs["fp32"])
        convert(model, graphs["int8"], int8=True)
        documents = texts(arguments.documents)
        runners = contestants(model, graphs)
        scores = {name: run(documents) for name, run in runners.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(arguments.rounds):
            for name, run in runners.items():
                start = time.perf_counter()
                run(documents)
                seconds[name].append(time.perf_counter() - start)
    baseline = next(iter(runners))
    best = set(sorted(range(len(documents)), key=lambda i: -scores[baseline][i])[:10])
    rows = []
    for name in runners:
        median = statistics.median(seconds[name])
        top = set(sorted(range(len(documents)), key=lambda i: -scores[name][i])[:10])
        rows.append(
            {
                "contestant": name,
                "documents_per_second": round(len(documents) / median, 1),
                "ratio": round(statistics.median(seconds[baseline]) / median, 2),
                "top10_overlap": len(best & top) / 10,
            }
        )
    if arguments.json:
        print(json.dumps({"machine": platform.processor() or platform.machine(), "rows": rows}, indent=1))
        return
    print(f"{len(documents)} documents, {arguments.rounds} rounds, {arguments.threads} threads")
    for row in rows:
        print(
            f"{row['contestant']:<40} {row['documents_per_second']:>8} documents/s  {row['ratio']:>5} x  "
            f"top-10 overlap {row['top10_overlap']:.1f}"
        )


if __name__ == "__main__":
    main()
