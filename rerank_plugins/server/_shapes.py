"""Requests and answers in the shapes that clients of rerank servers speak."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from rerank_plugins._texts import is_blank
from rerank_plugins.selection import BLANK_LOGIT
from rerank_plugins.types import RankedCandidate, Ranking

__all__ = ["Ask", "Refused", "Shape", "answer", "error_body", "parse", "shape_of"]

Shape = Literal["cohere", "openai", "tei"]
"""``cohere``: version 2, errors as ``{"message"}``; ``openai``: Jina, vLLM and Infinity, errors as
``{"error": {...}}``; ``tei``: text-embeddings-inference.
"""

BLANK_SCORE = -700.0
"""Raw score of a blank text: far below all others, and clients that take its exponential do not overflow."""


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: For the client; may hold what it sent.
        kind: What text-embeddings-inference calls it.
    """

    def __init__(self, status: int, message: str, kind: str = "Validation") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind


class SpansAsked(NamedTuple):
    """Cohere's ``relevant_spans``: which parts of a text the answer tells."""

    threshold: float = 0.1
    """Least probability of a span."""
    most: int | None = None
    """Most spans of a text; None for all."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for.

    Attributes:
        shape: In which the answer is given.
        query: The query.
        texts: The texts.
        top_n: Most results; None for all.
        raw: Logits instead of probabilities.
        documents: How texts are given back: not at all, as strings, or as objects with ``text``.
        strict: Whether a text that is too long is an error.
        instruction: Put to the model with the query.
        max_length: Most tokens of a pair.
        spans: Which spans of each text are told; None for none.
    """

    shape: Shape
    query: str
    texts: list[str]
    top_n: int | None = None
    raw: bool = False
    documents: Literal["none", "string", "object"] = "none"
    strict: bool = False
    instruction: str | None = None
    max_length: int | None = None
    spans: SpansAsked | None = None


def parse(path: str, body: bytes, *, agent: str, max_texts: int, raw: bool) -> Ask:
    """Read a request.

    Args:
        path: Of the endpoint.
        body: JSON.
        agent: What the client calls itself.
        max_texts: Most texts.
        raw: Whether scores are logits unless the request says otherwise.

    Raises:
        Refused: It cannot be read; the shape of the error is `shape_of` its path and body.
    """
    try:
        given = json.loads(body)
    except UnicodeDecodeError:
        raise Refused(400, "The body must be JSON in UTF-8.") from None
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise Refused(400, f"The body must be JSON: {what}.") from None
    if not isinstance(given, dict):
        raise Refused(400, f"The body must be a JSON object; got {_kind(given)}.")
    if path in ("/rerank", "/") and "texts" in given:
        return _tei(given, max_texts, raw)
    ask = _common(given, "documents", "cohere" if path == "/v2/rerank" else "openai", max_texts)
    given_raw = _flag(given, "raw_scores")
    activation = _flag(given, "use_activation")
    if given_raw is None and activation is not None:
        given_raw = not activation
    side = given.get("truncation_side")
    if side not in (None, "right"):
        raise Refused(400, f"truncation_side must be 'right': texts are cut at their end; got {_shown(side)}.")
    longest = _integer(given, "truncate_prompt_tokens")
    if longest is not None and longest != -1 and longest < 1:
        raise Refused(400, f"truncate_prompt_tokens must be -1 or at least 1; got {longest}.")
    return replace(
        ask,
        raw=raw if given_raw is None else given_raw,
        documents=_documents(path, agent, _flag(given, "return_documents")),
        instruction=_string(given, "instruction", optional=True),
        max_length=None if longest == -1 else longest,
        spans=_spans(given.get("relevant_spans")) if ask.shape == "cohere" else None,
    )


