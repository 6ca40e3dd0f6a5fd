"""Prints the tables of the card from what the other steps measured.

python recipes/minilm_l6/card.py OUT/figures OUT/calibration.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from evaluate import SETS


def table(rows: Sequence[Sequence[object]]) -> str:
    """Markdown; the first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def main() -> None:
    """Prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--measure", default="nDCG@10")
    arguments = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in arguments.figures.glob("*.json")}
    found = {name: found[name] for name in SETS if name in found}
    columns = list(dict.fromkeys(column for figures in found.values() for column in figures if column[0] != "q"))
    rows: list[list[object]] = [["set", "queries, candidates", *columns]]
    for name, figures in found.items():
        values = [figures[column][arguments.measure] if column in figures else None for column in columns]
        best = max(value for value in values if value is not None)
        cells = ["" if value is None else f"**{value:.3f}**" if value == best else f"{value:.3f}" for value in values]
        rows.append([name, "{}, {}".format(*figures["queries, candidates"]), *cells])
    whole = [column for column in columns if all(column in figures for figures in found.values())]
    means = {
        column: sum(figures[column][arguments.measure] for figures in found.values()) / len(found) for column in whole
    }
    rows.append(["mean", "", *(f"{means[column]:.3f}" if column in means else "" for column in columns)])
    print(table(rows), end="\n\n")
    kinds = json.loads(arguments.calibration.read_text())["kinds"]
    print(table([["kind", *next(iter(kinds.values()))], *([name, *row.values()] for name, row in kinds.items())]))


if __name__ == "__main__":
    main()
