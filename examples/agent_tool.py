"""Reranked search as a tool of an agent, in LangChain and in LlamaIndex.

    python examples/agent_tool.py

Runs offline: a script stands where your language model goes, so that only the search is real.
Needs: pip install "rerank-plugins[langchain,llama-index]" langchain
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from llama_index.core import SummaryIndex
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.schema import TextNode

from rerank_plugins import Reranker
from rerank_plugins.langchain import create_rerank_tool as create_langchain_tool
from rerank_plugins.llama_index import create_rerank_tool as create_llama_index_tool

QUESTION = "How do I undo a commit that I have already pushed?"
ANSWER = "Use git revert: it makes a new commit that undoes the old one."
PASSAGES = {
    "git-add": "git add puts the changes of a file into the index, for the next commit.",
    "git-stash": "git stash puts local changes aside, and git stash pop brings them back.",
    "git-revert": "git revert makes a new commit that undoes an earlier one, so it is safe after a push.",
    "git-push": "git push sends commits to a remote repository.",
    "git-log": "git log shows the commits of a branch, the newest first.",
}
DESCRIPTION = "Searches the git handbook."


class ScriptedChatModel(FakeMessagesListChatModel):
    """Asks for the tool, then answers. Your own chat model goes here."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> ScriptedChatModel:
        return self


def langchain_agent(reranker: Reranker) -> None:
    documents = [Document(text, metadata={"source": name}) for name, text in PASSAGES.items()]
    retriever = RunnableLambda(lambda query: documents)  # your retriever goes here
    tool = create_langchain_tool(retriever, name="search_handbook", description=DESCRIPTION, reranker=reranker, top_n=2)

    call = {"name": "search_handbook", "args": {"query": QUESTION}, "id": "1", "type": "tool_call"}
    model = ScriptedChatModel(responses=[AIMessage("", tool_calls=[call]), AIMessage(ANSWER)])
    agent = create_agent(model, tools=[tool])
    messages = agent.invoke({"messages": [("user", QUESTION)]})["messages"]

    found = next(message for message in messages if isinstance(message, ToolMessage))
    print(f"LangChain\n{found.content}")
    print(f"best: {found.artifact[0].metadata['source']}")
    print(f"answer: {messages[-1].content}\n")


async def llama_index_agent(reranker: Reranker) -> None:
    index = SummaryIndex([TextNode(text=text, id_=name) for name, text in PASSAGES.items()])
    tool = create_llama_index_tool(
        retriever=index.as_retriever(),  # your retriever goes here
        name="search_handbook",
        description=DESCRIPTION,
        reranker=reranker,
        top_n=2,
    )

    def script(messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
        if messages[-1].role == "tool":
            return ChatMessage(role="assistant", content=ANSWER)
        call = ToolCallBlock(tool_name="search_handbook", tool_kwargs={"query": QUESTION}, tool_call_id="1")
        return ChatMessage(role="assistant", blocks=[call])

    # Your own function-calling language model goes here.
    agent = FunctionAgent(tools=[tool], llm=MockFunctionCallingLLM(response_generator=script))
    run = agent.run(QUESTION)
    async for event in run.stream_events():
        if isinstance(event, ToolCallResult):
            print(f"LlamaIndex\n{event.tool_output.content}")
            print(f"best: {event.tool_output.raw_output[0].node.node_id}")
    print(f"answer: {(await run).response.content}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a directory; without it, the bundled cross-encoder")
    reranker = Reranker(parser.parse_args().model)

    langchain_agent(reranker)
    asyncio.run(llama_index_agent(reranker))


if __name__ == "__main__":
    main()
