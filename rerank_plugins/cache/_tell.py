"""What must be said without failing the request in which it is noticed, and without anybody's password."""

from __future__ import annotations

import logging
import warnings

from rerank_plugins._secrets import without_passwords

__all__ = ["tell"]


def tell(message: str) -> None:
    """Warn; where warnings are errors, log instead: a cache costs no result."""
    message = without_passwords(message)
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    except RuntimeWarning:
        logging.getLogger("rerank_plugins").warning("%s", message)
