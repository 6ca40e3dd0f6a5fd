"""The rule by which an engine is chosen for a model, and the copies that rerankers share."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rerank_plugins import models
from rerank_plugins._fork import fork_waits, with_a_team
from rerank_plugins.backends._files import ModelFiles
from rerank_plugins.backends.base import Backend, LocalBackend
from rerank_plugins.backends.checkpoint import Checkpoint
from rerank_plugins.backends.download import fetch_command, open_files, torch_files
from rerank_plugins.backends.weights import why_no_weights
from rerank_plugins.errors import ConfigurationError, MissingDependencyError, ModelLoadError, RerankError
from rerank_plugins.settings import Settings

__all__ = ["Choice", "choose", "fetch_weights", "load_backend", "open_checkpoint", "open_model", "open_weights"]

logger = logging.getLogger("rerank_plugins")

ENGINES = ("openvino", "onnx", "torch")
"""Modules of this package, each with ``plan`` and ``load``, in the order in which ``"auto"`` asks them on a CPU."""

_loaded: weakref.WeakValueDictionary[Settings, Backend] = weakref.WeakValueDictionary()
_loading: dict[Settings, threading.Lock] = {}
_registry_lock = threading.Lock()


def load_backend(settings: Settings) -> Backend:
    """Load a model, or return the copy that another reranker has loaded.

    ``backend="auto"`` takes the first of these that can run the model:

    1. torch on a GPU, where there are one, the ``torch`` extra, and weights for it;
    2. OpenVINO, where it is installed and the model has an ONNX graph that gives logits: its own, or one that
       ``rerank-plugins convert`` made of it earlier (graphs that are quantised dynamically are left to the next);
    3. ONNX Runtime, for the same graphs;
    4. torch on the CPU, where the ``torch`` extra and weights are there.

    An engine that cannot be imported, or cannot load the model, is passed over. If none is left, the error has the
    reason of each.

    Raises:
        ConfigurationError: The settings cannot be had together.
        MissingDependencyError: The backend was asked for by name and is not installed.
        ModelLoadError: The model is missing, incomplete or unreadable.
    """
    spec = settings.for_loading()
    with fork_waits():
        with _registry_lock:
            lock = _loading.setdefault(spec, threading.Lock())
        with lock:
            backend = _loaded.get(spec)
            if backend is None:
                backend = with_a_team(lambda: _load(spec))
                _loaded[spec] = backend
            return backend


def _engine(name: str) -> Any:
    return importlib.import_module(f"rerank_plugins.backends.{name}")


@dataclass
class Choice:
    """Which engines were asked for a model, and what each said.

    Attributes:
        checkpoint: The model.
        engine: The one that was chosen; None where none can run it.
        outcome: What it gave.
        refusals: What the others said, in the order in which they were asked.
    """

    checkpoint: Checkpoint
    engine: str | None = None
    outcome: Any = None
    refusals: dict[str, RerankError] = field(default_factory=dict)


def open_model(settings: Settings) -> Checkpoint:
    """What the files of a model say, the bundled one where none is named.

    Raises:
        ConfigurationError: `revision` beside a local directory.
        ModelLoadError: There is no such model, or a file of it is wrong.
    """
    if settings.model is None:
        return Checkpoint(ModelFiles(models.bundled_directory(), models.BUNDLED_NAME))
    return open_checkpoint(settings.model, revision=settings.revision)


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """What the files of a model say, a local directory's or the Hub's; for an adapter, with what it was trained on.

    Raises:
        ConfigurationError: `revision` beside a local directory.
        ModelLoadError: There is no such model, or a file of it is wrong.
    """
    files = open_files(model, revision=revision)
    checkpoint = Checkpoint(files)
    base = checkpoint.adapter_config.text("base_model_name_or_path")
    if base is None or checkpoint.config.values:
        return checkpoint
    try:
        return Checkpoint(files, Checkpoint(open_files(base)))
    except RerankError as error:
        raise ModelLoadError(f"{model!r} is an adapter of {base!r}, which is needed too. {error}") from error


def open_weights(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """As `open_checkpoint`, with all files on disk that PyTorch's libraries read.

    Args:
        model: A local directory or a Hub id.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Fetch the repository's Python files as well.

    Raises:
        ConfigurationError: `revision` beside a local directory.
        ModelLoadError: There is no such model, a file of it is wrong, or cannot be had.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    fetch_weights(checkpoint, trust_remote_code=trust_remote_code)
    return checkpoint


