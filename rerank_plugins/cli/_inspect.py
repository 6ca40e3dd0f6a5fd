"""`rerank-plugins inspect`: what a model's files say, which engines can run it, and which one would be taken."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Annotated, Any

import typer

from rerank_plugins.cli._options import Json, takes_settings
from rerank_plugins.cli._screen import echo, write_json

__all__ = ["inspect"]


@takes_settings("precision", "revision", "trust_remote_code")
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id or local directory of a cross-encoder; the bundled English model if not given."),
    ] = None,
    as_json: Json = False,
    **chosen: Any,
) -> None:
    """Show what is known of a model before it is loaded, and how --model MODEL would run here.

    Of a model on the Hub, settings and ONNX graphs are downloaded, but no weights for PyTorch.
    """
    from rerank_plugins._printable import json_text
    from rerank_plugins.settings import Settings

    facts, engines, taken = _look(Settings(model, **chosen))
    if as_json:
        write_json(json_text({**facts, "engines": engines, "auto": taken}, indent=2))
        return
    width = max(len(name) for name in facts) + 1
    for name, value in facts.items():
        first, *others = value if isinstance(value, list) else [value]
        echo(f"{name + ':':<{width}} {first}")
        for other in others:
            echo(f"{'':<{width}} {other}")
    echo("")
    for name, outcome in engines.items():
        echo(f"{name + ':':<{width}} {outcome}")
    echo("")
    echo(f'backend="auto" takes {taken}.' if taken else 'backend="auto" finds no engine that can run it.')


def _look(settings: Any) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """What a model says and holds, what each engine says of it, and which one would be taken."""
    from rerank_plugins.backends.load import ENGINES, choose, open_model
    from rerank_plugins.errors import RerankError

    checkpoint = open_model(settings)
    engines: dict[str, str] = {}
    for name in ENGINES:
        asked = replace(settings, backend=name)
        try:
            engines[name] = _would(choose(checkpoint, asked, functools.partial(_plan, checkpoint, asked)))
        except RerankError as error:
            engines[name] = f"no: {' '.join(str(error).split())}"
    choice = choose(checkpoint, settings, functools.partial(_plan, checkpoint, settings))
    return _facts(checkpoint), engines, choice.engine


def _plan(checkpoint: Any, settings: Any, engine: Any) -> Any:
    return engine.plan(checkpoint, settings)


def _would(choice: Any) -> str:
    _, graph, precision = choice.outcome
    what = "the weights" if graph is None else f"{graph.name}, stored as {graph.kind}"
    return f"yes: {what}, in {precision}"


def _facts(checkpoint: Any) -> dict[str, Any]:
    from rerank_plugins.backends.weights import tensors, weight_names, why_no_weights
    from rerank_plugins.errors import RerankError

    files = checkpoint.files
    names = weight_names(checkpoint)
    there = [name for name in names if files.there(name)]
    try:
        known = f"{len(tensors(checkpoint))} tensors" if there == names else "on the Hub"
        weights = f"{', '.join(names)} ({known})" if why_no_weights(checkpoint) is None else "none for PyTorch"
    except RerankError as error:
        weights = str(error)
    labels = checkpoint.labels
    facts = {
        "model": checkpoint.name,
        "files": str(files.path),
        "family": ", ".join(part for part in (checkpoint.model_type, checkpoint.architecture) if part) or "not told",
        "classes": "not told" if labels is None else f"{len(labels)}: {', '.join(labels[:20])}",
        "weights": weights,
        "graphs": _graphs(files) or "none",
        "tokenizer": "tokenizer.json" if checkpoint.folder_has("tokenizer.json") else "no tokenizer.json",
        "tokens": f"{checkpoint.limit()} at most",
        "prompt": _prompt(checkpoint),
        "code": "brings Python code of its own" if checkpoint.remote_code else "none of its own",
    }
    if checkpoint.adapter_config.values:
        facts["adapter of"] = checkpoint.adapter_config.text("base_model_name_or_path") or "not told"
    return facts


def _prompt(checkpoint: Any) -> str:
    found = []
    if checkpoint.takes_messages:
        found.append("chat template")
    if checkpoint.default_prompt:
        found.append(f"{checkpoint.default_prompt!r} before the query")
    return ", ".join(found) or "none"


def _graphs(files: Any) -> list[str]:
    from rerank_plugins.backends.graphs import graph_names, read_graph
    from rerank_plugins.errors import RerankError

    lines = []
    for name in graph_names(files, "auto"):
        if not files.there(name):
            lines.append(f"{name} (on the Hub)")
            continue
        try:
            graph = read_graph(files, name)
        except RerankError as error:
            lines.append(f"{name}: {error}")
            continue
        inputs, outputs = (", ".join(value.name for value in values) for values in (graph.inputs, graph.outputs))
        beside = f", weights in {', '.join(graph.external)}" if graph.external else ""
        lines.append(f"{name}: {graph.kind}, {inputs} -> {outputs}{beside}")
    return lines
