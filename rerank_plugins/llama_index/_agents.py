"""For LlamaIndex's agents: only the tools that fit, and only what fits of what they answer."""

# No postponed annotations: LlamaIndex looks for `Context` among those of a tool's function as they are.

import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import TextBlock
from llama_index.core.objects import ObjectRetriever, SimpleToolNodeMapping
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.tools import BaseTool, FunctionTool, ToolOutput, adapt_to_async_tool
from llama_index.core.workflow import Context
from pydantic import Field

from rerank_plugins._adapters import own_reranker
from rerank_plugins._agent_texts import (
    READ_DESCRIPTION,
    READ_TOOL,
    asked_for,
    no_such_result,
    part_of_result,
    shortened_note,
)
from rerank_plugins._texts import is_blank
from rerank_plugins._threads import in_thread
from rerank_plugins.errors import ConfigurationError, InputError
from rerank_plugins.reranker import Reranker
from rerank_plugins.results import Shortened, about_tokens, check_max_tokens, page, shorten_result
from rerank_plugins.selection import check_limits
from rerank_plugins.tools import WEIGHT, FirstStage, check_weight, tool_order, tool_text, with_cache

__all__ = ["RelevantToolRetriever", "with_relevant_results"]

_log = logging.getLogger("rerank_plugins")


class RelevantToolRetriever(ObjectRetriever[BaseTool]):
    """Finds, for an agent, the tools that fit what the user asks.

    For ``tool_retriever=`` of `FunctionAgent`, `ReActAgent` and `AgentWorkflow`. The tools come best first, after those
    of `always_include`. A blank request, and one that cannot be scored, gets all tools; a warning of the logger
    ``rerank_plugins`` says why. A request that is the name of a tool gets that tool: so agents look up what they call.

    Args:
        tools: All tools.
        top_n: How many tools to find, beside those of `always_include`.
        always_include: Names of tools, or tools, that are always there.
        min_score: Find those that score at least this; None finds the best `top_n`, whatever they score.
        first_stage: See `rerank_plugins.tools.rank_tools`.
        weight: See `rerank_plugins.tools.rank_tools`.
        reranker: A `Reranker` to share.
        **keywords: Keywords of `Reranker`, instead of `reranker`.

    Raises:
        ConfigurationError: A setting cannot work, or `always_include` names no tool.
        InputError: Something is no tool of LlamaIndex.
    """

    def __init__(
        self,
        tools: Iterable[BaseTool],
        top_n: int = 8,
        always_include: Iterable[str | BaseTool] = (),
        min_score: float | None = None,
        *,
        first_stage: FirstStage | None = None,
        weight: float = WEIGHT,
        reranker: Reranker | None = None,
        **keywords: Any,
    ) -> None:
        check_limits(top_n, min_score, None)
        check_weight(weight)
        listed = _checked(tools)
        always = set(_names(always_include))
        if unknown := sorted(always - {_name(tool) for tool in listed}):
            raise ConfigurationError(f"always_include names no tool that is given: {', '.join(unknown)}.")
        # What was left out of a result is there to be read whatever fits.
        always.add(READ_TOOL)
        own = with_cache(own_reranker(type(self).__name__, {"reranker": reranker, **keywords}))
        found = _ToolNodes(
            always=[tool for tool in listed if _name(tool) in always],
            others=[tool for tool in listed if _name(tool) not in always],
            order={
                "top_n": top_n,
                "min_score": min_score,
                "reranker": own,
                "first_stage": first_stage,
                "weight": weight,
            },
        )
        super().__init__(found, SimpleToolNodeMapping.from_objects(listed))


class _ToolNodes(BaseRetriever):
    """The tools that fit a request, as nodes: so they stand in traces, with their scores."""

    def __init__(self, always: Sequence[BaseTool], others: Sequence[BaseTool], order: dict[str, Any]) -> None:
        super().__init__()
        self._always = always
        self._others = others
        self._order = order

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = query_bundle.query_str
        named = [tool for tool in self._others if _name(tool) == query]
        if named or is_blank(query):
            return self._found([(tool, None) for tool in named or self._others])
        try:
            order = tool_order(query, self._others, **self._order)
        except Exception as error:
            # An agent goes on with all that it has.
            _log.warning("All tools are found, since they could not be ranked: %s: %s", type(error).__name__, error)
            return self._found([(tool, None) for tool in self._others])
        return self._found([(self._others[i], score) for i, score in zip(order.positions, order.scores, strict=True)])

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await in_thread(self._retrieve, query_bundle)

    def _found(self, tools: Sequence[tuple[BaseTool, float | None]]) -> list[NodeWithScore]:
        return [_node(tool, score) for tool, score in [*((tool, None) for tool in self._always), *tools]]


def _node(tool: BaseTool, score: float | None) -> NodeWithScore:
    name = _name(tool)
    return NodeWithScore(node=TextNode(id_=name, text=tool_text(tool), metadata={"name": name}), score=score)


def _name(tool: BaseTool) -> str:
    return tool.metadata.get_name()


def _names(tools: Any) -> list[str]:
    if isinstance(tools, str) or not isinstance(tools, Iterable):
        raise ConfigurationError(f"Give a list of names of tools, such as ['search']; got {tools!r}.")
    return [tool if isinstance(tool, str) else _name(tool) for tool in tools]


def _checked(tools: Any) -> list[BaseTool]:
    if isinstance(tools, str | BaseTool) or not isinstance(tools, Iterable):
        raise InputError(f"tools must be a list of LlamaIndex's tools; got {type(tools).__name__}.")
    listed = list(tools)
    for i, tool in enumerate(listed):
        if not isinstance(tool, BaseTool):
            raise InputError(
                f"tools must be LlamaIndex's tools; number {i} is a {type(tool).__name__}. For a function: "
                "FunctionTool.from_defaults(function)."
            )
    return listed


