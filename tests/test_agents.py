"""The search tools in agents of both frameworks, driven by scripted models: what a model writes never ends an agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from checkpoints import tiny
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.schema import NodeWithScore, TextNode
from test_llama_index import Fixed

from rerank_plugins import Reranker
from rerank_plugins.errors import InputError
from rerank_plugins.langchain import create_rerank_tool
from rerank_plugins.llama_index import create_rerank_tool as create_llama_index_tool
from rerank_plugins.testing import FakeBackend

TEXTS = ["git add stages a file", "git revert undoes a commit", "bake the bread"]
GOOD = "undo a commit"
LONG = "how do I undo a commit " * 100
REFUSED = {
    "too long": ({"query": LONG}, "too long (600 words"),
    "blank": ({"query": " \n"}, "the query is blank"),
    "nothing visible": ({"query": "\u200b\ufeff"}, "the query is blank"),
    "a list": ({"query": ["undo"]}, "query"),
    "a number": ({"query": 7}, "query"),
    "another name": ({"question": GOOD}, "query"),
}


class Scripted(GenericFakeChatModel):
    """A chat model that answers from a script."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def call(arguments: dict[str, Any], number: int = 1) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": "search_documents", "args": arguments, "id": str(number)}])


def langchain_agent(*arguments: dict[str, Any], **keywords: Any) -> Any:
    first_stage = RunnableLambda(lambda query: [Document(text, metadata={"source": "git"}) for text in TEXTS])
    tool = create_rerank_tool(first_stage, model=tiny("bert"), **keywords)
    script: list[BaseMessage] = []
    for number, one in enumerate(arguments):
        script += [call(one, number), AIMessage("done")]
    return create_agent(Scripted(messages=iter(script)), [tool], checkpointer=InMemorySaver())


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("is_async", [False, True])
async def test_langchain_tells_the_model_what_is_wrong_and_the_thread_goes_on(case: str, is_async: bool) -> None:
    arguments, reason = REFUSED[case]
    agent = langchain_agent(arguments, {"query": GOOD})
    config: Any = {"configurable": {"thread_id": "1"}}
    states = []
    for question in ("first", "second"):
        state = {"messages": [("user", question)]}
        states.append(await agent.ainvoke(state, config) if is_async else agent.invoke(state, config))
    refused, answered = (
        [message for message in state["messages"] if isinstance(message, ToolMessage)][-1] for state in states
    )
    assert refused.status == "error"
    assert reason in str(refused.content)
    assert answered.status == "success"
    assert str(answered.content).startswith("[1] relevance score 0.")
    # Each call has its answer, which the next turn of a real model needs.
    messages = states[1]["messages"]
    calls = [one["id"] for message in messages if isinstance(message, AIMessage) for one in message.tool_calls]
    assert calls == [message.tool_call_id for message in messages if isinstance(message, ToolMessage)]


def test_a_query_can_be_cut_instead() -> None:
    agent = langchain_agent({"query": LONG}, truncate_query=True)
    state = agent.invoke({"messages": [("user", "first")]}, {"configurable": {"thread_id": "1"}})
    (message,) = [message for message in state["messages"] if isinstance(message, ToolMessage)]
    assert message.status == "success"
    assert len(message.artifact) == 3


def test_what_a_program_got_wrong_is_no_message_to_the_model() -> None:
    tool = create_rerank_tool(RunnableLambda(lambda query: None), model=FakeBackend())
    with pytest.raises(InputError, match=r"What RunnableLambda returns must be a list.*NoneType"):
        tool.invoke({"query": GOOD})


def llama_index_agent(*arguments: dict[str, Any]) -> FunctionAgent:
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i))) for i, text in enumerate(TEXTS)]
    tool = create_llama_index_tool(Fixed(nodes), model=tiny("bert"))
    script: list[ChatMessage] = []
    for number, one in enumerate(arguments):
        block = ToolCallBlock(tool_call_id=str(number), tool_name="search_documents", tool_kwargs=one)
        script += [ChatMessage(role="assistant", blocks=[block])]
    script.append(ChatMessage(role="assistant", content="done"))
    replies = iter(script)

    def reply(messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
        return next(replies)

    llm = MockFunctionCallingLLM(response_generator=reply, is_chat_model=True)
    return FunctionAgent(tools=[tool], llm=llm, streaming=False)


@pytest.mark.parametrize("case", REFUSED)
async def test_llama_index_tells_the_model_what_is_wrong_and_goes_on(case: str) -> None:
    arguments, reason = REFUSED[case]
    handler = llama_index_agent(arguments, {"query": GOOD}).run(user_msg="first")
    seen = [event.tool_output async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    assert str(await handler) == "done"
    refused, answered = seen
    assert refused.is_error
    assert reason in refused.content
    assert not answered.is_error
    assert answered.content.startswith("[1] relevance score 0.")


@pytest.mark.parametrize("is_async", [False, True])
async def test_llama_indexs_tool_itself_answers_in_words(is_async: bool) -> None:
    retriever = Fixed([NodeWithScore(node=TextNode(text=text)) for text in TEXTS])
    tool = create_llama_index_tool(retriever, reranker=Reranker(tiny("bert")))
    output = await tool.acall(query=LONG) if is_async else tool.call(query=LONG)
    assert output.is_error
    assert output.content.startswith("Nothing was searched: the query is too long (600 words")
    assert output.raw_output == []
    assert output.tool_name == "search_documents"
    blank = await tool.acall(query=" ") if is_async else tool.call(query=" ")
    assert "the query is blank" in blank.content
    # A blank query is not searched for.
    assert retriever.queries == [LONG]


async def test_the_prompt_of_the_langchain_tool_can_be_the_callers() -> None:
    documents = [Document("text", metadata={"url": "https://example.org/a", "title": "A"})]
    first_stage = RunnableLambda(lambda query: documents * 2)
    prompt = PromptTemplate.from_template("<{title} {relevance_score:.2f} {url}> {page_content}")
    tool = create_rerank_tool(
        first_stage,
        model=FakeBackend(lambda query, text: 0.0),
        document_prompt=prompt,
        document_separator="|",
        response_format="content",
    )
    expected = "<A 0.50 https://example.org/a> text|<A 0.50 https://example.org/a> text"
    assert tool.invoke({"query": GOOD}) == expected
    assert await tool.ainvoke({"query": GOOD}) == expected
    plain = create_rerank_tool(first_stage, model=FakeBackend(lambda query, text: 0.0), top_n=1)
    assert plain.invoke({"query": GOOD}) == "[1] relevance score 0.500, title: A, url: https://example.org/a\ntext"
