"""langchain-core's cross-encoder interface: ours for other code, and other code's for our adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.cross_encoders import BaseCrossEncoder

from rerank_plugins._adapters import RerankerFields
from rerank_plugins.errors import ConfigurationError

__all__ = ["CrossEncoderScorer", "with_cross_encoder"]


class CrossEncoderScorer(RerankerFields, BaseCrossEncoder):
    """A cross-encoder for whatever takes langchain-core's ``BaseCrossEncoder``.

    Takes every keyword of `rerank_plugins.Reranker`, or ``reranker=`` for one that is shared.
    langchain-classic's ``CrossEncoderReranker(model=CrossEncoderScorer())`` drops the scores;
    `CrossEncoderRerank` keeps them, has a threshold and is traced.

    Raises:
        ConfigurationError: A setting cannot work.
    """

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Score (query, text) pairs.

        Args:
            text_pairs: Pairs, of one query or of several.

        Returns:
            One score a pair, input order, in the chosen scale: probabilities, or logits for
            ``scale="logit"``.

        Raises:
            QueryError: A query is blank or too long.
            InputError: Something is no string.
            ModelLoadError: The model is missing, incomplete or unreadable.
            ScoringError: The engine failed, or a logit is not finite.
        """
        positions: dict[str, list[int]] = {}
        for i, (query, _) in enumerate(text_pairs):
            positions.setdefault(query, []).append(i)
        scores = [0.0] * len(text_pairs)
        for query, places in positions.items():
            found = self._own.score(query, [text_pairs[i][1] for i in places])
            for i, score in zip(places, found.tolist(), strict=True):
                scores[i] = score
        return scores


class _Scores:
    """A LangChain cross-encoder as a ready backend."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.name = type(model).__name__
        self.model_name = str(getattr(model, "model_name", None) or self.name)
        self.declared = _declared_scale(model)
        self.emits = self.declared or "logit"
        if (fingerprint := getattr(model, "fingerprint", None)) is not None:
            self.fingerprint = fingerprint

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return list(self.model.score(list(pairs))) if pairs else []

    def __repr__(self) -> str:
        return f"{self.name}({self.model_name!r})"


def _declared_scale(model: Any) -> str | None:
    """What a cross-encoder says that its scores are; None where it says nothing. Never read from the scores."""
    declared = getattr(model, "emits", None)
    if declared is not None:
        if declared not in ("logit", "probability"):
            raise ConfigurationError(
                f"emits of {type(model).__name__} must be 'logit' or 'probability'; got {declared!r}."
            )
        return str(declared)
    # HuggingFaceCrossEncoder: sentence-transformers applies this to the logits of heads with one class.
    client = getattr(model, "client", None)
    labels = getattr(client, "num_labels", None)
    applied = type(getattr(client, "activation_fn", None)).__name__
    return {"Sigmoid": "probability", "Identity": "logit"}.get(applied) if labels == 1 else None


def with_cross_encoder(data: dict[str, Any]) -> dict[str, Any]:
    """The keywords of an adapter, with a `BaseCrossEncoder` as model made into a ready backend.

    Scores of a cross-encoder that does not say what they are get reported as they are: ``scale="logit"``.

    Raises:
        ConfigurationError: ``scale="probability"`` of scores of which nobody knows whether they are logits.
    """
    model = data.get("model")
    if isinstance(model, CrossEncoderScorer):
        rest = {key: value for key, value in data.items() if key != "model"}
        return {**rest, "reranker": model._own}
    if isinstance(model, type) or not callable(getattr(model, "score", None)):
        return data
    if any(callable(getattr(model, name, None)) for name in ("logits", "score_pairs")):
        return data
    scores = _Scores(model)
    if scores.declared is None and data.get("scale", "logit") == "probability":
        raise ConfigurationError(
            f"{scores.name} does not say whether its scores are logits or probabilities. Give it an attribute emits = "
            "'logit' or 'probability', or leave scale out: then its scores are reported as they are."
        )
    return {**({"scale": "logit"} if scores.declared is None else {}), **data, "model": scores}
