"""Does reranking help here? The whole measurement as one function."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.evaluation._beir import BeirDataset, Scorer, folder_name, read_collection, score_texts
from rerank_plugins.evaluation._first_stage import Embed, Progress, with_first_stage
from rerank_plugins.evaluation._results import DatasetResult, Evaluation, ModelResult, Speed
from rerank_plugins.evaluation._store import ScoreFile, pair_key
from rerank_plugins.evaluation.measures import (
    DEFAULT_MEASURES,
    Comparison,
    Values,
    best_order,
    compare,
    measure_queries,
    parse_measures,
)
from rerank_plugins.fusion import fused
from rerank_plugins.reranker import Reranker
from rerank_plugins.selection import BLANK_LOGIT, order
from rerank_plugins.settings import Settings

_PathLike = str | os.PathLike[str]
DEFAULT_FUSION = ("rrf", 0.1, 0.3, 0.5)
_PROBE_QUERIES = 3
_PROBE_TEXTS = 4


def evaluate(
    folders: _PathLike | Sequence[_PathLike],
    models: Scorer | Sequence[Scorer] | Mapping[str, Scorer] | None = None,
    *,
    first_stage: str = "auto",
    top_k: int = 100,
    measures: Sequence[str] = DEFAULT_MEASURES,
    fusion: Sequence[str | float] = DEFAULT_FUSION,
    work: _PathLike | None = None,
    resume: bool = True,
    embed: Embed | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures what reranking does to the first stage of test sets.

    First stage and reranked order are measured over the same top `top_k` candidates. A query counts where its
    judgements name a relevant document: see `DatasetResult` for how many others there were, and
    `measure_queries` for the policy and its reasons. The models are used one after the other, a `Reranker` being
    closed after its turn, which frees its memory; it loads again when it is next used.

    Args:
        folders: One or several in BEIR layout: queries.jsonl, corpus.jsonl[.gz], qrels.tsv (or qrels/test.tsv), and
            perhaps candidates.tsv. Or files of judged pairs, JSON lines ``{"query", "passage", "label"}`` or
            ``{"query", "positive", "negative"}``: each query searches the passages of the whole file then.
        models: What to measure: None for the bundled model, a `Reranker`, anything else with
            ``score(query, texts) -> (n,)``, or a function like that; several of them in a list, or by name.
        first_stage: ``"candidates"`` (candidates.tsv or candidates-bm25.tsv of the folder), ``"bm25"``, ``"faiss"``,
            ``"auto"`` (candidates where the folder has them, otherwise BM25), or a file, looked for in each folder
            first: a TREC run, or, named .tsv, lines *query id, document id, rank*.
        top_k: How many candidates of each query are reranked.
        measures: Names of ir-measures, the first of which the report plots.
        fusion: Values of `Settings.fusion` measured too, by the same scores; weights of ranks if no scores are known.
        work: Directory that keeps scores and searches: the same call goes on where an earlier one stopped. None
            keeps nothing.
        resume: Use the scores found there; False scores everything anew.
        embed: For ``"faiss"``: texts in, vectors of shape (n, dim) out; None takes all-MiniLM-L6-v2 of the ``demo``
            extra.
        progress: Takes a line of news and the share done.

    Returns:
        All results; `write_report` makes an HTML file of them.

    Raises:
        ConfigurationError: A file is missing, or a keyword cannot work.
        InputError: A line of a file is not valid; the message has file and line number.
        ModelLoadError: A model is missing.
        ScoringError: A score is not a finite number.

    Example:
        >>> from rerank_plugins import Reranker
        >>> from rerank_plugins.evaluation import evaluate, write_report
        >>> found = evaluate("my-test-set", Reranker(), work="scores")  # doctest: +SKIP
        >>> found.datasets[0].models[0].comparisons["nDCG@10"].difference  # doctest: +SKIP
        0.13
        >>> write_report(found, "report.html")  # doctest: +SKIP
    """
    parse_measures(measures)
    # Checked as `Reranker` does.
    ways = [how for value in fusion if (how := Settings(fusion=value).fusion) is not None]
    if top_k < 1:
        raise ConfigurationError(f"top_k must be 1 or more, got {top_k}.")
    scorers = _named(models)
    paths = [Path(f) for f in ([folders] if isinstance(folders, str | os.PathLike) else folders)]
    names = _dataset_names(paths)
    cache = None if work is None else Path(work)
    _check_models(list(scorers.values()))
    sets: list[tuple[BeirDataset, str]] = []
    for path, name in zip(paths, names, strict=True):
        if progress is not None:
            progress(f"{name}: reading", 0.0)
        collection = read_collection(path)
        sets.append(with_first_stage(collection, path, first_stage, top_k, embed=embed, cache=cache, progress=progress))

    total = sum(len(texts) for data, _ in sets for texts in _candidates(data, top_k).values()) * len(scorers)
    done = 0
    found: list[list[ModelResult]] = [[] for _ in sets]
    for model, scorer in scorers.items():
        for place, (data, _) in enumerate(sets):
            news = f"{names[place]}: {model}"

            def tell(documents: int, news: str = news) -> None:
                nonlocal done
                done += documents
                if progress is not None:
                    progress(news, done / max(total, 1))

            found[place].append(_rerank(model, scorer, names[place], data, top_k, measures, ways, cache, resume, tell))
        if isinstance(scorer, Reranker):
            scorer.close()
    return Evaluation(
        tuple(
            _result(name, data, source, top_k, measures, results)
            for name, (data, source), results in zip(names, sets, found, strict=True)
        )
    )


