"""The report's plots, as SVG that stands in an HTML page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from rerank_plugins._extras import import_extra
from rerank_plugins._printable import printable
from rerank_plugins.evaluation.wording import value_text

__all__ = ["GAIN", "LOSS", "Point", "gains_plot", "moves_plot", "quality_plot"]

GAIN, LOSS, STAY = "#0072b2", "#d55e00", "#8a949e"
_COLOURS = (GAIN, LOSS, "#009e73", "#cc79a7", "#b8860b", "#56a0d3")
"""Colours that stay apart for colour-blind readers (after Okabe and Ito), and on white as on black."""
_KINDS = {"gain": GAIN, "loss": LOSS, "stay": STAY}
_WIDTH = 13.0
"""Of a plot in inches; the page stretches it."""
_POINTS = 72
"""Points in an inch, also the resolution of the plots: a pixel is a point."""
_LABEL_APART = 14
"""Points between labels."""

Marks = dict[str, tuple[str, str]]
"""Class and tooltip of parts of a plot, by their ids."""


@dataclass(frozen=True, slots=True)
class Point:
    """A model in `quality_plot`: its latency in ms, its quality, and the ends of the interval of it, if known.

    `earlier` marks a latency that another run measured: its dot is hollow.
    """

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    earlier: bool = False


def quality_plot(points: Sequence[Point], first: float, ceiling: float, measure: str) -> str:
    """Quality against the median latency of a query, on a logarithmic axis, between first stage and ceiling."""
    ticker = import_extra("matplotlib.ticker", "eval")
    marks: Marks = {}
    with _plot(4.7, f"{measure} against latency", marks) as (axes, svg):
        for value, label, style in ((first, "first stage", "-"), (ceiling, "ceiling of the candidates", "--")):
            axes.axhline(value, color=STAY, linewidth=1.5, linestyle=style)
            axes.annotate(label, (0, value), xycoords=("axes fraction", "data"), xytext=(6, 4), **_BESIDE)
        times = [max(point.x, 1e-3) for point in points]
        axes.set_xscale("log")
        axes.set_xlim(10.0 ** math.floor(math.log10(min(times) / 1.5)), 10.0 ** math.ceil(math.log10(max(times) * 1.5)))
        ends = [first, ceiling, *(v for p in points for v in (p.y, p.low, p.high) if v is not None)]
        margin = 0.06 * (max(ends) - min(ends) or 1.0)
        axes.set_ylim(max(0.0, min(ends) - margin), max(ends) + margin)
        label_y = math.inf
        for place, point in sorted(enumerate(points), key=lambda item: -item[1].y):
            colour, x = _COLOURS[place % len(_COLOURS)], times[place]
            if point.low is not None and point.high is not None:
                axes.vlines(x, point.low, point.high, color=colour, linewidth=2, alpha=0.6)
            fill = "none" if point.earlier else colour
            axes.plot([x], [point.y], "o", markersize=9, color=colour, markerfacecolor=fill, gid=f"model-{place}")
            told = " (timed by an earlier run)" if point.earlier else ""
            marks[f"model-{place}"] = ("model", f"{point.name}: {value_text(point.y)}, {point.x:.3g} ms{told}")
            # Labels of models that lie close together are pushed apart.
            at_x, at_y = axes.transData.transform((x, point.y))
            label_y = min(at_y, label_y - _LABEL_APART)
            left = at_x > 0.6 * _WIDTH * _POINTS
            name = point.name if len(point.name) <= 60 else f"{point.name[:40]}…{point.name[-16:]}"
            beside = {**_BESIDE, "ha": "right" if left else "left", "va": "center"}
            axes.annotate(_shown(name), (x, point.y), xytext=(-9 if left else 9, label_y - at_y), **beside)
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:.3f}"))
        axes.grid(color=STAY, alpha=0.3)
        axes.set_xlabel("median time of a query in ms")
    return svg()


def gains_plot(changes: Sequence[tuple[str, float]], measure: str) -> str:
    """A bar for each query, largest gain first: above the line better, below it worse.

    Args:
        changes: Query texts and differences.
        measure: What changed.
    """
    ordered = sorted(changes, key=lambda item: -item[1])
    limit = max((abs(change) for _, change in ordered), default=0.0) or 1.0
    caption = f"difference of {measure} by query, {len(ordered)} queries"
    marks: Marks = {}
    with _plot(3.3, caption, marks) as (axes, svg):
        for place, (query, change) in enumerate(ordered):
            kind = "gain" if change > 0 else "loss" if change < 0 else "stay"
            # A query that stayed is a dot of a bar, so that it can be pointed at.
            height = change or -limit / 100
            axes.bar(place, height, width=0.85, color=_KINDS[kind], gid=f"query-{place}")
            marks[f"query-{place}"] = (kind, f"{change:+.3f} {query[:200]}")
        axes.set_xlim(-0.6, max(len(ordered), 1) - 0.4)
        axes.set_ylim(-1.02 * limit, 1.02 * limit)
        axes.set_yticks([-limit, 0.0, limit], [f"{-limit:+.2f}", "0", f"{limit:+.2f}"])
        axes.set_xticks([])
        axes.axhline(0.0, color=STAY, linewidth=1)
        axes.grid(axis="y", color=STAY, alpha=0.3)
        axes.set_xlabel(caption, parse_math=False)
    return svg()


def moves_plot(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """How many documents went from one range of ranks (rows) to another (columns); above the diagonal is down.

    Args:
        counts: Shape (n, n): from, to.
        labels: The ranges of ranks.
    """
    patches = import_extra("matplotlib.patches", "eval")
    most = max((max(row) for row in counts), default=0) or 1
    size, marks = len(labels), dict[str, tuple[str, str]]()
    with _plot(0.8 + 0.42 * size, "ranks of relevant documents before and after reranking", marks) as (axes, svg):
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                kind, name = "gain" if j < i else "loss" if j > i else "stay", f"cell-{i}-{j}"
                shade = 0.06 + 0.64 * math.sqrt(count / most)
                axes.add_patch(
                    patches.Rectangle((j - 0.495, i - 0.47), 0.99, 0.94, color=_KINDS[kind], alpha=shade, gid=name)
                )
                marks[name] = (kind, f"{count} relevant documents from ranks {labels[i]} to {labels[j]}")
                if count:
                    axes.annotate(str(count), (j, i), ha="center", va="center")
        axes.set_xlim(-0.5, max(size, 1) - 0.5)
        axes.set_ylim(max(size, 1) - 0.5, -0.5)
        axes.set_xticks(range(size), labels)
        axes.set_yticks(range(size), labels)
        axes.set_xlabel("rank after reranking")
        axes.set_ylabel("rank before")
    return svg()


_BESIDE = {"textcoords": "offset points", "parse_math": False}
"""Of labels: foreign text is no formula."""


def _shown(text: str) -> str:
    # The last two are no characters of XML.
    return re.sub("[\ufffe\uffff]", "\ufffd", printable(text, one_line=True))


@contextmanager
def _plot(height: float, label: str, marks: Marks) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Axes to draw on, and a function that gives the SVG once they are left.

    Nothing of matplotlib's state is read or kept: neither pyplot nor the user's settings.
    """
    style = import_extra("matplotlib.style", "eval")
    figures = import_extra("matplotlib.figure", "eval")
    found: list[str] = []
    # As text, a label is read in the fonts of the page.
    settings = {"svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif"}
    with style.context(["default", settings]), warnings.catch_warnings():
        # Of scripts that matplotlib's own font lacks, which the page's fonts have.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = figures.Figure(figsize=(_WIDTH, height), dpi=_POINTS)
        axes = figure.add_axes((0.07, 0.6 / height, 0.915, 1 - 0.8 / height))
        axes.spines[:].set_visible(False)
        axes.tick_params(left=False, bottom=False, which="both")
        yield axes, lambda: found[0]
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
        found.append(_inline(content.getvalue(), label, marks))


def _inline(svg: str, label: str, marks: Mapping[str, tuple[str, str]]) -> str:
    """An SVG file as a part of a page: without its head, with a tooltip for each mark."""

    def group(match: re.Match[str]) -> str:
        if match[1] not in marks:
            # matplotlib's own ids are the same in each plot of the page.
            return "<g>"
        kind, tooltip = marks[match[1]]
        return f'<g class="{kind}"><title>{escape(_shown(tooltip))}</title>'

    head, _, body = svg.partition("<svg ")[2].partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="([^"]*)">', group, body)
    start = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0] if box else ""} role="img"'
    return f'{start} aria-label="{escape(_shown(label))}">{body.strip()}'
