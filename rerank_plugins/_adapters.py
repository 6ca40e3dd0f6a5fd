"""What both frameworks' adapters share: keywords as pydantic fields, reading and copying metadata."""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SkipValidation,
    ValidationError,
    create_model,
)
from pydantic.json_schema import SkipJsonSchema

from rerank_plugins._requests import until
from rerank_plugins._texts import is_blank
from rerank_plugins.errors import ConfigurationError, InputError, QueryError
from rerank_plugins.reranker import Reranker
from rerank_plugins.selection import check_limits
from rerank_plugins.settings import Settings, documentation
from rerank_plugins.spans import shown
from rerank_plugins.types import RankedCandidate

__all__ = [
    "FALLBACK",
    "RELEVANT_SPANS",
    "RankFields",
    "RerankerFields",
    "checked_query",
    "copied",
    "details",
    "listed",
    "number",
    "own_reranker",
    "spans_of",
    "value_text",
]

_KEYWORDS = tuple(option.name for option in fields(Settings))


# -- fields --------------------------------------------------------------------------------------------------


class _Rerankers:
    """The rerankers of an adapter and of the copies that a framework makes of it, one for each settings.

    They keep what they have loaded, and the cache that is given by a number, from one copy to the next.
    """

    most = 8

    def __init__(self) -> None:
        self._known: list[Reranker] = []
        self._lock = threading.Lock()

    def get(self, settings: Settings) -> Reranker:
        with self._lock:
            same = next((known for known in self._known if known.settings == settings), None)
            if same is None:
                like = [known for known in self._known if known.settings.cache == settings.cache]
                same = like[0]._relative(settings) if like else Reranker(**settings.keywords())
            self._keep(same)
            return same

    def add(self, reranker: Reranker) -> None:
        with self._lock:
            self._keep(reranker)

    def _keep(self, reranker: Reranker) -> None:
        self._known = [reranker, *(known for known in self._known if known is not reranker)][: self.most]

    def __copy__(self) -> _Rerankers:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rerankers:
        return self

    def __reduce__(self) -> tuple[type[_Rerankers], tuple[()]]:
        return _Rerankers, ()


class _SharedReranker(BaseModel):
    """Every keyword of `Reranker` as a pydantic field, or ``reranker=`` for a shared one.

    A dump or a pickle carries these fields alone, never weights. A subclass with settings of its own checks
    them in `_check`.

    Raises:
        ConfigurationError: A keyword that cannot work, whatever the model.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    reranker: Any = Field(default=None, exclude=True, repr=False, frozen=True)
    """A `Reranker` to share, instead of the keywords above."""
    rerankers: SkipJsonSchema[Any] = Field(default=None, exclude=True, repr=False)
    """Not for callers: what copies of an adapter share. LangChain makes a copy for each call of a configurable one."""

    _own: Reranker = PrivateAttr()
    """The reranker that the fields describe: the shared one, or one of its own."""

    def __init__(self, **data: Any) -> None:
        # Not in validators: pydantic would wrap a ConfigurationError, a ValueError, into its own.
        _refuse_unknown(type(self), data)
        values, own = _with_reranker(data)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(_told(error)) from error
        self._check()
        self._own = own

    def _check(self) -> None:
        """Raise a `ConfigurationError` for a setting of the subclass that cannot work."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _KEYWORDS:
            own = self.rerankers.get(Settings(**{**self._keywords(), name: value}))
            super().__setattr__(name, own.config[name])
            self._own = own
        else:
            super().__setattr__(name, value)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Any:
        """A copy, with a reranker of its own where a keyword of `Reranker` changes."""
        copied = super().model_copy(update=update, deep=deep)
        if not set(update or ()).isdisjoint(_KEYWORDS):
            copied._own = copied.rerankers.get(Settings(**copied._keywords()))
        return copied

    def _keywords(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _KEYWORDS}


if TYPE_CHECKING:
    RerankerFields = _SharedReranker
else:
    # `Settings` checks the values: pydantic's own errors would not be ConfigurationErrors.
    RerankerFields = create_model(
        "RerankerFields",
        __base__=_SharedReranker,
        __doc__=_SharedReranker.__doc__,
        __module__=__name__,
        **{
            option.name: (
                Annotated[get_type_hints(Settings)[option.name], SkipValidation],
                Field(default=option.default, description=documentation(option)),
            )
            for option in fields(Settings)
        },
    )


