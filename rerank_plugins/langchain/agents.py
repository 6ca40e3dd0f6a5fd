"""Middleware for LangChain's agents: only the tools that fit, and only what fits of what they answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool, StructuredTool
from pydantic import BaseModel, Field

from rerank_plugins._adapters import own_reranker
from rerank_plugins._agent_texts import (
    READ_DESCRIPTION,
    READ_TOOL,
    asked_for,
    no_such_result,
    part_of_result,
    shortened_note,
)
from rerank_plugins._extras import import_extra
from rerank_plugins._texts import is_blank
from rerank_plugins._threads import in_thread
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.langchain._cross_encoder import with_cross_encoder
from rerank_plugins.langchain._runs import arun, run
from rerank_plugins.reranker import Reranker
from rerank_plugins.results import Shortened, about_tokens, check_max_tokens, page, shorten_result
from rerank_plugins.selection import check_limits
from rerank_plugins.tools import WEIGHT, FirstStage, ToolOrder, check_weight, tool_name, tool_order, with_cache

import_extra("langchain.agents.middleware", "langchain-agents")

# After the line above, which says what to install.
from langchain.agents.middleware import AgentMiddleware  # noqa: E402
from langchain.agents.middleware.types import ModelRequest, ModelResponse, ToolCallRequest  # noqa: E402
from langchain.tools import ToolRuntime  # noqa: E402
from langgraph.types import Command  # noqa: E402

__all__ = ["RelevantResultsMiddleware", "RelevantToolsMiddleware"]

_log = logging.getLogger("rerank_plugins")


class RelevantToolsMiddleware(AgentMiddleware[Any, Any, Any]):
    """Shows the language model, at each call, only the tools that fit the last turns of the conversation.

    They are chosen by `rerank_plugins.tools.rank_tools` and keep their order, so that a provider's prompt cache still
    fits where the choice is the same. The model sees these tools too, whatever fits: those of `always_include`, those
    that it has called since the user's last message, one that ``tool_choice`` names, and those that the provider runs.
    It sees all tools where the conversation has no text, or where scoring fails: a warning of the logger
    ``rerank_plugins`` and the trace say why.

    Args:
        top_n: How many tools to choose, beside those above.
        always_include: Names of tools, or tools, that are always there.
        min_score: Choose those that score at least this; None chooses the best `top_n`, whatever they score.
        turns: How many of the user's last messages count. What the model has said since then counts too.
        first_stage: See `rerank_plugins.tools.rank_tools`.
        weight: See `rerank_plugins.tools.rank_tools`.
        reranker: A `Reranker` to share.
        **keywords: Keywords of `Reranker`, instead of `reranker`.

    Raises:
        ConfigurationError: A setting cannot work.
        MissingDependencyError: ``langchain`` is not installed.

    Example:
        >>> from langchain.agents import create_agent
        >>> from rerank_plugins.langchain import RelevantToolsMiddleware
        >>> agent = create_agent(model, tools, middleware=[RelevantToolsMiddleware(top_n=8)])  # doctest: +SKIP
    """

    def __init__(
        self,
        top_n: int = 8,
        always_include: Iterable[str | BaseTool | dict[str, Any]] = (),
        min_score: float | None = None,
        *,
        turns: int = 2,
        first_stage: FirstStage | None = None,
        weight: float = WEIGHT,
        reranker: Any = None,
        **keywords: Any,
    ) -> None:
        super().__init__()
        self.tools = []
        check_limits(top_n, min_score, None)
        if top_n is None:
            raise ConfigurationError("top_n must be an int of at least 1; got None, which would choose all tools.")
        if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
            raise ConfigurationError(f"turns must be an int of at least 1; got {turns!r}.")
        check_weight(weight)
        self.top_n = int(top_n)
        self.always_include = frozenset(_names(always_include))
        self.min_score = min_score
        self.turns = turns
        self.first_stage = first_stage
        self.weight = weight
        self.reranker = with_cache(_reranker(self, reranker, keywords))

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model with the tools that fit."""
        choice = _Choice(self, request)
        if choice.needed:
            with run("RelevantTools", choice.inputs) as outputs:
                outputs |= choice.decide(_caught(self._order, choice))
        return handler(choice.request)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """As `wrap_model_call`, without blocking the event loop."""
        choice = _Choice(self, request)
        if choice.needed:
            async with arun("RelevantTools", choice.inputs) as outputs:
                outputs |= choice.decide(await in_thread(_caught, self._order, choice))
        return await handler(choice.request)

    def _order(self, choice: _Choice) -> ToolOrder:
        return tool_order(
            choice.queries,
            [tool for _, tool in choice.open],
            self.top_n,
            self.reranker,
            min_score=self.min_score,
            first_stage=self.first_stage,
            weight=self.weight,
        )


