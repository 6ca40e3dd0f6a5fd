"""Does reranking help here? Test sets in BEIR layout, and measures by ir-measures (extra ``eval``)."""

from rerank_plugins.evaluation._beir import (
    BeirDataset,
    Run,
    Scorer,
    first_stage_run,
    read_beir,
    rerank_run,
    score_texts,
)
from rerank_plugins.evaluation._evaluate import evaluate
from rerank_plugins.evaluation._report import write_report
from rerank_plugins.evaluation._results import DatasetResult, Evaluation, ModelResult, Speed
from rerank_plugins.evaluation.measures import DEFAULT_MEASURES, Comparison, compare, measure_run

__all__ = [
    "DEFAULT_MEASURES",
    "BeirDataset",
    "Comparison",
    "DatasetResult",
    "Evaluation",
    "ModelResult",
    "Run",
    "Scorer",
    "Speed",
    "compare",
    "evaluate",
    "first_stage_run",
    "measure_run",
    "read_beir",
    "rerank_run",
    "score_texts",
    "write_report",
]
