"""Every keyword of `Reranker`, once: its type, its default, its check and its documentation.

`Reranker`, the adapters' fields and the command line derive from `Settings`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import KW_ONLY, Field, asdict, dataclass, field, fields, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

from rerank_plugins import models
from rerank_plugins._secrets import without_passwords
from rerank_plugins.calibration import Calibration
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.passages import check_windows
from rerank_plugins.types import BackendName, Order, Precision, Scale, SpanUnit

__all__ = ["Settings"]

Check = Callable[[str, Any], Any]
"""Called with the keyword's name and value; returns the value as it is kept, or raises a `ConfigurationError`."""


def _wrong(name: str, expected: str, value: object) -> ConfigurationError:
    return ConfigurationError(f"{name} must be {expected}; got {value!r}.")


def _choice(name: str, value: Any, *, of: Any, optional: bool = False) -> Any:
    known = get_args(of)
    if value is None and optional:
        return None
    if not isinstance(value, str) or value not in known:
        raise _wrong(name, f"one of {', '.join(map(repr, known))}" + (", or None" if optional else ""), value)
    return value


def _text(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise _wrong(name, "a str, or None", value)
    return value


def _flag(name: str, value: Any) -> bool:
    # No other value is read as a flag: bool("false") is True.
    if not isinstance(value, bool):
        raise _wrong(name, "True or False", value)
    return value


def _count(name: str, value: Any, *, least: int, optional: bool = True) -> int | None:
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise _wrong(name, f"an int of at least {least}" + (", or None" if optional else ""), value)
    return int(value)


def _label(name: str, value: Any) -> str | int | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _wrong(name, "a class name, a column, or None", value)
    return int(value)


def _model(name: str, value: Any) -> Any:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str):
        if not value.strip():
            raise _wrong(name, "a Hub id, a local directory, or None for the bundled model", value)
        return None if value == models.BUNDLED_NAME else value
    if value is None or callable(getattr(value, "logits", None)) or callable(getattr(value, "score_pairs", None)):
        return value
    raise ConfigurationError(
        f"{name} must be None, a Hub id, a local directory, or an object with a method score_pairs(pairs); got "
        f"{type(value).__name__}. For a sentence-transformers CrossEncoder, pass the id or directory that it was "
        "loaded from."
    )


def _calibration(name: str, value: Any) -> Calibration | None:
    return None if value is None else Calibration.of(value)