class _Choice:
    """Of one call of the model: what is chosen from, and what comes of it."""

    def __init__(self, owner: RelevantToolsMiddleware, request: ModelRequest[Any]) -> None:
        self.request = request
        said = [str(message.text) for message in _since_user(request.messages)]
        self.queries = [*_user_texts(request.messages, owner.turns), *[text for text in said if not is_blank(text)][:1]]
        wanted = {*owner.always_include, READ_TOOL, *_chosen_names(request.tool_choice)}
        self.open = [
            (i, tool)
            for i, tool in enumerate(request.tools)
            if not _is_the_providers(tool) and tool_name(tool, i) not in wanted
        ]
        self.needed = bool(self.queries and self.open) and (len(self.open) > owner.top_n or owner.min_score is not None)
        self.inputs = {
            "queries": self.queries,
            "model": owner.reranker.model_name,
            "top_n": owner.top_n,
            "n_tools": len(request.tools),
        }

    def decide(self, order: ToolOrder | Exception) -> dict[str, Any]:
        """Keep the tools that were chosen; returns what the trace says."""
        if isinstance(order, Exception):
            reason = f"{type(order).__name__}: {order}"
            _log.warning("All tools are shown, since they could not be ranked: %s", reason)
            return {"tools": [_shown_name(tool) for tool in self.request.tools], "fallback": reason}
        best = [self.open[i] for i in order.positions]
        called = _called(self.request.messages)
        left_out = {i for i, tool in self.open if tool_name(tool) not in called} - {i for i, _ in best}
        tools = [tool for i, tool in enumerate(self.request.tools) if i not in left_out]
        self.request = self.request.override(tools=tools)
        scores = {tool_name(tool): score for (_, tool), score in zip(best, order.scores, strict=True)}
        outputs = {"tools": [_shown_name(tool) for tool in tools], "scores": scores}
        return outputs if order.fallback is None else {**outputs, "fallback": order.fallback}


class RelevantResultsMiddleware(AgentMiddleware[Any, Any, Any]):
    """Cuts a tool's long answer to the sentences that fit the request, and says so to the language model.

    The request is the user's last message, and those arguments of the call that are texts. A note below what is left
    says how much is missing and how to get it: by the tool ``read_tool_result``, which this middleware brings. The
    whole answer stays in the agent's state, where no model reads it: in the ``artifact`` of the `ToolMessage`, or in
    ``response_metadata["full_content"]`` where the tool has an artifact of its own. Answers that are short, are errors
    or cannot be scored stay whole, as do those of tools whose answer goes to the user (``return_direct``).

    For a graph with a `ToolNode` of its own: ``ToolNode([*tools, *middleware.tools],
    wrap_tool_call=middleware.wrap_tool_call, awrap_tool_call=middleware.awrap_tool_call)``.

    Args:
        max_tokens: About the most tokens of an answer; one is counted as four bytes.
        exclude: Names of tools, or tools, whose answers stay whole: those that must be read as code or as JSON.
        reranker: A `Reranker` to share.
        **keywords: Keywords of `Reranker`, instead of `reranker`.

    Raises:
        ConfigurationError: A setting cannot work.
        MissingDependencyError: ``langchain`` is not installed.
    """

    def __init__(
        self,
        max_tokens: int = 1_500,
        *,
        exclude: Iterable[str | BaseTool | dict[str, Any]] = (),
        reranker: Any = None,
        **keywords: Any,
    ) -> None:
        super().__init__()
        check_max_tokens(max_tokens)
        self.max_tokens = max_tokens
        self.exclude = frozenset(_names(exclude))
        self.reranker = _reranker(self, reranker, keywords)
        self.tools = [_reading_tool(max_tokens)]

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        """Call the tool, and cut what it answers."""
        answer = handler(request)
        cut = _Cut(self, request, answer)
        if cut.needed:
            with run("RelevantResults", cut.inputs) as outputs:
                outputs |= cut.decide(_caught(self._shortened, cut))
        return cut.answer

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]]
    ) -> ToolMessage | Command[Any]:
        """As `wrap_tool_call`, without blocking the event loop."""
        answer = await handler(request)
        cut = _Cut(self, request, answer)
        if cut.needed:
            async with arun("RelevantResults", cut.inputs) as outputs:
                outputs |= cut.decide(await in_thread(_caught, self._shortened, cut))
        return cut.answer

    def _shortened(self, cut: _Cut) -> Shortened | None:
        return shorten_result(cut.queries, cut.text, self.max_tokens, self.reranker)


