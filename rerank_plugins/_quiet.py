"""No progress bars of other libraries: this package shows progress where it is asked to, and only then."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["no_progress_bars"]

_lock = threading.Lock()
_inside = 0
_shown_before = False


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from showing bars, such as "Loading weights", while the body runs, in any thread.

    transformers has one switch for the process; it is as it was when the last body has ended. Usable as a decorator.
    """
    global _inside, _shown_before
    try:
        from transformers.utils import logging
    except ImportError:
        # Who needs it will say so; nobody else shows bars.
        yield
        return

    with _lock:
        if not _inside:
            _shown_before = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _shown_before:
                logging.enable_progress_bar()
