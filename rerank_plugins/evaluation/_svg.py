"""Plots as SVG text, for a report that opens without a network or a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as _escape

from rerank_plugins._printable import printable
from rerank_plugins.evaluation.wording import value_text

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56a0d3")
"""Colours that stay apart for colour-blind readers (after Okabe and Ito)."""


WIDTH = 960
"""Of a plot, in its own units: about a pixel each on a wide screen."""


def escape(text: str) -> str:
    """A text that is neither markup nor able to reorder what stands beside it."""
    return _escape(printable(text, one_line=True))


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
    width, height, left, right, top, bottom = WIDTH, 340, 58, 20, 16, 44
    ends = [first, ceiling, *(value for p in points for value in (p.y, p.low, p.high) if value is not None)]
    margin = 0.06 * (max(ends) - min(ends) or 1.0)
    y_low, y_high = max(0.0, min(ends) - margin), max(ends) + margin
    times = [max(p.x, 1e-3) for p in points]
    x_low, x_high = math.floor(math.log10(min(times) / 1.5)), math.ceil(math.log10(max(times) * 1.5))

    def x_at(value: float) -> float:
        return left + (math.log10(max(value, 1e-3)) - x_low) / (x_high - x_low) * (width - left - right)

    def y_at(value: float) -> float:
        return top + (y_high - value) / (y_high - y_low) * (height - top - bottom)

    parts = []
    for power in range(x_low, x_high + 1):
        x = x_at(10.0**power)
        parts.append(_line(x, top, x, height - bottom, "grid"))
        parts.append(_text(x, height - bottom + 16, f"{10.0**power:g}", "middle"))
    for step in range(5):
        value = y_low + (y_high - y_low) * step / 4
        parts.append(_line(left, y_at(value), width - right, y_at(value), "grid"))
        parts.append(_text(left - 6, y_at(value) + 4, f"{value:.3f}", "end"))
    for value, label, style in ((first, "first stage", "first"), (ceiling, "ceiling of the candidates", "ceiling")):
        parts.append(_line(left, y_at(value), width - right, y_at(value), style))
        parts.append(_text(left + 6, y_at(value) - 5, label, "start"))
    label_y = -math.inf
    for place, p in sorted(enumerate(points), key=lambda item: -item[1].y):
        colour, x, y = COLOURS[place % len(COLOURS)], x_at(p.x), y_at(p.y)
        if p.low is not None and p.high is not None:
            parts.append(
                f'<line x1="{x:.1f}" y1="{y_at(p.low):.1f}" x2="{x:.1f}" y2="{y_at(p.high):.1f}" '
                f'stroke="{colour}" stroke-width="2" opacity="0.6"/>'
            )
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" stroke="{colour}" stroke-width="2" '
            f'fill="{"none" if p.earlier else colour}"><title>{escape(p.name)}: {value_text(p.y)}, {p.x:.3g} ms'
            f"{' (timed by an earlier run)' if p.earlier else ''}</title></circle>"
        )
        # Labels of models that lie close together are pushed apart.
        label_y = max(y + 4, label_y + 14)
        to_left = x > width * 0.6
        name = p.name if len(p.name) <= 60 else f"{p.name[:40]}…{p.name[-16:]}"
        parts.append(_text(x - 10 if to_left else x + 10, label_y, name, "end" if to_left else "start"))
    parts.append(_text((left + width - right) / 2, height - 8, "median time of a query in ms", "middle"))
    return _svg(width, height, f"{measure} against latency", parts)


def gains_plot(changes: Sequence[tuple[str, float]], measure: str) -> str:
    """A bar for each query, largest gain first: above the line better, below it worse.

    Args:
        changes: Query texts and differences.
        measure: What changed.
    """
    width, height, left, top, bottom = WIDTH, 240, 58, 12, 30
    ordered = sorted(changes, key=lambda item: -item[1])
    limit = max((abs(change) for _, change in ordered), default=0.0) or 1.0
    middle = top + (height - top - bottom) / 2
    scale = (height - top - bottom) / 2 / limit
    step = (width - left - 10) / max(len(ordered), 1)
    parts = []
    for value in (limit, 0.0, -limit):
        y = middle - value * scale
        parts.append(_line(left, y, width - 10, y, "axis" if value == 0 else "grid"))
        parts.append(_text(left - 6, y + 4, f"{value:+.2f}" if value else "0", "end"))
    for place, (query, change) in enumerate(ordered):
        size = abs(change) * scale
        # A query that stayed is a dot of a bar, so that it can be pointed at.
        y, size = (middle - size, size) if change > 0 else (middle, size)
        parts.append(
            f'<rect x="{left + place * step:.2f}" y="{y:.2f}" width="{max(step * 0.85, 0.4):.2f}" '
            f'height="{max(size, 0.8):.2f}" class="{"gain" if change > 0 else "loss" if change < 0 else "stay"}">'
            f"<title>{change:+.3f} {escape(query[:200])}</title></rect>"
        )
    caption = f"difference of {measure} by query, {len(ordered)} queries"
    parts.append(_text((left + width) / 2, height - 8, caption, "middle"))
    return _svg(width, height, caption, parts)


def moves_plot(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """How many documents went from one range of ranks (rows) to another (columns); above the diagonal is down.

    Args:
        counts: Shape (n, n): from, to.
        labels: The ranges of ranks.
    """
    left, top, cell_h = 104, 42, 30
    cell_w = (WIDTH - left - 10) / len(labels) if labels else 0.0
    width, height = left + cell_w * len(labels) + 10, top + cell_h * len(labels) + 8
    most = max((max(row) for row in counts), default=0) or 1
    parts = [_text(left + cell_w * len(labels) / 2, 14, "rank after reranking", "middle")]
    parts.append(_text(left - 8, 34, "rank before", "end"))
    parts += [_text(left + cell_w * (i + 0.5), 34, label, "middle") for i, label in enumerate(labels)]
    for i, row in enumerate(counts):
        parts.append(_text(left - 8, top + cell_h * (i + 0.65), labels[i], "end"))
        for j, count in enumerate(row):
            kind = "gain" if j < i else "loss" if j > i else "stay"
            x, y = left + cell_w * j, top + cell_h * i
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{cell_w - 2:.1f}" height="{cell_h - 2}" class="{kind}" '
                f'opacity="{0.06 + 0.64 * math.sqrt(count / most):.3f}"><title>{count} relevant documents from ranks '
                f"{escape(labels[i])} to {escape(labels[j])}</title></rect>"
            )
            if count:
                parts.append(_text(x + cell_w / 2 - 1, y + cell_h * 0.62, str(count), "middle"))
    return _svg(width, height, "ranks of relevant documents before and after reranking", parts)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
