"""The one place that says what to ``pip install``."""

from __future__ import annotations

import importlib
from types import ModuleType

from rerank_plugins.errors import MissingDependencyError

__all__ = ["import_extra"]


def import_extra(module: str, extra: str | None = None) -> ModuleType:
    """Import a dependency that may be missing or broken.

    Args:
        module: Dotted name of the module, e.g. ``"sentence_transformers"``.
        extra: The extra of this distribution that brings it, e.g. ``"torch"``; None for what the base install brings.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: The module, or something that it needs, is not installed, or its import failed in
            whatever way. The message carries the command that installs it.
    """
    name = f'"rerank-plugins[{extra}]"' if extra else "rerank-plugins"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"This feature needs {module!r}, which could not be imported ({error}). "
            f"Install it with: pip install {name}",
            name=module,
        ) from error
    except Exception as error:
        # Shared libraries, a home directory or a working directory that is not there, another version's data.
        raise MissingDependencyError(
            f"This feature needs {module!r}, which is installed, but its import failed "
            f"({type(error).__name__}: {error}). Correct that, or install it anew: "
            f"pip install --force-reinstall {name}",
            name=module,
        ) from error
