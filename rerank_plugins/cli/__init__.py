"""The `rerank-plugins` command (extra ``cli``; the demo needs ``demo``)."""

from __future__ import annotations

import sys

from rerank_plugins._extras import import_extra
from rerank_plugins.errors import MissingDependencyError

__all__ = ["main"]


def main() -> None:
    """Run the command line; the console script `rerank-plugins`.

    Raises:
        SystemExit: Always: 0 for success, 2 for bad usage or input, 1 for everything else.
    """
    try:
        for module in ("typer", "rich", "platformdirs"):
            import_extra(module, "cli")
    except MissingDependencyError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(1) from None
    from rerank_plugins.cli._app import app

    app(prog_name="rerank-plugins")
