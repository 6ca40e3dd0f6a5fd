"""The table as a picture."""

from __future__ import annotations

import os

from harness._report import Report

__all__ = ["write_plot"]

_OURS, _OTHERS = "#0072b2", "#999999"


def write_plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a bar for each contender, with the spread over rounds, and the quality in words.

    Args:
        report: What to draw.
        path: A file; its ending (``.png``, ``.svg``, ``.pdf``) says what it becomes.
    """
    from matplotlib.figure import Figure

    rows = list(reversed(report.rows))
    ratios = [row.ratio for row in rows]
    # A figure of its own, without pyplot: no state of the caller's is touched.
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(
        [row.name for row in rows],
        ratios,
        xerr=[[row.ratio - row.ratio_low for row in rows], [row.ratio_high - row.ratio for row in rows]],
        color=[_OURS if row.ours else _OTHERS for row in rows],
        ecolor="#333333",
        capsize=2,
    )
    for place, row in enumerate(rows):
        quality = f"{row.ratio:.1f} x   top-10 overlap {row.overlap:.2f}, nDCG@10 {row.ndcg_difference:+.3f}"
        axes.annotate(quality, (row.ratio_high, place), xytext=(6, 0), textcoords="offset points", va="center", size=8)
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set_xlim(0, max(row.ratio_high for row in rows) * 1.6)
    axes.set_xlabel(f"documents/s against {report.baseline}, median of {report.rounds} rounds with lowest and highest")
    axes.set_title(
        f"{report.documents} candidates ({report.data}), {report.model}, {report.threads} threads\n"
        f"{report.machine['cpu']}",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
