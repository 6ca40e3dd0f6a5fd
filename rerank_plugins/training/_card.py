"""Model cards, README.md with the Hub's header: what a model was made of, how, and how good it is."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rerank_plugins import models
from rerank_plugins._machine import processor
from rerank_plugins.reranker import Reranker
from rerank_plugins.training._data import DataSource
from rerank_plugins.training._mining import torch_device
from rerank_plugins.training._model import BUNDLED, MINILM
from rerank_plugins.training._results import TrainedModel, TrainedRetriever
from rerank_plugins.training.settings import RetrieverSettings, TrainSettings, options

NOT_STATED = "not stated"
_FLATTERED = "the figures after training are a little flattered. Nothing is known about other domains or languages."


def public_name(model: str | os.PathLike[str] | Reranker) -> str:
    """A model's name as it may be published: a Hub id, or a directory without what is above it."""
    name = model.model_name if isinstance(model, Reranker) else os.fspath(model)
    return Path(name).resolve().name if Path(name).exists() else name


def trunk_name(trunk: str | os.PathLike[str] | None) -> str:
    """The public name of what `train` starts from."""
    if trunk == BUNDLED:
        return models.BUNDLED_NAME
    return MINILM if trunk is None else public_name(trunk)


def named(settings: TrainSettings | RetrieverSettings) -> TrainSettings | RetrieverSettings:
    """The settings with models by their public names."""
    kept = ("trunk", "filter", "teacher") if isinstance(settings, TrainSettings) else ("model", "teacher")
    given = {name: getattr(settings, name) for name in kept}
    names: dict[str, Any] = {name: public_name(model) for name, model in given.items() if model is not None}
    return replace(settings, **names)


def command(name: str, data: Sequence[str | os.PathLike[str]], out: Path, values: Mapping[str, Any]) -> str:
    """The command line that repeats a run.

    Args:
        name: The command's name.
        data: The files or folders of data.
        out: The directory of the result.
        values: The options, as `options` gives them; those that are None or False are left out.
    """
    words = ["rerank-plugins", name, *(Path(path).resolve().name for path in data), "--out", out.resolve().name]
    for option, value in values.items():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if item is True:
                words.append(option)
            elif item is not None and item is not False:
                words += [option, str(item)]
    return shlex.join(words)


def model_card(
    trained: TrainedModel, settings: TrainSettings, sources: Sequence[DataSource], data: Sequence[Path]
) -> str:
    """The card of a cross-encoder that was just trained.

    Args:
        trained: What came of it.
        settings: The keywords of `train`.
        sources: What was read.
        data: Where it was read from.
    """
    name, trunk, result, conversion = trained.path.resolve().name, settings.trunk, trained.result, trained.conversion
    base = f"rerank-plugins' {models.BUNDLED_NAME}" if trunk == BUNDLED else trunk_name(trunk)
    on_hub = trunk is None or (trunk != BUNDLED and not Path(trunk).exists())
    loop = ", ".join(f"{key} {value}" for key, value in asdict(settings.loop()).items() if key != "device")
    stated = list(settings.licences)
    stated += stated[:1] * (len(sources) - len(stated))
    two_formats = []
    if conversion is not None:
        two_formats = [
            "## The two formats",
            f"`model.safetensors` (float32) and `onnx/model.onnx` (weights in {conversion.weights}) were compared on "
            f"{conversion.pairs} pairs: Spearman correlation {conversion.rank_correlation:.4f}, largest difference of "
            f"logits {conversion.max_difference:.3g}.",
        ]
    return _card(
        name,
        {
            "library_name": "rerank-plugins",
            "pipeline_tag": "text-ranking",
            "base_model": base if on_hub else None,
            "tags": "[cross-encoder, reranker, onnx]" if conversion else "[cross-encoder, reranker]",
        },
        f"A cross-encoder, fine-tuned from {base}: it reads a query and a passage together and gives one logit, whose "
        f'sigmoid is meant as the probability that the passage is relevant. Use it with `Reranker("{name}")`, where '
        "that is its directory.",
        quality=[*_quality(trained), *two_formats],
        data=[_sources("judged pairs", sources, stated)],
        recipe=command("train", data, trained.path, options(named(settings))),
        settings=f"Settings of the loop, those that have no option too: {loop}.",
        run=[
            f"{result.steps} steps, {result.pairs} pairs, {_duration(result.seconds)} of training"
            + (", stopped early by patience" if result.stopped_early else ""),
            f"nDCG@10 at each evaluation: {', '.join(f'{value:.4f}' for value in result.measures) or 'none'}",
            f"seed: {settings.seed}",
        ],
        device=settings.device,
    )


