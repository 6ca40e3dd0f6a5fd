"""`rerank-plugins train`: a cross-encoder of your own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rerank_plugins._extras import import_extra
from rerank_plugins.cli._options import JudgedData, takes_options
from rerank_plugins.cli._screen import echo
from rerank_plugins.training import TrainSettings

if TYPE_CHECKING:
    from rerank_plugins.training import TrainedModel

__all__ = ["train"]


@takes_options(TrainSettings)
def train(
    data: JudgedData, out: Annotated[Path, typer.Option("--out", "-o", help="The model's directory.")], **chosen: Any
) -> None:
    """Fine-tune a cross-encoder on judged data.

    A run that was interrupted goes on where it stopped when it is started again. The best weights by nDCG@10 of
    held-out queries are kept, and a model card is written beside them.
    """
    from rerank_plugins import training
    from rerank_plugins.cli._progress import bar

    # No reports of weights between our own lines: a new head is no news.
    import_extra("transformers", "train").utils.logging.set_verbosity_error()
    with bar("Training") as tell:
        result = training.train(data, out, progress=tell, **chosen)
    run = result.result
    stopped = ", stopped early" if run.stopped_early else ""
    echo(f"{result.path}: {run.steps} steps, {run.pairs} pairs, {run.seconds:.0f} s{stopped}")
    _tell_quality(result, out)
    if result.ece_after is not None:
        echo(f"expected calibration error {result.ece_before:.4f}, calibrated {result.ece_after:.4f}")
    if result.conversion is not None:
        echo(
            f"safetensors against int8 ONNX on {result.conversion.pairs} pairs: Spearman correlation "
            f"{result.conversion.rank_correlation:.4f}, largest difference of logits "
            f"{result.conversion.max_difference:.3g}"
        )
    echo(f'Use it with Reranker("{result.path}"). The model card is {result.path / "README.md"}.')


def _tell_quality(result: TrainedModel, out: Path) -> None:
    """The measures, how many queries they rest on, and what they are to be compared with."""
    run, count = result.result, result.held_out
    if run.best is None:
        echo("Warning: no query was held out, so nothing was measured. Give more queries, or a split.", err=True)
        return
    echo(f"nDCG@10 of {count} held-out queries {run.measures[0]:.4f} at the start, {run.best:.4f} after training")
    if result.bundled is not None:
        echo(f"nDCG@10 of the bundled model on them {result.bundled:.4f}")
    if result.says_little:
        echo(
            f"Warning: {count} held-out quer{'y is' if count == 1 else 'ies are'} few, and chose the weights too: "
            'these figures say little. Hold out more with "split": "dev", or measure on other queries: rerank-plugins '
            f"evaluate DATA --model {out}",
            err=True,
        )
    if result.bundled is not None and not run.best > result.bundled:
        echo(
            "Warning: the bundled model is no worse on them. Use it as it is, or start from a better model with "
            "--trunk, or give more data or more time.",
            err=True,
        )
    elif not run.best > run.measures[0]:
        echo("Warning: training did not make the order better. Try more data or more time.", err=True)
