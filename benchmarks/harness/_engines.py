"""What runs in a worker process: one contender or more, asked over pipes, one JSON line a request.

Run by its path, not as a module: the package itself must not count in the import time and memory of others. Hence the
standard library alone at the top.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Engine", "serve"]


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded contender.

    Attributes:
        rerank: The call that is timed: takes a query and what `prepare` made, and returns what the contender gives.
        order: Positions of the texts, best first, out of what `rerank` returned.
        logits: Raw logits of texts for a query, in input order; None where the contender gives none. Never timed.
        prepare: Texts as the contender takes them, made before the clock starts.
    """

    rerank: Callable[[str, Any], Any]
    order: Callable[[Any], list[int]]
    logits: Callable[[str, list[str]], Any] | None = None
    prepare: Callable[[list[str]], Any] = list


def ours(model: str, *, backend: str, precision: str) -> Engine:
    """`Reranker.rank`."""
    reranker = _reranker(model, backend, precision)
    return Engine(reranker.rank, lambda ranking: [item.index for item in ranking], reranker.logits)


def ours_score(model: str, *, backend: str, precision: str) -> Engine:
    """`Reranker.score`: what the adapters add to."""
    reranker = _reranker(model, backend, precision)
    return Engine(reranker.score, _descending, reranker.logits)


def ours_langchain(model: str, *, backend: str, precision: str) -> Engine:
    """Our LangChain adapter."""
    from rerank_plugins.langchain import CrossEncoderRerank

    adapter = CrossEncoderRerank(reranker=_reranker(model, backend, precision), top_n=10**9)
    return _langchain_engine(lambda query, documents: adapter.compress_documents(documents, query), None)


def ours_llama_index(model: str, *, backend: str, precision: str) -> Engine:
    """Our LlamaIndex adapter."""
    from rerank_plugins.llama_index import CrossEncoderRerank

    adapter = CrossEncoderRerank(reranker=_reranker(model, backend, precision), top_n=10**9)
    return _llama_index_engine(adapter, None)


def langchain(model: str) -> Engine:
    """LangChain's `CrossEncoderReranker` over `HuggingFaceCrossEncoder`, as they come."""
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
    from langchain_community.cross_encoders import HuggingFaceCrossEncoder

    scorer = HuggingFaceCrossEncoder(model_name=model, model_kwargs={"device": "cpu"})
    compressor = CrossEncoderReranker(model=scorer, top_n=10**9)
    return _langchain_engine(
        lambda query, documents: compressor.compress_documents(documents, query), _raw(scorer.client)
    )


def llama_index(model: str) -> Engine:
    """LlamaIndex's `SentenceTransformerRerank`, as it comes."""
    from llama_index.core.postprocessor import SentenceTransformerRerank

    rerank = SentenceTransformerRerank(model=model, top_n=10**9, device="cpu", trust_remote_code=False)
    return _llama_index_engine(rerank, _raw(rerank._model))


def sentence_transformers(model: str, *, dtype: str, device: str = "cpu") -> Engine:
    """sentence-transformers' `CrossEncoder.predict`, sorted."""
    import torch
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(model, device=device, model_kwargs={"dtype": getattr(torch, dtype)})
    return Engine(lambda query, texts: encoder.predict([(query, text) for text in texts]), _descending, _raw(encoder))


def flashrank(model: str) -> Engine:
    """FlashRank on the ONNX graph that ours run; it knows models by a table of names, to which this one is added."""
    import flashrank.Config
    from flashrank import Ranker, RerankRequest

    directory = Path(model)
    flashrank.Config.model_file_map[directory.name] = "model.onnx"
    ranker = Ranker(model_name=directory.name, cache_dir=str(directory.parent), max_length=512, log_level="ERROR")

    def logits(query: str, texts: list[str]) -> list[float]:
        passages = [{"id": i, "text": text} for i, text in enumerate(texts)]
        scores = {item["id"]: float(item["score"]) for item in ranker.rerank(RerankRequest(query, passages))}
        # It gives float32 probabilities alone: beyond 16 the logit is lost.
        return [math.log(p) - math.log1p(-p) if 0 < p < 1 else math.nan for p in (scores[i] for i in range(len(texts)))]

    return Engine(
        rerank=lambda query, passages: ranker.rerank(RerankRequest(query, passages)),
        order=lambda ranked: [item["id"] for item in ranked],
        logits=logits,
        prepare=lambda texts: [{"id": i, "text": text} for i, text in enumerate(texts)],
    )


def fastembed(model: str, *, threads: int) -> Engine:
    """fastembed's `TextCrossEncoder` on the ONNX graph that ours run, added as a custom model."""
    from fastembed.common.model_description import ModelSource
    from fastembed.rerank.cross_encoder import TextCrossEncoder

    # A name can be added once in a process.
    name = f"rerank-plugins/benchmark-{len(TextCrossEncoder.list_supported_models())}"
    TextCrossEncoder.add_custom_model(model=name, sources=ModelSource(hf=name), model_file="model.onnx")
    encoder = TextCrossEncoder(name, specific_model_path=model, threads=threads, cuda=False)
    scores: Callable[[str, list[str]], list[float]] = lambda query, texts: list(encoder.rerank(query, texts))  # noqa: E731
    return Engine(scores, _descending, scores)


