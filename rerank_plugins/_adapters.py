"""The keywords that both frameworks' adapters take, and the reranker behind them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SkipValidation

from rerank_plugins.calibration import Calibration
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.reranker import Reranker
from rerank_plugins.types import Scale

__all__ = ["RerankerFields"]


class RerankerFields(BaseModel):
    """Every keyword of `Reranker` as a pydantic field, or ``reranker=`` for a shared one.

    A dump or a pickle carries these fields alone, never weights. A subclass with settings of its own checks
    them in `_check`.

    Raises:
        ConfigurationError: A keyword that cannot work, whatever the model.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: Any = None
    """None for the bundled model, a Hub id, a local directory, or a ready backend object."""
    backend: str = "auto"
    """`"auto"`, `"onnx"`, `"openvino"` or `"torch"`."""
    device: str | None = None
    """torch device; None chooses."""
    precision: str = "auto"
    """`"auto"`, `"fp32"`, `"bf16"`, `"fp16"` or `"int8"`."""
    max_length: int | None = None
    """Most tokens of a pair; None means as many as the model takes."""
    # `Reranker` checks it: pydantic's own error would not be a ConfigurationError.
    scale: Annotated[Scale, SkipValidation] = "probability"
    """What the score means: `"probability"` or `"logit"`."""
    label: str | int | None = None
    """For heads with several classes, the one to rank by."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    """Run Python code of the model's repository."""
    instruction: str | None = None
    """Task description for models that take one."""
    passage_length: int | None = None
    """Score long texts as windows of this many tokens; None scores their beginning."""
    passage_overlap: int = 0
    """Tokens that neighbouring windows share."""
    calibration: Any = None
    """A `Calibration`, the path of a saved one, or a mapping with `"scale"` and `"shift"`."""
    cache: Any = None
    """Keeps scores: a number of pairs, the path of a file, a `MemoryCache`, a `FileCache` or a store of bytes."""
    reranker: Any = Field(default=None, exclude=True, repr=False, frozen=True)
    """A `Reranker` to share, instead of the keywords above."""

    _made: Reranker | None = PrivateAttr(default=None)

    # Hidden from type checkers, which read the keywords off the fields.
    if not TYPE_CHECKING:

        def __init__(self, **data: Any) -> None:
            # Not in validators: pydantic would wrap a ConfigurationError, a ValueError, into its own.
            super().__init__(**_with_shared(data))
            self._check()
            _ = self._own

    def _check(self) -> None:
        """Raise a `ConfigurationError` for a setting of the subclass that cannot work."""

    @property
    def _own(self) -> Reranker:
        """The reranker that the fields describe: the shared one, or one made again when a field changes."""
        config = _plain({name: getattr(self, name) for name in _KEYWORDS})
        for made in (self.reranker, self._made):
            if made is not None and made.config == config:
                return made
        self._made = made = Reranker(**config)
        return made


def _with_shared(data: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of an adapter, with those of its shared reranker."""
    values = _plain(data)
    shared = values.get("reranker")
    if shared is None:
        return values
    if not isinstance(shared, Reranker):
        raise ConfigurationError(
            f"reranker must be a Reranker, got {type(shared).__name__}. "
            "A Hub id, a directory or a backend goes into model=."
        )
    config = shared.config
    clash = sorted(key for key in config if key in values and values[key] != config[key])
    if clash:
        raise ConfigurationError(
            f"Give either reranker= or its keywords: {', '.join(clash)} came beside reranker=. "
            "Set them where the Reranker is made."
        )
    return {**values, **config}


def _plain(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords as `Reranker.config` holds them."""
    values = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in keywords.items()}
    if values.get("calibration") is not None:
        values["calibration"] = asdict(Calibration.of(values["calibration"]))
    return values


_KEYWORDS = tuple(Reranker().config)