class RankFields(RerankerFields):
    """The keywords of an adapter that ranks: those of `Reranker`, and which results are kept."""

    # Checked in `_check`: pydantic would take True for 1 and "false" for False.
    top_n: Annotated[int | None, SkipValidation] = 3
    """Keep the best this many; None keeps all."""
    min_score: Annotated[float | None, SkipValidation] = None
    """Keep those that score at least this, in the chosen scale; None keeps all."""
    max_tokens: Annotated[int | None, SkipValidation] = None
    """Keep the best ones until the tokens of their scored texts exceed this; None keeps all. With `compress`, what is
    left of all texts has at most so many: the best spans until it is full."""
    compress: Annotated[bool | float, SkipValidation] = False
    """Leave of the texts their relevant spans alone, joined by " ... " where something is left out: True for those that
    are nearly as good as the best one, at most 35 % of all characters; a number for the best ones up to that share. A
    text without any is left out, one of a single span stays. Spans are sentences, or the windows of
    ``passage_length``."""
    deadline_s: Annotated[float | None, SkipValidation] = None
    """Seconds after which scoring stops; what was not scored has no score and follows in the order of the first stage.
    None waits for all."""
    add_details: Annotated[bool, SkipValidation] = False
    """Also put ``first_stage_rank`` (from 1), ``first_stage_score`` (None where there is none), ``truncated``, and with
    ``dedup`` the ``duplicates`` (positions in the first stage, from 0) into the metadata of the results. Traces have
    them always."""

    def _check(self) -> None:
        super()._check()
        check_limits(self.top_n, self.min_score, self.max_tokens, self.compress)
        until(self.deadline_s)
        for name in ("top_n", "max_tokens"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, int(value))
        self._check_flags("add_details")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigurationError(f"{name} must be True or False; got {value!r}.")

    def _cuts(self) -> dict[str, Any]:
        """The keywords of `Reranker.rank`."""
        names = ("top_n", "min_score", "max_tokens", "deadline_s", "compress")
        return {name: getattr(self, name) for name in names}


def _with_reranker(data: Mapping[str, Any]) -> tuple[dict[str, Any], Reranker]:
    """The fields of an adapter, and the reranker that they describe."""
    keywords = {name: value for name, value in data.items() if name in _KEYWORDS}
    _refuse_foreign_model(keywords.get("model"))
    shared = data.get("reranker")
    copies = data.get("rerankers")
    rerankers = _Rerankers() if copies is None else copies
    if shared is None:
        own = rerankers.get(Settings(**keywords))
        return {**data, **own.config, "rerankers": rerankers}, own
    if not isinstance(shared, Reranker):
        raise ConfigurationError(
            f"reranker must be a Reranker, got {type(shared).__name__}. "
            "A Hub id, a directory or a backend goes into model=."
        )
    config = shared.config
    settings = Settings(**keywords)
    given = settings.keywords()
    clash = sorted(name for name in keywords if given[name] != config[name])
    rerankers.add(shared)
    if clash and copies is not None:
        # A copy that LangChain makes with another value of a configurable field.
        own = rerankers.get(settings)
        return {**data, **own.config, "reranker": None, "rerankers": rerankers}, own
    if clash:
        raise ConfigurationError(
            f"Give either reranker= or its keywords: {', '.join(clash)} came beside reranker=. "
            "Set them where the Reranker is made."
        )
    return {**data, **config, "rerankers": rerankers}, shared


def own_reranker(owner: str, data: Mapping[str, Any]) -> Reranker:
    """The reranker of an object that is no pydantic model itself: ``reranker``, or one made from the keywords.

    Args:
        owner: Name of the object's class, for messages.
        data: ``reranker`` and keywords of `Reranker`.

    Raises:
        ConfigurationError: A keyword that is unknown or cannot work.
    """
    return _fields_of(owner)(**data)._own


@functools.cache
def _fields_of(owner: str) -> type[RerankerFields]:
    return create_model(owner, __base__=RerankerFields, __module__=__name__)


# -- keywords and models of other rerankers ------------------------------------------------------------------

