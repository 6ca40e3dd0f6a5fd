"""The whole pipeline behind two methods: `Reranker.rank` and `Reranker.score`."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins import models, passages, selection
from rerank_plugins._threads import in_thread
from rerank_plugins.backends import ModelSpec, PairScorer, as_backend, load_backend
from rerank_plugins.backends._tokenize import scorable
from rerank_plugins.backends.base import Backend
from rerank_plugins.cache import ScoreStore
from rerank_plugins.cache._scored import ScoreCache, Scored, settings_digest
from rerank_plugins.calibration import Calibration
from rerank_plugins.errors import ConfigurationError, InputError, ScoringError
from rerank_plugins.types import Candidate, RankedCandidate, Ranking, Scale

__all__ = ["Reranker"]


class Reranker:
    """Scores (query, text) pairs with a cross-encoder and ranks by the score.

    Making one loads and downloads nothing; the first use does, or `prepare`. Rerankers of the same model share one
    loaded copy. All methods are safe to call from many threads and tasks at once.

    Args:
        model: None (or its name) for the bundled English model, a Hub id, a local directory, or a ready backend: any
            object with ``score_pairs(pairs) -> float32 array``.
        backend: ``"auto"``, ``"onnx"``, ``"openvino"`` or ``"torch"``; see `rerank_plugins.backends.load_backend`
            for how ``"auto"`` decides, and `backend_name` for what it decided.
        device: torch device, e.g. ``"cuda:1"``; None chooses.
        precision: ``"auto"``, ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"``.
        max_length: Most tokens of a pair; None means as many as the model takes.
        scale: What ``score`` means: ``"probability"`` (float64 sigmoid, or softmax) or ``"logit"``.
        label: For heads with several classes, the one to rank by: a name (``"entailment"``) or a column. None takes
            the second of two classes, and is an error with three or more.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run Python code of the model's repository (torch backend). Read it first.
        instruction: Task description for models that take one, such as causal rerankers; put before the query
            for all others.
        passage_length: Score a long text as windows of this many tokens and take the best one; None scores its
            beginning only and marks the cut as ``truncated``.
        passage_overlap: Tokens that neighbouring windows share.
        calibration: Makes scores probabilities that mean something on your data: a `Calibration`, the path of one that
            ``rerank-plugins calibrate`` wrote, or a mapping with ``scale`` and ``shift``.
        cache: Keeps scores, so that a pair is scored once: a number of pairs (in memory), the path of a file, a
            `rerank_plugins.cache.MemoryCache` or `FileCache`, or a LangChain ``ByteStore``. Scores of another model,
            revision, precision, maximum length or instruction are never read. A ready backend needs a
            ``fingerprint`` for it.

    Raises:
        ConfigurationError: A keyword that cannot work, whatever the model.

    Example:
        >>> from rerank_plugins import Reranker
        >>> ranking = Reranker().rank("how do I undo a commit", ["git add stages files", "git revert undoes a commit"])
        >>> ranking[0].text
        'git revert undoes a commit'
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PairScorer | None = None,
        *,
        backend: str = "auto",
        device: str | None = None,
        precision: str = "auto",
        max_length: int | None = None,
        scale: Scale = "probability",
        label: str | int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        instruction: str | None = None,
        passage_length: int | None = None,
        passage_overlap: int = 0,
        calibration: Calibration | Mapping[str, float] | str | os.PathLike[str] | None = None,
        cache: int | str | os.PathLike[str] | ScoreStore | None = None,
    ) -> None:
        if scale not in ("probability", "logit"):
            raise ConfigurationError(f"scale must be 'probability' or 'logit'; got {scale!r}.")
        if max_length is not None and max_length < 1:
            raise ConfigurationError(f"max_length must be a positive number of tokens, or None; got {max_length!r}.")
        if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
            raise ConfigurationError(f"label must be a class name, a column, or None; got {label!r}.")
        passages.check_windows(passage_length, passage_overlap)
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if model == models.BUNDLED_NAME:
            model = None
        self._ready: PairScorer | None = None
        self._spec: ModelSpec | None = None
        if model is None or isinstance(model, str):
            self._spec = ModelSpec(
                model=model,
                backend=backend,
                device=device,
                precision=precision,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        elif callable(getattr(model, "score_pairs", None)):
            self._ready = model
        else:
            raise ConfigurationError(
                "model must be None, a Hub id, a local directory, or an object with a method score_pairs(pairs); got "
                f"{type(model).__name__}. For a sentence-transformers CrossEncoder, pass the id or directory it was "
                "loaded from."
            )
        self._config: dict[str, Any] = {
            "model": model,
            "backend": backend,
            "device": device,
            "precision": precision,
            "max_length": max_length,
            "scale": scale,
            "label": label,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "instruction": instruction,
            "passage_length": passage_length,
            "passage_overlap": passage_overlap,
            "calibration": None if calibration is None else asdict(Calibration.of(calibration)),
            "cache": os.fspath(cache) if isinstance(cache, os.PathLike) else cache,
        }
        self._cache = None if cache is None else ScoreCache(cache)
        self._settings: tuple[Backend, bytes] | None = None
        self.scale: Scale = scale
        self._lock = threading.Lock()
        self._backend: Backend | None = None
        self._shared: Backend | None = None

    # -- settings -----------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The keywords this reranker was made with: ``Reranker(**reranker.config)`` makes another one like it."""
        return dict(self._config)

    @property
    def model_name(self) -> str:
        """Name of the model, for rankings, traces and logs. Loads nothing."""
        model = self._config["model"]
        if model is None:
            return models.BUNDLED_NAME
        if isinstance(model, str):
            return model
        return str(getattr(model, "model_name", None) or getattr(model, "name", None) or type(model).__name__)

    @property
    def backend_name(self) -> str:
        """The engine that was chosen: ``"onnx"``, ``"openvino"``, ``"torch"`` or a ready backend's name.

        Loads the model if it is not.
        """
        return self._loaded().name

    @property
    def precision(self) -> str:
        """The number format that was chosen, e.g. ``"fp32"``. Loads the model if it is not."""
        return self._loaded().precision

    @property
    def max_length(self) -> int | None:
        """Most tokens of a pair; None where the backend does not tell. Loads the model if it is not."""
        return self._loaded().max_length

    def __repr__(self) -> str:
        given = {key: value for key, value in self._config.items() if value != _DEFAULTS[key]}
        return f"Reranker({', '.join(f'{key}={value!r}' for key, value in given.items())})"

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], Reranker], tuple[dict[str, Any]]]:
        # Configuration alone: a copy in another process loads the model itself.
        return _from_config, (self._config,)

    def __copy__(self) -> Reranker:
        copied = Reranker(**self._config)
        copied._cache = self._cache
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Reranker:
        # A ready backend and a cache are shared, as loaded weights are.
        return self.__copy__()

    # -- life ---------------------------------------------------------------------------------------------------

    def prepare(self) -> Reranker:
        """Load the model now rather than at the first use.

        Returns:
            Itself.

        Raises:
            ModelLoadError: The model is missing, incomplete or unreadable.
            MissingDependencyError: The backend that was asked for is not installed.
            ConfigurationError: A keyword that this model cannot do.
        """
        backend = self._loaded()
        if self._cache is not None:
            self._cache_settings(backend)
        return self

    def close(self) -> None:
        """Let go of the model. Its memory is freed once no other reranker uses it; the next use loads it again."""
        if self._cache is not None:
            self._cache.close()
        with self._lock:
            self._backend = self._shared = self._settings = None

    def __enter__(self) -> Reranker:
        return self.prepare()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _loaded(self) -> Backend:
        backend = self._backend
        if backend is not None:
            return backend
        with self._lock:
            if self._backend is None:
                # Held as it was loaded, so that the next reranker of this model finds it.
                self._shared = as_backend(self._ready) if self._spec is None else load_backend(_absolute(self._spec))
                config = self._config
                backend = self._shared.configured(max_length=config["max_length"], instruction=config["instruction"])
                if backend.labels:
                    _column(config["label"], len(backend.labels), backend.labels, self.model_name)
                self._backend = backend
            return self._backend

    # -- scoring ------------------------------------------------------------------------------------------------

    def score(self, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
        """Logits of texts for a query.

        Args:
            query: The query.
            texts: The texts, in any order.

        Returns:
            float32, shape (n_texts,), input order: raw logits, or the log-odds of the chosen class. A blank text has
            `selection.BLANK_LOGIT`: no model has seen it.

        Raises:
            InputError: The query is blank or too long, or something is no string.
            ScoringError: The engine failed, or a logit is not finite.
        """
        _check_query(query)
        items = [candidate.text for candidate in _candidates(texts)]
        return self._logits(query, items)[0].astype(np.float32)

    def rank(
        self,
        query: str,
        candidates: Iterable[str | Candidate],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
    ) -> Ranking:
        """Rank candidates by relevance to a query.

        Args:
            query: The query.
            candidates: Strings or `Candidate`s, in the order of the first stage.
            top_n: Keep the best this many; None keeps all.
            min_score: Keep those that score at least this, in the scale of this reranker; None keeps all.
            max_tokens: Keep the best ones until their tokens exceed this; None keeps all.

        Returns:
            The kept candidates, best first. Equal logits keep the order of the first stage; blank texts come last.

        Raises:
            ConfigurationError: `top_n` or `max_tokens` is below 1, or `min_score` is no number.
            InputError: The query is blank or too long, or a candidate is no text.
            ScoringError: The engine failed, or a logit is not finite.
        """
        selection.check_limits(top_n, min_score, max_tokens)
        _check_query(query)
        items = _candidates(candidates)
        texts = [item.text for item in items]
        logits, truncated = self._logits(query, texts)
        scores = selection.to_scale(self._calibrated(logits), self.scale)
        counts = None
        if max_tokens is not None and texts:
            counts = [len(offsets) for offsets in self._loaded().token_offsets(texts)]
        kept = selection.select(
            selection.order(logits),
            scores,
            min_score=min_score,
            top_n=top_n,
            token_counts=counts,
            max_tokens=max_tokens,
        )
        return Ranking(
            query=query,
            items=tuple(
                RankedCandidate(
                    candidate=items[i],
                    score=float(scores[i]),
                    logit=float(logits[i]),
                    index=i,
                    rank=rank,
                    truncated=bool(truncated[i]),
                )
                for rank, i in enumerate(kept, start=1)
            ),
            model=self.model_name,
            scale=self.scale,
        )

    async def ascore(self, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `score`, without blocking the event loop. Cancelling it ends the work after the batch that runs."""
        return await in_thread(self.score, query, texts)

    async def arank(
        self,
        query: str,
        candidates: Iterable[str | Candidate],
        top_n: int | None = None,
        min_score: float | None = None,
        *,
        max_tokens: int | None = None,
    ) -> Ranking:
        """As `rank`, without blocking the event loop. Cancelling it ends the work after the batch that runs."""
        return await in_thread(self.rank, query, candidates, top_n, min_score, max_tokens=max_tokens)

    def _logits(self, query: str, texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Logits and whether each text was cut, both of shape (n_texts,)."""
        distinct = list(dict.fromkeys(text for text in texts if text.strip()))
        logits = np.full(len(texts), selection.BLANK_LOGIT)
        truncated = np.zeros(len(texts), dtype=np.bool_)
        if not distinct:
            return logits, truncated
        backend = self._loaded()
        compute = functools.partial(self._scored, backend, query)
        if self._cache is None:
            raw, cut, owners = compute(distinct)
        else:
            raw, cut, owners = self._cache.scored(self._cache_settings(backend), query, distinct, compute)
        values = self._values(backend, raw)
        folded = passages.fold_max(values, owners, len(distinct))
        folded_cut = np.zeros(len(distinct), dtype=np.bool_)
        np.logical_or.at(folded_cut, owners, cut)
        place = {text: i for i, text in enumerate(distinct)}
        for i, text in enumerate(texts):
            if text in place:
                logits[i] = max(folded[place[text]], selection.BLANK_LOGIT)
                truncated[i] = folded_cut[place[text]]
        return logits, truncated

    def _scored(self, backend: Backend, query: str, texts: Sequence[str]) -> Scored:
        """What the engine says of all windows of distinct texts: finite logits, cuts, and the text of each window."""
        windows, owners = texts, list(range(len(texts)))
        if (length := self._config["passage_length"]) is not None:
            windows, owners = _windows(backend, texts, length, self._config["passage_overlap"])
        raw, cut = backend.score_with_truncation([(query, window) for window in windows])
        self._check_raw(backend, raw, query, windows)
        return raw, cut, owners

    def _cache_settings(self, backend: Backend) -> bytes:
        """Digest of all that decides a logit beside query and text."""
        known = self._settings
        # Kept with its backend: after `close`, another one may be loaded.
        if known is None or known[0] is not backend:
            told: object = backend.fingerprint
            fingerprint = told() if callable(told) else told
            if not isinstance(fingerprint, str) or not fingerprint:
                raise ConfigurationError(
                    f"cache= needs to tell the {backend.name!r} backend from others: give it a string attribute "
                    f"`fingerprint` that changes whenever its scores do; got {fingerprint!r}. Or leave cache at None."
                )
            config = self._config
            settings = ("max_length", "instruction", "passage_length", "passage_overlap")
            digest = settings_digest(backend.name, backend.precision, fingerprint, *(config[name] for name in settings))
            self._settings = known = (backend, digest)
        return known[1]

    def _calibrated(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        if (calibration := self._config["calibration"]) is None:
            return logits
        return np.where(logits > selection.BLANK_LOGIT, Calibration(**calibration)(logits), logits)

    def _check_raw(self, backend: Backend, raw: NDArray[np.float32], query: str, texts: Sequence[str]) -> None:
        if raw.ndim not in (1, 2) or len(raw) != len(texts):
            raise ScoringError(
                f"The {backend.name!r} backend must return shape ({len(texts)},) or ({len(texts)}, n_labels); "
                f"it returned {raw.shape}."
            )
        if not np.isfinite(raw).all():
            row = int(np.argwhere(~np.isfinite(raw))[0][0])
            raise ScoringError(
                f"The model {self.model_name!r} gave {raw[row].tolist()} for the query {query[:80]!r} and the text "
                f"{texts[row][:80]!r}: a score must be a finite number. Half precision can overflow: try "
                "precision='fp32', and check the weights."
            )

    def _values(self, backend: Backend, raw: NDArray[np.float32]) -> NDArray[np.float64]:
        """One log-odds a window out of whatever the backend emits."""
        n_labels = 1 if raw.ndim == 1 else raw.shape[1]
        column = _column(self._config["label"], n_labels, backend.labels, self.model_name)
        if backend.emits == "probability":
            return selection.to_logit(raw if raw.ndim == 1 else raw[:, column])
        if n_labels == 1:
            return raw.reshape(len(raw)).astype(np.float64)
        return selection.class_logit(raw, column)


def _absolute(spec: ModelSpec) -> ModelSpec:
    """One name for one local directory, so that rerankers made from different working directories can share it."""
    if spec.model is None or not Path(spec.model).expanduser().is_dir():
        return spec
    return ModelSpec(
        **{
            **{name: getattr(spec, name) for name in ModelSpec.__slots__},
            "model": str(Path(spec.model).expanduser().resolve()),
        }
    )


def _column(label: str | int | None, n_labels: int, names: Sequence[str], model: str) -> int:
    """The column of the logits to rank by."""
    listing = ", ".join(f"{i}: {name!r}" for i, name in enumerate(names)) or f"0 .. {n_labels - 1}, without names"
    if label is None:
        if n_labels > 2:
            raise ConfigurationError(
                f"{model!r} has {n_labels} classes, so it must be told which one to rank by: label=NAME or COLUMN, "
                f"one of {{{listing}}}."
            )
        return n_labels - 1
    if isinstance(label, str):
        matches = [i for i, name in enumerate(names) if name.lower() == label.lower()]
        if len(matches) == 1:
            return matches[0]
    elif 0 <= label < n_labels:
        return label
    raise ConfigurationError(f"{model!r} has no class {label!r}; expected one of {{{listing}}}.")


def _windows(backend: Backend, texts: Sequence[str], length: int, overlap: int) -> tuple[list[str], list[int]]:
    windows: list[str] = []
    owners: list[int] = []
    clean = [scorable(text) for text in texts]
    for owner, (text, offsets) in enumerate(zip(clean, backend.token_offsets(clean), strict=True)):
        parts = [part for part in passages.split_windows(text, offsets, length, overlap) if part.strip()]
        windows += parts
        owners += [owner] * len(parts)
    return windows, owners


def _check_query(query: str) -> None:
    if not isinstance(query, str):
        raise InputError(f"query must be a str, got {type(query).__name__}.")
    if not query.strip():
        raise InputError("query must have at least one character that is not white space; got a blank one.")


def _candidates(candidates: Iterable[str | Candidate]) -> list[Candidate]:
    if isinstance(candidates, str | bytes | Candidate):
        raise InputError(
            f"Expected several candidates, got one {type(candidates).__name__}. Put it into a list: [candidate]."
        )
    result = []
    for i, item in enumerate(candidates):
        if isinstance(item, Candidate):
            result.append(item)
        elif isinstance(item, str):
            result.append(Candidate(item))
        else:
            raise InputError(
                f"Candidate {i} must be a str or a Candidate, got {type(item).__name__}. For LangChain Documents and "
                "LlamaIndex nodes use rerank_plugins.langchain and rerank_plugins.llama_index."
            )
    return result


def _from_config(config: dict[str, Any]) -> Reranker:
    return Reranker(**config)


_DEFAULTS: dict[str, Any] = {**(Reranker.__init__.__kwdefaults__ or {}), "model": None}