def _spans(given: Any) -> SpansAsked | None:
    """What ``{"mode": "enabled", "threshold": 0.1, "max_spans": 3}`` asks for."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise Refused(400, f"relevant_spans must be an object or null; got {_kind(given)}.")
    mode = given.get("mode")
    if mode not in ("enabled", "disabled"):
        raise Refused(400, f"relevant_spans.mode must be 'enabled' or 'disabled'; got {_shown(mode)}.")
    threshold = given.get("threshold")
    if threshold is None:
        threshold = SpansAsked().threshold
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise Refused(400, f"relevant_spans.threshold must be a number from 0 to 1; got {_shown(threshold)}.")
    most = _integer(given, "max_spans")
    if most is not None and most < 1:
        raise Refused(400, f"relevant_spans.max_spans must be at least 1; got {most}.")
    return SpansAsked(float(threshold), most) if mode == "enabled" else None


def shape_of(path: str, body: bytes) -> Shape:
    """The shape of the error for a request that could not be read."""
    if path == "/v2/rerank":
        return "cohere"
    return "tei" if path in ("/rerank", "/") and b'"texts"' in body and b'"documents"' not in body else "openai"


def _documents(path: str, agent: str, asked: bool | None) -> Literal["none", "string", "object"]:
    if path == "/v2/rerank":
        # Cohere's second version gives none back.
        return "object" if asked else "none"
    if path.startswith("/infinity/"):
        return "string" if asked else "none"
    if path == "/rerank" and agent.startswith("litellm/"):
        # Its providers for vLLM and for Infinity send the same request, always ask for documents, and each fails on
        # the other's form of them; both do without.
        return "none"
    # Jina gives them unless told not to.
    return "object" if asked or (asked is None and path == "/v1/rerank") else "none"


def _tei(given: dict[str, Any], max_texts: int, raw: bool) -> Ask:
    ask = _common(given, "texts", "tei", max_texts)
    side = given.get("truncation_direction")
    if not isinstance(side, str | None) or (side or "right").lower() != "right":
        raise Refused(422, f"truncation_direction must be 'right': texts are cut at their end; got {_shown(side)}.")
    given_raw = _flag(given, "raw_scores", 422)
    return replace(
        ask,
        raw=raw if given_raw is None else given_raw,
        documents="string" if _flag(given, "return_text", 422) else "none",
        strict=_flag(given, "truncate", 422) is False,
    )


def _common(given: dict[str, Any], name: str, shape: Shape, max_texts: int) -> Ask:
    status = 422 if shape == "tei" else 400
    query = _string(given, "query", status=status)
    assert query is not None
    if is_blank(query):
        raise Refused(400, "query must not be blank.", "Empty")
    texts = given.get(name)
    if not isinstance(texts, list):
        raise Refused(status, f"{name} must be a list of strings; got {_kind(texts)}.")
    if not texts:
        raise Refused(400, f"{name} must not be empty.", "Empty")
    if len(texts) > max_texts:
        raise Refused(status, f"{name} may have at most {max_texts} items; got {len(texts)}.")
    read = []
    for i, item in enumerate(texts):
        text = item.get("text") if isinstance(item, Mapping) and shape != "tei" else item
        if not isinstance(text, str):
            also = "" if shape == "tei" else ' or an object with a string "text"'
            raise Refused(status, f"{name}[{i}] must be a string{also}; got {_kind(item)}.")
        read.append(text)
    top_n = None if shape == "tei" else _integer(given, "top_n")
    if top_n is not None and top_n < 0:
        raise Refused(status, f"top_n must be at least 0; got {top_n}.")
    # 0 means all, as in vLLM.
    return Ask(shape=shape, query=query, texts=read, top_n=top_n or None)


def _string(given: Mapping[str, Any], name: str, *, optional: bool = False, status: int = 400) -> str | None:
    value = given.get(name)
    if isinstance(value, str) or (optional and value is None):
        return value
    raise Refused(status, f"{name} must be a string; got {_kind(value) if name in given else 'nothing'}.")


def _flag(given: Mapping[str, Any], name: str, status: int = 400) -> bool | None:
    value = given.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise Refused(status, f"{name} must be true, false or null; got {_kind(value)}.")


def _integer(given: Mapping[str, Any], name: str) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 2**31:
        raise Refused(400, f"{name} must be an integer or null; got {_kind(value)}.")
    return value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    return repr(value[:20]) if isinstance(value, str) else _kind(value)


def answer(ask: Ask, ranking: Ranking, model: str) -> bytes:
    """The answer to a request, best first.

    Args:
        ask: The request.
        ranking: All its texts, ranked.
        model: Name of the model.
    """
    items = list(ranking)[: ask.top_n]
    scores = _scores(ask, items)
    if ask.shape == "tei":
        rows = [
            {"index": item.index, "score": score, **({} if ask.documents == "none" else {"text": item.text})}
            for item, score in zip(items, scores, strict=True)
        ]
        return json.dumps(rows).encode()
    results = [
        {"index": item.index, "relevance_score": score, **_document(ask, item), **_told_spans(ask, item)}
        for item, score in zip(items, scores, strict=True)
    ]
    said: dict[str, Any] = {"id": str(uuid.uuid4()), "results": results}
    if ask.shape == "cohere":
        said["meta"] = {"api_version": {"version": "2"}}
    else:
        tokens = _tokens(ask)
        said |= {
            "object": "list",
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    return json.dumps(said).encode()


def _scores(ask: Ask, items: Sequence[RankedCandidate]) -> list[float]:
    if not ask.raw:
        return [float(item.score or 0.0) for item in items]
    logits = (item.logit for item in items)
    return [BLANK_SCORE if logit is None or logit <= BLANK_LOGIT else float(logit) for logit in logits]


def _document(ask: Ask, item: RankedCandidate) -> dict[str, Any]:
    if ask.documents == "none":
        return {}
    return {"document": item.text if ask.documents == "string" else {"text": item.text}}


def _told_spans(ask: Ask, item: RankedCandidate) -> dict[str, Any]:
    if ask.spans is None:
        return {}
    likely = [span._asdict() for span in item.spans if span.score >= ask.spans.threshold]
    return {"relevant_spans": likely[: ask.spans.most]}


def _tokens(ask: Ask) -> int:
    """About how many tokens were read, at four characters a token: nobody bills them."""
    return len(ask.texts) * (len(ask.query) // 4 + 1) + sum(len(text) // 4 + 1 for text in ask.texts)


_KINDS = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}


def error_body(shape: Shape, status: int, message: str, kind: str = "Validation") -> bytes:
    """An error in the shape that the client expects."""
    if shape == "cohere":
        return json.dumps({"message": message}).encode()
    if shape == "tei":
        return json.dumps({"error": message, "error_type": kind}).encode()
    default = "InternalServerError" if status >= 500 else "BadRequestError"
    inner = {"message": message, "type": _KINDS.get(status, default), "param": None, "code": status}
    return json.dumps({"error": inner}).encode()
