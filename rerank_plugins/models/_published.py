"""Published cross-encoders, with the figures that their makers give.

Figures are copied, never measured here, and only those of the same measure compare. MS MARCO, QNLI, STS, Quora and NLI
models: the table of pretrained models in the documentation of sentence-transformers (documents per second on a V100).
All others: the model cards on the Hugging Face Hub; a few models are listed with what another maker's card measured,
which `PublishedModel.source` names. No figure stands where none was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["PUBLISHED", "PublishedModel"]

Head = Literal["one logit", "three-class NLI", "causal yes/no"]

_GRAPH = ("onnx", "openvino", "torch")
_TORCH = ("torch",)


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
    backends: tuple[str, ...] = _GRAPH
    note: str | None = None


def _msmarco(name: str, family: str, ndcg: float, mrr: float, speed: int) -> PublishedModel:
    return PublishedModel(
        id=f"cross-encoder/ms-marco-{name}",
        family=family,
        languages="en",
        head="one logit",
        max_length=512,
        ndcg_dl19=ndcg,
        mrr_msmarco=mrr,
        docs_per_second=speed,
        source="sbert.net",
    )


def _sbert(name: str, family: str, measure: str, figure: float, head: Head = "one logit") -> PublishedModel:
    return PublishedModel(
        id=f"cross-encoder/{name}",
        family=family,
        languages="en",
        head=head,
        max_length=512,
        measure=measure,
        figure=figure,
        source="sbert.net",
        note=None if head == "one logit" else 'rank with label="entailment"',
    )


_QNLI = "QNLI dev accuracy"
_STS = "STSb test Spearman"
_QUORA = "Quora dev average precision"
_MNLI = "MNLI mismatched accuracy"
_NLI: Head = "three-class NLI"
_BEIR_11 = "BEIR nDCG@10, 11 sets"
_BEIR_17 = "BEIR nDCG@10, 17 sets"
_CODE = "needs trust_remote_code=True"
_NON_COMMERCIAL = "CC-BY-NC-4.0"

PUBLISHED: tuple[PublishedModel, ...] = (
    _msmarco("TinyBERT-L2-v2", "bert", 69.84, 32.56, 9000),
    _msmarco("MiniLM-L2-v2", "bert", 71.01, 34.85, 4100),
    _msmarco("MiniLM-L4-v2", "bert", 73.04, 37.70, 2500),
    _msmarco("MiniLM-L6-v2", "bert", 74.30, 39.01, 1800),
    _msmarco("MiniLM-L12-v2", "bert", 74.31, 39.02, 960),
    _msmarco("electra-base", "electra", 71.99, 36.41, 340),
    PublishedModel(
        id="mixedbread-ai/mxbai-rerank-xsmall-v1",
        family="deberta-v2",
        languages="en",
        head="one logit",
        max_length=512,
        measure=_BEIR_11,
        figure=43.9,
        source="model card",
    ),
    PublishedModel(
        id="mixedbread-ai/mxbai-rerank-base-v1",
        family="deberta-v2",
        languages="en",
        head="one logit",
        max_length=512,
        measure=_BEIR_11,
        figure=46.9,
        source="model card",
    ),
    PublishedModel(
        id="mixedbread-ai/mxbai-rerank-large-v1",
        family="deberta-v2",
        languages="en",
        head="one logit",
        max_length=512,
        measure=_BEIR_11,
        figure=48.8,
        source="model card",
    ),
    PublishedModel(
        id="Alibaba-NLP/gte-reranker-modernbert-base",
        family="modernbert",
        languages="en",
        head="one logit",
        max_length=8192,
        measure="BEIR nDCG@10",
        figure=56.19,
        source="model card",
    ),
    PublishedModel(
        id="jinaai/jina-reranker-v1-tiny-en",
        family="jina-bert",
        languages="en",
        head="one logit",
        max_length=8192,
        measure=_BEIR_17,
        figure=48.54,
        source="model card",
        backends=_TORCH,
        note=_CODE,
    ),
    PublishedModel(
        id="jinaai/jina-reranker-v1-turbo-en",
        family="jina-bert",
        languages="en",
        head="one logit",
        max_length=8192,
        measure=_BEIR_17,
        figure=49.60,
        source="model card",
        backends=_TORCH,
        note=_CODE,
    ),
    PublishedModel(
        id="BAAI/bge-reranker-base",
        family="xlm-roberta",
        languages="zh, en",
        head="one logit",
        max_length=512,
        measure="C-MTEB reranking, 6 sets",
        figure=65.42,
        source="model card",
        licence="MIT",
    ),
    PublishedModel(
        id="BAAI/bge-reranker-large",
        family="xlm-roberta",
        languages="zh, en",
        head="one logit",
        max_length=512,
        measure="C-MTEB reranking, 6 sets",
        figure=66.10,
        source="model card",
        licence="MIT",
    ),
    PublishedModel(
        id="BAAI/bge-reranker-v2-m3",
        family="xlm-roberta",
        languages="multilingual",
        head="one logit",
        max_length=8192,
        measure=_BEIR_17,
        figure=53.65,
        source="card of jina-reranker-v2",
    ),
    PublishedModel(
        id="cross-encoder/mmarco-mMiniLMv2-L12-H384-v1",
        family="xlm-roberta",
        languages="multilingual",
        head="one logit",
        max_length=512,
        measure=_BEIR_17,
        figure=45.40,
        source="card of jina-reranker-v2",
    ),
    PublishedModel(
        id="jinaai/jina-reranker-v2-base-multilingual",
        family="xlm-roberta",
        languages="multilingual",
        head="one logit",
        max_length=1024,
        measure=_BEIR_17,
        figure=53.17,
        source="model card",
        licence=_NON_COMMERCIAL,
        backends=_TORCH,
        note=f"{_CODE}; not for commercial use",
    ),
    PublishedModel(
        id="Alibaba-NLP/gte-multilingual-reranker-base",
        family="new",
        languages="multilingual",
        head="one logit",
        max_length=8192,
        measure="MTEB-R",
        figure=59.51,
        source="card of Qwen3-Reranker",
        backends=_TORCH,
        note=_CODE,
    ),
    PublishedModel(
        id="Qwen/Qwen3-Reranker-0.6B",
        family="qwen3",
        languages="multilingual",
        head="causal yes/no",
        max_length=32768,
        measure="MTEB-R",
        figure=65.80,
        source="model card",
        backends=_TORCH,
        note="takes an instruction",
    ),
    PublishedModel(
        id="Qwen/Qwen3-Reranker-4B",
        family="qwen3",
        languages="multilingual",
        head="causal yes/no",
        max_length=32768,
        measure="MTEB-R",
        figure=69.76,
        source="model card",
        backends=_TORCH,
        note="takes an instruction; wants a GPU",
    ),
    PublishedModel(
        id="Qwen/Qwen3-Reranker-8B",
        family="qwen3",
        languages="multilingual",
        head="causal yes/no",
        max_length=32768,
        measure="MTEB-R",
        figure=69.02,
        source="model card",
        backends=_TORCH,
        note="takes an instruction; wants a GPU",
    ),
    PublishedModel(
        id="BAAI/bge-reranker-v2-gemma",
        family="gemma",
        languages="multilingual",
        head="causal yes/no",
        max_length=8192,
        backends=_TORCH,
        note="takes an instruction; wants a GPU",
    ),
    _sbert("qnli-distilroberta-base", "roberta", _QNLI, 90.96),
    _sbert("qnli-electra-base", "electra", _QNLI, 93.21),
    _sbert("stsb-TinyBERT-L4", "bert", _STS, 85.50),
    _sbert("stsb-distilroberta-base", "roberta", _STS, 87.92),
    _sbert("stsb-roberta-base", "roberta", _STS, 90.17),
    _sbert("stsb-roberta-large", "roberta", _STS, 91.47),
    _sbert("quora-distilroberta-base", "roberta", _QUORA, 87.48),
    _sbert("quora-roberta-base", "roberta", _QUORA, 87.80),
    _sbert("quora-roberta-large", "roberta", _QUORA, 87.91),
    _sbert("nli-distilroberta-base", "roberta", _MNLI, 83.98, _NLI),
    _sbert("nli-MiniLM2-L6-H768", "roberta", _MNLI, 86.89, _NLI),
    _sbert("nli-roberta-base", "roberta", _MNLI, 87.47, _NLI),
    _sbert("nli-deberta-v3-xsmall", "deberta-v2", _MNLI, 87.77, _NLI),
    _sbert("nli-deberta-v3-small", "deberta-v2", _MNLI, 87.55, _NLI),
    _sbert("nli-deberta-base", "deberta", _MNLI, 88.08, _NLI),
    _sbert("nli-deberta-v3-base", "deberta-v2", _MNLI, 90.04, _NLI),
)
"""The models, rerankers for search first, then those that judge pairs of sentences."""