def retriever_card(
    trained: TrainedRetriever,
    settings: RetrieverSettings,
    sources: Sequence[DataSource],
    data: Sequence[Path],
    *,
    training: tuple[int, int],
    dev: tuple[int, int],
    ranked: int,
    kept: int,
) -> str:
    """The card of a bi-encoder that was just trained.

    Args:
        trained: What came of it.
        settings: The keywords of `train_retriever`.
        sources: What was read.
        data: Where it was read from.
        training: Queries and examples that were learnt from.
        dev: Those held out.
        ranked: Dev queries that were measured.
        kept: The step whose weights were kept.
    """
    name = trained.path.name
    base = MINILM if settings.model is None else public_name(settings.model)
    return _card(
        name,
        {
            "library_name": "sentence-transformers",
            "pipeline_tag": "sentence-similarity",
            # Only ids of the Hub have an owner before a slash.
            "base_model": base if "/" in base else None,
            "tags": "[sentence-transformers, sentence-similarity, feature-extraction, rerank-plugins]",
        },
        f"A bi-encoder, fine-tuned from {base} as the first stage before a cross-encoder. Its vectors have length 1; "
        f'compare them by cosine or dot product. Use it with `SentenceTransformer("{name}")`, where that is its '
        "directory.",
        quality=_retriever_quality(trained.measures, ranked, kept),
        data=[
            _sources("triples", sources, []),
            f"{training[1]} examples of {training[0]} queries were learnt from, and {dev[1]} of {dev[0]} queries held "
            f"out: no query is in both. The licence of {base} holds too.",
        ],
        recipe=command("train-retriever", data, trained.path, options(named(replace(settings, steps=trained.steps)))),
        settings="",
        run=[
            f"{trained.steps} steps, {_duration(trained.seconds)} with their evaluations",
            f"seed: {settings.seed}",
        ],
        device=settings.device,
    )


def _card(
    name: str,
    header: Mapping[str, str | None],
    what: str,
    *,
    quality: Sequence[str],
    data: Sequence[str],
    recipe: str,
    settings: str,
    run: Sequence[str],
    device: str | None,
) -> str:
    lines = [f"{key}: {value}" for key, value in header.items() if value is not None]
    parts = ["\n".join(["---", *lines, "---"]), f"# {name}", what, "## Quality", *quality, "## Data", *data]
    parts += ["## Recipe", f"    {recipe}", *([settings] if settings else []), "## This run"]
    return "\n\n".join([*parts, "\n".join(f"- {item}" for item in (*run, f"machine: {_machine(device)}"))]) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _quality(trained: TrainedModel) -> list[str]:
    count, bundled, after = trained.held_out, trained.bundled, trained.result.best
    if after is None:
        return ["No queries were held out, so nothing was measured."]
    before = trained.result.measures[0]
    rows = [[f"nDCG@10, {count} held-out queries", f"{before:.4f}", f"{after:.4f}"]]
    if trained.ece_before is not None:
        pair = [f"{trained.ece_before:.4f}", f"{trained.ece_after:.4f}"]
        rows.append(["expected calibration error, on the pairs it was fitted on", *pair])
    parts = [_table(["measure", "before training", "after"], rows)]
    if bundled is not None:
        parts.append(f"On the same queries {models.BUNDLED_NAME} has nDCG@10 {bundled:.4f}.")
    if not after > before:
        parts.append("**Training did not improve the order of the held-out queries.**")
    if bundled is not None and not after > bundled:
        parts.append(f"**{models.BUNDLED_NAME}, which was not trained on this data, orders them no worse.**")
    if trained.says_little:
        parts.append(
            f"**{count} held-out queries are few: another {count} could give figures that differ by several "
            "hundredths.**"
        )
    chosen = "Measured on held-out queries of the data below, which also chose the best of the points measured:"
    return [*parts, f"{chosen} {_FLATTERED}"]


def _retriever_quality(measures: Mapping[str, tuple[float, float]], ranked: int, kept: int) -> list[str]:
    if not measures:
        return ["No queries were held out, so nothing was measured. The weights are those of the last step."]
    rows = [[measure, f"{before:.4f}", f"{after:.4f}"] for measure, (before, after) in measures.items()]
    parts = [
        _table(["measure", "before training", "after"], rows),
        f"Each of {ranked} held-out queries ranks all passages of their triples. The weights are those of step {kept}, "
        f"the best of the points that were measured by nDCG@10 of these same queries, so {_FLATTERED}",
    ]
    if any(after < before for before, after in measures.values()):
        parts.append("**Training made the order of the held-out queries worse.**")
    return parts


def _sources(rows: str, sources: Sequence[DataSource], licences: Sequence[str]) -> str:
    licences = [*licences, *[NOT_STATED] * (len(sources) - len(licences))]
    found = []
    for source, licence in zip(sources, licences, strict=True):
        counts = [str(source.rows), str(source.queries), str(source.passages or "none")]
        found.append([source.name, *counts, source.sha256[:12], licence])
    return _table(["data", rows, "queries", "corpus", "sha256", "licence"], found)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{math.floor(seconds / 60)} min {seconds % 60:.0f} s"


def _machine(device: str | None) -> str:
    """Processor, system and versions, in one line."""
    import torch

    chosen = torch_device(device)
    where = torch.cuda.get_device_name(chosen) if chosen.startswith("cuda") else processor()[0]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "sentence-transformers"))
    return f"{where}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {versions}"
