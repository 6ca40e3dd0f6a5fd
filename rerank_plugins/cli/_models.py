"""`rerank-plugins models`: the table of published cross-encoders."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from rerank_plugins._printable import json_text
from rerank_plugins.cli._options import Json
from rerank_plugins.cli._screen import Screen, styled, write_json
from rerank_plugins.models import BUNDLED_NAME, PublishedModel, published

__all__ = ["models"]


def models(as_json: Json = False) -> None:
    """List published cross-encoders, with the figures that their makers give.

    Any of them can be given as --model. Figures compare within one measure only.
    """
    if as_json:
        write_json(json_text([asdict(model) for model in published()], indent=2))
        return
    console, table = Screen(), _wide()
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if not console.is_terminal:
        console = Screen(width=needed)
    elif console.width < needed:
        table = _narrow()
    console.print(table)
    console.print(
        f"Without --model it is the bundled {BUNDLED_NAME}: English, one logit, no download. DL19: nDCG@10 on TREC "
        "DL 2019. MARCO: MRR@10 on MS MARCO dev. docs/s: on a V100. Figures are times 100 and compare within one "
        "measure only. --json has sources, backends and notes.",
        style="dim",
    )


def _wide() -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for name in ("model", "family", "languages", "head"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "DL19", "MARCO", "docs/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("own measure", no_wrap=True)
    table.add_column("licence", no_wrap=True)
    for model in published():
        table.add_row(
            model.id,
            model.family,
            model.languages,
            model.head,
            str(model.max_length),
            _number(model.ndcg_dl19),
            _number(model.mrr_msmarco),
            "" if model.docs_per_second is None else str(model.docs_per_second),
            _own(model),
            model.licence,
        )
    return table


def _narrow() -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("figures")
    for model in published():
        about = f"  {model.family}, {model.languages}, {model.head}, {model.max_length} tokens"
        figures = [
            f"DL19 {_number(model.ndcg_dl19)}" if model.ndcg_dl19 is not None else "",
            f"MARCO {_number(model.mrr_msmarco)}" if model.mrr_msmarco is not None else "",
            f"{model.docs_per_second} docs/s" if model.docs_per_second is not None else "",
            _own(model),
        ]
        name = styled(model.id).append("\n").append_text(styled(about, "dim"))
        table.add_row(name, ", ".join(filter(None, figures)))
    return table


def _own(model: PublishedModel) -> str:
    return "" if model.figure is None else f"{_number(model.figure)} {model.measure}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
