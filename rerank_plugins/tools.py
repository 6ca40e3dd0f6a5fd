"""Tools that fit a request, best first: for agents that have more tools than a language model should read."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from rerank_plugins import fusion, selection
from rerank_plugins._requests import checked_query
from rerank_plugins._texts import is_blank
from rerank_plugins._threads import in_thread
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.reranker import Reranker

__all__ = ["arank_tools", "bm25", "embedding_similarity", "rank_tools", "tool_name", "tool_text"]

T = TypeVar("T")
FirstStage = Callable[[str, Sequence[str]], Sequence[float] | NDArray[np.float64]]
"""A request and the texts of tools in, one score for each out; higher is better."""

WEIGHT = 0.3
"""Of the first stage beside the cross-encoder; see docs/agents.md for what was measured."""
CACHED_PAIRS = 20_000
"""Scores that are kept of (request, tool) pairs, about 150 bytes each: an agent asks again with the same ones."""
_LONGEST_QUERY = 1_000
"""Characters of a request that are read. Of a longer one the two ends are: what is asked stands in one of them."""
_LONGEST_TEXT = 1_000
"""Characters of a tool that are read: its name and what it does come first."""


def rank_tools(
    query: str | Sequence[str],
    tools: Iterable[T],
    top_n: int | None = None,
    reranker: Reranker | None = None,
    *,
    min_score: float | None = None,
    first_stage: FirstStage | None = None,
    weight: float = WEIGHT,
) -> list[T]:
    """Rank tools by how well they fit a request.

    A tool is read by the words of its name, its description and the names of its arguments. The scores of the
    cross-encoder and those of a first stage, both brought to 0..1 within the list, are summed.

    Args:
        query: The request, or several, such as the last turns of a conversation: a tool counts by the one that it
            fits best.
        tools: JSON schemas of OpenAI (chat completions or responses), Anthropic, MCP, Gemini or Bedrock; tools of
            LangChain, LlamaIndex or MCP; functions and pydantic models; (name, description) pairs.
        top_n: Keep the best this many; None keeps all.
        reranker: Scores the pairs; None takes the bundled model, with a cache of pairs that it has scored. Settings
            that change its order (``fusion``, ``adjust``, ``dedup``, ``order``) do not count here.
        min_score: Keep those that the cross-encoder gives at least this score; None keeps all.
        first_stage: Called with a request and the texts of all tools; returns one score for each. None takes `bm25`.
            See `embedding_similarity` for embedding models.
        weight: Of the first stage, from 0 to 1.

    Returns:
        The tools themselves, best first.

    Raises:
        ConfigurationError: `top_n`, `min_score` or `weight` cannot work.
        InputError: The request is blank, or something is no tool.
        ScoringError: Scoring failed.

    Example:
        >>> from rerank_plugins.tools import rank_tools
        >>> tools = [("send_email", "Sends an email."), ("get_weather", "Forecasts the weather of a city.")]
        >>> rank_tools("Will it rain in Lisbon tomorrow?", tools, top_n=1)
        [('get_weather', 'Forecasts the weather of a city.')]
    """
    given = _listed(tools)
    order = tool_order(
        query, given, top_n, reranker, min_score=min_score, first_stage=first_stage, weight=weight
    ).positions
    return [given[i] for i in order]


async def arank_tools(
    query: str | Sequence[str],
    tools: Iterable[T],
    top_n: int | None = None,
    reranker: Reranker | None = None,
    *,
    min_score: float | None = None,
    first_stage: FirstStage | None = None,
    weight: float = WEIGHT,
) -> list[T]:
    """As `rank_tools`, without blocking the event loop."""
    return await in_thread(
        rank_tools, query, tools, top_n, reranker, min_score=min_score, first_stage=first_stage, weight=weight
    )


class ToolOrder(NamedTuple):
    """Which tools fit, best first."""

    positions: list[int]
    """In the list of tools, best first."""
    scores: list[float | None]
    """What the cross-encoder gave each of them; None where it was not scored."""
    fallback: str | None
    """Why some were not scored, or None."""


def tool_order(
    query: str | Sequence[str],
    tools: Sequence[Any],
    top_n: int | None = None,
    reranker: Reranker | None = None,
    *,
    min_score: float | None = None,
    first_stage: FirstStage | None = None,
    weight: float = WEIGHT,
) -> ToolOrder:
    """What `rank_tools` does, as positions and scores."""
    selection.check_limits(top_n, min_score, None)
    check_weight(weight)
    queries = requests(query)
    texts = [tool_text(tool, i) for i, tool in enumerate(tools)]
    if not texts:
        return ToolOrder([], [], None)
    first = np.max([_first_stage_scores(first_stage or bm25, one, texts) for one in queries], axis=0)
    rankings = plain(reranker).rank_many([(one, texts) for one in queries])
    logits = np.full(len(texts), -np.inf)
    scores: list[float | None] = [None] * len(texts)
    for item in (item for ranking in rankings for item in ranking):
        if item.logit is not None and item.logit > logits[item.index]:
            logits[item.index], scores[item.index] = item.logit, item.score
    keys = _fused(logits, first, weight)
    positions = [int(i) for i in np.argsort(-keys, kind="stable")]
    # No threshold for what has no score.
    judged = np.array([np.inf if score is None else score for score in scores])
    kept = selection.select(positions, judged, min_score=min_score)[:top_n]
    fallback = next((ranking.fallback for ranking in rankings if ranking.fallback is not None), None)
    return ToolOrder(kept, [scores[i] for i in kept], fallback)


def check_weight(weight: Any) -> None:
    """Raise a `ConfigurationError` for a weight of the first stage that cannot work."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise ConfigurationError(f"weight is that of the first stage, a number from 0 to 1; got {weight!r}.")


