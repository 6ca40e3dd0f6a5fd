"""The model card: what a model was made of, how, and how good it is."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rerank_plugins import models
from rerank_plugins._machine import processor
from rerank_plugins.conversion import ConversionReport
from rerank_plugins.reranker import Reranker
from rerank_plugins.training._config import TrainingConfig, TrainingResult
from rerank_plugins.training._data import DataSource, Group
from rerank_plugins.training._mining import torch_device
from rerank_plugins.training._model import BUNDLED

NOT_STATED = "not stated"
FEW_QUERIES = 50
"""Held-out queries below which a mean says little: the standard error of nDCG@10 is then about 0.05."""


def public_name(model: str | os.PathLike[str] | Reranker) -> str:
    """A model's name as it may be published: a Hub id, or a directory without what is above it."""
    name = model.model_name if isinstance(model, Reranker) else os.fspath(model)
    return Path(name).resolve().name if Path(name).exists() else name


def command(data: Sequence[str | os.PathLike[str]], out: Path, options: Mapping[str, Any]) -> str:
    """The command line that repeats a run; options that are None or False are left out."""
    words = ["rerank-plugins", "train", *(Path(path).resolve().name for path in data), "--out", out.resolve().name]
    for option, value in options.items():
        for item in value if isinstance(value, tuple) else (value,):
            if item is True:
                words.append(option)
            elif item is not None and item is not False:
                words += [option, public_name(item) if isinstance(item, (Reranker, os.PathLike)) else str(item)]
    return shlex.join(words)


def model_card(
    name: str,
    *,
    recipe: str,
    trunk: str | os.PathLike[str] | None,
    config: TrainingConfig,
    sources: Sequence[DataSource],
    licences: Sequence[str | None],
    groups: Sequence[Group],
    dev: Sequence[Group],
    result: TrainingResult,
    ece: tuple[float | None, float | None],
    conversion: ConversionReport | None,
    bundled: float | None = None,
) -> str:
    """A README.md for a model that was just trained, in Markdown with the Hub's header.

    Args:
        name: The model's name.
        recipe: The command that repeats the run.
        trunk: What it started from; None is the bundled model.
        config: The settings of the loop.
        sources: The data; empty where the kinds of ``groups`` name it.
        licences: A text for each of ``sources``, or None where nobody gave one.
        groups: What was learnt from.
        dev: What was measured.
        result: How it went.
        ece: Expected calibration error before and after calibration; None where it could not be measured.
        conversion: What the ONNX graph is like; None without one.
        bundled: nDCG@10 of the bundled model on ``dev``; None where it was not measured.
    """
    bundled_trunk = trunk in (None, BUNDLED)
    base = f"rerank-plugins' {models.BUNDLED_NAME}" if bundled_trunk else public_name(str(trunk))
    on_hub = not bundled_trunk and not Path(str(trunk)).exists()
    header = ["---", "library_name: rerank-plugins", "pipeline_tag: text-ranking"]
    header += [f"base_model: {base}"] if on_hub else []
    header += ["tags: [cross-encoder, reranker, onnx]" if conversion else "tags: [cross-encoder, reranker]", "---"]
    parts = [
        "\n".join(header),
        f"# {name}",
        f"A cross-encoder, fine-tuned from {base}: it reads a query and a passage together and gives one logit, whose "
        f'sigmoid is meant as the probability that the passage is relevant. Use it with `Reranker("{name}")`, where '
        "that is its directory.",
        "## Quality",
        *_quality(dev, result, ece, bundled),
        "Measured on held-out queries of the data below, which also chose the best of the points measured: the figures "
        "after training are a little flattered. Nothing is known about other domains or languages.",
    ]
    if conversion is not None:
        parts += [
            "## The two formats",
            f"`model.safetensors` (float32) and `onnx/model.onnx` (weights in {conversion.weights}) were compared on "
            f"{conversion.pairs} pairs: Spearman correlation {conversion.rank_correlation:.4f}, largest difference of "
            f"logits {conversion.max_difference:.3g}.",
        ]
    return "\n\n".join([*parts, "## Data", _data(sources, licences, groups), *_recipe(recipe, config, result)])


def _quality(
    dev: Sequence[Group], result: TrainingResult, ece: tuple[float | None, float | None], bundled: float | None
) -> list[str]:
    if not dev:
        return ["No queries were held out, so nothing was measured."]
    before, after = result.measures[0], result.best
    rows = ["| measure | before training | after |", "| --- | --- | --- |"]
    rows.append(f"| nDCG@10, {len(dev)} held-out queries | {before:.4f} | {after:.4f} |")
    if ece[0] is not None:
        rows.append(f"| expected calibration error, on the pairs it was fitted on | {ece[0]:.4f} | {ece[1]:.4f} |")
    parts = ["\n".join(rows)]
    if len(result.by_kind) > 1:
        kinds = [f"| {kind} | {value:.4f} |" for kind, value in result.by_kind.items()]
        parts.append("\n".join(["| held-out queries of | nDCG@10 after |", "| --- | --- |", *kinds]))
    if bundled is not None:
        parts.append(f"On the same queries {models.BUNDLED_NAME} has nDCG@10 {bundled:.4f}.")
    if not after > before:
        parts.append("**Training did not improve the order of the held-out queries.**")
    if bundled is not None and not after > bundled:
        parts.append(f"**{models.BUNDLED_NAME}, which was not trained on this data, orders them no worse.**")
    if len(dev) < FEW_QUERIES:
        parts.append(
            f"**{len(dev)} held-out queries are few: another {len(dev)} could give figures that differ by several "
            "hundredths.**"
        )
    return parts


def _data(sources: Sequence[DataSource], licences: Sequence[str | None], groups: Sequence[Group]) -> str:
    if not sources:
        rows = ["| data | lists |", "| --- | --- |"]
        return "\n".join([*rows, *(f"| {kind} | {count} |" for kind, count in Counter(g.kind for g in groups).items())])
    rows = ["| data | judged pairs | queries | corpus | sha256 | licence |", "| --- | --- | --- | --- | --- | --- |"]
    for source, licence in zip(sources, licences, strict=True):
        name, stated = (" ".join(text.replace("|", "\\|").split()) for text in (source.name, licence or NOT_STATED))
        counts = f"{source.pairs} | {source.queries} | {source.passages or 'none'}"
        rows.append(f"| {name} | {counts} | {source.sha256[:12]} | {stated} |")
    return "\n".join(rows)


def _recipe(recipe: str, config: TrainingConfig, result: TrainingResult) -> list[str]:
    listed = ", ".join(f"{key} {value}" for key, value in asdict(config).items() if key != "device")
    early = ", stopped early by patience" if result.stopped_early else ""
    measures = ", ".join(f"{value:.4f}" for value in result.measures)
    return [
        "## Recipe",
        f"    {recipe}",
        f"Settings of the loop, those that have no option too: {listed}.",
        "## This run",
        f"- {result.steps} steps, {result.pairs} pairs, {_duration(result.seconds)} of training{early}\n"
        f"- nDCG@10 at each evaluation: {measures or 'none'}\n"
        f"- seed: {config.seed}\n"
        f"- machine: {machine(config.device)}\n",
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{math.floor(seconds / 60)} min {seconds % 60:.0f} s"


def machine(device: str | None) -> str:
    """Processor, system and versions, in one line."""
    import torch

    chosen = torch_device(device)
    where = torch.cuda.get_device_name(chosen) if chosen.startswith("cuda") else processor()[0]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "sentence-transformers"))
    return f"{where}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {versions}"
