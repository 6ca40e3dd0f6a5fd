"""Measures by ir-measures, and the comparison of two runs query by query."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.evaluation._beir import BeirDataset

DEFAULT_MEASURES = ("nDCG@10", "MRR@10", "R@10", "AP")

Values = dict[str, dict[str, float]]
"""Values by measure and query id."""

_SAME = 1e-9
"""Differences up to this are rounding."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A measure before and after reranking, over the same queries.

    Attributes:
        before: Mean of the first stage.
        after: Mean of the reranked order.
        difference: ``after - before``.
        low: Lower end of the 95 % confidence interval of the difference; None where it is not defined.
        high: Upper end.
        p_value: Two-sided, of the hypothesis that the difference is 0; None where it is not defined.
        better: Queries whose value rose.
        worse: Queries whose value fell.
        same: All others.
    """

    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    better: int
    worse: int
    same: int


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compares the values of two runs, query by query, by a paired t-test and its 95 % confidence interval.

    For means of retrieval measures the t-test keeps its nominal error rate and has the most power among the usual
    paired tests, even where differences are not normal (Urbano et al. 2019), and it agrees with the randomisation and
    bootstrap tests in practice (Smucker et al. 2007). Nothing is corrected for the number of models and measures that
    are compared: `holm` does that. Interval and p-value are not defined,
    hence None, for fewer than two queries, or where all queries differ by the same amount other than 0.

    Args:
        before: Values of the first run, one for each query.
        after: Values of the second run, in the same order.

    References:
        J. Urbano, H. Lima, A. Hanjalic. Statistical Significance Testing in Information Retrieval: An Empirical
        Analysis of Type I, Type II and Type III Errors. SIGIR 2019.
        M. Smucker, J. Allan, B. Carterette. A Comparison of Statistical Significance Tests for Information Retrieval
        Evaluation. CIKM 2007.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    change = second - first
    low, high, p_value = _t_test(change)
    better, worse = int((change > _SAME).sum()), int((change < -_SAME).sum())
    return Comparison(
        before=float(first.mean()),
        after=float(second.mean()),
        difference=float(change.mean()),
        low=low,
        high=high,
        p_value=p_value,
        better=better,
        worse=worse,
        same=len(change) - better - worse,
    )


def _t_test(change: NDArray[np.float64]) -> tuple[float | None, float | None, float | None]:
    if len(change) < 2:
        return None, None, None
    if float(np.ptp(change)) <= _SAME:
        return (0.0, 0.0, 1.0) if abs(float(change[0])) <= _SAME else (None, None, None)
    stats: Any = import_extra("scipy.stats", "eval")
    test = stats.ttest_1samp(change, 0.0)
    interval = test.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(test.pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for how many there are, in their order; None where there is none, which counts as no test.

    Below 0.05 after it, a difference is unlikely to be one that stood out only because many were looked at.

    References:
        S. Holm. A Simple Sequentially Rejective Multiple Test Procedure. Scandinavian Journal of Statistics, 1979.
    """
    known = sorted((value, place) for place, value in enumerate(p_values) if value is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (value, place) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        corrected[place] = highest
    return corrected


def split_measures(text: str) -> list[str]:
    """Names of measures between blanks or commas, those within parentheses excepted: ``"nDCG@10 AP(rel=2)"``."""
    return [name for name in re.split(r"[\s,]+(?![^(]*\))", text.strip()) if name]


def parse_measures(names: Sequence[str]) -> dict[str, Any]:
    """Measures of ir-measures by the names that were given.

    Raises:
        ConfigurationError: If there is no name, or one that ir-measures does not know or cannot compute.
    """
    library: Any = import_extra("ir_measures", "eval")
    if not names:
        raise ConfigurationError(f"Expected one measure or more, such as {' '.join(DEFAULT_MEASURES)}; got none.")
    parsed = {}
    for name in names:
        try:
            measure = library.parse_measure(name)
            # A cutoff of 0 ends the process in trec_eval.
            if measure.params.get("cutoff", 1) < 1:
                raise ValueError("the cutoff must be 1 or more")
            list(library.iter_calc([measure], {"q": {"d": 1}}, {"q": {"d": 1.0}}))
        except Exception as error:
            raise ConfigurationError(
                f"The measure {name!r} cannot be computed: {error}. Expected names of ir-measures, such as "
                f"{' '.join(DEFAULT_MEASURES)} or AP(rel=2); see https://ir-measur.es/en/latest/measures.html."
            ) from error
        parsed[name] = measure
    return parsed


def measure_queries(dataset: BeirDataset, run: Mapping[str, Mapping[str, float]], measures: Sequence[str]) -> Values:
    """Values of measures for every usable query.

    Which queries count: those with a judged document of a grade above 0 (`BeirDataset.usable`). All others are left
    out, since nDCG, AP and recall are not defined without a relevant document: averaging them as 0 would only hide
    differences. A query that the run lacks counts as 0, as ``trec_eval -c`` does, so that finding nothing is no
    advantage. Relevant documents count whether or not the run, or even the corpus, holds them; documents without a
    judgement count as not relevant. A measure with a higher threshold, such as ``AP(rel=2)``, is 0 for a query that
    has no such document.

    Args:
        dataset: The test set.
        run: What to measure.
        measures: Names such as ``"nDCG@10"``, ``"MRR@10"``, ``"AP"``, ``"R@10"``, ``"AP(rel=2)"``.

    Raises:
        ConfigurationError: If a measure's name is unknown.
    """
    library: Any = import_extra("ir_measures", "eval")
    parsed = parse_measures(measures)
    names: dict[Any, list[str]] = {}
    for name, measure in parsed.items():
        names.setdefault(measure, []).append(name)
    queries = dataset.usable
    values: Values = {name: dict.fromkeys(queries, 0.0) for name in parsed}
    qrels = {query: dataset.qrels[query] for query in queries}
    for metric in library.iter_calc(list(names), qrels, {query: dict(run.get(query, {})) for query in queries}):
        for name in names[metric.measure]:
            values[name][metric.query_id] = float(metric.value)
    return values


def measure_run(
    dataset: BeirDataset, run: Mapping[str, Mapping[str, float]], measures: Sequence[str] = DEFAULT_MEASURES
) -> dict[str, float]:
    """Means of measures, by the names given; see `measure_queries` for which queries count.

    Raises:
        ConfigurationError: If a measure's name is unknown.
    """
    return means(measure_queries(dataset, run, measures))


def means(values: Values) -> dict[str, float]:
    """Mean of each measure over its queries."""
    return {name: float(np.mean(list(found.values()))) for name, found in values.items()}


def best_order(candidates: Iterable[str], grades: Mapping[str, int]) -> list[str]:
    """The best order that candidates allow: by grade, those without a judgement last."""
    return sorted(candidates, key=lambda document: -grades.get(document, 0))
