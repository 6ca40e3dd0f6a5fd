"""All that commands show goes through here: foreign texts can neither drive the terminal nor be read as markup."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from rerank_plugins._printable import printable
from rerank_plugins._secrets import without_passwords

__all__ = ["COMMAND", "Screen", "echo", "shown", "styled", "write_json"]

COMMAND = "rerank_plugins.command"
"""Where a context keeps the command line, in its ``meta``."""


def shown(text: str, *, one_line: bool = False) -> str:
    """A text as it may be shown: control characters visible, passwords of URLs not."""
    return printable(without_passwords(text), one_line=one_line)


def echo(text: str, *, err: bool = False) -> None:
    """Write a line to standard output, or to standard error."""
    typer.echo(shown(text), err=err)


def write_json(line: str) -> None:
    """Write JSON that `json_text` made, as it is and in UTF-8, to standard output."""
    typer.echo(line.encode())


def styled(text: str, style: str = "") -> Text:
    """A text for a table or a line of rich."""
    return Text(shown(text), style=style)


class Screen(Console):
    """rich's console, where strings are texts: neither markup nor emoji codes, and no control characters.

    Args:
        err: Write to standard error.
        width: Columns; None takes the terminal's.
    """

    def __init__(self, *, err: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=err, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed or stands in a table comes through here."""
        return super().render_str(shown(text), **{**options, "markup": False, "emoji": False})


def warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """In place of `warnings.showwarning`: the message alone, on standard error."""
    echo(f"Warning: {message}", err=True)


def utf8() -> None:
    """Write UTF-8 whatever the locale: an ASCII terminal must not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