_NO_KEY = "leave it out: the model runs here"
_NO_BATCH = "leave it out: batches are made by token length"
_NO_LLM = "leave it out: a cross-encoder scores, no language model"
_COUNTERPARTS = {
    **dict.fromkeys(("score_threshold", "similarity_threshold", "similarity_cutoff", "threshold"), "min_score"),
    **dict.fromkeys(("top_k", "topk", "k", "n", "num_results", "similarity_top_k"), "top_n, the number of results"),
    **dict.fromkeys(("model_name", "model_name_or_path", "model_id_or_path", "model_id", "checkpoint"), "model"),
    **dict.fromkeys(("client", "cross_encoder", "ov_model"), "model, or reranker for a shared Reranker"),
    **dict.fromkeys(("base_url", "url", "endpoint", "host"), "model, which takes the URL of a server"),
    **dict.fromkeys(("api_key", "cohere_api_key", "jina_api_key", "dashscope_api_key", "voyage_api_key"), _NO_KEY),
    **dict.fromkeys(("batch_size", "choice_batch_size"), _NO_BATCH),
    **dict.fromkeys(("llm", "choice_select_prompt", "parse_choice_select_answer_fn", "format_node_batch_fn"), _NO_LLM),
    **dict.fromkeys(("max_seq_length", "max_tokens_per_doc", "max_chunks_per_doc"), "max_length or passage_length"),
    **dict.fromkeys(("dtype", "torch_dtype", "use_fp16", "use_bf16"), "precision"),
    **dict.fromkeys(("activation_fn", "activation_fct", "normalize", "apply_sigmoid"), "scale"),
    **dict.fromkeys(("model_kwargs", "automodel_args"), "device, precision, revision or trust_remote_code"),
    "rank_fields": "metadata_fields (LangChain) or metadata_mode (LlamaIndex)",
    "keep_retrieval_score": "add_details, which keeps the score and the rank of the first stage",
    "prefix_metadata": 'leave it out: the score is in metadata["relevance_score"]',
    "query_instruction": "instruction",
    "num_threads": "threads",
}
"""What a keyword of FlashrankRerank, CohereRerank, SentenceTransformerRerank, LLMRerank and others is called here."""

_MODELS = {
    "ms-marco-TinyBERT-L-2-v2": "cross-encoder/ms-marco-TinyBERT-L2-v2",
    "ms-marco-MiniLM-L-12-v2": "cross-encoder/ms-marco-MiniLM-L12-v2",
    "ms-marco-MultiBERT-L-12": "BAAI/bge-reranker-v2-m3 (many languages)",
    "rank-T5-flan": "cross-encoder/ms-marco-MiniLM-L12-v2",
    "rank_zephyr_7b_v1_full": "Qwen/Qwen3-Reranker-0.6B",
}
_HOSTED = (
    "rerank-v",
    "rerank-english-",
    "rerank-multilingual-",
    "rerank-2",
    "rerank-1",
    "jina-reranker-",
    "gte-rerank-v",
)


def _refuse_unknown(cls: type[BaseModel], data: Mapping[str, Any]) -> None:
    known = {field.alias or name for name, field in cls.model_fields.items()} | set(cls.model_fields)
    unknown = [name for name in data if name not in known]
    if not unknown:
        return
    advice = []
    for name in unknown:
        close = get_close_matches(name, sorted(set(cls.model_fields) - {"rerankers"}), 1, cutoff=0.75)
        hint = _COUNTERPARTS.get(name) or (close[0] if close else "nothing like it is known here")
        advice.append(f"{name} -> {hint}")
    raise ConfigurationError(f"{cls.__name__} does not have the keyword {', '.join(unknown)}: {'; '.join(advice)}.")


def _refuse_foreign_model(model: object) -> None:
    """Name our counterpart of a model that only another library knows by this name."""
    if not isinstance(model, str) or "/" in model or Path(model).exists():
        return
    if model in _MODELS:
        raise ConfigurationError(
            f"model={model!r} is FlashRank's name. Its counterpart here: model={_MODELS[model]!r}."
        )
    if model.startswith(_HOSTED):
        raise ConfigurationError(
            f"model={model!r} runs behind its maker's API alone. Leave model out for the bundled English model, or "
            "name one of the Hub: 'BAAI/bge-reranker-v2-m3' for many languages."
        )


def _told(error: ValidationError) -> str:
    """What pydantic found wrong, without the values: they may be long or secret."""
    problems = (f"{'.'.join(map(str, problem['loc'])) or 'keywords'}: {problem['msg']}" for problem in error.errors())
    return f"{error.title} cannot be made: {'; '.join(problems)}."


# -- what goes in --------------------------------------------------------------------------------------------


def listed(items: Any, name: str, *, iterators: bool = True) -> list[Any]:
    """What should be a list in the order of the first stage, as a new list.

    Raises:
        InputError: It is none, or its order means nothing.
    """
    # A pydantic model is iterable too: over its fields.
    wrong = isinstance(items, str | bytes | Mapping | set | frozenset | BaseModel) or not isinstance(items, Iterable)
    if wrong or (isinstance(items, Iterator) and not iterators):
        raise InputError(
            f"{name} must be a list, best first as the first stage found them; got {type(items).__name__}."
        )
    return list(items)