def rerankers(model: str) -> Engine:
    """rerankers' cross-encoder."""
    from rerankers import Reranker

    ranker = Reranker(model, model_type="cross-encoder", device="cpu", verbose=0)

    def logits(query: str, texts: list[str]) -> list[float]:
        scores = {item.document.doc_id: float(item.score) for item in ranker.rank(query, texts).results}
        return [scores[i] for i in range(len(texts))]

    return Engine(ranker.rank, lambda ranked: [item.document.doc_id for item in ranked.results], logits)


def _reranker(model: str, backend: Any, precision: Any) -> Any:
    from rerank_plugins.reranker import Reranker

    return Reranker(model, backend=backend, precision=precision, device="cpu").prepare()


def _langchain_engine(rerank: Callable[[str, Any], Any], logits: Callable[[str, list[str]], Any] | None) -> Engine:
    from langchain_core.documents import Document

    return Engine(
        rerank=rerank,
        order=lambda documents: [document.metadata["place"] for document in documents],
        logits=logits,
        prepare=lambda texts: [Document(text, metadata={"place": i}) for i, text in enumerate(texts)],
    )


def _llama_index_engine(postprocessor: Any, logits: Callable[[str, list[str]], Any] | None) -> Engine:
    from llama_index.core.schema import NodeWithScore, TextNode

    return Engine(
        rerank=lambda query, nodes: postprocessor.postprocess_nodes(nodes, query_str=query),
        order=lambda nodes: [int(node.node.node_id) for node in nodes],
        logits=logits,
        # Fresh ones for each call: LlamaIndex's own postprocessor writes into them.
        prepare=lambda texts: [
            NodeWithScore(node=TextNode(text=t, id_=str(i)), score=0.0) for i, t in enumerate(texts)
        ],
    )


def _raw(encoder: Any) -> Callable[[str, list[str]], Any]:
    import torch

    return lambda query, texts: encoder.predict([(query, t) for t in texts], activation_fn=torch.nn.Identity())


def _descending(scores: Any) -> list[int]:
    values = [float(score) for score in scores]
    return sorted(range(len(values)), key=lambda i: -values[i])


# -- the worker -------------------------------------------------------------------------------------------------


def pin(library: str, threads: int) -> None:
    """Give an engine the same number of threads however a contender makes its session."""
    if library == "torch":
        import torch

        torch.set_num_threads(threads)
    elif library == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession
        make = session.__init__

        def init(self: Any, model: Any, sess_options: Any = None, *args: Any, **kwargs: Any) -> None:
            options = sess_options or onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            make(self, model, options, *args, **kwargs)

        session.__init__ = init
    elif library == "openvino":
        import openvino

        compile_model = openvino.Core.compile_model

        def compiled(self: Any, model: Any, device: str, config: Any = None) -> Any:
            return compile_model(self, model, device, {**(config or {}), "INFERENCE_NUM_THREADS": threads})

        openvino.Core.compile_model = compiled


def peak_bytes() -> int | None:
    """Most memory that this process has held, in bytes; None where the system does not tell."""
    try:
        # Not getrusage: its maximum is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


class _Worker:
    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}

    def limit(self, size: int) -> dict[str, Any]:
        """Fail rather than drive the machine out of memory."""
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        return {}

    def imports(self, modules: list[str]) -> dict[str, Any]:
        start = time.perf_counter()
        for module in modules:
            importlib.import_module(module)
        return {"seconds": time.perf_counter() - start}

    def load(
        self, name: str, function: str, model: str, keywords: dict[str, Any], library: str, threads: int
    ) -> dict[str, Any]:
        if library:
            pin(library, threads)
        module, _, attribute = function.rpartition(":")
        make = getattr(importlib.import_module(module), attribute) if module else globals()[attribute]
        self.engines[name] = make(model, **keywords)
        return {}

    def rank(self, name: str, calls: list[tuple[str, list[str]]], logits: bool) -> dict[str, Any]:
        engine = self.engines[name]
        orders = [engine.order(engine.rerank(query, engine.prepare(texts))) for query, texts in calls]
        if not logits or engine.logits is None:
            return {"orders": orders, "logits": None}
        found = [[float(value) for value in engine.logits(query, texts)] for query, texts in calls]
        return {"orders": orders, "logits": [[v if math.isfinite(v) else None for v in row] for row in found]}

    def time(self, name: str, calls: list[tuple[str, list[str]]]) -> dict[str, Any]:
        engine, seconds = self.engines[name], []
        for query, texts in calls:
            prepared = engine.prepare(texts)
            start = time.perf_counter()
            engine.rerank(query, prepared)
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def peak(self) -> dict[str, Any]:
        return {"bytes": peak_bytes()}


def serve() -> None:
    """Answer requests until standard input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Started by its path: Python has put this directory first.
    sys.path.pop(0)
    serve()
