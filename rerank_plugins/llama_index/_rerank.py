"""The node postprocessor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import PurePosixPath, PureWindowsPath
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
    TextNode,
)
from pydantic import Field, SkipValidation
from pydantic.json_schema import SkipJsonSchema

from rerank_plugins._adapters import (
    FALLBACK,
    RELEVANT_SPANS,
    RankFields,
    copied,
    details,
    listed,
    number,
    spans_of,
    value_text,
)
from rerank_plugins.errors import ConfigurationError, InputError, QueryError
from rerank_plugins.types import Candidate, Ranking, excerpt

__all__ = ["CrossEncoderRerank", "content"]

dispatcher = get_dispatcher(__name__)

_RETRIEVAL_SCORE = "retrieval_score"


class CrossEncoderRerank(RankFields, BaseNodePostprocessor):
    """Puts the nodes of a retriever into the order of a cross-encoder, and keeps the best.

    Takes every keyword of `rerank_plugins.Reranker`, or ``reranker=`` for one that is shared. Construction
    loads nothing. The nodes that come out are copies that keep id, type and metadata; their ``score`` is a
    Python float in the scale of the reranker. The nodes that went in stay as they were. What ``deadline_s`` or
    ``on_error`` left without a score keeps that of the retriever, and has the reason in
    ``metadata["rerank_fallback"]``, hidden from the LLM and the embedder. So is ``metadata["relevant_spans"]``, which
    ``spans``, ``passage_length`` and ``compress`` add: the places (start, end, score) in the text that was given, best
    first. With ``compress`` the text is what is left, from ``start_char_idx`` to ``end_char_idx`` in its source.

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

    metadata_mode: MetadataMode = MetadataMode.EMBED
    """Which metadata is scored together with the text, and before each window of it: by default what the embedder sees.
    A value that is missing, NaN or blank is left out; the parts of a list are joined."""
    score_file_paths: Annotated[bool, SkipValidation] = False
    """Score absolute file paths in the metadata too, as ``SimpleDirectoryReader`` writes them. They are left out by
    default: the order would depend on where a folder lies."""
    keep_retrieval_score: Annotated[bool, SkipValidation] = False
    """Keep the retriever's score in ``metadata["retrieval_score"]``, hidden from the LLM and the embedder."""
    node_text: SkipJsonSchema[Callable[[BaseNode], str] | None] = Field(default=None, exclude=True, repr=False)
    """Called with a node; returns the text to score, in place of ``node.get_content(metadata_mode)``. A node whose text
    is not in it has no ``relevant_spans``, and stays whole with `compress`."""

    def _check(self) -> None:
        super()._check()
        self._check_flags("score_file_paths", "keep_retrieval_score")

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serialises this class under."""
        return "CrossEncoderRerank"

    def to_json(self, **kwargs: Any) -> str:
        """The configuration as JSON.

        Raises:
            ConfigurationError: A setting is an object, such as a ready backend, which no JSON can carry.
        """
        data = self.to_dict(**kwargs)
        try:
            return json.dumps(data)
        except TypeError as error:
            plain = (str, int, float, list, tuple, dict, type(None))
            objects = [
                f"{type(value).__name__} as {name}" for name, value in data.items() if not isinstance(value, plain)
            ]
            raise ConfigurationError(
                "JSON can carry a model that is None, a Hub id or a directory, a cache that is None, a number or a "
                f"path, and no functions; got {', '.join(objects)}. Name them instead, or use pickle."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        # LlamaIndex drops what it cannot pickle: without its model, the copy would rank by another one.
        left_out = ("callback_manager", "reranker", "rerankers")
        names = [name for name in type(self).model_fields if name not in left_out]
        return _rebuild, (type(self), {name: getattr(self, name) for name in names})

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, candidates = _query(query_bundle), self._candidates(nodes)
        with self._events(nodes, query) as (kept, tags):
            ranking = self._own.rank(query.query_str, candidates, **self._cuts())
            self._keep(kept, tags, nodes, ranking)
        return kept

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, candidates = _query(query_bundle), self._candidates(nodes)
        with self._events(nodes, query) as (kept, tags):
            ranking = await self._own.arank(query.query_str, candidates, **self._cuts())
            self._keep(kept, tags, nodes, ranking)
        return kept

    @contextmanager
    def _events(
        self, nodes: Sequence[NodeWithScore], query: QueryBundle
    ) -> Iterator[tuple[list[NodeWithScore], dict[str, Any]]]:
        """Announce the rerank and its end to both of LlamaIndex's event systems; the body fills in nodes and tags."""
        kept: list[NodeWithScore] = []
        tags: dict[str, Any] = {}
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
            yield kept, tags
            event.on_end(payload={EventPayload.NODES: kept})
        dispatcher.event(ReRankEndEvent(nodes=kept, tags=tags))

    def _candidates(self, nodes: Sequence[NodeWithScore]) -> list[Candidate]:
        candidates = []
        for i, item in enumerate(listed(nodes, "nodes")):
            if not isinstance(item, NodeWithScore):
                raise InputError(
                    f"nodes must hold NodeWithScore objects; number {i} is a {type(item).__name__}. "
                    "Wrap it: NodeWithScore(node=node)."
                )
            header, text = self._scored_text(item.node, i)
            metadata = item.node.metadata
            candidates.append(Candidate(text, item.node.node_id, metadata, number(item.score), header))
        return candidates

    def _scored_text(self, node: BaseNode, position: int) -> tuple[str, str]:
        """The metadata's lines and the text of a node."""
        if self.node_text is not None:
            header, text = "", self.node_text(node)
        else:
            if not isinstance(node.metadata, dict):
                raise InputError(f"The metadata of node {position} must be a dict, got {type(node.metadata).__name__}.")
            header, text = "", node.get_content(MetadataMode.NONE)
            if isinstance(text, str) and self.metadata_mode != MetadataMode.NONE:
                whole = content(node, self.metadata_mode, file_paths=self.score_file_paths)
                # LlamaIndex's template decides where the text stands; before it is what each window begins with.
                body = text.strip()
                header, text = (whole.removesuffix(body), body) if whole.endswith(body) else ("", whole)
        if not isinstance(text, str):
            raise InputError(
                f"The text of node {position} must be a str, got {type(text).__name__}. Leave such nodes out, or let "
                "node_text return a text."
            )
        return header, text

    def _keep(
        self,
        kept: list[NodeWithScore],
        tags: dict[str, Any],
        nodes: Sequence[NodeWithScore],
        ranking: Ranking,
    ) -> None:
        """Fill in copies of the ranked nodes, and what is known of each beside its score."""
        tags["details"] = [{"node_id": ranked.candidate.id, **details(ranked)} for ranked in ranking]
        if ranking.fallback is not None:
            tags["fallback"] = ranking.fallback
        for ranked in ranking:
            item = nodes[ranked.index]
            known = details(ranked)
            extra = known if self.add_details else {}
            if self.keep_retrieval_score:
                extra = {**extra, _RETRIEVAL_SCORE: known["first_stage_score"]}
            if not ranked.scored:
                extra = {**extra, FALLBACK: ranking.fallback}
            score = ranked.score if ranked.scored else item.score
            text = item.node.get_content(MetadataMode.NONE)
            spans = spans_of(ranked, text)
            if spans:
                extra = {**extra, RELEVANT_SPANS: spans}
            node = _with_metadata(item.node, extra)
            if spans and self.compress:
                _shorten(node, text, spans)
            kept.append(item.model_copy(update={"node": node, "score": score}))


