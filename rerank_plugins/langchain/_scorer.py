"""`CrossEncoderScorer`, langchain-core's cross-encoder interface."""

from __future__ import annotations

from langchain_core.cross_encoders import BaseCrossEncoder

from rerank_plugins._adapters import RerankerFields

__all__ = ["CrossEncoderScorer"]


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
            InputError: A query is blank or too long, or something is no string.
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