def _check_models(scorers: Sequence[Scorer]) -> None:
    """Load each model: a missing one is told before the first stage and the other models have taken hours."""
    for scorer in scorers:
        if isinstance(scorer, Reranker):
            scorer.prepare()
            if len(scorers) > 1:
                scorer.close()


def _named(models: Scorer | Sequence[Scorer] | Mapping[str, Scorer] | None) -> dict[str, Scorer]:
    if models is None:
        models = Reranker()
    if isinstance(models, Mapping):
        named = dict(models)
    else:
        given: Sequence[Any] = models if isinstance(models, list | tuple) else [models]
        named = {}
        for scorer in given:
            name = str(getattr(scorer, "model_name", None) or getattr(scorer, "__name__", type(scorer).__name__))
            if name in named:
                raise ConfigurationError(f"Two models are called {name!r}. Give each a name: models={{name: model}}.")
            named[name] = scorer
    if not named:
        raise ConfigurationError("Expected one model or more, got none.")
    for name, scorer in named.items():
        if not callable(getattr(scorer, "score", scorer)):
            raise ConfigurationError(
                f"The model {name!r} must be a Reranker, an object with score(query, texts), or a function like that; "
                f"got {type(scorer).__name__}. For a Hub id or a directory: Reranker({scorer!r:.60})."
            )
    return named


def _dataset_names(paths: Sequence[Path]) -> list[str]:
    if not paths:
        raise ConfigurationError("Expected one folder or more in BEIR layout, got none.")
    for path in paths:
        if not path.exists():
            raise ConfigurationError(
                f"{path} is no folder, and no file. Expected a folder with queries.jsonl, corpus.jsonl[.gz] and "
                'qrels.tsv, or a file of JSON lines {"query", "passage", "label"}.'
            )
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ConfigurationError("A folder was given twice.")
    short = [folder_name(path) for path in resolved]
    return [str(path) if short.count(name) > 1 else name for path, name in zip(resolved, short, strict=True)]


def _candidates(data: BeirDataset, top_k: int) -> dict[str, list[str]]:
    """The candidates to rerank, of the queries that count; those without any left out."""
    return {query: found[:top_k] for query in data.usable if (found := data.candidates.get(query))}


def _rerank(
    model: str,
    scorer: Scorer,
    name: str,
    data: BeirDataset,
    top_k: int,
    measures: Sequence[str],
    ways: Sequence[str | float],
    work: Path | None,
    resume: bool,
    progress: Callable[[int], None],
) -> ModelResult:
    engine, settings = "", {}
    if isinstance(scorer, Reranker):
        engine = f"{scorer.backend_name}, {scorer.precision}"
        config = scorer.config
        settings = {**config, "model": scorer.model_name, "engine": engine}
    candidates = _candidates(data, top_k)
    # Before the clock runs: engines compile and allocate in their first calls.
    probes = _probe(scorer, data, candidates)
    rankings: dict[str, list[str]] = {}
    scores: dict[str, list[float]] = {}
    with_first: dict[str, dict[str, list[str]]] = {str(how): {} for how in ways}
    times: list[tuple[int, float, bool]] = []
    with contextlib.ExitStack() as stack:
        kept = None
        if work is not None:
            kept = stack.enter_context(ScoreFile(work, name, model, settings, probes, resume))
        for query, documents in candidates.items():
            texts = [data.documents[document] for document in documents]
            key = pair_key(data.queries[query], texts)
            known = None if kept is None else kept.get(key, len(texts))
            if known is None:
                logits, took = _timed(scorer, data, query, texts)
                times.append((len(documents), took, True))
                if kept is not None:
                    kept.put(key, logits, took)
            else:
                logits, took = known
                times.append((len(documents), took, False))
            best = np.argsort(-np.asarray(logits), kind="stable")
            rankings[query] = [documents[row] for row in best]
            scores[query] = [logits[row] for row in best]
            for how in ways:
                with_first[str(how)][query] = _fused(documents, logits, how, data.scores.get(query))
            progress(len(documents))
    values = measure_queries(data, _places(rankings), measures)
    before = measure_queries(data, _places(candidates), measures)
    return ModelResult(
        model,
        engine,
        rankings,
        scores,
        values,
        _compared(data, before, values),
        _speed(times),
        {
            how: _compared(data, values, measure_queries(data, _places(orders), measures))
            for how, orders in with_first.items()
        },
    )