def _fused(logits: NDArray[np.float64], first: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """What the order is made of. Tools without a logit follow in the order of the first stage."""
    known = np.isfinite(logits) & (logits > selection.BLANK_LOGIT)
    keys = fusion.min_max(first) - 2.0
    if known.any():
        keys[known] = fusion.weighted(logits[known], first[known], weight)
    return keys


@functools.cache
def _default() -> Reranker:
    """The bundled model, for all who give no other."""
    return Reranker(cache=CACHED_PAIRS)


def with_cache(reranker: Reranker | None) -> Reranker:
    """A `plain` reranker that keeps the scores of pairs: the one that is given, or one like it."""
    given = plain(reranker)
    config = given.config
    return given if config["cache"] is not None else Reranker(**{**config, "cache": CACHED_PAIRS})


_PLAIN = {"fusion": None, "adjust": None, "dedup": None, "order": "best_first", "spans": None}


def plain(reranker: Reranker | None) -> Reranker:
    """One that gives each text its logit, and drops none; the bundled model where none is given."""
    if reranker is None:
        return _default()
    if not isinstance(reranker, Reranker):
        raise ConfigurationError(
            f"reranker must be a Reranker, got {type(reranker).__name__}. For a Hub id, a directory or a backend: "
            "reranker=Reranker(model)."
        )
    config = reranker.config
    return reranker if config == {**config, **_PLAIN} else Reranker(**{**config, **_PLAIN})


def _listed(tools: Any) -> list[Any]:
    if isinstance(tools, Mapping):
        raise InputError(
            "tools must be a list of tools, got one mapping. Put a schema into a list: [schema]; for names and "
            "descriptions give the pairs: list(mapping.items())."
        )
    if isinstance(tools, str | bytes | set | frozenset) or not isinstance(tools, Iterable):
        raise InputError(f"tools must be a list of tools, got {type(tools).__name__}.")
    return list(tools)


def requests(query: Any) -> list[str]:
    """The requests of a caller, each short enough to leave room for a tool or a sentence."""
    several = [query] if isinstance(query, str) or not isinstance(query, Iterable) else list(query)
    if not several:
        raise InputError("query must be a request or several; got none.")
    result: list[str] = []
    for one in map(checked_query, several):
        half = _LONGEST_QUERY // 2
        parts = [one] if len(one) <= _LONGEST_QUERY else [one[:half], one[-half:]]
        result += [part for part in parts if not is_blank(part)]
    return list(dict.fromkeys(result)) or [several[0]]


# -- first stages ----------------------------------------------------------------------------------------------


def bm25(query: str, texts: Sequence[str]) -> NDArray[np.float64]:
    """BM25 of words and their parts of four characters, which stand for stems in any language.

    Args:
        query: The request.
        texts: The texts of the tools.

    Returns:
        Shape (n_texts,), higher is better; 0 where no part of a word is shared.

    References:
        Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, with k1 = 1.5, b = 0.75.
        McNamee and Mayfield, "Character N-Gram Tokenization for European Language Text Retrieval", 2004.
    """
    k1, b = 1.5, 0.75
    counts = [Counter(_parts(text)) for text in texts]
    lengths = np.array([count.total() for count in counts], dtype=np.float64)
    norms = k1 * (1 - b + b * lengths / max(1.0, float(lengths.mean())))
    scores = np.zeros(len(texts))
    for part in set(_parts(query)):
        n = np.array([count[part] for count in counts], dtype=np.float64)
        if found := int((n > 0).sum()):
            scores += math.log(1 + (len(texts) - found + 0.5) / (found + 0.5)) * n * (k1 + 1) / (n + norms)
    return scores


def _parts(text: str) -> list[str]:
    """Words, and their parts of four characters; of two where a character is a syllable or a word."""
    parts: list[str] = []
    for word in re.findall(r"[^\W_]+", text.lower()):
        marked, size = f"^{word}$", 2 if ord(word[0]) > 0x2E7F else 4
        parts += [word, *(marked[i : i + size] for i in range(len(marked) - size + 1))]
    return parts


def embedding_similarity(embed: Callable[[list[str]], Any], kept: int = 4_096) -> FirstStage:
    """A first stage for `rank_tools`: the cosine of a request and a tool, of any embedding model.

    Args:
        embed: Takes texts, returns vectors of shape (n, dim): ``SentenceTransformer.encode``, ``embed_documents`` of
            LangChain's embeddings, ``get_text_embedding_batch`` of LlamaIndex's.
        kept: Vectors to keep, of requests and of tools.

    Returns:
        A function for ``first_stage=``. It embeds a text once, as long as it keeps its vector.
    """
    vectors: dict[str, NDArray[np.float64]] = {}

    def similarity(query: str, texts: Sequence[str]) -> NDArray[np.float64]:
        wanted = list(dict.fromkeys([query, *texts]))
        known = {text: vectors[text] for text in wanted if text in vectors}
        if missing := [text for text in wanted if text not in known]:
            fresh = np.asarray(embed(missing), dtype=np.float64)
            if fresh.ndim != 2 or len(fresh) != len(missing):
                raise ConfigurationError(
                    f"embed must return vectors of shape ({len(missing)}, dim); it returned {fresh.shape}."
                )
            fresh /= np.maximum(np.linalg.norm(fresh, axis=1, keepdims=True), 1e-12)
            known.update(zip(missing, fresh, strict=True))
            if len(vectors) + len(missing) > kept:
                vectors.clear()
            vectors.update(known)
        return np.stack([known[text] for text in texts]) @ known[query]

    return similarity


def _first_stage_scores(first_stage: FirstStage, query: str, texts: Sequence[str]) -> NDArray[np.float64]:
    scores = np.asarray(first_stage(query, texts), dtype=np.float64)
    if scores.shape != (len(texts),) or not np.isfinite(scores).all():
        raise ConfigurationError(
            f"first_stage must return a finite score for each of {len(texts)} tools; it returned "
            f"{'shape ' + str(scores.shape) if scores.shape != (len(texts),) else 'some that are not finite'}."
        )
    return scores


# -- tools as texts --------------------------------------------------------------------------------------------


class _Described(NamedTuple):
    name: str
    description: str
    arguments: tuple[str, ...] = ()


_ARGUMENTS = ("parameters", "input_schema", "inputSchema", "params_json_schema", "parameters_json_schema")
"""Where a tool has the JSON schema of its arguments."""


def tool_text(tool: Any, position: int = 0) -> str:
    """The text that a tool is scored by: the words of its name, its description, the names of its arguments.

    Args:
        tool: As `rank_tools` takes it.
        position: In the list, for the message where it is no tool.

    Raises:
        InputError: It is no tool.
    """
    described = _described(tool, position)
    words = _words(described.name)
    first, _, rest = described.description.strip().partition("\n")
    # LlamaIndex begins with the signature.
    has_signature = rest != "" and first.startswith(f"{described.name}(")
    description = " ".join((rest if has_signature else described.description).split())
    text = f"{words}: {description}" if words and description else words or description
    if described.arguments:
        text = f"{text}\nArguments: {', '.join(_words(name) for name in described.arguments)}"
    return text[:_LONGEST_TEXT]


def tool_name(tool: Any, position: int = 0) -> str:
    """The name that a tool is called by.

    Args:
        tool: As `rank_tools` takes it.
        position: In the list, for the message where it is no tool.

    Raises:
        InputError: It is no tool.
    """
    return _described(tool, position).name


def _words(name: str) -> str:
    """The words of an identifier: getHTTPStatus2, get_http_status and get-http-status alike."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\dA-Z_]+|\d+", name)
    return " ".join(parts).lower() if parts else name


def _described(tool: Any, position: int) -> _Described:
    found = None
    if isinstance(tool, Mapping):
        found = _of_schema(tool)
    elif isinstance(tool, tuple | list):
        if len(tool) == 2 and isinstance(tool[0], str) and isinstance(tool[1], str | None):
            found = _Described(tool[0], tool[1] or "")
    elif isinstance(tool, str):
        found = None
    elif isinstance(getattr(metadata := getattr(tool, "metadata", None), "description", None), str):
        # LlamaIndex. LangChain's tools have metadata too: a dict.
        arguments = _properties(getattr(metadata, "fn_schema", None))
        found = _Described(_text(metadata, "name"), _text(metadata, "description"), arguments)
    elif isinstance(tool, type) or inspect.isroutine(tool):
        found = _of_callable(tool)
    elif isinstance(getattr(tool, "name", None), str):
        schemas = (getattr(tool, name, None) for name in ("tool_call_schema", *_ARGUMENTS))
        schema = next((schema for schema in schemas if schema is not None), None)
        found = _Described(tool.name, _text(tool, "description"), _properties(schema))
    if found is None or is_blank(found.name + found.description):
        raise InputError(
            f"Tool {position} must be a JSON schema with a name, a tool of LangChain, LlamaIndex or MCP, a function, "
            f"or a (name, description) pair; got {_kind(tool)}."
        )
    return found


def _kind(tool: Any) -> str:
    if isinstance(tool, Mapping):
        return f"a mapping with the keys {', '.join(map(repr, list(tool)[:8])) or 'none'}"
    return f"a {type(tool).__name__}"


def _of_schema(schema: Mapping[str, Any]) -> _Described | None:
    """What a JSON schema of a tool says, in whichever of the vendors' shapes."""
    for key in ("function", "custom", "toolSpec"):
        if isinstance(schema.get(key), Mapping):
            return _of_schema(schema[key])
    for key in ("function_declarations", "functionDeclarations"):
        if isinstance(schema.get(key), Sequence):
            parts = [part for one in schema[key] if isinstance(one, Mapping) and (part := _of_schema(one))]
            names = " ".join(part.name for part in parts)
            return _Described(names, " ".join(part.description for part in parts)) if parts else None
    # A tool that the provider runs has a type alone: {"type": "web_search"}, {"google_search": {}}.
    kind = next(iter(schema)) if len(schema) == 1 and isinstance(next(iter(schema.values())), Mapping) else None
    name = next((value for key in ("name", "title", "type") if _is_text(value := schema.get(key))), kind)
    if not _is_text(name):
        return None
    title, described = schema.get("title"), schema.get("description")
    texts = [title if title != name else None, described]
    arguments = next((schema[key] for key in _ARGUMENTS if key in schema), schema)
    return _Described(name, ". ".join(text for text in texts if _is_text(text)), _properties(arguments))


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether something is a text with a visible character."""
    return isinstance(value, str) and not is_blank(value)


def _of_callable(tool: Any) -> _Described:
    if isinstance(tool, type):
        arguments = _properties(tool)
    else:
        arguments = tuple(name for name in inspect.signature(tool).parameters if name not in ("self", "cls"))
    return _Described(tool.__name__, inspect.cleandoc(tool.__doc__ or ""), arguments)


def _properties(schema: Any) -> tuple[str, ...]:
    """The names of the arguments: of a JSON schema, or of a pydantic model."""
    fields = getattr(schema, "model_fields", None)
    if isinstance(schema, Mapping):
        # Bedrock puts the schema one deeper.
        inner = schema.get("json", schema)
        fields = inner.get("properties") if isinstance(inner, Mapping) else None
    return tuple(str(name) for name in fields) if isinstance(fields, Mapping) else ()


def _text(owner: Any, name: str) -> str:
    value = getattr(owner, name, None)
    return value if isinstance(value, str) else ""
