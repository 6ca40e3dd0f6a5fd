"""What both frameworks' adapters share: the keywords of `Reranker` as pydantic fields, and the reranker behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SkipValidation, create_model

from rerank_plugins.errors import ConfigurationError
from rerank_plugins.reranker import Reranker
from rerank_plugins.settings import Settings, documentation

__all__ = ["RerankerFields"]

_KEYWORDS = tuple(option.name for option in fields(Settings))


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

    _own: Reranker = PrivateAttr()
    """The reranker that the fields describe: the shared one, or one of its own."""

    def __init__(self, **data: Any) -> None:
        # Not in validators: pydantic would wrap a ConfigurationError, a ValueError, into its own.
        values, own = _with_reranker(data)
        super().__init__(**values)
        self._check()
        self._own = own

    def _check(self) -> None:
        """Raise a `ConfigurationError` for a setting of the subclass that cannot work."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _KEYWORDS:
            own = Reranker(**{**self._keywords(), name: value})
            super().__setattr__(name, own.config[name])
            self._own = own
        else:
            super().__setattr__(name, value)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Any:
        """A copy, with a reranker of its own where a keyword of `Reranker` changes."""
        copied = super().model_copy(update=update, deep=deep)
        if not set(update or ()).isdisjoint(_KEYWORDS):
            copied._own = Reranker(**copied._keywords())
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


def _with_reranker(data: Mapping[str, Any]) -> tuple[dict[str, Any], Reranker]:
    """The fields of an adapter, and the reranker that they describe."""
    keywords = {name: value for name, value in data.items() if name in _KEYWORDS}
    shared = data.get("reranker")
    if shared is None:
        own = Reranker(**keywords)
        return {**data, **own.config}, own
    if not isinstance(shared, Reranker):
        raise ConfigurationError(
            f"reranker must be a Reranker, got {type(shared).__name__}. "
            "A Hub id, a directory or a backend goes into model=."
        )
    config = shared.config
    given = Settings(**keywords).keywords()
    clash = sorted(name for name in keywords if given[name] != config[name])
    if clash:
        raise ConfigurationError(
            f"Give either reranker= or its keywords: {', '.join(clash)} came beside reranker=. "
            "Set them where the Reranker is made."
        )
    return {**data, **config}, shared
