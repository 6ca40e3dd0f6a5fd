"""How a first stage is asked for a number of candidates, whatever its setting for that is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from numbers import Integral
from typing import Any, NamedTuple, cast

from annotated_types import Le, Lt
from langchain_core.documents import BaseDocumentCompressor
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableConfig,
    RunnableSequence,
    RunnableWithFallbacks,
)
from langchain_core.runnables.base import RunnableBinding, RunnableBindingBase
from langchain_core.runnables.config import merge_configs
from langchain_core.runnables.configurable import DynamicRunnable

__all__ = ["Asked", "asking_for"]

_NAMES = (
    "k",
    "top_k",
    "top_n",
    "max_documents",
    "max_results",
    "num_results",
    "n_results",
    "number_of_results",
    "num_documents",
    "num_docs",
    "max_docs",
    "n_docs",
    "top_k_results",
    "similarity_top_k",
    "limit",
)
"""What retrievers and compressors call the number of their results."""

_DEFAULT_FETCH_K = 20
"""What LangChain's vector stores fetch for MMR, and FAISS for a filter, unless they are told."""


class Asked(NamedTuple):
    """A first stage that was asked for a number of candidates."""

    retriever: RetrieverLike
    """A copy; the caller's retriever is never changed."""
    doubt: str | None
    """Why it may return fewer although it could find more; None where it returns as many as it finds."""


def asking_for(retriever: RetrieverLike, k: int, config: RunnableConfig, *, is_async: bool) -> Asked:
    """A copy of a first stage that returns `k` candidates, as far as that can be asked for.

    Every setting is raised and none is lowered, so it never returns fewer than the caller's retriever does by itself.
    Runnables around a retriever (``with_retry``, ``with_fallbacks``, ``with_config``, ``bind``, configurable ones,
    branches, a chain that ends in one) and retrievers around retrievers (ensembles, query rewriters, compression,
    rerankers) are looked into.

    Args:
        retriever: The caller's retriever.
        k: The number of candidates.
        config: Of the call; it decides what a configurable retriever is.
        is_async: Whether it will be called by ``ainvoke``.
    """
    return _Asking(k, is_async).asked(retriever, config)


def _is_retriever(value: Any) -> bool:
    """Whether a value is a retriever, or a Runnable around one."""
    while True:
        if isinstance(value, RunnableBindingBase):
            value = value.bound
        elif isinstance(value, RunnableWithFallbacks):
            value = value.runnable
        elif isinstance(value, DynamicRunnable):
            value = value.default
        elif isinstance(value, RunnableSequence):
            value = value.last
        elif isinstance(value, RunnableBranch):
            value = value.default
        else:
            return isinstance(value, BaseRetriever)


