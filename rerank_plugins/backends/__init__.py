"""Engines that turn (query, text) pairs into logits, and the rule by which one is chosen."""

from __future__ import annotations

import glob
import importlib.util
import sys
import threading
import weakref
from pathlib import Path

from rerank_plugins import models
from rerank_plugins.backends._files import ModelFiles, converted_directory, find_graph, resolve
from rerank_plugins.backends.base import Backend, LocalBackend, Pair, PairLogits, PairScorer, as_backend
from rerank_plugins.errors import ConfigurationError, ModelLoadError
from rerank_plugins.settings import Settings

__all__ = ["Backend", "LocalBackend", "Pair", "PairLogits", "PairScorer", "as_backend", "load_backend"]

_loaded: weakref.WeakValueDictionary[Settings, Backend] = weakref.WeakValueDictionary()
_loading: dict[Settings, threading.Lock] = {}
_registry_lock = threading.Lock()


def load_backend(settings: Settings) -> Backend:
    """Load a model, or return the copy that another reranker has loaded.

    ``backend="auto"`` decides in this order:

    1. torch, where a GPU and the ``torch`` extra are there (never for the bundled model, which is a graph);
    2. the model's ONNX graph (its own, or one that ``rerank-plugins convert`` made earlier), on OpenVINO where that
       is installed, otherwise on ONNX Runtime;
    3. torch on the CPU, where the ``torch`` extra is there;
    4. otherwise a `ModelLoadError` that says what to install.

    Raises:
        ConfigurationError: The settings cannot be had together.
        MissingDependencyError: The backend was asked for by name and is not installed.
        ModelLoadError: The model is missing, incomplete or unreadable.
    """
    spec = settings.for_loading()
    with _registry_lock:
        lock = _loading.setdefault(spec, threading.Lock())
    with lock:
        backend = _loaded.get(spec)
        if backend is None:
            backend = _load(spec)
            _loaded[spec] = backend
        return backend


def _load(spec: Settings) -> Backend:
    if spec.model is None:
        return _load_bundled(spec)
    if spec.backend == "torch" or (spec.backend == "auto" and _torch_on_gpu(spec.device)):
        return _load_torch(spec)
    files = resolve(spec.model, revision=spec.revision, torch=False, precision=spec.precision)
    graph = None if files.is_causal else find_graph(files.path, spec.precision)
    if graph is None and not files.is_causal and (converted := _find_converted(files)) is not None:
        files = ModelFiles(converted, files.name)
        graph = find_graph(files.path, spec.precision)
    if graph is not None:
        return _load_graph(spec, files, graph)
    if spec.backend != "auto":
        raise ModelLoadError(
            f"{spec.model!r} has no ONNX graph (onnx/model.onnx or model.onnx), which backend={spec.backend!r} needs. "
            + (
                "Causal language models run on backend='torch'."
                if files.is_causal
                else f"Make one with: rerank-plugins convert {spec.model} OUT   and use OUT, or take backend='torch'."
            )
        )
    if not _has_torch():
        raise ModelLoadError(
            f"{spec.model!r} has no ONNX graph, and PyTorch is not installed. "
            'Install it with: pip install "rerank-plugins[torch]"'
            + ("" if files.is_causal else "   or convert the model elsewhere: rerank-plugins convert MODEL OUT")
        )
    return _load_torch(spec)


def _load_bundled(spec: Settings) -> Backend:
    if spec.backend == "torch":
        raise ConfigurationError(
            "The bundled model is an ONNX graph: backend='torch' cannot load it. Use backend='auto', 'onnx' or "
            "'openvino', or name a checkpoint, e.g. Reranker('cross-encoder/ms-marco-MiniLM-L6-v2', backend='torch')."
        )
    files = ModelFiles(models.bundled_directory(), models.BUNDLED_NAME)
    graph = find_graph(files.path, "fp32")
    if graph is None:
        raise ModelLoadError(f"The installation is incomplete: {files.path} has no model.onnx. Reinstall the package.")
    return _load_graph(spec, files, graph)


def _load_graph(spec: Settings, files: ModelFiles, graph: Path) -> Backend:
    from rerank_plugins.backends._onnx import OnnxBackend, OpenVinoBackend

    if spec.device not in (None, "cpu", "CPU"):
        raise ConfigurationError(
            f"device={spec.device!r} needs the torch backend; ONNX graphs run on the CPU here. "
            "Use backend='torch', or leave device at None."
        )
    engine = spec.backend
    if engine == "auto":
        engine = "openvino" if importlib.util.find_spec("openvino") is not None else "onnx"
    if engine == "openvino":
        precision = spec.precision if spec.precision in ("auto", "bf16", "int8") else "fp32"
        if precision == "int8":
            # Rounded here, from the exact weights. A graph that was rounded elsewhere runs as it is.
            plain = find_graph(files.path, "fp32")
            graph, precision = (plain, "int8") if plain is not None else (graph, "fp32")
        return OpenVinoBackend(files, graph, precision=precision, threads=spec.threads)
    stored = files.config.get("rerank_plugins", {}).get("weights") or ("int8" if "int8" in graph.name else None)
    if spec.precision == "int8" and stored != "int8" and "quantized" not in graph.name:
        raise ModelLoadError(
            f"{files.name!r} has no int8 graph. Make one with: rerank-plugins convert {files.name} OUT --int8   or "
            "take backend='openvino', which needs none."
        )
    if spec.precision in ("bf16", "fp16") and "fp16" not in graph.name:
        raise ConfigurationError(
            f"precision={spec.precision!r} is not available on ONNX Runtime for this graph: "
            "use backend='openvino' or 'torch' for it, or precision='auto'."
        )
    return OnnxBackend(files, graph, threads=spec.threads)


def _load_torch(spec: Settings) -> Backend:
    from rerank_plugins.backends._torch import TorchBackend

    assert spec.model is not None
    files = resolve(
        spec.model, revision=spec.revision, torch=True, precision=spec.precision, code=spec.trust_remote_code
    )
    return TorchBackend(
        files,
        device=spec.device,
        precision=spec.precision,
        trust_remote_code=spec.trust_remote_code,
        threads=spec.threads,
    )


def _find_converted(files: ModelFiles) -> Path | None:
    directory = converted_directory(files)
    return directory if (directory / "model.onnx").is_file() else None


def _has_torch() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "sentence_transformers"))


def _torch_on_gpu(device: str | None) -> bool:
    if device is not None:
        return device.split(":")[0].lower() != "cpu"
    # Importing torch takes a second; a machine without any GPU driver need not pay it.
    if not _has_torch() or not _gpu_driver():
        return False
    from rerank_plugins.backends._torch import default_device

    return default_device() != "cpu"


def _gpu_driver() -> bool:
    if sys.platform != "linux":
        return True
    return any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg", "/dev/dri/render*"))
