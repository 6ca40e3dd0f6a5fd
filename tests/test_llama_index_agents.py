"""Help for LlamaIndex's agents: which tools they find, and what they read of their answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.types import ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.objects import ObjectRetriever
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.schema import QueryBundle
from llama_index.core.tools import FunctionTool, QueryEngineTool, ToolMetadata, ToolOutput
from llama_index.core.tools.types import BaseTool
from llama_index.core.workflow import Context

from rerank_plugins import ConfigurationError, InputError, Reranker
from rerank_plugins.llama_index import RelevantToolRetriever, with_relevant_results
from rerank_plugins.testing import FakeBackend

THINGS = ["rain", "mail", "music", "money", "maps", "news", "sport", "books", "films", "food"]


def named(name: str, description: str, answer: Any = "done") -> FunctionTool:
    return FunctionTool.from_defaults(lambda topic="": answer, name=name, description=description)


TOOLS = [named(f"about_{thing}", f"Tells of {thing}.") for thing in THINGS]


def names(tools: Sequence[BaseTool]) -> list[str]:
    return [tool.metadata.get_name() for tool in tools]


async def test_the_tools_themselves_are_found_best_first() -> None:
    retriever = RelevantToolRetriever(TOOLS, 2, ["about_food"], reranker=Reranker(FakeBackend()))
    assert isinstance(retriever, ObjectRetriever)
    found = retriever.retrieve("tells of music. tells of music. and mail.")
    assert names(found)[0] == "about_food"
    assert sorted(names(found)[1:]) == ["about_mail", "about_music"]
    assert all(any(tool is given for given in TOOLS) for tool in found)
    assert await retriever.aretrieve(QueryBundle("tells of music. and mail.")) == found
    nodes = retriever.retriever.retrieve("tells of news.")
    assert [node.node_id for node in nodes][:2] == ["about_food", "about_news"]
    assert nodes[1].score > 0.9
    assert retriever.node_postprocessors == []


def test_the_reading_tool_is_always_there() -> None:
    retriever = RelevantToolRetriever(shortened(*TOOLS), 1, reranker=Reranker(FakeBackend()))
    assert names(retriever.retrieve("tells of news.")) == ["read_tool_result", "about_news"]


def test_a_blank_request_gets_all_and_a_name_its_tool() -> None:
    backend = FakeBackend()
    retriever = RelevantToolRetriever(TOOLS, 1, model=backend)
    assert len(retriever.retrieve("")) == 10
    assert names(retriever.retrieve("about_maps")) == ["about_maps"]
    assert backend.calls == []
    assert len(retriever.retrieve("no_such_tool")) == 1


async def test_where_scoring_fails_all_tools_are_found(caplog: Any) -> None:
    def fails(query: str, text: str) -> float:
        raise RuntimeError("out of order")

    retriever = RelevantToolRetriever(TOOLS, 1, reranker=Reranker(FakeBackend(fails)))
    with caplog.at_level(logging.WARNING, "rerank_plugins"):
        assert await retriever.aretrieve("tells of news.") == TOOLS
    assert "out of order" in caplog.text


def test_a_threshold_and_pairs_that_are_scored_once() -> None:
    backend = FakeBackend(lambda query, text: 3.0 if "news" in text else -3.0)
    retriever = RelevantToolRetriever(TOOLS, min_score=0.5, model=backend)
    for _ in range(3):
        assert names(retriever.retrieve("anything")) == ["about_news"]
    assert sum(map(len, backend.calls)) == 10


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: RelevantToolRetriever(TOOLS, 0), ConfigurationError, "top_n"),
        (lambda: RelevantToolRetriever(TOOLS, weight=7), ConfigurationError, "weight"),
        (lambda: RelevantToolRetriever(TOOLS, always_include=["x"]), ConfigurationError, "names no tool.*: x"),
        (lambda: RelevantToolRetriever(TOOLS, always_include="about_rain"), ConfigurationError, "list of names"),
        (lambda: RelevantToolRetriever(TOOLS, similarity_top_k=3), ConfigurationError, "top_n"),
        (lambda: RelevantToolRetriever([print]), InputError, "number 0 is a builtin"),
        (lambda: RelevantToolRetriever(TOOLS[0]), InputError, "must be a list"),
        (lambda: with_relevant_results(TOOLS, 0), ConfigurationError, "max_tokens"),
        (lambda: with_relevant_results([print]), InputError, "number 0"),
        (lambda: with_relevant_results(TOOLS, top_n=2), ConfigurationError, "with_relevant_results does not have"),
    ],
)
def test_settings_that_cannot_work(make: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


class Scripted:
    """A function-calling model that follows a script, and remembers which tools it saw."""

    def __init__(self, *steps: tuple[str, dict[str, Any]] | str) -> None:
        self.steps = list(steps)
        self.seen: list[list[str]] = []
        seen = self.seen

        class Model(MockFunctionCallingLLM):
            def _prepare_chat_with_tools(self, tools: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append(names(tools))
                return super()._prepare_chat_with_tools(tools, *args, **kwargs)

        self.llm = Model(response_generator=self.answer)

    def answer(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
        step = self.steps.pop(0)
        if isinstance(step, str):
            return ChatMessage(role="assistant", content=step)
        call = ToolCallBlock(tool_name=step[0], tool_kwargs=step[1], tool_call_id=str(len(self.steps)))
        return ChatMessage(role="assistant", blocks=[call])


async def results_of(agent: Any, request: str) -> tuple[list[ToolOutput], str]:
    handler = agent.run(request)
    outputs = [event.tool_output async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    return outputs, (await handler).response.content


@pytest.mark.parametrize("workflow", [False, True])
async def test_a_function_agent_sees_and_calls_what_fits(workflow: bool) -> None:
    script = Scripted(("about_mail", {"topic": "x"}), "Here it is.")
    retriever = RelevantToolRetriever(TOOLS, 2, reranker=Reranker(FakeBackend()))
    agent: Any = FunctionAgent(name="helper", description="Helps.", tool_retriever=retriever, llm=script.llm)
    if workflow:
        agent = AgentWorkflow(agents=[agent], root_agent="helper")
    outputs, answer = await results_of(agent, "tells of mail. and music.")
    assert [output.content for output in outputs] == ["done"]
    assert answer == "Here it is."
    assert [sorted(seen) for seen in script.seen] == [["about_mail", "about_music"]] * 2


async def test_a_react_agent_calls_what_fits() -> None:
    steps = ['Thought: mail.\nAction: about_mail\nAction Input: {"topic": "x"}', "Thought: done.\nAnswer: Here it is."]
    prompts: list[str] = []

    def answer(messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
        prompts.append(str(messages[0].content))
        return ChatMessage(role="assistant", content=steps.pop(0))

    retriever = RelevantToolRetriever(TOOLS, 1, reranker=Reranker(FakeBackend()))
    agent = ReActAgent(tool_retriever=retriever, llm=MockFunctionCallingLLM(response_generator=answer))
    outputs, text = await results_of(agent, "tells of mail.")
    assert [output.content for output in outputs] == ["done"]
    assert text == "Here it is."
    assert "about_mail" in prompts[0]
    assert "about_music" not in prompts[0]


LONG = "\n\n".join(
    [f"Filler sentence number {i} says nothing that matters here at all." for i in range(200)]
    + ["Pandas eat bamboo all day."]
    + [f"More filler, number {i}, about other things." for i in range(200)]
)


def shortened(*tools: BaseTool, **keywords: Any) -> list[BaseTool]:
    return with_relevant_results(tools, 50, reranker=Reranker(FakeBackend()), **keywords)


async def test_a_long_answer_is_cut_and_can_be_read_whole() -> None:
    handbook = named("handbook", "A handbook.", LONG)
    tools = shortened(handbook)
    assert names(tools) == ["handbook", "read_tool_result"]
    script = Scripted(("handbook", {"topic": "x"}), "I wait.")
    agent = FunctionAgent(tools=tools, llm=script.llm)
    context = Context(agent)
    handler = agent.run("What do pandas eat?", ctx=context)
    outputs = [event.tool_output async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    await handler
    assert "Pandas eat bamboo all day." in outputs[0].content
    assert len(outputs[0].content) < 500
    assert outputs[0].raw_output.raw_output == LONG if isinstance(outputs[0].raw_output, ToolOutput) else True
    result_id = outputs[0].content.split('id="')[1].split('"')[0]
    # The context goes through JSON, as where a run is taken up later.
    with pytest.warns(Warning, match="memory"):
        kept = context.to_dict()
    context = Context.from_dict(agent, kept)
    script.steps += [("read_tool_result", {"id": result_id}), ("read_tool_result", {"id": "other"}), "bamboo"]
    handler = agent.run("Read on.", ctx=context)
    read = [event.tool_output async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    await handler
    assert LONG.startswith(read[0].content.split("\n\n[Characters")[0])
    assert "the next part: read_tool_result" in read[0].content
    assert "no shortened result with the id 'other'" in read[1].content


async def test_without_an_agent_the_call_is_the_request() -> None:
    (tool, _) = shortened(named("handbook", "A handbook.", LONG))
    for output in (tool.call(topic="pandas eat what"), await tool.acall(topic="pandas eat what")):  # type: ignore[attr-defined]
        assert "Pandas eat bamboo all day." in output.content
        assert output.content.endswith("and were left out.]")
        assert output.raw_output == LONG
    assert tool(topic="pandas").content == LONG  # type: ignore[operator]


async def test_a_tool_that_wants_the_context_gets_it() -> None:
    got: list[Any] = []

    async def wants(ctx: Context, topic: str = "") -> str:
        """Wants the context."""
        got.append(await ctx.store.get("user_msg_str"))
        return LONG

    # LlamaIndex reads no postponed annotations.
    wants.__annotations__ = {"ctx": Context, "topic": str, "return": str}
    script = Scripted(("wants", {"topic": "x"}), "done")
    tools = shortened(FunctionTool.from_defaults(async_fn=wants))
    outputs, _ = await results_of(FunctionAgent(tools=tools, llm=script.llm), "What do pandas eat?")
    assert got == ["What do pandas eat?"]
    assert "bamboo" in outputs[0].content


async def test_what_stays_whole() -> None:
    final = FunctionTool.from_defaults(lambda: LONG, name="final", description="Ends.", return_direct=True)
    excluded, short = named("excluded", "Stays.", LONG), named("short", "Is short.", "short")
    tools = shortened(final, excluded, short, exclude=["excluded"])
    assert tools[0] is final
    assert tools[1] is excluded
    assert (await tools[2].acall(topic="pandas eat what")).content == "short"  # type: ignore[attr-defined]

    class Fails(BaseTool):
        metadata = ToolMetadata(name="fails", description="Fails.")  # type: ignore[assignment]

        def __call__(self, input: Any) -> ToolOutput:
            return ToolOutput(content=LONG, tool_name="fails", raw_input={}, raw_output=None, is_error=True)

    failing = shortened(Fails())[0]
    assert (await failing.acall(input="pandas eat what")).content == LONG  # type: ignore[attr-defined]


async def test_blocks_that_are_no_text_stay() -> None:
    image = ImageBlock(url="https://example.org/a.png")
    mixed = FunctionTool.from_defaults(lambda topic: [TextBlock(text=LONG), image], name="mixed", description="Both.")
    output = await shortened(mixed)[0].acall(topic="pandas eat what")  # type: ignore[attr-defined]
    assert output.blocks[1] == image
    assert len(output.blocks) == 2
    assert "bamboo" in output.content


async def test_what_cannot_be_scored_stays_whole(caplog: Any) -> None:
    def fails(query: str, text: str) -> float:
        raise RuntimeError("out of order")

    tools = with_relevant_results([named("handbook", "A.", LONG)], 50, reranker=Reranker(FakeBackend(fails)))
    output = await tools[0].acall(topic="pandas eat what")  # type: ignore[attr-defined]
    assert output.content == LONG
    assert "stays whole" in caplog.text


async def test_tools_of_query_engines_are_found_and_cut() -> None:
    class Engine(CustomQueryEngine):
        def custom_query(self, query_str: str) -> str:
            return LONG

    tool = QueryEngineTool.from_defaults(Engine(), name="pandas", description="Tells of pandas.")
    retriever = RelevantToolRetriever([*TOOLS, tool], 1, reranker=Reranker(FakeBackend()))
    assert retriever.retrieve("tells of pandas.") == [tool]
    output = shortened(tool)[0].call(input="pandas eat what")  # type: ignore[attr-defined]
    assert "Pandas eat bamboo" in output.content
    assert "[Shortened: " in output.content