class _Cut:
    """Of one call of a tool: the text that is cut, and the answer with what is left of it."""

    def __init__(self, owner: RelevantResultsMiddleware, request: ToolCallRequest, answer: Any) -> None:
        call = request.tool_call
        self.answer: ToolMessage | Command[Any] = answer
        self.call_id = str(call["id"])
        self.message = _message_of(answer, self.call_id)
        self.text = "" if self.message is None else str(self.message.text)
        self.queries = [*_user_texts(_messages(request.state), 1), *asked_for(call["args"])]
        self.needed = (
            self.message is not None
            and self.message.status != "error"
            and call["name"] not in (*owner.exclude, READ_TOOL)
            and not (request.tool is not None and request.tool.return_direct)
            and bool(self.queries)
            and about_tokens(self.text) > owner.max_tokens
        )
        self.inputs = {
            "queries": self.queries,
            "model": owner.reranker.model_name,
            "tool": call["name"],
            "characters": len(self.text),
        }

    def decide(self, shortened: Shortened | Exception | None) -> dict[str, Any]:
        """Put what is left into the answer; returns what the trace says."""
        if isinstance(shortened, Exception):
            reason = f"{type(shortened).__name__}: {shortened}"
            _log.warning("A tool's answer stays whole, since it could not be scored: %s", reason)
            return {"left_out": 0, "fallback": reason}
        if shortened is None or self.message is None:
            return {"left_out": 0}
        note = shortened_note(shortened.left_out, len(self.text), self.call_id)
        self.answer = _replaced(self.answer, self.message, f"{shortened.text}\n\n{note}")
        return {"left_out": shortened.left_out, "content": shortened.text}


def _caught(decide: Callable[[Any], Any], what: Any) -> Any:
    """What a decision returns or raises: an agent goes on with all that it has."""
    try:
        return decide(what)
    except Exception as error:
        return error


def _reranker(owner: object, reranker: Any, keywords: Mapping[str, Any]) -> Reranker:
    return own_reranker(type(owner).__name__, with_cross_encoder({"reranker": reranker, **keywords}))


def _names(tools: Any) -> list[str]:
    if isinstance(tools, str) or not isinstance(tools, Iterable):
        raise ConfigurationError(f"Give a list of names of tools, such as ['search']; got {tools!r}.")
    return [tool if isinstance(tool, str) else tool_name(tool) for tool in tools]


# -- what a conversation says ----------------------------------------------------------------------------------


def _messages(state: Any) -> list[AnyMessage]:
    """The messages of an agent's state: a mapping, a model, or the list itself."""
    if isinstance(state, list):
        return state
    found = state.get("messages") if isinstance(state, Mapping) else getattr(state, "messages", None)
    return list(found or [])


def _since_user(messages: Sequence[AnyMessage]) -> list[AIMessage]:
    """What the model has said since the user's last message."""
    said: list[AIMessage] = []
    for message in reversed(messages):
        if isinstance(message, HumanMessage):
            break
        if isinstance(message, AIMessage):
            said.append(message)
    return said


