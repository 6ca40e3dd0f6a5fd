"""What a benchmark has found."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rerank_plugins._machine import processor

__all__ = ["Overhead", "Report", "Row", "Size", "machine", "versions"]

_PACKAGES = (
    "rerank-plugins",
    "numpy",
    "torch",
    "onnxruntime",
    "openvino",
    "tokenizers",
    "transformers",
    "sentence-transformers",
    "langchain-classic",
    "langchain-community",
    "llama-index-core",
    "FlashRank",
    "fastembed",
    "rerankers",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One contender.

    Attributes:
        name: The contender.
        ours: Whether it is an engine of this package.
        precision: Number format of its arithmetic.
        documents_per_s: Median over rounds.
        ratio: Its rate over the baseline's in the same round; median over rounds.
        ratio_low: Lowest of these ratios.
        ratio_high: Highest of these ratios.
        ndcg: nDCG@10; see `harness._quality.Quality`.
        ndcg_difference: nDCG@10 less the reference's.
        overlap: Share of the reference's top 10 that is in its top 10.
        same_order: Whether its top 10 are the reference's, in the same order.
        logit_difference: Largest difference of logits to the reference's; None where it gives none.
        seconds: Of each round.
        short_p50_s: Median of a short call; None where it was not measured, as for all that follow.
        short_p95_s: 95th percentile of a short call.
        import_s: Importing it, in a fresh process.
        first_score_s: From the start of a process to its first scores.
        peak_bytes: Most memory of a process that reranks 1,000 candidates.
    """

    name: str
    ours: bool
    precision: str
    documents_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ndcg: float
    ndcg_difference: float
    overlap: float
    same_order: bool
    logit_difference: float | None
    seconds: tuple[float, ...]
    short_p50_s: float | None = None
    short_p95_s: float | None = None
    import_s: float | None = None
    first_score_s: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Overhead:
    """What a way of calling adds to `Reranker.score` on a short call.

    Attributes:
        engine: The engine below.
        name: The way of calling.
        median_s: Median of a call.
        added_s: Median difference to `Reranker.score` on the same texts in the same round.
        share: `added_s` over the median of `Reranker.score`.
    """

    engine: str
    name: str
    median_s: float
    added_s: float
    share: float


@dataclass(frozen=True, slots=True)
class Size:
    """One contender on a number of candidates, in a fresh process.

    Attributes:
        name: The contender.
        candidates: How many.
        tokens: Tokens of their pairs, without padding.
        seconds: Of the call, once the model is loaded and has scored.
        per_token_s: Seconds of a token.
        peak_bytes: Most memory of the process.
    """

    name: str
    candidates: int
    tokens: int
    seconds: float
    per_token_s: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """A benchmark's figures; ratios are of measurements in the same round.

    Attributes:
        model: What everybody has loaded.
        data: What was reranked.
        judged: Whether nDCG is by judgements of the data; otherwise by the reference's own top 10.
        queries: How many.
        documents: Candidates of all queries together.
        tokens: Tokens of their pairs, without padding.
        max_length: Tokens at which everybody cut a pair.
        threads: Threads of every engine.
        rounds: How often everybody had a turn.
        baseline: The contender that ratios are of.
        reference: The contender whose order and logits are the exact ones.
        rows: The contenders, in their order.
        overheads: What the adapters cost; empty where it was not measured.
        sizes: Time and memory from few candidates to many; empty where it was not measured.
        notes: What was left out, and why.
        turns: Who had a turn, one after the other, in the timed rounds.
        machine: Processor, cores, system, Python.
        versions: Of the packages that take part.
    """

    model: str
    data: str
    judged: bool
    queries: int
    documents: int
    tokens: int
    max_length: int
    threads: int
    rounds: int
    baseline: str
    reference: str
    rows: Sequence[Row]
    overheads: Sequence[Overhead]
    sizes: Sequence[Size]
    notes: Sequence[str]
    turns: Sequence[str]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def differing(self) -> list[Row]:
        """Contenders whose top 10 are not the reference's, in its order."""
        return [row for row in self.rows if not row.same_order]

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return asdict(self)


def machine() -> dict[str, Any]:
    """What this runs on."""
    cpu, flags = processor()
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cpu": cpu,
        "cpu_flags": [flag for flag in known if flag in flags],
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that take part, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
