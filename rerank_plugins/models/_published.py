"""Published cross-encoders, with the figures that their makers give.

Figures are copied, never measured here, and only those of the same measure compare. MS MARCO, QNLI, STS, Quora and NLI
models: the table of pretrained models in the documentation of sentence-transformers (documents per second on a V100).
All others: the model cards on the Hugging Face Hub; a few models are listed with what another maker's card measured,
which `PublishedModel.source` names. No figure stands where none was found.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["PublishedModel", "published"]

Head = Literal["one logit", "three-class NLI", "causal yes/no"]

_ALL = ("onnx", "openvino", "torch")


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A published cross-encoder.

    Attributes:
        id: Its id on the Hugging Face Hub.
        family: The architecture, as ``model_type`` of its configuration.
        languages: ISO 639-1 codes, or ``"multilingual"``.
        head: ``"one logit"``, ``"three-class NLI"`` (needs a ``label``), or ``"causal yes/no"``: the next token of a
            decoder.
        max_length: Most tokens of a pair.
        ndcg_dl19: nDCG@10 on TREC Deep Learning 2019, times 100.
        mrr_msmarco: MRR@10 on the MS MARCO dev set, times 100.
        docs_per_second: Documents a second on a V100.
        measure: The measure of `figure`, where the family has one of its own.
        figure: What the model reaches there, times 100.
        source: Who published the figures; None where there are none.
        licence: SPDX identifier.
        backends: Backends that run it, the Hub's graph or one that ``rerank-plugins convert`` makes.
        note: What else one must know before using it.
    """

    id: str
    family: str
    languages: str
    head: Head
    max_length: int
    ndcg_dl19: float | None = None
    mrr_msmarco: float | None = None
    docs_per_second: int | None = None
    measure: str | None = None
    figure: float | None = None
    source: str | None = None
    licence: str = "Apache-2.0"
    backends: tuple[str, ...] = _ALL
    note: str | None = None


@functools.cache
def published() -> tuple[PublishedModel, ...]:
    """The models of ``published.json``: rerankers for search first, then those that judge pairs of sentences."""
    rows = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return tuple(PublishedModel(**{**row, "backends": tuple(row.get("backends", _ALL))}) for row in rows)
