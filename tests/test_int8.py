"""Products of int8 on OpenVINO: close to float32 whatever the activations look like."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rerank_plugins.backends import _int8
from rerank_plugins.errors import ModelLoadError

N_IN, N_OUT, N_ROWS = 64, 96, 2000


def product(weights: np.ndarray) -> tuple[Any, Any]:
    """A graph of one matrix product, and what compiles it."""
    import openvino as ov
    import openvino.opset13 as opset

    values = opset.parameter([-1, N_IN], np.float32, name="values")
    matrix = opset.constant(np.ascontiguousarray(weights.T))
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    return ov.Model([opset.matmul(values, matrix, False, True)], [values]), lambda part: core.compile_model(
        part, "CPU", settings
    )


def error(values: np.ndarray, weights: np.ndarray, seen: np.ndarray | None = None) -> float:
    """Relative error of the rounded product."""
    model, compile_ = product(weights)
    _int8.quantise(model, [{"values": values if seen is None else seen}], compile_)
    exact = values @ weights
    found = compile_(model)([values])[0]
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N_ROWS, N_IN), dtype=np.float32)


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((N_IN, N_OUT), dtype=np.float32)


def plan_of(values: np.ndarray, weights: np.ndarray) -> Any:
    return _int8._plan(values.min(axis=0), values.max(axis=0), np.square(values).mean(axis=0), weights, 1.0)


def test_ordinary_activations_are_rounded_whole(values: np.ndarray, weights: np.ndarray) -> None:
    assert not len(plan_of(values, weights).outliers)
    assert 1e-4 < error(values, weights) < 0.02


def test_channels_that_stand_out_are_kept(values: np.ndarray, weights: np.ndarray) -> None:
    # Once in a while, so that the rest matters: as the activations of feed-forward layers have it.
    seldom = np.arange(N_ROWS) % 500 == 0
    values[seldom, 7] = 100.0
    values[seldom, 40] = -100.0
    assert {7, 40} <= set(plan_of(values, weights).outliers.tolist())
    assert error(values[~seldom], weights, seen=values) < 0.02
    assert error(values[seldom], weights, seen=values) < 0.01


def test_a_channel_that_was_silent_may_speak(values: np.ndarray, weights: np.ndarray) -> None:
    seen = values.copy()
    seen[:, 3] *= 0.001
    assert error(values, weights, seen=seen) < 0.03


def test_ranges_that_few_rows_showed_are_not_trusted(values: np.ndarray, weights: np.ndarray) -> None:
    assert error(values, weights, seen=values[: _int8.FEWEST_ROWS - 1]) < 1e-6


def test_hopeless_products_stay(values: np.ndarray, weights: np.ndarray) -> None:
    values **= 7
    assert plan_of(values, weights) is None
    assert error(values, weights) < 1e-6


def test_a_graph_without_products_is_refused() -> None:
    model, compile_ = product(np.ones((N_IN, 2), np.float32))
    with pytest.raises(ModelLoadError, match="no matrix product"):
        _int8.quantise(model, [], compile_)
