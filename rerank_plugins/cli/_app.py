"""The application: its commands, and how errors are told."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rerank_plugins import __version__
from rerank_plugins.cli._benchmark import benchmark
from rerank_plugins.cli._calibrate import calibrate
from rerank_plugins.cli._convert import convert
from rerank_plugins.cli._demo import demo
from rerank_plugins.cli._evaluate import evaluate
from rerank_plugins.cli._mine import mine
from rerank_plugins.cli._models import models
from rerank_plugins.cli._rank import rank
from rerank_plugins.cli._train import train
from rerank_plugins.cli._train_retriever import train_retriever
from rerank_plugins.errors import ConfigurationError, InputError, RerankError

__all__ = ["app"]


class _Group(TyperGroup):
    """A group whose commands end with a message and an exit code where they raise a `RerankError`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RerankError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigurationError | InputError) else 1) from None


app = typer.Typer(
    cls=_Group,
    help="Cross-encoder reranking for LangChain and LlamaIndex: try it, use it, convert and train models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, rank, models, evaluate, benchmark, calibrate, convert, mine, train, train_retriever):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rerank-plugins {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass
