"""`train_retriever`: fine-tuning a bi-encoder on mined triples, with sentence-transformers' trainer and losses."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rerank_plugins._extras import import_extra
from rerank_plugins._judgements import Pair, Triple
from rerank_plugins._minilm import minilm_directory
from rerank_plugins._paths import read_as_umask_says, writable_directory, write_file
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.errors import ConfigurationError, InputError, ModelLoadError
from rerank_plugins.training._card import named, retriever_card
from rerank_plugins.training._data import Group, as_paths, read_triple_data, split_pairs
from rerank_plugins.training._results import TrainedRetriever
from rerank_plugins.training._retriever_trainer import MEASURES, Run, fit_encoder, resume
from rerank_plugins.training._teacher import as_reranker, open_teacher, teacher_scores
from rerank_plugins.training.settings import Directory, Model, Paths, Progress, RetrieverSettings, options, takes

COSINE_MARGIN = 0.25
"""Root mean square to which the teacher's margins are scaled: targets for differences of cosines."""

_WORK = ".training-retriever"
_DEV_QUERIES = 500


@takes(RetrieverSettings)
def train_retriever(triples: Paths, out_dir: Directory, **keywords: Any) -> TrainedRetriever:
    """Fine-tunes a bi-encoder, the first stage, on triples such as `mine` writes.

    All data is read and checked before the training. An interrupted call resumes. A line with several negatives gives
    one training example for each. Dev queries rank all passages of the dev triples, before, during and after the
    training; the best weights are kept. Vectors are compared by cosine, and the saved model gives unit vectors.

    Args:
        triples: Files of JSON lines ``{"query", "positive", "negative", "positive_score"?, "negative_score"?,
            "split"?}`` (``.gz`` allowed), where ``negative`` may be a list. Scores are logits of a cross-encoder.
            Without ``split``, a share of the queries is held out as dev queries.
        out_dir: The model's directory.
        keywords: See `RetrieverSettings`.

    Returns:
        The model's directory and its measures.

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
    settings = RetrieverSettings(**keywords)
    for module in ("torch", "sentence_transformers", "accelerate", "datasets"):
        import_extra(module, "train")
    out = Path(out_dir).expanduser().resolve()
    work = out / _WORK
    _check_room(out, work, settings.overwrite)
    files = as_paths(triples)
    read, sources = read_triple_data(files)
    training, dev = _split(read, settings.dev_fraction)
    total = settings.steps
    if total is None:
        total = math.ceil(settings.epochs * math.ceil(_counts(training)[1] / settings.batch_size))
    settings = replace(settings, steps=total)

    with no_progress_bars():
        run, kept, after, ranked = _trained(training, dev, [source.sha256 for source in sources], work, settings)
    measures = {name: (run.before[name], after[name]) for name in after}
    trained = TrainedRetriever(out, measures, total, run.seconds)
    card = retriever_card(
        trained,
        settings,
        sources,
        files,
        training=_counts(training),
        dev=_counts(dev),
        ranked=ranked,
        kept=kept,
    )
    made = work / "model"
    write_file(made / "README.md", card)
    # safetensors writes for the owner alone.
    read_as_umask_says(made)
    _install(made, out, work, settings.overwrite)
    return trained


def _trained(
    training: Sequence[Triple], dev: Sequence[Triple], data: list[str], work: Path, settings: RetrieverSettings
) -> tuple[Run, int, dict[str, float], int]:
    """Trains, measures, and saves the model in ``work``.

    Returns:
        The run, the step of the weights that were kept, their measures of the dev queries, and how many of these were
        measured.
    """
    encoder = _encoder(minilm_directory("train") if settings.model is None else settings.model, settings.device)
    # Made after the model is loaded: a wrong name leaves no directory behind.
    writable_directory(work.parent)
    own_length = encoder.max_seq_length
    encoder.max_seq_length = min(settings.max_length, own_length or settings.max_length)
    decisive = {flag.lstrip("-").replace("-", "_"): value for flag, value in options(named(settings)).items()}
    run = resume(work, {**decisive, "data": data})
    evaluator = _evaluator(dev, settings.seed)
    ranked = 0 if evaluator is None else len(evaluator.queries)
    if evaluator is not None and not run.before:
        if settings.progress is not None:
            settings.progress(f"measuring {ranked} dev queries", 0.0)
        run.before = _measure(evaluator, encoder)
        run.save()
    margins = None
    if settings.loss == "margin-mse":
        margins = _margins(training, settings.teacher, work, settings.device, settings.progress)
    best = fit_encoder(encoder, _dataset(training, margins), evaluator, run, settings.progress)
    encoder = _encoder(best, settings.device)
    after = {} if evaluator is None else _measure(evaluator, encoder)
    encoder.max_seq_length = own_length
    shutil.rmtree(work / "model", ignore_errors=True)
    encoder.to("cpu").save_pretrained(str(work / "model"), create_model_card=False)
    return run, int(best.name.rsplit("-", 1)[-1]), after, ranked


def _check_room(out: Path, work: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"{out} is not a directory.")
    # A run killed while it moved its files into place has them beside its work folder.
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
        # The order by dot product or distance is then the order by cosine.
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
    """Margins: score of each triple's positive minus that of each negative, scaled to the range of cosines.

    Logits have no bound, but cosines differ by at most 2: unscaled, the fit would drive all vectors to that limit.
    Scores come from the file. A line that lacks one gets all of its scores from the teacher, so that no margin mixes
    two models.
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
    # Renamed first: a kill during the removal leaves no folder of an interrupted run.
    shutil.rmtree(work.rename(work.with_name(f"{work.name}.done")))
