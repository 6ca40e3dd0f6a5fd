"""Speed against what else there is, side by side in one run on the same weights, with quality beside it."""

from harness._contenders import AGAINST, Contender
from harness._plot import write_plot
from harness._report import Overhead, Report, Row, Size
from harness._run import run

__all__ = ["AGAINST", "Contender", "Overhead", "Report", "Row", "Size", "run", "write_plot"]
