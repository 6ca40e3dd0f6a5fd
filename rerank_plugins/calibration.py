"""Logits as probabilities that mean something: an increasing map, fitted on judged pairs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rerank_plugins._paths import write_file
from rerank_plugins._printable import json_text, parse_json
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.selection import to_scale

__all__ = ["Calibration", "expected_calibration_error", "fit_calibration"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """An increasing map of logits, ``slope * logit + intercept``, under which the sigmoid is a probability.

    It changes what scores mean, never the order. `Reranker(calibration=...)` takes one, or the path of a saved one.

    Attributes:
        slope: Above 0.
        intercept: Any finite number.

    Raises:
        ConfigurationError: `slope` is not above 0, or one of them is no finite number.

    References:
        Platt, "Probabilistic Outputs for Support Vector Machines", 1999.
    """

    slope: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("slope", self.slope), ("intercept", self.intercept)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigurationError(f"The {name} of a calibration must be a finite number; got {value!r}.")
        if self.slope <= 0:
            raise ConfigurationError(
                f"The slope of a calibration must be above 0, or it turns the order; got {self.slope}."
            )

    def __call__(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Calibrated logits, float64, of the same shape."""
        return np.asarray(self.slope * np.asarray(logits, dtype=np.float64) + self.intercept, dtype=np.float64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a JSON object with ``slope`` and ``intercept``.

        Raises:
            ConfigurationError: The file cannot be written.
        """
        write_file(path, json_text(asdict(self)) + "\n")

    @classmethod
    def of(cls, value: Calibration | Mapping[str, Any] | str | os.PathLike[str]) -> Calibration:
        """One from a `Calibration`, from a mapping with ``slope`` and ``intercept``, or from a file that `save` wrote.

        Raises:
            ConfigurationError: It is none of these, or the file cannot be read.
        """
        if isinstance(value, Calibration):
            return value
        origin = "calibration"
        if isinstance(value, str | os.PathLike):
            origin = f"The calibration file {os.fspath(value)!r}"
            try:
                value = parse_json(Path(value).expanduser().read_bytes())
            except (OSError, ValueError) as error:
                raise ConfigurationError(
                    f"{origin} cannot be read: {error}. Make one with: rerank-plugins calibrate PAIRS --out OUT"
                ) from error
        if not isinstance(value, Mapping) or set(value) != {"slope", "intercept"}:
            raise ConfigurationError(
                f'{origin} must hold {{"slope": ..., "intercept": ...}} and no more; got {value!r}.'
            )
        return cls(**value)


def expected_calibration_error(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Mean distance between the predicted probability and the share of positives, over equally wide bins.

    Args:
        logits: Shape (n,).
        labels: 0 or 1, shape (n,).
        bins: Number of bins.

    Returns:
        From 0 (calibrated) to 1.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (https://arxiv.org/abs/1706.04599).
    """
    probabilities = to_scale(np.asarray(logits, dtype=np.float64), "probability")
    truth = np.asarray(labels, dtype=np.float64)
    bin_of = np.minimum((probabilities * bins).astype(int), bins - 1)
    error = 0.0
    for number in range(bins):
        inside = bin_of == number
        if inside.any():
            error += float(inside.mean()) * abs(float(probabilities[inside].mean()) - float(truth[inside].mean()))
    return error


def fit_calibration(
    logits: ArrayLike, labels: ArrayLike, weights: Sequence[float] | NDArray[Any] | None = None
) -> Calibration:
    """The calibration under which the sigmoid fits the labels best, by logistic regression.

    Args:
        logits: Raw logits, shape (n,).
        labels: From 0 to 1, shape (n,).
        weights: A weight for each, shape (n,); None weighs all the same.

    Raises:
        InputError: All labels are the same, or lengths differ.
    """
    x, y = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if not x.shape == y.shape == w.shape or x.ndim != 1:
        raise InputError(f"Expected one label and weight for each logit; got shapes {x.shape}, {y.shape}, {w.shape}.")
    if not len(x) or y.min() == y.max():
        raise InputError("Calibration needs both relevant and irrelevant pairs; all labels are the same.")
    centre, spread = float(x.mean()), float(x.std()) or 1.0
    design = np.stack([(x - centre) / spread, np.ones_like(x)], axis=1)
    beta = np.zeros(2)
    for _ in range(100):
        p = to_scale(design @ beta, "probability")
        gradient = design.T @ (w * (p - y)) + 1e-6 * beta
        hessian = (design * (w * p * (1 - p))[:, None]).T @ design + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        # Damped: far out, Newton's step overshoots.
        beta = beta - step * min(1.0, 4.0 / float(np.abs(step).max() + 1e-12))
        if float(np.abs(step).max()) < 1e-9:
            break
    # Where logits say nothing of the labels the slope can come out negative, which would turn the order.
    slope = max(float(beta[0]) / spread, 1e-3)
    return Calibration(slope, float(beta[1]) - slope * centre)
