"""Speed against what else there is, side by side in one run on the same weights, with quality beside it."""

from rerank_plugins.benchmark._contenders import AGAINST, Contender
from rerank_plugins.benchmark._plot import write_plot
from rerank_plugins.benchmark._report import Overhead, Report, Row, Size
from rerank_plugins.benchmark._run import run

__all__ = ["AGAINST", "Contender", "Overhead", "Report", "Row", "Size", "run", "write_plot"]
