"""Millions of pairs: files in, the same rows with scores out, in shards that are kept when a run is interrupted."""

from rerank_plugins.bulk.files import BulkResult, score_files
from rerank_plugins.bulk.process import ScoringProcess
from rerank_plugins.bulk.rows import RowScores, score_rows

__all__ = ["BulkResult", "RowScores", "ScoringProcess", "score_files", "score_rows"]