def checked_query(query: object) -> str:
    """The query, if there is something to search for.

    Raises:
        QueryError: It is no text, or blank.
    """
    if not isinstance(query, str):
        raise QueryError(f"the query must be a text, not {type(query).__name__}; say what to search for")
    if is_blank(query):
        raise QueryError("the query is blank; say what to search for")
    return query


def value_text(value: Any) -> str:
    """A metadata value as text: parts of containers joined by ", ", and "" for whatever is missing.

    Missing are None, NaN and the like of pandas and NumPy, blank texts, empty containers, and bytes that are no UTF-8.
    Each container is read once, so that cycles end; the parts of a set are sorted, so that equal sets give equal texts.
    """
    parts: list[str] = []
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        label, item = stack.pop()
        # Arrays, series and scalars of NumPy and pandas.
        if callable(unpack := getattr(item, "tolist", None)):
            item = unpack()
        if isinstance(item, Mapping | list | tuple | set | frozenset):
            if id(item) in seen:
                continue
            seen.add(id(item))
            stack += reversed([*_parts(label, item)])
        elif text := _scalar_text(item):
            parts.append(label + text)
    return ", ".join(parts)


def _parts(label: str, container: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(container, Mapping):
        return [(f"{key}: ", part) for key, part in container.items()]
    parts = sorted(container, key=value_text) if isinstance(container, set | frozenset) else container
    return [(label, part) for part in parts]


def _scalar_text(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            value = bytes(value).decode()
        except UnicodeDecodeError:
            return ""
    if isinstance(value, str):
        return "" if is_blank(value) else value
    return "" if _is_missing(value) else str(value)


def _is_missing(value: Any) -> bool:
    if value is None:
        return True
    try:
        # NaN and NaT differ from themselves.
        return bool(value != value)
    except (TypeError, ValueError):
        # pandas.NA compares to NA, which has no truth.
        return type(value).__name__ == "NAType"


def number(*values: object) -> float | None:
    """The first value that is a finite number, as a float."""
    for value in values:
        # A flag is a Real too.
        if type(value) is not bool and isinstance(value, Real) and math.isfinite(value):
            return float(value)
    return None


# -- what comes out ------------------------------------------------------------------------------------------


FALLBACK = "rerank_fallback"
"""Key of the metadata that says why a result was not reranked."""
RELEVANT_SPANS = "relevant_spans"
"""Key of the metadata that says which parts of the text were scored by themselves: (start, end, score), best first."""


def spans_of(item: RankedCandidate, text: str) -> list[tuple[int, int, float]]:
    """The spans of a result as places in the text of the caller's object."""
    return [(span.start, span.end, span.score) for span in shown(item, text)]


def details(item: RankedCandidate) -> dict[str, Any]:
    """What the core knows of a result beside its score."""
    known = {
        "first_stage_rank": item.first_stage_rank,
        "first_stage_score": item.candidate.first_stage_score,
        "truncated": item.truncated,
    }
    return {**known, "duplicates": list(item.duplicates)} if item.duplicates else known


def copied(value: Any, models: tuple[type[BaseModel], ...] = ()) -> Any:
    """Containers anew at every depth, cycles included; other objects are shared, as a value may be anything.

    Args:
        value: A metadata value, or a mapping of them.
        models: Pydantic models that are copied like containers.
    """
    # One generator a container instead of recursion: metadata can be deeper than Python's stack.
    memo: dict[int, Any] = {}
    stack = [_copying(value, models, memo)]
    result = None
    while stack:
        try:
            child = stack[-1].send(result)
        except StopIteration as done:
            stack.pop()
            result = done.value
        else:
            stack.append(_copying(child, models, memo))
            result = None
    return result


def _copying(value: Any, models: tuple[type[BaseModel], ...], memo: dict[int, Any]) -> Generator[Any, Any, Any]:
    """Yields what must be copied first, is sent the copies, and returns the copy."""
    if id(value) in memo:
        return memo[id(value)]
    new = value
    if isinstance(value, dict):
        new = memo[id(value)] = copy.copy(value)
        for key, item in value.items():
            new[key] = yield item
    elif type(value) is list:
        new = memo[id(value)] = []
        for item in value:
            new.append((yield item))
    elif type(value) is tuple:
        parts = []
        for item in value:
            parts.append((yield item))
        new = memo[id(value)] = tuple(parts)
    elif type(value) is set:
        new = memo[id(value)] = set(value)
    elif isinstance(value, models):
        new = memo[id(value)] = value.model_copy()
        for name, item in value:
            new.__dict__[name] = yield item
    return new
