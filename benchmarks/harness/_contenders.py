"""Who takes part: our engines, and what else there is."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rerank_plugins.errors import ConfigurationError

__all__ = ["AGAINST", "Contender", "adapters", "missing", "opponents", "our_engines"]


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that reranks, and how to load it in a process of its own.

    Attributes:
        name: Its row in the table.
        load: ``"function"`` of the engines that are known, or ``"module:function"``: takes the model's directory and
            `keywords`, and returns an object with ``rerank(query, prepared)``, ``order(result)``, ``logits(query,
            texts)`` or None, and ``prepare(texts)``.
        library: What multiplies its matrices: ``"torch"``, ``"onnx"``, ``"openvino"``, or blank where not known.
        precision: Number format of the arithmetic.
        reads: ``"checkpoint"`` or ``"graph"``.
        modules: What it imports.
        install: What to ``pip install`` for it.
        keywords: Further arguments of `load`.
        takes_threads: Whether `load` takes ``threads``.
        ours: Whether it is an engine of this package.
    """

    name: str
    load: str
    library: str = ""
    precision: str = "fp32"
    reads: Literal["checkpoint", "graph"] = "checkpoint"
    modules: tuple[str, ...] = ()
    install: str = ""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    takes_threads: bool = False
    ours: bool = False


_ST = ("sentence_transformers",)
_KNOWN = (
    Contender(
        "langchain",
        "langchain",
        "torch",
        modules=("langchain_classic.retrievers.document_compressors", "langchain_community.cross_encoders", *_ST),
        install="langchain-classic langchain-community sentence-transformers",
    ),
    Contender(
        "llama-index",
        "llama_index",
        "torch",
        modules=("llama_index.core.postprocessor", *_ST),
        install="llama-index-core sentence-transformers",
    ),
    Contender(
        "sentence-transformers",
        "sentence_transformers",
        "torch",
        modules=_ST,
        install="sentence-transformers",
        keywords={"dtype": "float32"},
    ),
    Contender(
        "sentence-transformers-bf16",
        "sentence_transformers",
        "torch",
        "bf16",
        modules=_ST,
        install="sentence-transformers",
        keywords={"dtype": "bfloat16"},
    ),
    Contender("flashrank", "flashrank", "onnx", reads="graph", modules=("flashrank",), install="flashrank"),
    Contender(
        "fastembed",
        "fastembed",
        "onnx",
        reads="graph",
        modules=("fastembed.rerank.cross_encoder",),
        install="fastembed",
        takes_threads=True,
    ),
    Contender(
        "rerankers", "rerankers", "torch", modules=("rerankers", "transformers"), install="rerankers[transformers]"
    ),
)
AGAINST: Mapping[str, Contender] = {contender.name: contender for contender in _KNOWN}
"""What can be compared with, by the name that ``--against`` takes."""

_PRECISIONS = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8"), "torch": ("fp32", "bf16")}
_MODULES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "sentence_transformers"}


def opponents(against: Sequence[str | Contender]) -> list[Contender]:
    """Contenders by name; ``"all"`` is every known one, ``"module:function"`` one of the caller's.

    Raises:
        ConfigurationError: A name that is not known.
    """
    found: dict[str, Contender] = {}
    for item in against:
        if isinstance(item, Contender):
            found[item.name] = item
        elif item == "all":
            found.update(AGAINST)
        elif item in AGAINST:
            found[item] = AGAINST[item]
        elif ":" in item:
            found[item] = Contender(item, item, reads="graph", modules=(item.split(":")[0],))
        else:
            raise ConfigurationError(
                f"There is no contender {item!r}: expected all, {', '.join(AGAINST)}, or module:function of your own."
            )
    return list(found.values())


def our_engines(backends: Sequence[str], precisions: Sequence[str]) -> list[Contender]:
    """Our engines, in each of the precisions that they have.

    Raises:
        ConfigurationError: A backend or precision that does not exist, or no pair of them that does.
    """
    known = {precision for having in _PRECISIONS.values() for precision in having}
    for what, given, expected in (("backend", backends, set(_PRECISIONS)), ("precision", precisions, known)):
        if wrong := [item for item in given if item not in expected]:
            raise ConfigurationError(f"There is no {what} {wrong[0]!r} here: expected some of {sorted(expected)}.")
    found = [
        Contender(
            f"rerank-plugins {backend} {precision}",
            "ours",
            backend,
            precision,
            reads="checkpoint" if backend == "torch" else "graph",
            modules=("rerank_plugins", _MODULES[backend]),
            install=f'"rerank-plugins[{backend}]"',
            keywords={"backend": backend, "precision": precision},
            ours=True,
        )
        for backend in dict.fromkeys(backends)
        for precision in dict.fromkeys(precisions)
        if precision in _PRECISIONS[backend]
    ]
    if not found:
        raise ConfigurationError(
            f"None of the backends {', '.join(backends)} computes in {', '.join(precisions)}: expected "
            + "; ".join(f"{backend}: {', '.join(having)}" for backend, having in _PRECISIONS.items())
        )
    return found


def adapters(engine: Contender) -> list[Contender]:
    """`Reranker.score` and both adapters around it, on one of our engines; the first is what the others add to."""
    surfaces = (
        ("Reranker.score", "ours_score", ()),
        ("Reranker.rank", "ours", ()),
        ("LangChain adapter", "ours_langchain", ("langchain_core",)),
        ("LlamaIndex adapter", "ours_llama_index", ("llama_index.core",)),
    )
    return [
        Contender(
            name, load, engine.library, engine.precision, engine.reads, modules, keywords=engine.keywords, ours=True
        )
        for name, load, modules in surfaces
    ]


def missing(contender: Contender) -> list[str]:
    """Top-level modules of a contender that are not installed."""
    tops = dict.fromkeys(module.split(".")[0] for module in contender.modules)
    return [top for top in tops if importlib.util.find_spec(top) is None]