def content(node: BaseNode, mode: MetadataMode, *, file_paths: bool = True) -> str:
    """``node.get_content(mode)``, without metadata that is missing, and with the parts of lists joined.

    Args:
        node: It stays as it is.
        mode: Which metadata stands with the text.
        file_paths: Whether absolute file paths do.
    """
    texts = {
        key: text
        for key, value in node.metadata.items()
        if (file_paths or not _is_absolute_path(value)) and (text := value_text(value))
    }
    return node.model_copy(update={"metadata": texts}).get_content(mode)


def _is_absolute_path(value: Any) -> bool:
    if not isinstance(value, str | PathLike):
        return False
    path = str(fspath(value))
    is_one_line = len(path.splitlines()) == 1
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return is_one_line and (absolute or path.startswith("file:"))


def _with_metadata(node: BaseNode, extra: dict[str, Any]) -> BaseNode:
    """A copy of a node, with metadata that neither the LLM nor the embedder sees."""
    new: BaseNode = node.model_copy(
        update={name: copied(value, (MediaResource, RelatedNodeInfo)) for name, value in node}
    )
    for stale in (FALLBACK, RELEVANT_SPANS):
        new.metadata.pop(stale, None)
    new.metadata.update(extra)
    for hidden in (new.excluded_embed_metadata_keys, new.excluded_llm_metadata_keys) if extra else ():
        hidden += [key for key in extra if key not in hidden]
    return new


def _shorten(node: BaseNode, text: str, spans: Sequence[tuple[int, int, float]]) -> None:
    """Leave of a copy of a node the spans of its text, at their place in the source."""
    node.set_content(excerpt(text, spans))
    start = getattr(node, "start_char_idx", None)
    if start is not None and isinstance(node, TextNode):
        node.start_char_idx = start + min(span[0] for span in spans)
        node.end_char_idx = start + max(span[1] for span in spans)


def _rebuild(cls: type[CrossEncoderRerank], keywords: dict[str, Any]) -> CrossEncoderRerank:
    return cls(**keywords)


def _query(query_bundle: QueryBundle | None) -> QueryBundle:
    if query_bundle is None:
        raise QueryError(
            "Reranking needs the query, and got none. Pass it: postprocess_nodes(nodes, query_str='...') or "
            "postprocess_nodes(nodes, query_bundle=QueryBundle('...'))."
        )
    return query_bundle
