"""Command-line options that several commands take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from rerank_plugins.settings import Settings
from rerank_plugins.training.settings import flags_of
from rerank_plugins.types import BackendName, Precision, Scale, SpanUnit

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Hub id or local directory of a cross-encoder; the bundled English model if not given.",
    ),
]
Backend = Annotated[
    BackendName,
    typer.Option(help="The engine; auto takes the fastest one there is."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code of the model's repository. Read it first."),
]
Label = Annotated[
    str | None,
    typer.Option(help="Class to rank by, a name or a column, where a model has several: entailment."),
]
JudgedData = Annotated[
    list[Path],
    typer.Argument(
        help='Files of JSON lines {"query", "passage", "label"} or {"query", "positive", "negative"}, folders with '
        "pairs.jsonl, or BEIR folders."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output, and nothing else there.")]


def class_label(label: str | None) -> str | int | None:
    """The label as `Reranker` takes it: digits are a column."""
    return int(label) if label is not None and label.isdecimal() else label


_OF_RERANKER: dict[str, Any] = {
    "model": Model,
    "backend": Backend,
    "scale": Annotated[Scale, typer.Option(help="What a score means.")],
    "label": Label,
    "max_length": Annotated[int | None, typer.Option(min=1, help="Most tokens of a query and a text together.")],
    "precision": Annotated[Precision, typer.Option(help="Number format.")],
    "instruction": Annotated[str | None, typer.Option(help="Task description, for models that take one.")],
    "device": Annotated[str | None, typer.Option(help="torch device.")],
    "threads": Annotated[int | None, typer.Option(min=1, help="Threads to compute with; all cores if not given.")],
    "passage_length": Annotated[
        int | None, typer.Option(min=1, help="Score a long text in windows of this many tokens; the best one counts.")
    ],
    "spans": Annotated[
        SpanUnit | None, typer.Option(help="Tell which sentences of a text it was, each with its own score.")
    ],
    "revision": Revision,
    "trust_remote_code": TrustRemoteCode,
}
"""Options for keywords of `Reranker`, which has their defaults."""


def takes_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, in the place of ``**chosen``, options for keywords of `Reranker`, and it the chosen values."""
    defaults = {keyword.name: keyword.default for keyword in fields(Settings)}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            if "label" in names:
                given["label"] = class_label(given["label"])
            command(**given)

        return _with_options(run, command, [(name, defaults[name], _OF_RERANKER[name]) for name in names])

    return decorate


def takes_options(settings: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, in the place of ``**chosen``, an option for each keyword of some settings of training."""
    return lambda command: _with_options(command, command, _options(settings))


def _with_options(
    run: Callable[..., None], command: Callable[..., None], options: Sequence[tuple[str, Any, Any]]
) -> Callable[..., None]:
    """``run`` with the signature of a command and further options: name, default and annotation of each."""
    signature = inspect.signature(command, eval_str=True)
    own = [given for given in signature.parameters.values() if given.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, default, annotation in options
    ]
    run.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    return run


def _options(settings: type[Any]) -> list[tuple[str, Any, Any]]:
    """Name, default and annotation of each option."""
    hints = get_type_hints(settings)
    found = []
    for keyword in fields(settings):
        if keyword.metadata["help"] is None:
            continue
        hint: Any = hints[keyword.name]
        default: Any = keyword.default
        if get_origin(hint) is Sequence:
            hint, default = list[str], list(default)
        elif str in get_args(hint):
            # Of a model, its name.
            hint = str | None
        told = default is not None and default is not False and default != []
        option = typer.Option(
            *flags_of(keyword), help=keyword.metadata["help"], min=keyword.metadata["least"], show_default=told
        )
        found.append((keyword.name, default, Annotated[hint, option]))
    return found
