"""What is seen from outside: one OpenTelemetry span and one line of the debug log for each rerank.

Spans appear as soon as the application has imported ``opentelemetry`` and set up a tracer provider; nothing is to be
switched on here. They have the attributes that OpenInference gives a reranker, and ``gen_ai.operation.name=rerank``.

Queries and texts are recorded unless one of these says otherwise: ``record_content(False)``, or the environment
variables ``RERANK_PLUGINS_TRACE_CONTENT=false``, ``OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=false``,
``OPENINFERENCE_HIDE_INPUTS=true`` (queries and candidates) and ``OPENINFERENCE_HIDE_OUTPUTS=true`` (what is kept).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rerank_plugins import __version__
from rerank_plugins.settings import Settings
from rerank_plugins.types import Candidate, Limits, Ranking

__all__ = ["record_content", "reranking"]

_log = logging.getLogger("rerank_plugins")
_content = True


def record_content(on: bool) -> None:
    """Whether spans of this process have queries and texts; they have identifiers, scores and counts in any case."""
    global _content
    _content = bool(on)


@contextmanager
def reranking(
    settings: Settings, jobs: Sequence[tuple[str, Sequence[Candidate]]], limits: Limits
) -> Iterator[Callable[[Sequence[Ranking]], None]]:
    """Watch requests that are ranked together.

    Args:
        settings: Of the reranker.
        jobs: Query and candidates of each request.
        limits: What is kept of each.

    Yields:
        A function that is to be called with the rankings.
    """
    start = time.perf_counter()
    done: list[Ranking] = []
    trace = _tracing()
    spans = [] if trace is None else [_started(trace, settings, limits, items) for _, items in jobs]
    with ExitStack() as stack:
        if trace is not None and len(spans) == 1:
            # What happens below, such as a request to a server, becomes its child.
            stack.enter_context(
                trace.use_span(spans[0], end_on_exit=False, record_exception=False, set_status_on_exception=False)
            )
        try:
            yield done.extend
        except BaseException as error:
            for span in spans:
                _fail(trace, span, error)
            raise
        finally:
            for number, span in enumerate(spans):
                _describe(span, settings, limits, *jobs[number], done[number] if done else None)
                span.end()
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug(
            "reranked: model %s, %d queries, %d candidates, %d kept, %.1f ms%s",
            settings.model_name,
            len(jobs),
            sum(len(items) for _, items in jobs),
            sum(map(len, done)),
            1000 * (time.perf_counter() - start),
            ", not all scored" if any(ranking.fallback for ranking in done) else "",
        )


def _tracing() -> Any:
    """The module ``opentelemetry.trace``, where an application uses it and has not suppressed instrumentation."""
    # Who sets up tracing has imported it: here it need not be, which would take time where nobody traces.
    trace, context = sys.modules.get("opentelemetry.trace"), sys.modules.get("opentelemetry.context")
    if trace is None or context is None:
        return None
    suppressed = context.get_value(getattr(context, "_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation"))
    return None if suppressed else trace


def _started(trace: Any, settings: Settings, limits: Limits, items: Sequence[Candidate]) -> Any:
    tracer = trace.get_tracer("rerank_plugins", __version__)
    # Samplers see only what a span begins with.
    return tracer.start_span(f"rerank {settings.model_name}", attributes=_summary(settings, limits, items))


def _summary(settings: Settings, limits: Limits, items: Sequence[Candidate]) -> dict[str, Any]:
    return {
        "openinference.span.kind": "RERANKER",
        "gen_ai.operation.name": "rerank",
        "gen_ai.request.model": settings.model_name,
        "reranker.model_name": settings.model_name,
        "reranker.top_k": len(items) if limits.top_n is None else int(limits.top_n),
    }


def _describe(
    span: Any,
    settings: Settings,
    limits: Limits,
    query: str,
    items: Sequence[Candidate],
    ranking: Ranking | None,
) -> None:
    if not span.is_recording():
        return
    inputs, outputs = _shows("OPENINFERENCE_HIDE_INPUTS"), _shows("OPENINFERENCE_HIDE_OUTPUTS")
    documents: dict[str, Any] = {}
    for i, candidate in enumerate(items):
        part = f"reranker.input_documents.{i}.document"
        documents |= _document(part, candidate, i, candidate.first_stage_score, inputs)
    for i, item in enumerate(ranking or ()):
        part = f"reranker.output_documents.{i}.document"
        documents |= _document(part, item.candidate, item.index, item.score, outputs)
    span.set_attributes(documents)
    # Last: where a span may have no more attributes, the oldest are dropped.
    asked = {"reranker.query": query, "input.value": query, "input.mime_type": "text/plain"} if inputs else {}
    failed = {} if ranking is None or ranking.fallback is None else {"rerank.fallback": ranking.fallback}
    span.set_attributes({**asked, **failed, **_summary(settings, limits, items)})


def _document(part: str, candidate: Candidate, index: int, score: float | None, content: bool) -> dict[str, Any]:
    found: dict[str, Any] = {f"{part}.id": str(index) if candidate.id is None else str(candidate.id)}
    if score is not None:
        found[f"{part}.score"] = float(score)
    if content:
        found[f"{part}.content"] = candidate.text
    return found


def _fail(trace: Any, span: Any, error: BaseException) -> None:
    kind = type(error).__qualname__
    span.set_attribute("error.type", kind)
    # Messages quote the beginning of a query or a text.
    shown = _shows("OPENINFERENCE_HIDE_INPUTS")
    if shown:
        span.record_exception(error)
    span.set_status(trace.Status(trace.StatusCode.ERROR, f"{kind}: {error}" if shown else kind))


def _shows(hide: str) -> bool:
    """Whether content is recorded, unless a variable of OpenInference hides this part of it."""
    switches = ("RERANK_PLUGINS_TRACE_CONTENT", "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT")
    off = any(_says(name, "false", "0", "no", "off", "no_content") for name in switches)
    return _content and not off and not _says(hide, "true", "1", "yes", "on")


def _says(variable: str, *values: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in values