def _user_texts(messages: Sequence[AnyMessage], n: int) -> list[str]:
    """The user's last `n` messages that have a text, newest first."""
    texts = [str(message.text) for message in reversed(messages) if isinstance(message, HumanMessage)]
    return [text for text in texts if not is_blank(text)][:n]


def _called(messages: Sequence[AnyMessage]) -> list[str]:
    return [call["name"] for message in _since_user(messages) for call in message.tool_calls]


def _chosen_names(tool_choice: Any) -> list[str]:
    """The name that ``tool_choice`` forces, in whichever of the providers' shapes."""
    if isinstance(tool_choice, Mapping):
        inner = tool_choice.get("function")
        found = inner.get("name") if isinstance(inner, Mapping) else tool_choice.get("name")
    else:
        found = tool_choice
    return [found] if isinstance(found, str) else []


def _is_the_providers(tool: Any) -> bool:
    """Whether the provider runs a tool, such as its web search: nothing says what it is for."""
    return isinstance(tool, dict) and "function" not in tool and not tool.get("description")


def _shown_name(tool: Any) -> str:
    return str(tool.get("name") or tool.get("type") or "tool") if _is_the_providers(tool) else tool_name(tool)


# -- what a tool answers ---------------------------------------------------------------------------------------

_FULL = "full_content"


def _message_of(answer: Any, call_id: str) -> ToolMessage | None:
    """The tool's message in an answer, which may be a `Command` that updates the agent's state."""
    if isinstance(answer, ToolMessage):
        return answer
    return next((one for one in _updated(answer) if isinstance(one, ToolMessage) and one.tool_call_id == call_id), None)


def _updated(answer: Any) -> list[Any]:
    update = answer.update if isinstance(answer, Command) else None
    found = update.get("messages") if isinstance(update, Mapping) else None
    return list(found) if isinstance(found, list | tuple) else []


def _replaced(answer: Any, message: ToolMessage, text: str) -> Any:
    """A copy of an answer whose message has another text, and keeps its own one out of the model's sight."""
    whole = message.text
    content: Any = text
    if not isinstance(message.content, str):
        others = [block for block in message.content if isinstance(block, dict) and block.get("type") != "text"]
        content = [{"type": "text", "text": text}, *others]
    update: dict[str, Any] = {"content": content}
    if message.artifact is None:
        update["artifact"] = {_FULL: str(whole)}
    else:
        update["response_metadata"] = {**message.response_metadata, _FULL: str(whole)}
    new = message.model_copy(update=update)
    if answer is message:
        return new
    messages = [new if one is message else one for one in _updated(answer)]
    return replace(answer, update={**answer.update, "messages": messages})


def _full_content(message: ToolMessage) -> str | None:
    """The whole text of a message that was cut."""
    for place in (message.artifact, message.response_metadata):
        if isinstance(place, Mapping) and isinstance(text := place.get(_FULL), str):
            return text
    return None


class _Arguments(BaseModel):
    """Arguments of the reading tool."""

    id: Annotated[str, Field(description="The id that the note below the shortened result names.")]
    start: Annotated[int, Field(description="The character to begin at, from 0.")] = 0


def _reading_tool(max_tokens: int) -> BaseTool:
    """The tool by which a model reads what was left out, a part at a time."""

    def read(id: str, runtime: ToolRuntime, start: int = 0) -> str:
        messages = [one for one in _messages(runtime.state) if isinstance(one, ToolMessage)]
        whole = {one.tool_call_id: text for one in messages if (text := _full_content(one)) is not None}
        if id not in whole:
            return no_such_result(id, list(whole))
        return part_of_result(whole[id], *page(whole[id], start, max_tokens), id)

    async def aread(id: str, runtime: ToolRuntime, start: int = 0) -> str:
        return read(id, runtime, start)

    return StructuredTool.from_function(
        read, aread, name=READ_TOOL, description=READ_DESCRIPTION, args_schema=_Arguments, infer_schema=False
    )
