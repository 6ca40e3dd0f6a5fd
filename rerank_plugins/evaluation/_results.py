"""What an evaluation found: the table, the report and the JSON are views of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rerank_plugins._paths import writable_directory, write_file
from rerank_plugins.errors import InputError
from rerank_plugins.evaluation._beir import BeirDataset
from rerank_plugins.evaluation._store import slug
from rerank_plugins.evaluation.measures import Comparison, Values, holm, means


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a model scored.

    Attributes:
        documents: Documents scored.
        seconds: Time in the scorer, the first call to warm up left out.
        documents_per_s: Throughput, one query after the other.
        p50_s: Median time of a query with all its candidates, in seconds.
        p95_s: 95th percentile of it, in seconds.
        queries: How many queries these figures are of: those that this run scored, and did not find kept.
        earlier: This run found the scores of all queries kept, so that the times are those of an earlier run.
    """

    documents: int
    seconds: float
    documents_per_s: float
    p50_s: float
    p95_s: float
    queries: int = 0
    earlier: bool = False


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One model on one data set.

    Attributes:
        name: The model.
        engine: Engine and number format, such as ``"onnx, fp32"``; empty where they are not known.
        rankings: Document ids by query, best first.
        scores: Logits by query, in the order of `rankings`.
        values: Measures by name and query.
        comparisons: Each measure against the first stage.
        speed: How fast it was; None where no query had a candidate.
        fused: Each measure of the order that `Settings.fusion` makes, against the reranked one: by the way of fusion,
            then by measure.
    """

    name: str
    engine: str
    rankings: dict[str, list[str]]
    scores: dict[str, list[float]]
    values: Values
    comparisons: dict[str, Comparison]
    speed: Speed | None
    fused: dict[str, dict[str, Comparison]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DatasetResult:
    """One data set: its first stage, and what each model made of it.

    Attributes:
        name: The data set.
        dataset: Its texts and judgements; `BeirDataset.usable` are the queries that count.
        first_stage: Where the candidates come from.
        top_k: Candidates of each query that were reranked, and measured before and after.
        candidates: Their ids by query, in the order of the first stage.
        first: Measures of the first stage by name and query.
        ceiling: Measures of the best order that the candidates allow.
        models: The results, in the order the models were given.
        unjudged: Queries without any judgement: not scored, not measured.
        without_relevant: Queries whose judgements name nothing relevant: not scored, not measured.
        without_candidates: Measured queries for which the first stage found nothing; each counts as 0.
    """

    name: str
    dataset: BeirDataset
    first_stage: str
    top_k: int
    candidates: dict[str, list[str]]
    first: Values
    ceiling: Values
    models: tuple[ModelResult, ...]
    unjudged: int
    without_relevant: int
    without_candidates: int

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures."""
        return tuple(self.first)

    @property
    def queries(self) -> list[str]:
        """Ids of the queries that were measured."""
        return self.dataset.usable

    def to_dict(self) -> dict[str, Any]:
        """Everything but texts, judgements and rankings, ready for JSON."""
        first, ceiling = means(self.first), means(self.ceiling)
        return {
            "dataset": self.name,
            "first_stage": self.first_stage,
            "top_k": self.top_k,
            "queries": len(self.queries),
            "queries_unjudged": self.unjudged,
            "queries_without_relevant": self.without_relevant,
            "queries_without_candidates": self.without_candidates,
            "measures": {name: {"first_stage": first[name], "ceiling": ceiling[name]} for name in self.measures},
            "models": [
                {
                    "model": model.name,
                    "engine": model.engine,
                    "measures": {name: asdict(found) for name, found in model.comparisons.items()},
                    "fusion": {
                        how: {name: asdict(found) for name, found in by_measure.items()}
                        for how, by_measure in model.fused.items()
                    },
                    "speed": None if model.speed is None else asdict(model.speed),
                }
                for model in self.models
            ],
            "per_query": {
                query: {
                    name: {
                        "first_stage": self.first[name][query],
                        "ceiling": self.ceiling[name][query],
                        "models": {model.name: model.values[name][query] for model in self.models},
                    }
                    for name in self.measures
                }
                for query in self.queries
            },
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `rerank_plugins.evaluation.evaluate` found.

    Attributes:
        datasets: One result for each folder, in the order they were given.
    """

    datasets: tuple[DatasetResult, ...]

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures."""
        return self.datasets[0].measures

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(model.name for model in self.datasets[0].models)

    def mean(self, measure: str, model: str | None = None) -> float:
        """Mean of a measure over the data sets, each counted once: of a model, or of the first stage if None."""
        found = []
        for result in self.datasets:
            values = result.first if model is None else next(m for m in result.models if m.name == model).values
            found.append(means(values)[measure])
        return float(np.mean(found))

    def corrected(self) -> dict[tuple[str, str, str], float | None]:
        """p-values by data set, model and measure, corrected by `holm` for the number of all of them."""
        compared = [
            ((result.name, model.name, measure), found.p_value)
            for result in self.datasets
            for model in result.models
            for measure, found in model.comparisons.items()
        ]
        values = holm([value for _, value in compared])
        return {key: value for (key, _), value in zip(compared, values, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "datasets": [result.to_dict() for result in self.datasets],
            "means": {
                measure: {
                    "first_stage": self.mean(measure),
                    "models": {model: self.mean(measure, model) for model in self.model_names},
                }
                for measure in self.measures
            },
        }

    def write_runs(self, directory: Path) -> list[Path]:
        """Write a TREC run of the first stage and of each model for each data set.

        Scores are logits, lowered by the least that float32 can tell where two are equal: tools that sort by score
        and break ties by document id then see the order that was measured. Those of the first stage count down to 1.

        Args:
            directory: Where to; it is made if it is not there.

        Returns:
            The files, named ``DATASET.MODEL.run``.

        Raises:
            InputError: An id has a blank in it, which the format cannot hold.
            ConfigurationError: The directory cannot be written.
        """
        written: list[Path] = []
        writable_directory(directory)
        for result in self.datasets:
            places = {
                query: [float(left) for left in range(len(found), 0, -1)] for query, found in result.candidates.items()
            }
            runs = [("first-stage", result.candidates, places)]
            runs += [(model.name, model.rankings, model.scores) for model in result.models]
            for name, rankings, scores in runs:
                path = _free(directory / f"{slug(result.name)}.{slug(name)}.run", written)
                write_file(path, _trec_run(rankings, scores, slug(name)))
                written.append(path)
        return written


def _free(path: Path, taken: Sequence[Path]) -> Path:
    number, free = 2, path
    while free in taken:
        free, number = path.with_name(f"{path.stem}.{number}.run"), number + 1
    return free


def _trec_run(rankings: Mapping[str, Sequence[str]], scores: Mapping[str, Sequence[float]], tag: str) -> str:
    lines = []
    for query, documents in rankings.items():
        for rank, (document, score) in enumerate(zip(documents, _falling(scores[query]), strict=True), 1):
            for name in (query, document):
                if len(name.split()) != 1:
                    raise InputError(
                        f"A TREC run separates its fields by blanks, so it cannot hold the id {name!r}. Rename it, or "
                        "leave out --runs."
                    )
            lines.append(f"{query} Q0 {document} {rank} {score:.9g} {tag}\n")
    return "".join(lines)


def _falling(scores: Sequence[float]) -> list[float]:
    found: list[float] = []
    for score in scores:
        value = float(np.float32(score))
        if found and value < -1e30:
            # Blank texts have the lowest float32, below which there is no room for the next one.
            value = found[-1] - max(1.0, abs(found[-1]) * 1e-3)
        elif found and value >= found[-1]:
            value = float(np.nextafter(np.float32(found[-1]), np.float32(-np.inf)))
        found.append(value)
    return found
