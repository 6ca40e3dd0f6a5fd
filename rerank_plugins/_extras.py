"""The one place that says what to ``pip install``."""

from __future__ import annotations

import importlib
from types import ModuleType

from rerank_plugins.errors import MissingDependencyError

__all__ = ["import_extra"]


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Dotted name of the module, e.g. ``"sentence_transformers"``.
        extra: The extra of this distribution that brings it, e.g. ``"torch"``.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: The module, or something that it needs, is not installed. The message carries
            the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"This feature needs {module!r}, which could not be imported ({error}). "
            f'Install it with: pip install "rerank-plugins[{extra}]"',
            name=module,
        ) from error
