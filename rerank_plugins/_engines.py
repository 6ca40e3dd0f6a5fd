"""The import of the native engines: quiet, and with one error for whatever goes wrong in it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

from rerank_plugins._extras import import_extra
from rerank_plugins._fork import fork_waits

__all__ = ["onnxruntime", "openvino"]

_lock = threading.Lock()


def onnxruntime() -> ModuleType:
    """ONNX Runtime, imported without its telemetry.

    Its import writes an identifier and events below ``~/.cache`` and looks up the address that collects them. What
    the caller imported before, or set ``ORT_DISABLE_TELEMETRY`` to, stays as it is.

    Raises:
        MissingDependencyError: It is not installed, or its import failed.
    """
    with fork_waits(), _lock, _without_onnxruntime_telemetry():
        return import_extra("onnxruntime")


def openvino() -> ModuleType:
    """OpenVINO, imported without its telemetry.

    Its import writes an identifier below the home directory (and fails where there is none), starts a process and
    looks up the address that collects events. What the caller imported before stays as it is.

    Raises:
        MissingDependencyError: It is not installed, or its import failed.
    """
    with fork_waits(), _lock, _without_openvino_telemetry():
        return import_extra("openvino", "openvino")


@contextlib.contextmanager
def _without_onnxruntime_telemetry() -> Iterator[None]:
    # Read once, by the library's constructor: a call after the import comes too late for the files.
    name = "ORT_DISABLE_TELEMETRY"
    if "onnxruntime" in sys.modules or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)


@contextlib.contextmanager
def _without_openvino_telemetry() -> Iterator[None]:
    # OpenVINO goes on without the package where it is not installed, and None makes its import say so.
    name = "openvino_telemetry"
    if "openvino" in sys.modules:
        yield
        return
    present = name in sys.modules
    kept = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if present:
            sys.modules[name] = kept  # type: ignore[assignment]
        else:
            sys.modules.pop(name, None)