def _cache(name: str, value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _on_error(name: str, value: Any) -> Any:
    if value in ("raise", "keep_order") or callable(getattr(value, "rank_many", None)):
        return value
    raise _wrong(name, "'raise', 'keep_order' or another Reranker", value)


def _dedup(name: str, value: Any) -> float | None:
    if value is None or value == "exact":
        return None if value is None else 1.0
    return _share(name, value, "'exact', a likeness above 0 and at most 1, or None", above=0.0)


def _fusion(name: str, value: Any) -> str | float | None:
    if value is None or value == "rrf":
        return None if value is None else "rrf"
    return _share(name, value, "'rrf', a weight of the first stage from 0 to 1, or None")


def _share(name: str, value: Any, expected: str, *, above: float = -1.0) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not above < float(value) or not 0 <= float(value) <= 1:
        raise _wrong(name, expected, value)
    return float(value)


def _callable(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise _wrong(name, "a function, or None", value)
    return value


def _setting(default: Any, check: Check, doc: str, *, loads: bool = False) -> Any:
    """A keyword. One that `loads` decides which weights are loaded and on which engine."""
    return field(default=default, metadata={"check": check, "doc": doc, "loads": loads})


_OF_THE_SERVER = ("backend", "device", "precision", "threads", "revision", "trust_remote_code")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a `Reranker` does: its keywords, checked. Immutable; `dataclasses.replace` makes another one.

    Raises:
        ConfigurationError: A keyword that cannot work, whatever the model.
    """

    model: Any = _setting(
        None,
        _model,
        "None (or its name) for the bundled English model, a Hub id, a local directory, the address of a rerank server "
        "(``http://localhost:8080?dialect=tei``), or a ready backend: any object with "
        "``score_pairs(pairs) -> float32 array``.",
        loads=True,
    )
    _: KW_ONLY
    backend: BackendName = _setting(
        "auto",
        partial(_choice, of=BackendName),
        '``"auto"``, ``"onnx"``, ``"openvino"`` or ``"torch"``; `rerank_plugins.backends.load_backend` says how '
        '``"auto"`` decides.',
        loads=True,
    )
    device: str | None = _setting(None, _text, 'torch device, e.g. ``"cuda:1"``; None chooses.', loads=True)
    precision: Precision = _setting(
        "auto",
        partial(_choice, of=Precision),
        '``"auto"``, ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"``.',
        loads=True,
    )
    threads: int | None = _setting(
        None,
        partial(_count, least=1),
        "Threads that one call computes with; None leaves it to the engine: one for each core.",
        loads=True,
    )
    max_length: int | None = _setting(
        None, partial(_count, least=1), "Most tokens of a pair; None means as many as the model takes."
    )
    scale: Scale = _setting(
        "probability",
        partial(_choice, of=Scale),
        'What ``score`` means: ``"probability"`` (float64 sigmoid, or softmax) or ``"logit"``.',
    )
    label: str | int | None = _setting(
        None,
        _label,
        'For heads with several classes, the one to rank by: a name (``"entailment"``) or a column. None takes the '
        "second of two classes, unless their names say otherwise.",
    )
    revision: str | None = _setting(None, _text, "Branch, tag or commit on the Hub.", loads=True)
    trust_remote_code: bool = _setting(
        False, _flag, "Run Python code of the model's repository (torch backend). Read it first.", loads=True
    )
    instruction: str | None = _setting(
        None,
        _text,
        "Task description for models that take one, such as causal rerankers; put before the query for all others.",
    )
    truncate_query: bool = _setting(
        False,
        _flag,
        "Cut a query that leaves no room for a text, at its end, instead of raising an `InputError`; the texts then "
        "count as ``truncated``.",
    )
    passage_length: int | None = _setting(
        None,
        partial(_count, least=1),
        "Score a long text as windows of this many tokens and take the best one; None scores its beginning only and "
        "marks the cut as ``truncated``.",
    )
    passage_overlap: int = _setting(
        0, partial(_count, least=0, optional=False), "Tokens that neighbouring windows share."
    )
    spans: SpanUnit | None = _setting(
        None,
        partial(_choice, of=SpanUnit, optional=True),
        'Which part of a text it was: ``"sentences"`` scores the sentences of what is kept one by one, for '
        "`RankedCandidate.spans`; the order stays that of whole texts. None gives the windows of ``passage_length``, "
        "where that is set.",
    )
    calibration: Calibration | None = _setting(
        None,
        _calibration,
        "Makes scores probabilities that mean something on your data: a `Calibration`, the path of one that "
        "``rerank-plugins calibrate`` wrote, or a mapping with ``slope`` and ``intercept``.",
    )
    cache: Any = _setting(
        None,
        _cache,
        "Keeps scores, so that a pair is scored once: a number of pairs (in memory), the path of a file, a "
        "`rerank_plugins.cache.MemoryCache` or `FileCache`, or a LangChain ``ByteStore``. Scores of another model, "
        "revision, precision, maximum length or instruction are never read. A ready backend needs a ``fingerprint``.",
    )

    dedup: float | None = _setting(
        None,
        _dedup,
        'Leave out candidates that repeat a better one: ``"exact"`` for the same text (blanks and case aside), or the '
        "smallest likeness, from 0 to 1, of a repetition (Jaccard index of five-character shingles). "
        "`RankedCandidate.duplicates` has what was left out.",
    )
    fusion: str | float | None = _setting(
        None,
        _fusion,
        'Let the first stage count too: ``"rrf"`` for reciprocal rank fusion, or the weight, from 0 to 1, of '
        "`Candidate.first_stage_score` beside the logit, both brought to 0..1 within the list. Scores stay the same.",
    )
    adjust: Any = _setting(
        None,
        _callable,
        "Called with each `RankedCandidate` that was scored; returns a number that is added to its logit for the "
        "order: recency, source, a boost by metadata. Logits and scores are reported without it.",
    )
    order: Order = _setting(
        "best_first",
        partial(_choice, of=Order),
        '``"best_first"``, or ``"ends"`` for the best at both ends of what is returned; ranks stay those of quality.',
    )
    on_error: Any = _setting(
        "raise",
        _on_error,
        "What `rank` does where scoring fails for a reason that passes (no connection, a timeout, a server that is "
        'busy or out of order, a full disk): ``"raise"``, ``"keep_order"`` for the order of the first stage, or '
        "another `Reranker` that ranks instead. `Ranking.fallback` says what happened.",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            object.__setattr__(self, option.name, option.metadata["check"](option.name, value))
        if self.is_address:
            theirs = [name for name in self.changed() if name in _OF_THE_SERVER]
            if theirs:
                raise ConfigurationError(
                    f"{', '.join(theirs)} cannot be set for a rerank server, which decides that itself; got a model "
                    f"{self.model_name!r}. Leave them out."
                )
        check_windows(self.passage_length, self.passage_overlap)
        if self.model is None and self.revision is not None:
            raise ConfigurationError(
                f"revision={self.revision!r} needs a Hub id as model; the bundled model has no revisions."
            )

    @property
    def model_name(self) -> str:
        """Name of the model, for rankings, traces and logs."""
        if self.model is None:
            return models.BUNDLED_NAME
        if isinstance(self.model, str):
            return without_passwords(self.model)
        return str(getattr(self.model, "model_name", None) or getattr(self.model, "name", type(self.model).__name__))

    @property
    def is_address(self) -> bool:
        """Whether the model is on a rerank server."""
        return isinstance(self.model, str) and self.model.strip().lower().startswith(("http://", "https://"))

    @property
    def ready(self) -> bool:
        """Whether the model is a backend that needs no loading."""
        return not (self.model is None or isinstance(self.model, str))

    def keywords(self) -> dict[str, Any]:
        """The keywords, of plain values where they can be: ``Settings(**settings.keywords())`` equals these."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {**values, "calibration": None if self.calibration is None else asdict(self.calibration)}

    def changed(self) -> dict[str, Any]:
        """The keywords that are not the defaults."""
        defaults = {option.name: option.default for option in fields(self)}
        return {name: value for name, value in self.keywords().items() if value != defaults[name]}

    def __repr__(self) -> str:
        # A store's own repr may have the address it is connected to.
        return without_passwords(f"Settings({', '.join(f'{key}={value!r}' for key, value in self.changed().items())})")

    def for_loading(self) -> Settings:
        """These settings with only what decides which weights are loaded: equal ones can share a loaded copy.

        A local directory is absolute in them, so that rerankers made in other working directories can share it.
        """
        model = self.model
        if isinstance(model, str) and Path(model).expanduser().is_dir():
            model = str(Path(model).expanduser().resolve())
        others = {option.name: option.default for option in fields(self) if not option.metadata["loads"]}
        return replace(self, **{**others, "model": model})


def documentation(option: Field[Any]) -> str:
    """The documentation of a keyword, in Markdown with double backticks for code."""
    return str(option.metadata["doc"])


Settings.__doc__ = (
    f"{Settings.__doc__ or ''}\n    Attributes:\n"
    + "\n".join(f"        {option.name}: {documentation(option)}" for option in fields(Settings))
    + "\n"
)
