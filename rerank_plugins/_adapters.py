"""The keywords that both frameworks' adapters take, and the reranker behind them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from rerank_plugins.errors import ConfigurationError
from rerank_plugins.reranker import Reranker
from rerank_plugins.types import Scale

__all__ = ["RerankerFields"]


class RerankerFields(BaseModel):
    """Every keyword of `Reranker` as a pydantic field, or ``reranker=`` for a shared one.

    A dump or a pickle carries these fields alone, never weights.
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
    scale: Scale = "probability"
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
    reranker: Any = Field(default=None, exclude=True, repr=False)
    """A `Reranker` to share, instead of the keywords above."""

    _own: Reranker = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _from_shared(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("reranker") is None:
            return values
        shared = values["reranker"]
        if not isinstance(shared, Reranker):
            raise ConfigurationError(f"reranker must be a Reranker, got {type(shared).__name__}.")
        config = shared.config
        clash = sorted(key for key in config if key in values and values[key] != config[key])
        if clash:
            raise ConfigurationError(
                f"Give either reranker= or its keywords: {', '.join(clash)} came beside reranker=. "
                "Set them where the Reranker is made."
            )
        return {**values, **config}

    def model_post_init(self, context: Any, /) -> None:
        """Make the reranker; it loads nothing yet."""
        super().model_post_init(context)
        config = {name: getattr(self, name) for name in _KEYWORDS}
        self._own = self.reranker if self.reranker is not None else Reranker(**config)
        self.reranker = self._own


_KEYWORDS = tuple(Reranker().config)