# -- what tools answer -----------------------------------------------------------------------------------------


def with_relevant_results(
    tools: Iterable[BaseTool],
    max_tokens: int = 1_500,
    *,
    exclude: Iterable[str | BaseTool] = (),
    reranker: Reranker | None = None,
    **keywords: Any,
) -> list[BaseTool]:
    """Wrap tools so that their long answers are cut to the sentences that fit the request.

    The request is the user's message, and those arguments of the call that are texts. A note below what is left says
    how much is missing and how to get it: by the tool ``read_tool_result``. The whole answer stays in the
    ``raw_output``, and in the store of the agent's context for the reading tool. Answers that are short, are errors or
    cannot be scored stay whole, as do those of tools whose answer goes to the user (``return_direct``).

    Args:
        tools: They are wrapped, not changed.
        max_tokens: About the most tokens of an answer; one is counted as four bytes.
        exclude: Names of tools, or tools, whose answers stay whole.
        reranker: A `Reranker` to share.
        **keywords: Keywords of `Reranker`, instead of `reranker`.

    Returns:
        The tools in their order, and the reading tool.

    Raises:
        ConfigurationError: A setting cannot work.
        InputError: Something is no tool of LlamaIndex.
    """
    check_max_tokens(max_tokens)
    listed, left_out = _checked(tools), set(_names(exclude))
    own = own_reranker("with_relevant_results", {"reranker": reranker, **keywords})
    wrapped = [
        tool if tool.metadata.return_direct or _name(tool) in left_out else _ShortenedTool(tool, max_tokens, own)
        for tool in listed
    ]
    return [*wrapped, _reading_tool(max_tokens)]


class _ShortenedTool(FunctionTool):
    """A tool with another one inside, whose long answers it cuts. Agents give it their context."""

    def __init__(self, tool: BaseTool, max_tokens: int, reranker: Reranker) -> None:
        self.tool = adapt_to_async_tool(tool)
        super().__init__(fn=self.tool.call, metadata=tool.metadata, async_fn=self.tool.acall)
        # By this name agents pass on their context; no argument of a tool is called so.
        self.requires_context = True
        self.ctx_param_name = "agent_context_of_shortened_tool"
        self._max_tokens = max_tokens
        self._reranker = reranker

    def call(self, *args: Any, **kwargs: Any) -> ToolOutput:
        _, inner = self._split(kwargs)
        output = self.tool.call(*args, **inner)
        text = self._long_text(output)
        queries = asked_for(kwargs)
        if text is None or not queries:
            return output
        return _cut(output, text, _caught(queries, text, self._max_tokens, self._reranker), None)

    async def acall(self, *args: Any, **kwargs: Any) -> ToolOutput:
        context, inner = self._split(kwargs)
        output = await self.tool.acall(*args, **inner)
        text = self._long_text(output)
        said = None if context is None else await context.store.get("user_msg_str", default=None)
        queries = [*([said] if isinstance(said, str) and not is_blank(said) else []), *asked_for(kwargs)]
        if text is None or not queries:
            return output
        shortened = await in_thread(_caught, queries, text, self._max_tokens, self._reranker)
        result_id = None
        if context is not None and shortened is not None:
            result_id = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
            await context.store.set(_key(result_id), text)
        return _cut(output, text, shortened, result_id)

    def _split(self, kwargs: dict[str, Any]) -> tuple[Context | None, dict[str, Any]]:
        """The agent's context, and the arguments of the inner tool."""
        context = kwargs.pop(self.ctx_param_name or "", None)
        inner = dict(kwargs)
        if context is not None and isinstance(self.tool, FunctionTool) and self.tool.requires_context:
            inner[str(self.tool.ctx_param_name)] = context
        return context, inner

    def _long_text(self, output: ToolOutput) -> str | None:
        """The text of an answer that is too long."""
        return None if output.is_error or about_tokens(output.content) <= self._max_tokens else output.content


def _caught(queries: list[str], text: str, max_tokens: int, reranker: Reranker) -> Shortened | None:
    """What is left of a text; None where all of it stays: an agent goes on with all that it has."""
    try:
        return shorten_result(queries, text, max_tokens, reranker)
    except Exception as error:
        _log.warning("A tool's answer stays whole, it could not be scored: %s: %s", type(error).__name__, error)
        return None


def _cut(output: ToolOutput, text: str, shortened: Shortened | None, result_id: str | None) -> ToolOutput:
    """A copy of an answer with what is left of its text."""
    if shortened is None:
        return output
    note = shortened_note(shortened.left_out, len(text), result_id)
    others = [block for block in output.blocks if not isinstance(block, TextBlock)]
    return output.model_copy(update={"blocks": [TextBlock(text=f"{shortened.text}\n\n{note}"), *others]})


def _key(result_id: str) -> str:
    return f"rerank_plugins_result_{result_id}"


def _reading_tool(max_tokens: int) -> FunctionTool:
    """The tool by which a model reads what was left out, a part at a time."""

    async def read(
        ctx: Context,
        id: Annotated[str, Field(description="The id that the note below the shortened result names.")],
        start: Annotated[int, Field(description="The character to begin at, from 0.")] = 0,
    ) -> str:
        text = await ctx.store.get(_key(id), default=None)
        return no_such_result(id, ()) if text is None else part_of_result(text, *page(text, start, max_tokens), id)

    return FunctionTool.from_defaults(async_fn=read, name=READ_TOOL, description=READ_DESCRIPTION)
