"""The `rerank-plugins` command (extra ``cli``; the demo needs ``demo``)."""

from __future__ import annotations

import os
import sys

from rerank_plugins._extras import import_extra
from rerank_plugins.errors import MissingDependencyError

__all__ = ["main"]


def main() -> None:
    """Run the command line; the console script `rerank-plugins`, and ``python -m rerank_plugins``.

    Raises:
        SystemExit: Always: 0 for success, 2 for bad usage or input, 1 for everything else.
    """
    try:
        for module in ("typer", "rich"):
            import_extra(module, "cli")
    except MissingDependencyError:
        # The base install brings the command, since a console script belongs to no extra.
        sys.stderr.write('Error: the command rerank-plugins needs its extra: pip install "rerank-plugins[cli]"\n')
        raise SystemExit(1) from None
    # Before anything imports transformers or the Hub's client: one bar at a time, ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from rerank_plugins.cli._app import app
    from rerank_plugins.cli._screen import utf8

    utf8()
    app(prog_name="rerank-plugins")
