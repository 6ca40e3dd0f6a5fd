"""Middleware in LangChain's agents and in LangGraph's ToolNode: which tools a model sees, and what it reads of them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain.tools import ToolRuntime
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import StructuredTool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command
from pydantic import PrivateAttr

from rerank_plugins import ConfigurationError, Reranker
from rerank_plugins.langchain import RelevantResultsMiddleware, RelevantToolsMiddleware
from rerank_plugins.testing import FakeBackend


class Scripted(FakeMessagesListChatModel):
    """Answers by a script, and remembers the tools and the messages of each call."""

    _bound: list[list[str]] = PrivateAttr(default_factory=list)
    _read: list[list[Any]] = PrivateAttr(default_factory=list)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Any:
        self._bound.append([one["name"] if isinstance(one, dict) and "name" in one else getattr(one, "name", "dict")
                            for one in tools])  # fmt: skip
        return self

    def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        self._read.append(list(messages))
        return super()._generate(messages, *args, **kwargs)


def call(name: str, call_id: str = "1", **arguments: Any) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": call_id, "type": "tool_call"}])


def named(name: str, description: str, answer: str = "done") -> StructuredTool:
    return StructuredTool.from_function(lambda topic="": answer, name=name, description=description)


THINGS = ["rain", "mail", "music", "money", "maps", "news", "sport", "books", "films", "food"]
TOOLS = [named(f"about_{thing}", f"Tells of {thing}.") for thing in THINGS]


async def run(agent: Any, is_async: bool, *messages: Any, config: Any = None) -> list[Any]:
    state = {"messages": list(messages)}
    result = await agent.ainvoke(state, config) if is_async else agent.invoke(state, config)
    return list(result["messages"])


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_model_sees_the_tools_that_fit_in_their_order(is_async: bool) -> None:
    model = Scripted(responses=[call("about_mail"), AIMessage("done")])
    middleware = RelevantToolsMiddleware(2, ["about_food"], reranker=Reranker(FakeBackend()))
    agent = create_agent(model, TOOLS, middleware=[middleware])
    messages = await run(agent, is_async, HumanMessage("tells of music. and mail."))
    assert messages[-1].text == "done"
    assert [message.content for message in messages if isinstance(message, ToolMessage)] == ["done"]
    assert model._bound == [["about_mail", "about_music", "about_food"]] * 2


async def test_what_was_called_what_is_forced_and_what_the_provider_runs_stays() -> None:
    class Forces(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(request.override(tool_choice="about_films"))

    model = Scripted(responses=[call("about_books"), AIMessage("done")])
    provider = {"type": "web_search"}
    middleware = [Forces(), RelevantToolsMiddleware(1, reranker=Reranker(FakeBackend()))]
    agent = create_agent(model, [*TOOLS, provider], middleware=middleware)
    await run(agent, False, HumanMessage("tells of sport."))
    assert model._bound == [
        ["about_sport", "about_films", "dict"],
        ["about_sport", "about_books", "about_films", "dict"],
    ]


async def test_the_last_turns_count() -> None:
    def bound(*messages: Any, **keywords: Any) -> list[str]:
        model = Scripted(responses=[AIMessage("done")])
        middleware = RelevantToolsMiddleware(1, reranker=Reranker(FakeBackend()), first_stage=zeros, **keywords)
        create_agent(model, TOOLS, middleware=[middleware]).invoke({"messages": list(messages)})
        return model._bound[0]

    def zeros(query: str, texts: Sequence[str]) -> list[float]:
        return [0.0] * len(texts)

    talk = [HumanMessage("tells of news."), AIMessage("Here they are."), HumanMessage("yes please")]
    assert bound(*talk) == ["about_news"]
    # What the model has said since then counts; what it said before does not.
    assert bound(*talk, AIMessage("I need what tells of maps. about")) == ["about_maps"]
    # A message without a text, such as an image, is passed over.
    image = HumanMessage([{"type": "image", "url": "https://example.org/a.png"}])
    assert bound(HumanMessage("tells of food."), image, turns=1) == ["about_food"]


@pytest.mark.parametrize("messages", [[], [HumanMessage(" ")], [HumanMessage([{"type": "image", "url": "x"}])]])
def test_without_a_text_the_model_sees_all_tools(messages: list[Any]) -> None:
    backend = FakeBackend()
    model = Scripted(responses=[AIMessage("done")])
    create_agent(model, TOOLS, middleware=[RelevantToolsMiddleware(1, model=backend)]).invoke({"messages": messages})
    assert len(model._bound[0]) == len(TOOLS)
    assert backend.calls == []


def test_as_few_tools_as_are_asked_for_need_no_scores() -> None:
    backend = FakeBackend()
    model = Scripted(responses=[AIMessage("done")])
    agent = create_agent(model, TOOLS, middleware=[RelevantToolsMiddleware(10, model=backend)])
    agent.invoke({"messages": [HumanMessage("tells of news.")]})
    assert len(model._bound[0]) == 10
    assert backend.calls == []


def test_a_threshold_may_leave_fewer() -> None:
    model = Scripted(responses=[AIMessage("done")])
    reranker = Reranker(FakeBackend(lambda query, text: 3.0 if "news" in text else -3.0))
    middleware = RelevantToolsMiddleware(8, min_score=0.5, reranker=reranker)
    create_agent(model, TOOLS, middleware=[middleware]).invoke({"messages": [HumanMessage("anything")]})
    assert model._bound[0] == ["about_news"]


class Runs(BaseCallbackHandler):
    """The runs of ours: name, inputs and outputs."""

    def __init__(self) -> None:
        self.started: dict[Any, tuple[str, Any, Any]] = {}
        self.ended: list[tuple[str, Any, Any]] = []

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: Any, name: str = "", **kwargs: Any) -> None:
        self.started[run_id] = (name, inputs, kwargs.get("parent_run_id"))

    def on_chain_end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        name, inputs, _ = self.started[run_id]
        if name.startswith("Relevant"):
            self.ended.append((name, inputs, outputs))


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_choice_is_in_the_trace(is_async: bool) -> None:
    runs = Runs()
    model = Scripted(responses=[AIMessage("done")])
    middleware = RelevantToolsMiddleware(1, reranker=Reranker(FakeBackend(), scale="logit"))
    agent = create_agent(model, TOOLS, middleware=[middleware])
    await run(agent, is_async, HumanMessage("tells of news."), config={"callbacks": [runs]})
    ((name, inputs, outputs),) = runs.ended
    assert (name, inputs["queries"], inputs["top_n"], inputs["n_tools"]) == ("RelevantTools", ["tells of news."], 1, 10)
    assert outputs["tools"] == ["about_news"]
    assert outputs["scores"]["about_news"] == pytest.approx(2.93)
    parents = [parent for name, _, parent in runs.started.values() if name.startswith("Relevant")]
    assert runs.started[parents[0]][0] == "model"


@pytest.mark.parametrize("is_async", [False, True])
async def test_where_scoring_fails_the_model_sees_all_tools(is_async: bool, caplog: Any) -> None:
    def fails(query: str, text: str) -> float:
        raise RuntimeError("out of order")

    runs = Runs()
    model = Scripted(responses=[AIMessage("done")])
    agent = create_agent(model, TOOLS, middleware=[RelevantToolsMiddleware(1, reranker=Reranker(FakeBackend(fails)))])
    with caplog.at_level(logging.WARNING, "rerank_plugins"):
        await run(agent, is_async, HumanMessage("tells of news."), config={"callbacks": [runs]})
    assert len(model._bound[0]) == 10
    assert "All tools are shown" in caplog.text
    assert "out of order" in runs.ended[0][2]["fallback"]


def test_a_model_that_is_missing_leaves_all_tools(caplog: Any) -> None:
    model = Scripted(responses=[AIMessage("done")])
    agent = create_agent(model, TOOLS, middleware=[RelevantToolsMiddleware(1, model="nobody/no-such-model")])
    agent.invoke({"messages": [HumanMessage("tells of news.")]})
    assert len(model._bound[0]) == 10
    assert "no-such-model" in caplog.text


def test_pairs_are_scored_once() -> None:
    backend = FakeBackend()
    model = Scripted(responses=[call("about_mail"), call("about_mail", "2"), AIMessage("done")])
    agent = create_agent(model, TOOLS, middleware=[RelevantToolsMiddleware(2, reranker=Reranker(backend))])
    agent.invoke({"messages": [HumanMessage("tells of mail.")]})
    assert len(model._bound) == 3
    pairs = [pair for pairs in backend.calls for pair in pairs]
    assert len(pairs) == len(set(pairs)) == 10


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RelevantToolsMiddleware(0), "top_n"),
        (lambda: RelevantToolsMiddleware(None), "top_n"),  # type: ignore[arg-type]
        (lambda: RelevantToolsMiddleware(turns=0), "turns"),
        (lambda: RelevantToolsMiddleware(weight=-1), "weight"),
        (lambda: RelevantToolsMiddleware(min_score="x"), "min_score"),  # type: ignore[arg-type]
        (lambda: RelevantToolsMiddleware(always_include="search"), "list of names"),
        (lambda: RelevantToolsMiddleware(threshold=3), "RelevantToolsMiddleware does not have the keyword threshold"),
        (lambda: RelevantToolsMiddleware(reranker="a/b"), "must be a Reranker"),
        (lambda: RelevantResultsMiddleware(0), "max_tokens"),
        (lambda: RelevantResultsMiddleware(exclude="search"), "list of names"),
        (lambda: RelevantResultsMiddleware(top_n=3), "RelevantResultsMiddleware does not have"),
    ],
)
def test_settings_that_cannot_work(make: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make()


# -- results ---------------------------------------------------------------------------------------------------

LONG = "\n\n".join(
    [f"Filler sentence number {i} says nothing that matters here at all." for i in range(200)]
    + ["Pandas eat bamboo all day."]
    + [f"More filler, number {i}, about other things." for i in range(200)]
)


def handbook(answer: Any = LONG) -> StructuredTool:
    return StructuredTool.from_function(lambda question="": answer, name="handbook", description="A handbook.")


def results(**keywords: Any) -> RelevantResultsMiddleware:
    return RelevantResultsMiddleware(50, reranker=Reranker(FakeBackend()), **keywords)


def tool_messages(messages: Sequence[Any]) -> list[ToolMessage]:
    return [message for message in messages if isinstance(message, ToolMessage)]


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_long_answer_is_cut_and_can_be_read_whole(is_async: bool) -> None:
    reads = [call("read_tool_result", str(i), id="call-7", start=start) for i, start in enumerate((0, 13_000, 99_999))]
    model = Scripted(
        responses=[call("handbook", "call-7", question="what do pandas eat"), *reads, call("read_tool_result", "9",
                   id="other"), AIMessage("bamboo")]
    )  # fmt: skip
    agent = create_agent(model, [handbook()], middleware=[results()], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    messages = await run(agent, is_async, HumanMessage("What do pandas eat?"), config=config)
    cut, first, second, beyond, unknown = tool_messages(messages)
    assert "Pandas eat bamboo all day." in cut.text
    assert len(cut.text) < 500
    assert "[Shortened: " in cut.text
    assert 'call read_tool_result with id="call-7".]' in cut.text
    assert cut.artifact == {"full_content": LONG}
    assert model._bound[0] == ["read_tool_result", "handbook"]
    assert LONG.startswith(first.text.split("\n\n[Characters")[0])
    assert f"[Characters 0 to {len(first.text.split(chr(10) * 2 + '[Characters')[0])} of {len(LONG):,}" in first.text
    assert "the next part" in first.text
    assert second.text.split("\n\n[Characters")[0] in LONG
    assert beyond.text.endswith(f"[Characters {len(LONG):,} to {len(LONG):,} of {len(LONG):,}, the end.]")
    assert "no shortened result with the id 'other'" in unknown.text
    assert "call-7" in unknown.text
    # No model has read the whole.
    assert all(LONG not in str(message.content) for read in model._read for message in read)


def test_reading_goes_through_the_whole_text() -> None:
    from rerank_plugins.results import page

    parts, start = [], 0
    while start < len(LONG):
        begin, end = page(LONG, start, 50)
        assert begin == start < end
        parts.append(LONG[begin:end])
        start = end
    assert "".join(parts) == LONG
    assert max(map(len, parts)) <= 200
    assert page("大" * 100, 0, 3) == (0, 4)
    assert page("", 5, 3) == (0, 0)


async def test_short_answers_errors_and_excluded_tools_stay_whole() -> None:
    @tool
    def fails() -> str:
        """Fails."""
        raise ValueError(LONG)

    fails.handle_tool_error = True
    final = StructuredTool.from_function(lambda: LONG, name="final", description="Ends.", return_direct=True)
    backend = FakeBackend()
    middleware = RelevantResultsMiddleware(50, model=backend, exclude=["handbook", handbook("x")])
    node = ToolNode([handbook(), handbook("short")], wrap_tool_call=middleware.wrap_tool_call)
    state = {"messages": [HumanMessage("What do pandas eat?"), call("handbook")]}
    graph = StateGraph(MessagesState).add_node("tools", node).add_edge(START, "tools").compile()
    assert tool_messages(graph.invoke(state)["messages"])[0].text == "short"
    agent = create_agent(
        Scripted(responses=[call("final"), AIMessage("done")]), [final], middleware=[results(), middleware][:1]
    )
    assert tool_messages(agent.invoke({"messages": [HumanMessage("What?")]})["messages"])[0].text == LONG
    assert backend.calls == []


@pytest.mark.parametrize("is_async", [False, True])
async def test_it_works_in_a_tool_node_of_a_graph(is_async: bool) -> None:
    middleware = results()
    node = ToolNode(
        [handbook(), *middleware.tools],
        wrap_tool_call=middleware.wrap_tool_call,
        awrap_tool_call=middleware.awrap_tool_call,
    )
    graph = StateGraph(MessagesState).add_node("tools", node).add_edge(START, "tools").compile()
    asked = [HumanMessage("What do pandas eat?"), call("handbook", "h")]
    (cut,) = tool_messages(await run(graph, is_async, *asked))
    assert "bamboo" in cut.text
    assert len(cut.text) < 500
    (_, read) = tool_messages(await run(graph, is_async, *asked, cut, call("read_tool_result", "r", id="h", start=0)))
    assert LONG.startswith(read.text.split("\n\n[Characters")[0])


def test_an_artifact_of_the_tools_own_stays() -> None:
    own = StructuredTool.from_function(
        lambda: (LONG, {"rows": 3}), name="own", description="Own.", response_format="content_and_artifact"
    )
    model = Scripted(responses=[call("own", "o"), call("read_tool_result", "r", id="o"), AIMessage("done")])
    agent = create_agent(model, [own], middleware=[results()])
    cut, read = tool_messages(agent.invoke({"messages": [HumanMessage("What do pandas eat?")]})["messages"])
    assert cut.artifact == {"rows": 3}
    assert cut.response_metadata["full_content"] == LONG
    assert LONG.startswith(read.text.split("\n\n[Characters")[0])


def test_blocks_that_are_no_text_stay_and_commands_are_cut_too() -> None:
    image = {"type": "image", "url": "https://example.org/a.png"}

    @tool
    def mixed() -> Any:
        """Text and an image."""
        return [{"type": "text", "text": LONG}, image]

    @tool
    def commands(runtime: ToolRuntime) -> Any:
        """Updates the state."""
        return Command(update={"messages": [ToolMessage(LONG, tool_call_id=runtime.tool_call_id)]})

    model = Scripted(responses=[call("mixed", "m"), call("commands", "c"), AIMessage("done")])
    agent = create_agent(model, [mixed, commands], middleware=[results()])
    blocks, command = tool_messages(agent.invoke({"messages": [HumanMessage("What do pandas eat?")]})["messages"])
    assert blocks.content[1] == image
    assert "bamboo" in blocks.content[0]["text"]
    assert len(blocks.content) == 2
    assert "bamboo" in command.text
    assert "[Shortened: " in command.text
    assert command.artifact == {"full_content": LONG}


@pytest.mark.parametrize("is_async", [False, True])
async def test_what_cannot_be_scored_stays_whole(is_async: bool, caplog: Any) -> None:
    def fails(query: str, text: str) -> float:
        raise RuntimeError("out of order")

    runs = Runs()
    model = Scripted(responses=[call("handbook"), AIMessage("done")])
    middleware = RelevantResultsMiddleware(50, reranker=Reranker(FakeBackend(fails)))
    agent = create_agent(model, [handbook()], middleware=[middleware])
    with caplog.at_level(logging.WARNING, "rerank_plugins"):
        messages = await run(agent, is_async, HumanMessage("What do pandas eat?"), config={"callbacks": [runs]})
    assert tool_messages(messages)[0].text == LONG
    assert "stays whole" in caplog.text
    assert "out of order" in runs.ended[0][2]["fallback"]


def test_the_request_is_the_users_and_the_calls() -> None:
    runs = Runs()
    arguments = {"question": "bamboo for pandas", "path": "/a/b.txt", "n": 3}
    schema = {"type": "object", "properties": {key: {} for key in arguments}}
    wide = StructuredTool.from_function(
        lambda **kwargs: LONG, name="handbook", description="A handbook.", args_schema=schema
    )
    model = Scripted(responses=[call("handbook", **arguments), AIMessage("done")])
    agent = create_agent(model, [wide], middleware=[results()])
    talk = [HumanMessage("An old question."), AIMessage("Yes."), HumanMessage("What do pandas eat?")]
    agent.invoke({"messages": talk}, {"callbacks": [runs]})
    ((name, inputs, outputs),) = runs.ended
    assert name == "RelevantResults"
    assert inputs["queries"] == ["What do pandas eat?", "bamboo for pandas"]
    assert inputs["tool"] == "handbook"
    assert outputs["left_out"] > 10_000


def test_both_together_keep_the_reading_tool() -> None:
    model = Scripted(responses=[call("handbook", "h"), AIMessage("done")])
    middleware = [RelevantToolsMiddleware(1, reranker=Reranker(FakeBackend())), results()]
    agent = create_agent(model, [handbook(), *TOOLS], middleware=middleware)
    agent.invoke({"messages": [HumanMessage("tells of news.")]})
    assert model._bound == [["read_tool_result", "about_news"], ["read_tool_result", "handbook", "about_news"]]


def test_json_without_sentences_is_cut_too() -> None:
    rows = json.dumps([{"id": i, "name": f"thing {i}", "eats": "bamboo" if i == 150 else "grass"} for i in range(300)])
    model = Scripted(responses=[call("handbook", "h"), AIMessage("done")])
    middleware = RelevantResultsMiddleware(
        400, reranker=Reranker(FakeBackend(lambda query, text: text.count("bamboo")))
    )
    agent = create_agent(model, [handbook(rows)], middleware=[middleware])
    (cut,) = tool_messages(agent.invoke({"messages": [HumanMessage("Who eats bamboo?")]})["messages"])
    assert "bamboo" in cut.text
    assert len(cut.text) < 2_000


def test_without_langchain_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['langchain'] = None\n"
        "from rerank_plugins import MissingDependencyError\n"
        "import rerank_plugins.langchain as adapters\n"
        "adapters.CrossEncoderRerank()\n"
        "try: adapters.RelevantToolsMiddleware\n"
        "except MissingDependencyError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "rerank-plugins[langchain-agents]"' in done.stdout
