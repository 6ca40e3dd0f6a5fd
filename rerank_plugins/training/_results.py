"""What training gives back."""

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
    """How a run of `fit` went.

    Attributes:
        steps: Optimiser steps taken.
        pairs: Pairs seen.
        seconds: Time spent, over all resumptions.
        measures: nDCG@10 of the dev queries at each evaluation: the first before any training, the last of the mean of
            the best and the last weights, if there was time for that; empty without dev queries.
        best: The best of them, whose weights are in the model; None without dev queries.
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
    """What `train` made.

    Attributes:
        path: The model's directory: safetensors for the torch backend, and ``onnx/`` for the others.
        result: How the training went.
        ece_before: Expected calibration error of the raw logits on the dev pairs; None without dev pairs.
        ece_after: The same after calibration.
        calibration: What became part of the model's last layer; None where nothing could be fitted.
        conversion: What `convert` says of the ONNX graph; None if none was asked for.
        held_out: How many held-out queries the measures of `result` rest on.
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
    """What `train_retriever` made.

    Attributes:
        path: The model's directory, as sentence-transformers saves and loads it.
        measures: ``"nDCG@10"`` and ``"MRR@10"`` of the dev queries, each before and after; empty without dev queries.
        steps: Optimiser steps of the run; the weights that are kept may be those of an earlier one.
        seconds: Time spent on training and its evaluations, over all resumptions.
    """

    path: Path
    measures: Mapping[str, tuple[float, float]]
    steps: int
    seconds: float