def _compared(data: BeirDataset, before: Values, after: Values) -> dict[str, Comparison]:
    return {
        measure: compare([before[measure][q] for q in data.usable], [after[measure][q] for q in data.usable])
        for measure in after
    }


def _fused(
    documents: Sequence[str], logits: Sequence[float], how: str | float, first_stage: Sequence[float] | None
) -> list[str]:
    """The order that `Settings.fusion` gives; blank documents stay at the end."""
    keys = np.asarray(logits, dtype=np.float64)
    ranks = -np.arange(len(keys), dtype=np.float64)
    known = ranks if first_stage is None or isinstance(how, str) else np.asarray(first_stage[: len(keys)])
    read = keys > BLANK_LOGIT
    if read.any():
        keys[read] = fused(keys[read], how, known[read])
    return [documents[row] for row in order(keys)]


def _timed(scorer: Scorer, data: BeirDataset, query: str, texts: Sequence[str]) -> tuple[list[float], float]:
    began = time.perf_counter()
    try:
        logits = score_texts(scorer, data.queries[query], texts)
    except InputError as error:
        raise InputError(f"{data.name}, query {query!r}: {error}") from error
    return [float(logit) for logit in logits], time.perf_counter() - began


def _probe(scorer: Scorer, data: BeirDataset, candidates: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
    """Logits of the first candidates, and the longest one, of the first queries."""
    probes = {}
    for query in list(candidates)[:_PROBE_QUERIES]:
        texts = [data.documents[document] for document in candidates[query]]
        chosen = [*texts[: _PROBE_TEXTS - 1], max(texts, key=len)]
        probes[pair_key(data.queries[query], chosen)] = _timed(scorer, data, query, chosen)[0]
    return probes


def _places(rankings: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    # Places rather than logits: evaluation tools break ties by document id.
    return {q: {document: -float(place) for place, document in enumerate(found)} for q, found in rankings.items()}


def _speed(times: Sequence[tuple[int, float, bool]]) -> Speed | None:
    """Speed by documents, seconds and whether this run took them, of each query.

    Times of an earlier run, perhaps under another load, are used only where this run scored nothing, and marked.
    """
    if not times:
        return None
    now = [(documents, took) for documents, took, new in times if new]
    used = now or [(documents, took) for documents, took, _ in times]
    documents, total = sum(count for count, _ in used), sum(took for _, took in used)
    seconds = [took for _, took in used]
    return Speed(
        documents=documents,
        seconds=total,
        documents_per_s=documents / max(total, 1e-9),
        p50_s=float(np.percentile(seconds, 50)),
        p95_s=float(np.percentile(seconds, 95)),
        queries=len(used),
        earlier=not now,
    )


def _result(
    name: str,
    data: BeirDataset,
    source: str,
    top_k: int,
    measures: Sequence[str],
    models: Sequence[ModelResult],
) -> DatasetResult:
    candidates = _candidates(data, top_k)
    best = {query: best_order(found, data.qrels[query]) for query, found in candidates.items()}
    unjudged = sum(query not in data.qrels for query in data.queries)
    return DatasetResult(
        name=name,
        dataset=data,
        first_stage=source,
        top_k=top_k,
        candidates=candidates,
        first=measure_queries(data, _places(candidates), measures),
        ceiling=measure_queries(data, _places(best), measures),
        models=tuple(models),
        unjudged=unjudged,
        without_relevant=len(data.queries) - len(data.usable) - unjudged,
        without_candidates=len(data.usable) - len(candidates),
    )