def fetch_weights(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> None:
    """Fetch all that PyTorch's libraries read of a model; see `open_weights`."""
    for part in (checkpoint, checkpoint.base):
        if part is not None:
            part.files.fetch(torch_files(part.files, code=trust_remote_code))


def choose(checkpoint: Checkpoint, settings: Settings, ask: Callable[[Any], Any]) -> Choice:
    """Ask the engines in turn until one can run a model.

    Args:
        checkpoint: The model.
        settings: What was asked for.
        ask: What to do with the module of an engine; raises a `RerankError` where that one cannot run the model.

    Raises:
        RerankError: What an engine says that was asked for by name.
    """
    choice = Choice(checkpoint)
    order: list[str] = [settings.backend]
    if settings.backend == "auto":
        order = [*ENGINES]
        # By the name that the package has for it, so that it can be told otherwise.
        from rerank_plugins import backends

        if settings.model is not None and backends._torch_on_gpu(settings.device):
            order = ["torch", *ENGINES[:-1]]
            logger.debug("%s: torch is asked first, for there is a GPU or device= names one", checkpoint.name)
    for name in order:
        try:
            choice.outcome = ask(_engine(name))
            choice.engine = name
            return choice
        except RerankError as error:
            if settings.backend != "auto":
                raise
            # Its traceback knows the frames that hold the model which is loaded next, and would keep it for ever.
            choice.refusals[name] = error.with_traceback(None)
            logger.debug("%s: %s cannot run it: %s", checkpoint.name, name, error)
    return choice


def _load(spec: Settings) -> Backend:
    if spec.is_address:
        # Here: what speaks HTTP is only loaded where a server is used.
        from rerank_plugins.backends.http import from_url

        return from_url(spec.model)
    if spec.model is None and spec.backend == "torch":
        raise ConfigurationError(
            "The bundled model is an ONNX graph: backend='torch' cannot load it. Use backend='auto', 'onnx' or "
            "'openvino', or name a checkpoint, e.g. Reranker('cross-encoder/ms-marco-MiniLM-L6-v2', backend='torch')."
        )
    checkpoint = open_model(spec)
    choice = choose(checkpoint, spec, lambda engine: engine.load(checkpoint, spec))
    if choice.engine is None:
        raise nothing_runs(choice, spec)
    backend: LocalBackend = choice.outcome
    passed = "".join(f"; not {name}: {_line(error)}" for name, error in choice.refusals.items())
    logger.info(
        "%s: loaded from %s on %s in %s%s",
        checkpoint.name,
        checkpoint.files.path,
        backend.name,
        backend.precision,
        passed,
    )
    return backend


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def nothing_runs(choice: Choice, settings: Settings) -> RerankError:
    """The error for a model that no engine can run: the reason of each, and the command that helps."""
    checkpoint = choice.checkpoint
    reasons = list(choice.refusals.items())
    if len({str(error) for _, error in reasons}) == 1:
        return reasons[0][1]
    # What says most comes first: what is wrong with the weights, or with the graph if there is one.
    graphs = any(name.endswith(".onnx") for name in checkpoint.files.names)
    reasons.sort(key=lambda item: (item[0] == "torch") == graphs)
    listing = "\n".join(f"  {name}: {error}" for name, error in reasons)
    kinds = {type(error) for _, error in reasons}
    kind = ConfigurationError if kinds == {ConfigurationError} else ModelLoadError
    remedy = _remedy(choice, settings)
    return kind(f"No engine can run {checkpoint.name!r}.\n{listing}" + (f"\n{remedy}" if remedy else ""))


def _remedy(choice: Choice, settings: Settings) -> str:
    """The one command that helps; empty where the reasons say it, or nothing does."""
    checkpoint = choice.checkpoint
    torch = choice.refusals.get("torch")
    if isinstance(torch, MissingDependencyError) and why_no_weights(checkpoint) is None:
        convert = "" if checkpoint.is_causal else "   or convert it elsewhere: rerank-plugins convert MODEL OUT"
        extra = "peft" if torch.name == "peft" else '"rerank-plugins[torch]"'
        return f"What helps: pip install {extra}{convert}"
    if checkpoint.files.partial is not None and why_no_weights(checkpoint) is not None:
        return f"What helps: {fetch_command(checkpoint.name, settings.revision)}"
    return ""


def _has_torch() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "sentence_transformers"))


def _torch_on_gpu(device: str | None) -> bool:
    if device is not None:
        return device.split(":")[0].lower() != "cpu"
    # Importing torch takes a second; a machine without any GPU driver need not pay it.
    if not _has_torch() or not _gpu_driver():
        return False
    try:
        return bool(_engine("torch").default_device() != "cpu")
    except RerankError:
        return False


def _gpu_driver() -> bool:
    if sys.platform != "linux":
        return True
    return any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg", "/dev/dri/render*"))
