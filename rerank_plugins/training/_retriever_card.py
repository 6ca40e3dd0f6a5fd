"""The model card of a fine-tuned bi-encoder."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rerank_plugins.training._card import NOT_STATED, machine

_OPTIONS = ("model", "loss", "teacher", "steps", "batch_size", "learning_rate", "max_length", "seed", "dev_fraction")


def retriever_card(
    name: str,
    *,
    settings: Mapping[str, Any],
    files: Sequence[tuple[Path, int]],
    training: tuple[int, int],
    dev: tuple[int, int],
    ranked: int,
    measures: Mapping[str, tuple[float, float]],
    kept: int,
    seconds: float,
    device: str | None,
) -> str:
    """A README.md for a bi-encoder that was just trained, in Markdown with the Hub's header.

    Args:
        name: The model's name.
        settings: Those of `train_retriever` that decide the result; None where a default model was taken.
        files: The triples, and how many each file has.
        training: Queries and examples that were learnt from.
        dev: Those held out.
        ranked: Dev queries that were measured.
        measures: Each measure of the dev queries before and after; empty without dev queries.
        kept: The step whose weights were kept.
        seconds: Time the training took, its evaluations included.
        device: The torch device that was asked for.
    """
    base = settings["model"] or "sentence-transformers/all-MiniLM-L6-v2"
    words = ["rerank-plugins", "train-retriever", *(path.name for path, _ in files), "--out", name]
    for option in _OPTIONS:
        if settings[option] is not None:
            words += [f"--{option.replace('_', '-')}", str(settings[option])]
    tags = "sentence-transformers, sentence-similarity, feature-extraction, rerank-plugins"
    # Only ids of the Hub have an owner before a slash.
    on_hub = f"base_model: {base}\n" if "/" in base else ""
    header = f"---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n{on_hub}tags: [{tags}]\n---"
    rows = [
        f"| {path.name} | {lines} | {hashlib.sha256(path.read_bytes()).hexdigest()[:12]} | {NOT_STATED} |"
        for path, lines in files
    ]
    parts = [
        header,
        f"# {name}",
        f"A bi-encoder, fine-tuned from {base} as the first stage before a cross-encoder. Its vectors have length 1; "
        f'compare them by cosine or dot product. Use it with `SentenceTransformer("{name}")`, where that is its '
        "directory.",
        "## Quality",
        *_quality(measures, ranked, kept),
        "## Data",
        "\n".join(["| file | lines | sha256 | licence |", "| --- | --- | --- | --- |", *rows]),
        f"{training[1]} examples of {training[0]} queries were learnt from, and {dev[1]} of {dev[0]} queries held out: "
        f"no query is in both. The licence of {base} holds too.",
        "## Recipe",
        f"    {shlex.join(words)}",
        f"- {settings['steps']} steps, {seconds:.0f} s with their evaluations\n- seed: {settings['seed']}\n"
        f"- machine: {machine(device)}\n",
    ]
    return "\n\n".join(parts)


def _quality(measures: Mapping[str, tuple[float, float]], ranked: int, kept: int) -> list[str]:
    if not measures:
        return ["No queries were held out, so nothing was measured. The weights are those of the last step."]
    rows = [f"| {measure} | {before:.4f} | {after:.4f} |" for measure, (before, after) in measures.items()]
    parts = [
        "\n".join(["| measure | before training | after |", "| --- | --- | --- |", *rows]),
        f"Each of {ranked} held-out queries ranks all passages of their triples. The weights are those of step {kept}, "
        "the best of the points that were measured by nDCG@10 of these same queries, so the figures after training are "
        "a little flattered. Nothing is known about other domains or languages.",
    ]
    if any(after < before for before, after in measures.values()):
        parts.append("**Training made the order of the held-out queries worse.**")
    return parts