class _Asking(NamedTuple):
    k: int
    is_async: bool

    def asked(self, retriever: Runnable[Any, Any], config: RunnableConfig) -> Asked:
        if isinstance(retriever, DynamicRunnable):
            return self._configured(retriever, config)
        if isinstance(retriever, RunnableBindingBase):
            inner = merge_configs(retriever.config, config)
            inner = merge_configs(inner, *(make(inner) for make in retriever.config_factories))
            bound = self.asked(retriever.bound, inner)
            changes = {"bound": bound.retriever, "kwargs": self._raised(retriever.kwargs)}
            return Asked(retriever.model_copy(update=changes), bound.doubt)
        if isinstance(retriever, RunnableWithFallbacks):
            first = self.asked(retriever.runnable, config)
            others = [self.asked(other, config) for other in retriever.fallbacks]
            changes = {"runnable": first.retriever, "fallbacks": [other.retriever for other in others]}
            doubt = next((one.doubt for one in (first, *others) if one.doubt), None)
            return Asked(retriever.model_copy(update=changes), doubt)
        if isinstance(retriever, RunnableBranch):
            return self._branches(retriever, config)
        if isinstance(retriever, RunnableSequence):
            return self._sequence(retriever, config)
        if isinstance(retriever, BaseRetriever):
            return self._retriever(retriever, config)
        return Asked(retriever, f"nothing is known of how a {type(retriever).__name__} is asked for more")

    def _configured(self, retriever: DynamicRunnable[Any, Any], config: RunnableConfig) -> Asked:
        # What it is depends on the call, and so does the setting that is raised.
        without = cast(RunnableConfig, {key: value for key, value in config.items() if key != "callbacks"})
        concrete, prepared = retriever.prepare(without)
        inner = self.asked(concrete, prepared)
        own = {**(retriever.config or {}), "configurable": prepared.get("configurable", {})}
        return Asked(RunnableBinding(bound=inner.retriever, config=cast(RunnableConfig, own)), inner.doubt)

    def _branches(self, branch: RunnableBranch[Any, Any], config: RunnableConfig) -> Asked:
        default = self.asked(branch.default, config)
        others = [(condition, self.asked(chosen, config)) for condition, chosen in branch.branches]
        changes = {
            "default": default.retriever,
            "branches": [(condition, chosen.retriever) for condition, chosen in others],
        }
        doubt = next((one.doubt for one in (default, *(chosen for _, chosen in others)) if one.doubt), None)
        return Asked(branch.model_copy(update=changes), doubt)

    def _sequence(self, chain: RunnableSequence[Any, Any], config: RunnableConfig) -> Asked:
        steps = [self.asked(step, config) if _is_retriever(step) else None for step in chain.steps]
        if all(step is None for step in steps):
            return Asked(chain, "no step of the chain is a retriever")
        first, *middle, last = [
            old if new is None else new.retriever for old, new in zip(chain.steps, steps, strict=True)
        ]
        changed = chain.model_copy(update={"first": first, "middle": middle, "last": last})
        doubt = "the steps after the retriever may drop some" if steps[-1] is None else steps[-1].doubt
        return Asked(changed, doubt)

    def _retriever(self, retriever: BaseRetriever, config: RunnableConfig) -> Asked:
        if _is_reranker(retriever):
            return self._reranker(retriever, config)
        doubts: list[str] = []
        changes = self._raised_fields(retriever, doubts)
        known = bool(changes)
        search = self._raised_search(retriever, known)
        if search is not None:
            changes["search_kwargs"] = search
            known |= any(name in search for name in _NAMES)
        parts, inner_doubts = self._raised_parts(retriever, config)
        changed = retriever.model_copy(update=changes | parts) if changes or parts else retriever

        accepted = self._parameters(retriever)
        doubts += [doubt for doubt in inner_doubts if doubt]
        if {"vectorstore", "docstore"} <= set(type(retriever).model_fields):
            doubts.append(f"{type(retriever).__name__} searches parts, several of which can belong to one document")
        if not (known or accepted or inner_doubts):
            doubts.append(
                f"{type(retriever).__name__} has none of the settings that are known here "
                f"({', '.join(_NAMES)}, search_kwargs['k'])"
            )
        return Asked(changed.bind(**accepted) if accepted else changed, "; ".join(doubts) or None)

    def _reranker(self, retriever: Any, config: RunnableConfig) -> Asked:
        """A `RerankRetriever`: its ``top_n`` counts results, its ``k`` candidates."""
        changes: dict[str, Any] = {}
        doubt = None
        if retriever.top_n is not None:
            changes["top_n"] = max(retriever.top_n, self.k)
        if retriever.k is not None:
            # It asks its own first stage for them, and says what came of it.
            changes["k"] = max(retriever.k, self.k)
        else:
            changes["retriever"], doubt = self.asked(retriever.retriever, config)
        return Asked(retriever.model_copy(update=changes), doubt)

    def _raised_fields(self, item: BaseRetriever | BaseDocumentCompressor, doubts: list[str]) -> dict[str, Any]:
        """The fields for the number of results, raised."""
        changes: dict[str, Any] = {}
        for name in _NAMES:
            field = type(item).model_fields.get(name)
            if field is None:
                continue
            value = getattr(item, name, None)
            if value is None and (name == "top_n" or isinstance(item, BaseDocumentCompressor)):
                # It keeps all that it gets.
                changes[name] = None
            elif value is None or _is_number(value):
                most = min((_largest(bound) for bound in field.metadata if isinstance(bound, Le | Lt)), default=self.k)
                changes[name] = max(int(value or 0), min(self.k, most))
                if changes[name] < self.k:
                    doubts.append(f"{name} of {type(item).__name__} is {most} at most")
        return changes

    def _raised_search(self, retriever: BaseRetriever, known: bool) -> dict[str, Any] | None:
        """``search_kwargs``, raised; None where there are none."""
        given = getattr(retriever, "search_kwargs", None)
        if "search_kwargs" not in type(retriever).model_fields or not isinstance(given, Mapping | None):
            return None
        search = self._raised(given or {})
        parameters = _search_parameters(retriever)
        # A retriever with a field for it would give it twice.
        if not known and "k" in parameters:
            search.setdefault("k", self.k)
        takes_fetch_k = "fetch_k" in search or (
            "search_type" in type(retriever).model_fields and "fetch_k" in parameters
        )
        if takes_fetch_k and search.get("fetch_k", _DEFAULT_FETCH_K) < self.k:
            search["fetch_k"] = self.k
        return search

    def _raised_parts(
        self, retriever: BaseRetriever, config: RunnableConfig
    ) -> tuple[dict[str, Any], list[str | None]]:
        """The retrievers and compressors that a retriever is made of, raised; and a doubt for each of the former."""
        parts: dict[str, Any] = {}
        doubts: list[str | None] = []
        for name in type(retriever).model_fields:
            value = getattr(retriever, name, None)
            if isinstance(value, BaseDocumentCompressor):
                parts[name] = self._compressor(value)
            elif _is_retriever(value):
                parts[name], doubt = self.asked(cast(Runnable[Any, Any], value), config)
                doubts.append(doubt)
            elif isinstance(value, list | tuple) and any(map(_is_retriever, value)):
                asked = [self.asked(one, config) for one in value]
                parts[name] = [one.retriever for one in asked]
                # One that returns enough is enough for all.
                each = [one.doubt for one in asked]
                doubts.append(None if None in each else "; ".join(filter(None, each)))
        return parts, doubts

    def _compressor(self, compressor: BaseDocumentCompressor) -> BaseDocumentCompressor:
        changes = self._raised_fields(compressor, [])
        steps = getattr(compressor, "transformers", None)
        if isinstance(steps, Sequence):
            changes["transformers"] = [
                self._compressor(step) if isinstance(step, BaseDocumentCompressor) else step for step in steps
            ]
        return compressor.model_copy(update=changes) if changes else compressor

    def _parameters(self, retriever: BaseRetriever) -> dict[str, int]:
        """The keywords for the number of results that a call takes by name."""
        method = retriever._aget_relevant_documents if self.is_async else retriever._get_relevant_documents
        return {name: self.k for name in _parameter_names(method) if name in _NAMES}

    def _raised(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: max(value, self.k) if name in _NAMES and _is_number(value) else value
            for name, value in keywords.items()
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_reranker(item: Any) -> bool:
    """Whether an item is a `RerankRetriever`, whose ``k`` counts candidates and whose ``top_n`` counts results."""
    return isinstance(item, BaseRetriever) and {"k", "top_n", "retriever"} <= set(type(item).model_fields)


def _largest(bound: Le | Lt) -> int:
    return int(cast(int, bound.le)) if isinstance(bound, Le) else int(cast(int, bound.lt)) - 1


def _search_parameters(retriever: BaseRetriever) -> set[str]:
    """Parameters of the vector store's method that gets ``search_kwargs``."""
    kind = getattr(retriever, "search_type", "")
    methods = {"mmr": "max_marginal_relevance_search", "similarity_score_threshold": "similarity_search_with_score"}
    method = methods.get(str(getattr(kind, "value", kind)), "similarity_search")
    return _parameter_names(getattr(getattr(retriever, "vectorstore", None), method, None))


def _parameter_names(function: Any) -> set[str]:
    try:
        return set(signature(function).parameters)
    except (TypeError, ValueError):
        return set()
