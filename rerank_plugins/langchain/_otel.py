"""OpenTelemetry below LangChain's runs."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from uuid import UUID

__all__ = ["current"]


def current(run_id: UUID) -> AbstractContextManager[Any]:
    """While it is entered, the span of a run is the current one, so that further spans become its children.

    OpenInference makes a span for each of LangChain's runs, but none of them the current one. Without it, nothing is
    changed.
    """
    instrumentation: Any = sys.modules.get("openinference.instrumentation.langchain")
    trace: Any = sys.modules.get("opentelemetry.trace")
    if instrumentation is None or trace is None:
        return nullcontext()
    instrumentor = instrumentation.LangChainInstrumentor()
    span = instrumentor.get_span(run_id) if instrumentor.is_instrumented_by_opentelemetry else None
    if span is None:
        return nullcontext()
    result: AbstractContextManager[Any] = trace.use_span(
        span, end_on_exit=False, record_exception=False, set_status_on_exception=False
    )
    return result
