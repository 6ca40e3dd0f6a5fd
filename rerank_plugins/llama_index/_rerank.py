"""The node postprocessor."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import (
    BaseNode,
    MediaResource,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
)
from pydantic import Field, SkipValidation
from pydantic.json_schema import SkipJsonSchema

from rerank_plugins._adapters import RerankerFields
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.selection import check_limits
from rerank_plugins.types import Candidate, Ranking

__all__ = ["CrossEncoderRerank"]

dispatcher = get_dispatcher(__name__)

_RETRIEVAL_SCORE = "retrieval_score"


class CrossEncoderRerank(RerankerFields, BaseNodePostprocessor):
    """Puts the nodes of a retriever into the order of a cross-encoder, and keeps the best.

    Takes every keyword of `rerank_plugins.Reranker`, or ``reranker=`` for one that is shared. Construction
    loads nothing. The nodes that come out are copies that keep id, type and metadata; their ``score`` is a
    Python float in the scale of the reranker. The nodes that went in stay as they were.

    `to_dict`, `to_json` and pickle carry the settings alone. `node_text` is not part of `to_dict`; give it
    again: ``CrossEncoderRerank.from_dict(data, node_text=function)``.

    Raises:
        ConfigurationError: A setting cannot work.

    Example:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> from rerank_plugins.llama_index import CrossEncoderRerank
        >>> texts = ["git add stages files", "git revert undoes a commit"]
        >>> nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
        >>> CrossEncoderRerank(top_n=1).postprocess_nodes(nodes, query_str="how do I undo a commit")[0].text
        'git revert undoes a commit'
    """

    # `check_limits` checks it: pydantic would take True for 1.
    top_n: Annotated[int | None, SkipValidation] = 3
    """Keep the best this many; None keeps all."""
    min_score: Annotated[float | None, SkipValidation] = None
    """Keep those that score at least this, in the scale of the reranker; None keeps all."""
    metadata_mode: MetadataMode = MetadataMode.EMBED
    """Which metadata is scored together with the text: by default what the embedder sees."""
    keep_retrieval_score: bool = False
    """Keep the retriever's score in ``metadata["retrieval_score"]``, hidden from the LLM and the embedder."""
    node_text: SkipJsonSchema[Callable[[BaseNode], str] | None] = Field(default=None, exclude=True, repr=False)
    """Called with a node; returns the text to score, in place of ``node.get_content(metadata_mode)``."""

    def _check(self) -> None:
        super()._check()
        check_limits(self.top_n, self.min_score)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serialises this class under."""
        return "CrossEncoderRerank"

    def to_json(self, **kwargs: Any) -> str:
        """The configuration as JSON.

        Raises:
            ConfigurationError: ``model`` or ``cache`` is an object, which no JSON can carry.
        """
        data = self.to_dict(**kwargs)
        try:
            return json.dumps(data)
        except TypeError as error:
            settings = self._own.settings
            raise ConfigurationError(
                "JSON can carry a model that is None, a Hub id or a directory, and a cache that is None, a number or a "
                f"path; got {type(settings.model).__name__} and {type(settings.cache).__name__}. Name them instead, "
                "or use pickle."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        # LlamaIndex drops what it cannot pickle: without its model, the copy would rank by another one.
        names = [name for name in type(self).model_fields if name not in ("callback_manager", "reranker")]
        return _rebuild, (type(self), {name: getattr(self, name) for name in names})

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, candidates = _query(query_bundle), self._candidates(nodes)
        with self._events(nodes, query) as kept:
            ranking = self._own.rank(query.query_str, candidates, self.top_n, self.min_score)
            kept += self._ranked(nodes, ranking)
        return kept

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, candidates = _query(query_bundle), self._candidates(nodes)
        with self._events(nodes, query) as kept:
            ranking = await self._own.arank(query.query_str, candidates, self.top_n, self.min_score)
            kept += self._ranked(nodes, ranking)
        return kept

    @contextmanager
    def _events(self, nodes: Sequence[NodeWithScore], query: QueryBundle) -> Iterator[list[NodeWithScore]]:
        """Announce the rerank and its end to both of LlamaIndex's event systems; the body fills the list."""
        kept: list[NodeWithScore] = []
        top_n = len(nodes) if self.top_n is None else self.top_n
        model_name = self._own.model_name
        dispatcher.event(ReRankStartEvent(query=query, nodes=list(nodes), top_n=top_n, model_name=model_name))
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: model_name,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield kept
            event.on_end(payload={EventPayload.NODES: kept})
        dispatcher.event(ReRankEndEvent(nodes=kept))

    def _candidates(self, nodes: Sequence[NodeWithScore]) -> list[Candidate]:
        for i, item in enumerate(nodes):
            if not isinstance(item, NodeWithScore):
                raise InputError(
                    f"nodes must hold NodeWithScore objects; number {i} is a {type(item).__name__}. "
                    "Wrap it: NodeWithScore(node=node)."
                )
        read = self.node_text or (lambda node: node.get_content(self.metadata_mode))
        return [Candidate(read(item.node), id=item.node.node_id) for item in nodes]

    def _ranked(self, nodes: Sequence[NodeWithScore], ranking: Ranking) -> list[NodeWithScore]:
        result = []
        for ranked in ranking:
            item = nodes[ranked.index]
            node = _copied_node(item.node)
            if self.keep_retrieval_score:
                node.metadata[_RETRIEVAL_SCORE] = None if item.score is None else float(item.score)
                for hidden in (node.excluded_embed_metadata_keys, node.excluded_llm_metadata_keys):
                    if _RETRIEVAL_SCORE not in hidden:
                        hidden.append(_RETRIEVAL_SCORE)
            result.append(item.model_copy(update={"node": node, "score": ranked.score}))
        return result


def _rebuild(cls: type[CrossEncoderRerank], keywords: dict[str, Any]) -> CrossEncoderRerank:
    return cls(**keywords)


def _query(query_bundle: QueryBundle | None) -> QueryBundle:
    if query_bundle is None:
        raise InputError(
            "Reranking needs the query, and got none. Pass it: postprocess_nodes(nodes, query_str='...') or "
            "postprocess_nodes(nodes, query_bundle=QueryBundle('...'))."
        )
    return query_bundle


def _copied_node(node: BaseNode) -> BaseNode:
    return node.model_copy(update={name: _copied(value) for name, value in node})


def _copied(value: Any) -> Any:
    """Containers anew, at every depth. Other objects are shared: an `IndexNode` can hold a whole index."""
    if isinstance(value, dict):
        new = copy.copy(value)
        new.update({key: _copied(item) for key, item in value.items()})
        return new
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, set):
        return set(value)
    if isinstance(value, MediaResource | RelatedNodeInfo):
        return value.model_copy(update={name: _copied(item) for name, item in value})
    return value
