"""Progress bars, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from rerank_plugins.cli._screen import Screen, shown, styled

__all__ = ["bar", "spinner"]


@contextmanager
def bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """Show one bar while the body runs; nothing is left of it on a terminal, nor written where there is none.

    Args:
        title: Shown until the first report.

    Yields:
        A function that takes a line of news and the share done, 0 to 1.
    """
    console = Screen(err=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(shown(title, one_line=True), total=1.0)
        yield lambda news, share: progress.update(task, description=shown(news, one_line=True), completed=share)


def spinner(text: str) -> AbstractContextManager[Any]:
    """Show that something is being done while the body runs; nothing where there is no terminal."""
    console = Screen(err=True)
    return console.status(styled(text)) if console.is_terminal else nullcontext()
