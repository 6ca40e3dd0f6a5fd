"""int8 graphs: close to float32 whatever the activations look like, and the same on both engines."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import QUERY, TEXTS, tiny
from onnx import helper, numpy_helper

from rerank_plugins import Reranker
from rerank_plugins.backends import onnx_file, quantisation
from rerank_plugins.conversion import convert
from rerank_plugins.errors import ConfigurationError, ModelLoadError

N_IN, N_OUT, N_ROWS = 64, 96, 2000
ENGINES = ("onnx", "openvino")


def save(path: Path, nodes: list[Any], weights: dict[str, np.ndarray], *, n_in: int = N_IN, opset: int = 18) -> Path:
    """A graph from ``values`` (rows, n_in) to ``product`` (rows, N_OUT)."""
    ends = [("values", n_in), ("product", N_OUT)]
    source, result = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, size]) for name, size in ends)
    graph = helper.make_graph(
        nodes, "graph", [source], [result], [numpy_helper.from_array(value, name) for name, value in weights.items()]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), str(path))
    return path


def matmul(path: Path, weights: np.ndarray, **settings: int) -> Path:
    node = helper.make_node("MatMul", ["values", "weights"], ["product"])
    return save(path, [node], {"weights": weights}, **settings)


def run(engine: str, content: bytes, feed: dict[str, np.ndarray]) -> np.ndarray:
    if engine == "onnx":
        return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, feed)[0]
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return np.array(core.compile_model(core.read_model(io.BytesIO(content)), "CPU", settings)(feed)[0])


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N_ROWS, N_IN), dtype=np.float32)


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((N_IN, N_OUT), dtype=np.float32)


@pytest.fixture
def error(tmp_path: Path) -> Callable[..., float]:
    """Relative error of the rounded product on ONNX Runtime, after OpenVINO was seen to give the same."""

    def measure(values: np.ndarray, weights: np.ndarray, seen: np.ndarray | None = None) -> float:
        graph = matmul(tmp_path / "model.onnx", weights)
        content = quantisation.quantised(graph, [{"values": values if seen is None else seen}])
        exact = values @ weights
        found, other = (run(engine, content, {"values": values}) for engine in ENGINES)
        # All rows but those in which an activation lay in the middle of two steps.
        assert (np.abs(found - other).max(axis=1) > 1e-4 * np.abs(exact).max()).mean() < 0.005
        return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))

    return measure


def plan_of(values: np.ndarray, weights: np.ndarray) -> Any:
    found = quantisation._Range(values.min(axis=0), values.max(axis=0), np.square(values).mean(axis=0), len(values))
    return quantisation._plan(found, weights)


# How products are rounded.


def test_ordinary_activations_are_rounded_whole(
    error: Callable[..., float], values: np.ndarray, weights: np.ndarray
) -> None:
    assert not len(plan_of(values, weights).outliers)
    assert 1e-4 < error(values, weights) < 0.02


def test_channels_that_stand_out_are_kept(error: Callable[..., float], values: np.ndarray, weights: np.ndarray) -> None:
    # Once in a while, so that the rest matters: as the activations of feed-forward layers have it.
    seldom = np.arange(N_ROWS) % 500 == 0
    values[seldom, 7] = 100.0
    values[seldom, 40] = -100.0
    assert {7, 40} <= set(plan_of(values, weights).outliers.tolist())
    assert error(values[~seldom], weights, seen=values) < 0.02
    assert error(values[seldom], weights, seen=values) < 0.01


def test_a_channel_that_was_silent_may_speak(
    error: Callable[..., float], values: np.ndarray, weights: np.ndarray
) -> None:
    seen = values.copy()
    seen[:, 3] *= 0.001
    assert error(values, weights, seen=seen) < 0.03


def test_hopeless_products_keep_their_activations(
    error: Callable[..., float], values: np.ndarray, weights: np.ndarray
) -> None:
    values **= 7
    assert plan_of(values, weights) is None
    # Only the weights are stored in int8.
    assert 1e-4 < error(values, weights) < 0.01


def test_zero_stays_zero(tmp_path: Path, values: np.ndarray, weights: np.ndarray) -> None:
    content = quantisation.quantised(matmul(tmp_path / "model.onnx", weights), [{"values": np.abs(values) + 0.1}])
    for engine in ENGINES:
        assert not run(engine, content, {"values": np.zeros((3, N_IN), np.float32)}).any()


@pytest.mark.parametrize("seen", [np.ones, lambda shape: -np.ones(shape), np.zeros], ids=["above", "below", "zero"])
def test_activations_of_one_sign_or_none(seen: Callable[..., np.ndarray], tmp_path: Path, weights: np.ndarray) -> None:
    values = seen((N_ROWS, N_IN)).astype(np.float32)
    content = quantisation.quantised(matmul(tmp_path / "model.onnx", weights), [{"values": values}])
    exact = values[:5] @ weights
    for engine in ENGINES:
        found = run(engine, content, {"values": values[:5]})
        assert np.abs(found - exact).max() <= 0.02 * np.abs(exact).max()


# Integers, and the same ones everywhere.


def test_both_engines_multiply_integers(tmp_path: Path, values: np.ndarray, weights: np.ndarray) -> None:
    import openvino

    content = quantisation.quantised(matmul(tmp_path / "model.onnx", weights), [{"values": values}])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert "MatMulIntegerToFloat" in kinds
    assert "MatMul" not in kinds

    core = openvino.Core()
    model = core.read_model(io.BytesIO(content))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    infos = [{key: str(value.value) for key, value in op.get_rt_info().items()} for op in compiled.get_ops()]
    products = [info["runtimePrecision"] for info in infos if info.get("layerType") == "FullyConnected"]
    assert products == ["u8"]


def test_no_sum_of_two_products_leaves_16_bits(tmp_path: Path) -> None:
    # What processors without VNNI add up before they widen: bytes up to 255 times two neighbours.
    weights = np.abs(np.random.default_rng(2).standard_normal((N_IN, N_OUT), dtype=np.float32))
    weights[:, 0] = 1.0
    values = np.random.default_rng(3).uniform(0, 1, (N_ROWS, N_IN)).astype(np.float32)
    values[:50] = 1.0
    content = quantisation.quantised(matmul(tmp_path / "model.onnx", weights), [{"values": values}])
    stored = [numpy_helper.to_array(item) for item in onnx.load_from_string(content).graph.initializer]
    integers = next(item for item in stored if item.dtype == np.int8 and item.ndim == 2).astype(int)
    assert np.abs(integers[::2] + integers[1::2]).max() <= 128
    # Where neighbours allow it, all steps are used.
    assert np.abs(integers).max() > 100

    (tmp_path / "int8.onnx").write_bytes(content)
    np.save(tmp_path / "values.npy", values[:50])
    code = (
        "import sys, numpy as np, openvino as ov; path, values, out = sys.argv[1:]; "
        "np.save(out, ov.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})([np.load(values)])[0])"
    )
    names = [str(tmp_path / name) for name in ("int8.onnx", "values.npy", "found.npy")]
    subprocess.run([sys.executable, "-c", code, *names], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True)
    np.testing.assert_allclose(np.load(names[2]), run("openvino", content, {"values": values[:50]}), rtol=1e-6)
    np.testing.assert_allclose(np.load(names[2]), values[:50] @ weights, rtol=0.01)


def test_equal_input_makes_equal_bytes(tmp_path: Path, values: np.ndarray, weights: np.ndarray) -> None:
    graph = matmul(tmp_path / "model.onnx", weights)
    first, again = (quantisation.quantised(graph, [{"values": values}]) for _ in range(2))
    assert first == again
    # What is only a last digit of an engine's arithmetic does not show.
    assert quantisation.quantised(graph, [{"values": values * np.float32(1 + 1e-7)}]) == first
    assert quantisation.quantised(graph, [{"values": 2 * values}]) != first


# Graphs as exporters write them.


def gemm(path: Path, weights: np.ndarray) -> tuple[Path, np.ndarray]:
    bias = np.arange(N_OUT, dtype=np.float32)
    node = helper.make_node("Gemm", ["values", "weights", "bias"], ["product"], transB=1)
    return save(path, [node], {"weights": weights.T.copy(), "bias": bias}), bias


def transposed(path: Path, weights: np.ndarray) -> tuple[Path, np.ndarray]:
    nodes = [
        helper.make_node("Transpose", ["weights"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["values", "columns"], ["product"]),
    ]
    return save(path, nodes, {"weights": weights.T.copy()}), np.zeros(N_OUT, np.float32)


def old_operators(path: Path, weights: np.ndarray) -> tuple[Path, np.ndarray]:
    return matmul(path, weights, opset=11), np.zeros(N_OUT, np.float32)


def stored_weights(path: Path, weights: np.ndarray) -> tuple[Path, np.ndarray]:
    scale = (np.abs(weights).max(axis=0) / 127).astype(np.float32)
    integers = np.rint(weights / scale).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["integers", "scale"], ["floats"], axis=1),
        helper.make_node("MatMul", ["values", "floats"], ["product"]),
    ]
    return save(path, nodes, {"integers": integers, "scale": scale}), np.zeros(N_OUT, np.float32)


def beside_it(path: Path, weights: np.ndarray) -> tuple[Path, np.ndarray]:
    model = onnx.load(str(matmul(path, weights)))
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path, np.zeros(N_OUT, np.float32)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", [gemm, transposed, old_operators, stored_weights, beside_it])
def test_every_form_of_a_product(
    form: Callable[..., Any], engine: str, tmp_path: Path, values: np.ndarray, weights: np.ndarray
) -> None:
    graph, bias = form(tmp_path / "model.onnx", weights)
    content = quantisation.quantised(graph, [{"values": values}])
    (tmp_path / "int8.onnx").write_bytes(content)
    assert onnx_file.quantisation(tmp_path / "int8.onnx") == "static"
    exact = values @ weights + bias
    found = run(engine, content, {"values": values})
    assert 1e-4 < np.sqrt(np.mean((found - exact) ** 2) / np.mean((values @ weights) ** 2)) < 0.02
    # No float copy of the weights is left.
    floats = [item for item in onnx.load_from_string(content).graph.initializer if item.data_type == 1]
    assert max(np.prod(item.dims) for item in floats) <= N_OUT


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_two_products_share_are_stored_once(engine: str, tmp_path: Path, values: np.ndarray) -> None:
    weights = np.random.default_rng(1).standard_normal((N_OUT, N_OUT), dtype=np.float32) / 10
    values = np.random.default_rng(0).standard_normal((N_ROWS, N_OUT), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["values", "weights"], ["first"]),
        helper.make_node("MatMul", ["first", "weights"], ["product"]),
    ]
    graph = save(tmp_path / "model.onnx", nodes, {"weights": weights}, n_in=N_OUT)
    content = quantisation.quantised(graph, [{"values": values}])
    assert len(content) < 1.5 * weights.size
    found, exact = run(engine, content, {"values": values}), values @ weights @ weights
    assert np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)) < 0.03


@pytest.mark.parametrize("engine", ENGINES)
def test_tables_are_stored_as_integers(engine: str, tmp_path: Path, weights: np.ndarray) -> None:
    table = np.random.default_rng(4).standard_normal((500, N_IN), dtype=np.float32) * np.arange(1, 501)[:, None]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["product"]),
    ]
    graph = save(tmp_path / "model.onnx", nodes, {"table": table.astype(np.float32), "weights": weights})
    model = onnx.load(str(graph))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [None]))
    onnx.save(model, str(graph))
    ids = np.arange(500).repeat(3)
    content = quantisation.quantised(graph, [{"ids": ids}])
    found, exact = run(engine, content, {"ids": ids}), table[ids] @ weights
    assert np.abs(found - exact).max() < 0.03 * np.abs(exact).max()
    assert len(content) < 1.3 * (table.size + weights.size)


@pytest.mark.parametrize("engine", ENGINES)
def test_branches_keep_what_they_read(engine: str, tmp_path: Path, values: np.ndarray, weights: np.ndarray) -> None:
    result = helper.make_tensor_value_info("kept", onnx.TensorProto.FLOAT, [None, N_OUT])
    branches = [
        helper.make_graph([helper.make_node(kind, ["inner", "bias"], ["kept"])], kind, [], [result])
        for kind in ("Add", "Sub")
    ]
    nodes = [
        helper.make_node("MatMul", ["values", "weights"], ["inner"]),
        helper.make_node("If", ["yes"], ["product"], then_branch=branches[0], else_branch=branches[1]),
    ]
    bias = np.full(N_OUT, 3, np.float32)
    graph = save(tmp_path / "model.onnx", nodes, {"weights": weights, "bias": bias, "yes": np.array(True)})
    found = run(engine, quantisation.quantised(graph, [{"values": values}]), {"values": values})
    exact = values @ weights + bias
    assert 1e-4 < np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)) < 0.02


# Refusals.


def test_a_graph_without_products_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["values", "weights"], ["product"])
    graph = save(tmp_path / "model.onnx", [node], {"weights": np.ones(N_OUT, np.float32)}, n_in=N_OUT)
    with pytest.raises(ModelLoadError, match="no matrix product with float32 weights"):
        quantisation.quantised(graph, [{"values": np.ones((N_ROWS, N_OUT), np.float32)}])


def test_half_precision_is_refused(tmp_path: Path, weights: np.ndarray) -> None:
    nodes = [
        helper.make_node("Cast", ["values"], ["half"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half", "weights"], ["product16"]),
        helper.make_node("Cast", ["product16"], ["product"], to=onnx.TensorProto.FLOAT),
    ]
    graph = save(tmp_path / "model.onnx", nodes, {"weights": weights.astype(np.float16)})
    with pytest.raises(ModelLoadError, match="float32 weights"):
        quantisation.quantised(graph, [{"values": np.ones((N_ROWS, N_IN), np.float32)}])


def test_ranges_that_few_rows_showed_are_not_trusted(tmp_path: Path, values: np.ndarray, weights: np.ndarray) -> None:
    graph = matmul(tmp_path / "model.onnx", weights)
    with pytest.raises(ConfigurationError, match="too short: expected at least 1000 tokens in all, found 999"):
        quantisation.quantised(graph, [{"values": values[:500]}, {"values": values[:499]}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no calibration texts"),
        ('{"query": "a", "text": "b"}\nnonsense\n', r'Line 2 of .*expected .*"query".* found .nonsense'),
        ('{"query": "a"}\n', "Line 1"),
        ('{"query": "a", "text": "  "}\n', "Line 1"),
        ('["a", "b"]\n', "Line 1"),
    ],
)
def test_calibration_texts_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        quantisation.calibration_pairs(tmp_path / "texts.jsonl")


def test_calibration_texts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.jsonl cannot be read"):
        quantisation.calibration_pairs(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        convert(tiny("bert"), tmp_path / "out", int8=True, calibrate=tmp_path / "bytes.jsonl")
    with pytest.raises(ConfigurationError, match="int8=True"):
        convert(tiny("bert"), tmp_path / "out", calibrate=tmp_path / "bytes.jsonl")


def test_the_texts_of_the_package_are_short_and_of_many_kinds() -> None:
    pairs = quantisation.calibration_pairs()
    assert sum(len(query) + len(text) for query, text in pairs) < 13_000
    lengths = [len(text) for _, text in pairs]
    assert min(lengths) < 20
    assert max(lengths) > 700
    assert len({text for _, text in pairs}) == len(pairs) >= 40


# Whole models.


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("int8")
    texts = [{"query": f"what is {text[:20]}", "text": text * 3} for text in TEXTS] * 8
    (work / "texts.jsonl").write_text("\n".join(json.dumps(item) for item in texts), encoding="utf-8")
    convert(tiny("bert"), work / "float")
    convert(tiny("bert"), work / "int8", int8=True)
    convert(tiny("bert"), work / "own", int8=True, calibrate=work / "texts.jsonl")
    return {path.name: path for path in work.iterdir()}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stored_graph_and_one_made_while_loading_are_the_same(directories: dict[str, Path], engine: str) -> None:
    stored = Reranker(str(directories["int8"]), backend=engine)
    made = Reranker(str(directories["float"]), backend=engine, precision="int8")
    logits = stored.logits(QUERY, TEXTS)
    assert (made.logits(QUERY, TEXTS) == logits).all()
    assert stored.precision == made.precision == "int8"
    exact = Reranker(str(directories["float"]), backend=engine, precision="fp32").logits(QUERY, TEXTS)
    assert np.abs(logits - exact).max() > 1e-4
    assert np.corrcoef(logits, exact)[0, 1] > 0.99


def test_both_engines_score_alike_and_alone_as_together(directories: dict[str, Path]) -> None:
    rerankers = [Reranker(str(directories["int8"]), backend=engine) for engine in ENGINES]
    first, second = (reranker.logits(QUERY, TEXTS) for reranker in rerankers)
    assert np.abs(first - second).max() < 0.15
    assert np.corrcoef(first, second)[0, 1] > 0.999
    for reranker, together in zip(rerankers, (first, second), strict=True):
        alone = np.array([reranker.logits(QUERY, [text])[0] for text in TEXTS])
        assert np.abs(alone - together).max() < 0.02 * np.ptp(together)


def test_own_texts_make_other_scales(directories: dict[str, Path]) -> None:
    default, own = (onnx_file.read(directories[name] / "model.onnx") for name in ("int8", "own"))
    assert [node.op_type for node in default.graph.node].count("QuantizeLinear") > 0
    assert default.SerializeToString() != own.SerializeToString()
    logits = [Reranker(str(directories[name]), backend="onnx").logits(QUERY, TEXTS) for name in ("float", "own")]
    assert np.corrcoef(*logits)[0, 1] > 0.99


def test_what_was_made_while_loading_shows_in_the_fingerprint(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rerank_plugins.backends.load import load_backend
    from rerank_plugins.settings import Settings

    def fingerprint(precision: str) -> str:
        settings = Settings(model=str(directories["float"]), backend="onnx", precision=precision)  # type: ignore[arg-type]
        return str(load_backend(settings).fingerprint)

    exact, rounded = fingerprint("fp32"), fingerprint("int8")
    pairs = quantisation.calibration_pairs()
    monkeypatch.setattr(quantisation, "calibration_pairs", lambda: pairs[10:])
    assert len({exact, rounded, fingerprint("int8")}) == 3


def test_the_command_takes_texts(directories: dict[str, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from rerank_plugins.cli._app import app

    call = ["convert", tiny("bert"), str(tmp_path / "out"), "--int8", "--calibrate", str(directories["texts.jsonl"])]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (directories["own"] / "model.onnx").read_bytes()


# What a graph says of itself.


def graph_of(path: Path, *nodes: Any, **weights: np.ndarray) -> Path:
    return save(path, list(nodes), weights, n_in=N_OUT)


ROUND = helper.make_node("QuantizeLinear", ["values", "step", "zero"], ["integers"])
BACK = helper.make_node("DequantizeLinear", ["integers", "step", "zero"], ["product"])
ZERO = np.array(0, np.uint8)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([helper.make_node("Relu", ["values"], ["product"])], None),
        ([ROUND, BACK], "static"),
        (
            [
                helper.make_node("DynamicQuantizeLinear", ["values"], ["integers", "step_", "zero_"]),
                helper.make_node("DequantizeLinear", ["integers", "step_", "zero_"], ["product"]),
            ],
            "dynamic",
        ),
        (
            [
                helper.make_node("ReduceMax", ["values"], ["largest"], keepdims=0),
                helper.make_node("QuantizeLinear", ["values", "largest", "zero"], ["integers"]),
                helper.make_node("DequantizeLinear", ["integers", "largest", "zero"], ["product"]),
            ],
            "dynamic",
        ),
        (
            [
                helper.make_node("Identity", ["step"], ["same"]),
                helper.make_node("QuantizeLinear", ["values", "same", "zero"], ["integers"]),
                helper.make_node("DequantizeLinear", ["integers", "same", "zero"], ["product"]),
            ],
            "static",
        ),
        (
            [
                helper.make_node("DequantizeLinear", ["zero", "step", "zero"], ["weight"]),
                helper.make_node("Add", ["values", "weight"], ["product"]),
            ],
            "weights",
        ),
    ],
    ids=["float", "static", "dynamic", "scale of the batch", "constant by a detour", "weights"],
)
def test_how_a_graph_is_quantised_is_read_from_what_it_computes(
    nodes: list[Any], expected: str | None, tmp_path: Path
) -> None:
    graph = graph_of(tmp_path / "model.onnx", *nodes, step=np.array(0.5, np.float32), zero=ZERO)
    assert onnx_file.quantisation(graph) == expected
    # Old exporters list weights among the inputs.
    model = onnx.load(str(graph))
    model.graph.input.append(helper.make_tensor_value_info("step", onnx.TensorProto.FLOAT, []))
    onnx.save(model, str(graph))
    assert onnx_file.quantisation(graph) == expected


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x08\x08"])
def test_what_is_no_graph_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelLoadError, match="no ONNX graph"):
        onnx_file.quantisation(tmp_path / "model.onnx")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        onnx_file.read(tmp_path / "none.onnx")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int8, np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("raw", [True, False])
def test_tensors_of_every_type_and_way_of_storing(dtype: Any, raw: bool, tmp_path: Path) -> None:
    values = np.array([[1, 2, 3], [4, 5, 6]], dtype)
    item = numpy_helper.from_array(values, "x")
    if not raw:
        item = helper.make_tensor("x", item.data_type, values.shape, values.ravel())
    graph = save(tmp_path / "model.onnx", [helper.make_node("Relu", ["values"], ["product"])], {}, n_in=N_OUT)
    model = onnx.load(str(graph))
    model.graph.initializer.append(item)
    onnx.save(model, str(graph))
    (found,) = onnx_file.read(graph).graph.initializer
    assert (onnx_file.array(found, tmp_path) == values).all()
    assert numpy_helper.to_array(
        onnx.TensorProto.FromString(onnx_file.tensor("y", values).SerializeToString())
    ).tolist() == (values.tolist())
