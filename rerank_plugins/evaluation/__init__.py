"""Does reranking help here? Test sets in BEIR layout, and measures by ir-measures (extra ``eval``)."""

from rerank_plugins.evaluation._beir import (
    BeirDataset,
    Run,
    first_stage_run,
    read_beir,
    rerank_run,
)
from rerank_plugins.evaluation._evaluate import evaluate
from rerank_plugins.evaluation._measures import DEFAULT_MEASURES, Comparison, compare, measure_run
from rerank_plugins.evaluation._report import write_report
from rerank_plugins.evaluation._results import DatasetResult, Evaluation, ModelResult, Speed

__all__ = [
    "DEFAULT_MEASURES",
    "BeirDataset",
    "Comparison",
    "DatasetResult",
    "Evaluation",
    "ModelResult",
    "Run",
    "Speed",
    "compare",
    "evaluate",
    "first_stage_run",
    "measure_run",
    "read_beir",
    "rerank_run",
    "write_report",
]
