"""`train`: from judged data to a model directory in one call."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rerank_plugins._extras import import_extra
from rerank_plugins._paths import read_as_umask_says, writable_directory, write_file
from rerank_plugins._printable import json_text
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.calibration import Calibration, expected_calibration_error, fit_calibration
from rerank_plugins.conversion import convert
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.reranker import Reranker
from rerank_plugins.training._card import model_card, trunk_name
from rerank_plugins.training._data import (
    Group,
    TrainingData,
    as_paths,
    evaluation_groups,
    groups_from_pairs,
    read_data,
    read_groups,
    split_pairs,
    write_groups,
)
from rerank_plugins.training._loop import Scorer, evaluate_groups, fit, mean_ndcg
from rerank_plugins.training._mining import BiEncoder, torch_device
from rerank_plugins.training._model import fold, miner_of, start
from rerank_plugins.training._negatives import mined_groups
from rerank_plugins.training._results import TrainedModel
from rerank_plugins.training._teacher import MINER, as_reranker, distilled, open_teacher, teacher_scores
from rerank_plugins.training.settings import Directory, Paths, Progress, TrainSettings, takes

_WORK = ".training"

_EXPORT_S = 30.0
"""Seconds reserved in a budget for calibration and export: those of a MiniLM-L6 on two cores."""

_LEAST_TRAINING = 0.25
"""Least share of the budget for training, however long the rest takes."""


@takes(TrainSettings)
def train(data: Paths, out_dir: Directory, **keywords: Any) -> TrainedModel:
    """Fine-tunes a cross-encoder on judged data and exports it for every backend.

    All data is read and checked before the training. An interrupted call resumes: ``out_dir`` keeps mined negatives,
    the teacher's scores and checkpoints until the end. A model card, ``README.md`` in ``out_dir``, gives the recipe,
    the data and the measures.

    Args:
        data: One or several of: a file of JSON lines of pairs ``{"query", "passage", "label", "split"?}``, with labels
            from 0 to 1, or of triples ``{"query", "positive", "negative", "split"?}``; a folder with
            ``pairs.jsonl[.gz]``; a BEIR folder with ``queries.jsonl``, ``corpus.jsonl[.gz]`` and ``qrels.tsv``, or
            ``qrels/train.tsv`` and ``qrels/dev.tsv``. Without a split, a tenth of the queries is held out for choosing
            and calibrating.
        out_dir: The model's directory. Give it to ``Reranker(model=...)``.
        keywords: See `TrainSettings`.

    Raises:
        ConfigurationError: If ``out_dir`` holds a finished model, or an argument cannot work.
        InputError: If a line of the data is not valid, with file and line number; or if nothing can be learnt
            from it.
        MissingDependencyError: If the extra ``train`` is not installed.
        ModelLoadError: If the trunk, the filter or the teacher cannot be loaded.
    """
    began = time.monotonic()
    settings = TrainSettings(**keywords)
    paths, licences = as_paths(data), len(settings.licences)
    out = _prepared(out_dir, settings.overwrite)
    if licences not in (0, 1, len(paths)):
        raise ConfigurationError(f"Give one licence for all data or one for each of {len(paths)}; got {licences}.")
    read = read_data(paths)
    writable_directory(out)
    with no_progress_bars():
        groups, dev = _lists(read, out / _WORK, settings)
        bundled = _bundled_ndcg(dev, settings.progress)
        model = start(settings.trunk, settings.seed)
        budget_s = None
        if settings.minutes is not None:
            spent = time.monotonic() - began + (_EXPORT_S if settings.export else 0.0)
            budget_s = max(60 * settings.minutes - spent, 60 * settings.minutes * _LEAST_TRAINING)
        checkpoints = out / _WORK / "checkpoints"
        result = fit(model, groups, dev, settings.loop(), checkpoints, settings.progress, budget_s=budget_s)
        calibrated = _calibrate(model, dev, settings.device)
        trained = _finish(model, out, settings, TrainedModel(out, result, *calibrated, None, len(dev), bundled))
    facts = {
        "trunk": trunk_name(settings.trunk),
        "config": {key: value for key, value in asdict(settings.loop()).items() if key != "device"},
        "groups": len(groups),
        "result": asdict(result),
        "ece_before": trained.ece_before,
        "ece_after": trained.ece_after,
        "calibration": None if trained.calibration is None else asdict(trained.calibration),
        "bundled": bundled,
        "held_out": len(dev),
        "data": [source.sha256 for source in read.sources],
    }
    write_file(out / "training.json", json_text(facts, indent=2) + "\n")
    write_file(out / "README.md", model_card(trained, settings, read.sources, paths))
    shutil.rmtree(out / _WORK, ignore_errors=True)
    return trained


def _prepared(out_dir: Directory, overwrite: bool) -> Path:
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


def _lists(data: TrainingData, work: Path, settings: TrainSettings) -> tuple[list[Group], list[Group]]:
    """Training groups with their targets, and dev groups."""
    # Opened before the long work: a wrong name is an error at once.
    miner = miner_of(settings.trunk)
    by_miner = settings.mine and settings.temperature is None and settings.teacher in (None, MINER)
    teacher = None
    if not by_miner and (settings.teacher is not None or settings.mine):
        teacher = open_teacher(settings.teacher or MINER, miner, settings.device)
    filter = as_reranker(settings.filter, settings.device) if settings.filtered else None
    groups, dev = _groups(data, work, settings, miner, filter, settings.teacher_share if by_miner else 0.0)
    if teacher is not None:
        scores = teacher_scores(teacher, groups, work, settings.progress)
        groups = distilled(groups, scores, settings.teacher_share, settings.temperature or teacher.temperature)
    return groups, dev


def _groups(
    data: TrainingData,
    work: Path,
    settings: TrainSettings,
    miner: Path,
    filter: Reranker | None,
    teacher_share: float,
) -> tuple[list[Group], list[Group]]:
    """Training and dev groups; mined ones are kept in ``work`` for the next call."""
    size, seed = settings.group_size, settings.seed
    training, held_out = split_pairs(data.pairs)
    dev = evaluation_groups(held_out, limit=500)
    groups: list[Group] = []
    if not settings.mine:
        groups = groups_from_pairs(training, size, seed)
    elif training:
        facts = [*(source.sha256 for source in data.sources), str(miner), size, seed, teacher_share]
        digest = hashlib.sha256(json.dumps([*facts, repr(filter), settings.below]).encode()).hexdigest()[:24]
        # The training groups are written last: where they are, both are.
        kept = work / f"{digest}-dev.jsonl", work / f"{digest}-train.jsonl"
        if kept[1].is_file():
            return read_groups(kept[1]), read_groups(kept[0])
        groups, mined_dev = mined_groups(
            [training, [] if dev else held_out],
            data.passages,
            BiEncoder(miner, device=settings.device),
            (size, 10),
            seed=seed,
            teacher_share=teacher_share,
            reranker=filter,
            below=settings.below,
            progress=settings.progress,
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
    """nDCG@10 of the bundled model on the dev groups; None without any."""
    if not dev:
        return None
    with Reranker() as reranker:
        logits = []
        for number, group in enumerate(dev, 1):
            logits.append(reranker.logits(group.query, group.passages))
            if progress is not None:
                progress("measuring the bundled model", number / len(dev))
    return mean_ndcg(dev, logits)


def _calibrate(
    model: Any, dev: Sequence[Group], device: str | None
) -> tuple[float | None, float | None, Calibration | None]:
    """Fits a calibration on the dev pairs and folds it into the model.

    Returns:
        Expected calibration error before and after, and the calibration; None each where nothing could be fitted.
    """
    labels = np.array([gain for group in dev for gain in group.gains])
    if not len(labels) or labels.min() == labels.max():
        return None, None, None
    # As at inference: float32 and full length.
    length = model[0].max_seq_length or 512
    scorer = Scorer(model, max_length=length, micro_batch=32, bf16=False, device=torch_device(device))
    _, logits = evaluate_groups(scorer, dev)
    calibration = fit_calibration(logits, labels)
    if not fold(model, calibration):
        return None, None, None
    truth = (labels >= 0.5).astype(float)
    before, after = (expected_calibration_error(values, truth) for values in (logits, calibration(logits)))
    return before, after, calibration


def _finish(model: Any, out: Path, settings: TrainSettings, trained: TrainedModel) -> TrainedModel:
    """Saves the trained model, which replaces all else in its directory, and exports it."""
    model.to("cpu")
    for leftover in [path for path in out.iterdir() if path.name != _WORK]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    model.save_pretrained(str(out), create_model_card=False)
    if settings.export:
        trained = replace(trained, conversion=convert(out, out / "onnx", int8=True, progress=settings.progress))
    # safetensors writes for the owner alone.
    read_as_umask_says(out)
    return trained
