"""Command-line options that several commands take."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Hub id or local directory of a cross-encoder; the bundled English model if not given.",
    ),
]
Backend = Annotated[
    Literal["auto", "onnx", "openvino", "torch"],
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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output, and nothing else there.")]


def class_label(label: str | None) -> str | int | None:
    """The label as `Reranker` takes it: digits are a column."""
    return int(label) if label is not None and label.isdecimal() else label
