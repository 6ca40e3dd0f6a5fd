"""The application: its commands, and how errors are told."""

from __future__ import annotations

import errno
import math
import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from rerank_plugins import __version__
from rerank_plugins.cli import _screen
from rerank_plugins.cli._benchmark import benchmark
from rerank_plugins.cli._calibrate import calibrate
from rerank_plugins.cli._convert import convert
from rerank_plugins.cli._demo import demo
from rerank_plugins.cli._evaluate import evaluate
from rerank_plugins.cli._inspect import inspect
from rerank_plugins.cli._mine import mine
from rerank_plugins.cli._models import models
from rerank_plugins.cli._rank import rank
from rerank_plugins.cli._score import score, with_address
from rerank_plugins.cli._serve import serve
from rerank_plugins.cli._train import train
from rerank_plugins.cli._train_retriever import train_retriever
from rerank_plugins.errors import ConfigurationError, InputError, RerankError

__all__ = ["app", "in_options"]

_UsageError: Any = typer.BadParameter.__base__
"""click's: typer brings a click of its own in some versions, and does not export this one."""


@contextmanager
def _told(command: Any) -> Iterator[None]:
    """Errors end a command with a message and an exit code; warnings are a line on standard error."""
    with warnings.catch_warnings():
        warnings.showwarning = _screen.warning  # type: ignore[assignment]
        try:
            yield
        except _UsageError as error:
            # What was typed, such as a file name, is part of the message.
            error.message = _screen.shown(error.message)
            raise
        except RerankError as error:
            _screen.echo(f"Error: {in_options(str(error), command)}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigurationError | InputError) else 1) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            _screen.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from None


class _Command(TyperCommand):
    """A command whose numbers are finite, and whose errors name its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        found = super().parse_args(ctx, args)
        for option in self.params:
            value = ctx.params.get(str(option.name))
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"expected a finite number, got {value}.", ctx=ctx, param=option)  # type: ignore[arg-type]
        return found

    def invoke(self, ctx: Any) -> Any:
        with _told(self):
            return super().invoke(ctx)


class _ScoreCommand(_Command):
    """A command whose option ``--ray`` may stand without a value, which typer's options cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        return super().parse_args(ctx, with_address(args))


class _Group(TyperGroup):
    def make_context(self, info_name: str | None, args: list[str], *others: Any, **kwargs: Any) -> Any:
        given = list(args)
        with _told(self):
            context = super().make_context(info_name, args, *others, **kwargs)
        # For reports, which say how they were made.
        context.meta[_screen.COMMAND] = shlex.join(["rerank-plugins", *given])
        return context

    def invoke(self, ctx: Any) -> Any:
        with _told(self):
            return super().invoke(ctx)


def in_options(message: str, command: Any) -> str:
    """A message of the library in the words of the command line: ``--overwrite`` instead of ``overwrite=True``.

    Args:
        message: It names keywords as ``name=value``, as ``some_name``, or before "must", "is", "needs" or "belongs".
        command: Its parameters are the keywords that are translated.
    """
    for parameter in command.params:
        name, options = str(parameter.name), list(parameter.opts)
        if not options or not options[0].startswith("-"):
            continue
        shown = max(options, key=len)
        off = [*getattr(parameter, "secondary_opts", []), f"without {shown}"][0]
        word = rf"(?<![\w./\\-]){name}"
        message = re.sub(rf"{word}=True\b", shown, message)
        message = re.sub(rf"{word}=False\b", off, message)
        message = re.sub(rf"{word}=\.\.\.", shown, message)
        message = re.sub(rf"{word}=(?=['\"\w.-])", f"{shown} ", message)
        if "_" in name:
            message = re.sub(rf"{word}(?![\w./\\=])", shown, message)
        message = re.sub(rf"{word}(?= (?:must|is|needs|belongs)\b)", shown, message)
    return message


app = typer.Typer(
    cls=_Group,
    help="Cross-encoder reranking for LangChain and LlamaIndex: try it, use it, convert and train models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo,
    rank,
    score,
    models,
    inspect,
    evaluate,
    benchmark,
    calibrate,
    convert,
    mine,
    train,
    train_retriever,
    serve,
):
    app.command(cls=_ScoreCommand if command is score else _Command)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        _screen.echo(f"rerank-plugins {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass
