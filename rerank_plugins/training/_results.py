"""Results of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rerank_plugins.calibration import Calibration
from rerank_plugins.conversion import ConversionReport

FEW_QUERIES = 50
"""Held-out queries below which a mean says little: the standard error of nDCG@10 is then about 0.05."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Outcome of `fit`.

    Attributes:
        steps: Optimiser steps taken.
        pairs: Pairs seen.
        seconds: Time spent, over all resumptions.
        measures: nDCG@10 of the dev queries at each evaluation, the first before training. The last one is of the mean
            of the best and the last weights, where time allowed it. Empty without dev queries.
        best: The best of `measures`, that of the model's weights; None without dev queries.
        stopped_early: Whether patience ran out before the budget.
    """

    steps: int
    pairs: int
    seconds: float
    measures: tuple[float, ...]
    best: float | None
    stopped_early: bool = False


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """Outcome of `train`.

    Attributes:
        path: The model's directory: safetensors for the torch backend, and ``onnx/`` for the others.
        result: Outcome of the training loop.
        ece_before: Expected calibration error of the raw logits on the dev pairs; None without dev pairs.
        ece_after: The same after calibration.
        calibration: Calibration in the model's last layer; None where nothing could be fitted.
        conversion: Report of the ONNX export; None without one.
        held_out: Number of dev queries, which the measures of `result` are means over.
        bundled: nDCG@10 of the bundled model on the same queries; None where nothing was held out.
    """

    path: Path
    result: TrainingResult
    ece_before: float | None = None
    ece_after: float | None = None
    calibration: Calibration | None = None
    conversion: ConversionReport | None = None
    held_out: int = 0
    bundled: float | None = None

    @property
    def says_little(self) -> bool:
        """Whether the held-out queries are so few that the measures may differ by hundredths on other ones."""
        return self.held_out < FEW_QUERIES


@dataclass(frozen=True, slots=True)
class TrainedRetriever:
    """Outcome of `train_retriever`.

    Attributes:
        path: The model's directory, as sentence-transformers saves and loads it.
        measures: ``"nDCG@10"`` and ``"MRR@10"`` of the dev queries, each before and after; empty without dev queries.
        steps: Optimiser steps of the run; the kept weights may be those of an earlier step.
        seconds: Time spent on training and its evaluations, over all resumptions.
    """

    path: Path
    measures: Mapping[str, tuple[float, float]]
    steps: int
    seconds: float
