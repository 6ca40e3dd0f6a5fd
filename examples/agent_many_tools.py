"""An agent with 60 tools that reads eight of them, and of a long answer only what fits; in three frameworks' ways.

    python examples/agent_many_tools.py

Runs offline: a script stands where your language model goes, so that only the choice of tools and texts is real.
Needs: pip install "rerank-plugins[langchain-agents,llama-index]"
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import StructuredTool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.tools import FunctionTool

from rerank_plugins import Reranker
from rerank_plugins.langchain import RelevantResultsMiddleware, RelevantToolsMiddleware
from rerank_plugins.llama_index import RelevantToolRetriever, with_relevant_results
from rerank_plugins.tools import rank_tools

QUESTION = "How many days of paid vacation do I have in my first year?"
ANSWER = "You have 25 days of paid vacation in your first year."
WANTED = "search_hr_handbook"
TOOLS = {
    line.split(": ", 1)[0]: line.split(": ", 1)[1]
    for line in """
search_hr_handbook: Searches the handbook for employees: vacation, sick leave, salary, benefits, working hours.
search_it_wiki: Searches the IT department's wiki on laptops, passwords, VPN and printers.
search_code: Searches the source code of all repositories.
search_contracts: Searches contracts with customers and suppliers.
search_papers: Searches scientific papers by topic and author.
search_news: Finds news articles of the last days.
search_patents: Finds patents by number, owner or topic.
search_images: Finds photographs and drawings by what they show.
web_search: Searches the web.
read_web_page: Reads a web page by its address.
get_weather: Forecasts the weather of a place for the next ten days.
get_air_quality: Tells ozone, pollen and fine dust of a place.
get_tides: Tells high and low water of a harbour.
get_traffic: Tells jams and road works on a route.
plan_route: Finds the way between two places by car, by bicycle or on foot.
find_trains: Finds train connections with changes and prices.
find_flights: Searches flights and compares their fares.
book_flight: Books a flight that was found.
find_hotels: Looks for hotels with prices, ratings and free rooms.
book_hotel: Books a room in a hotel.
rent_car: Rents a car at an airport or in a town.
find_restaurants: Finds restaurants near a place by cuisine and price.
book_table: Books a table in a restaurant.
find_recipes: Finds recipes by ingredients, diet and cooking time.
count_calories: Tells the calories and nutrients of a meal.
log_workout: Notes a workout with its time and distance.
find_doctor: Finds doctors by specialty who have appointments.
order_medicine: Orders medicine from a pharmacy.
send_email: Sends an email.
search_email: Searches the mailbox.
send_chat_message: Writes to a colleague or a channel.
create_event: Puts an appointment into the calendar.
find_free_time: Finds a time when all participants of a meeting are free.
book_meeting_room: Books a room in the office for a meeting.
set_reminder: Reminds of something at a time.
start_timer: Starts a timer or a stopwatch.
create_ticket: Opens a ticket for support or for a bug.
search_tickets: Finds tickets by text, state and owner.
merge_pull_request: Merges a pull request.
run_tests: Runs the tests of a repository.
deploy_service: Brings a version of a service into production.
read_logs: Reads the log of a service.
query_metrics: Queries metrics of services, such as latency and errors.
query_database: Runs an SQL query on the warehouse.
make_chart: Draws a chart of a table.
read_spreadsheet: Reads cells of a spreadsheet.
write_spreadsheet: Writes cells of a spreadsheet.
convert_units: Converts lengths, weights, temperatures and volumes.
convert_currency: Converts amounts between currencies at today's rate.
calculate: Evaluates an arithmetic expression.
get_stock_price: Tells the price of a share and its history.
pay_invoice: Pays an invoice by bank transfer.
file_expenses: Hands in receipts of a business trip.
track_package: Tells where a parcel is.
translate: Translates a text between languages.
summarise: Sums up a long text.
check_spelling: Corrects spelling and grammar.
transcribe_audio: Writes down what is said in a recording.
generate_image: Makes a picture from a description.
play_music: Plays a song, an album or a radio station.
""".strip().splitlines()
}
HANDBOOK = "\n\n".join(
    [f"Section {i}. Forms for case {i} are in room {i}. Ask the front desk for them." for i in range(1, 150)]
    + ["Vacation. In the first year every employee has 25 days of paid vacation. From the third year on it is 28 days."]
    + [f"Section {i}. The canteen serves menu {i} on Mondays and soup on all days." for i in range(150, 300)]
)
"""A long answer of the tool that is wanted."""


def answer_of(name: str) -> str:
    return HANDBOOK if name == WANTED else "Nothing was found."


# -- LangChain -------------------------------------------------------------------------------------------------


class ScriptedChatModel(FakeMessagesListChatModel):
    """Asks for the tool, then answers. Your own chat model goes here."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> ScriptedChatModel:
        print(f"the model sees {len(tools)} tools: {', '.join(sorted(tool.name for tool in tools))}")
        return self


def scripted() -> ScriptedChatModel:
    call = {"name": WANTED, "args": {"query": "paid vacation in the first year"}, "id": "call-1", "type": "tool_call"}
    return ScriptedChatModel(responses=[AIMessage("", tool_calls=[call]), AIMessage(ANSWER)])


def langchain_tool(name: str, description: str) -> StructuredTool:
    return StructuredTool.from_function(lambda query: answer_of(name), name=name, description=description)


def show(messages: Sequence[Any]) -> None:
    found = next(message for message in messages if isinstance(message, ToolMessage))
    print(f"of {len(HANDBOOK):,} characters it reads {len(found.text):,}:\n{found.text}")
    print(f"answer: {messages[-1].text}\n")


def with_create_agent(reranker: Reranker) -> None:
    print("LangChain, create_agent")
    tools = [langchain_tool(name, description) for name, description in TOOLS.items()]
    middleware = [
        RelevantToolsMiddleware(top_n=8, reranker=reranker),
        RelevantResultsMiddleware(max_tokens=100, reranker=reranker),
    ]
    agent = create_agent(scripted(), tools, middleware=middleware)
    show(agent.invoke({"messages": [HumanMessage(QUESTION)]})["messages"])


def with_tool_node(reranker: Reranker) -> None:
    print("LangGraph, ToolNode")
    tools = [langchain_tool(name, description) for name, description in TOOLS.items()]
    results = RelevantResultsMiddleware(max_tokens=100, reranker=reranker)
    model = scripted()

    def call_model(state: MessagesState) -> dict[str, Any]:
        request = next(one.text for one in reversed(state["messages"]) if isinstance(one, HumanMessage))
        chosen = [*rank_tools(request, tools, top_n=8, reranker=reranker), *results.tools]
        return {"messages": [model.bind_tools(chosen).invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", call_model)
    graph.add_node("tools", ToolNode([*tools, *results.tools], wrap_tool_call=results.wrap_tool_call))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition, {"tools": "tools", END: END})
    graph.add_edge("tools", "model")
    show(graph.compile().invoke({"messages": [HumanMessage(QUESTION)]})["messages"])


# -- LlamaIndex ------------------------------------------------------------------------------------------------


class ScriptedLLM(MockFunctionCallingLLM):
    """Your own function-calling language model goes here."""

    def _prepare_chat_with_tools(self, tools: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        names = sorted(tool.metadata.get_name() for tool in tools)
        print(f"the model sees {len(tools)} tools: {', '.join(names)}")
        return super()._prepare_chat_with_tools(tools, *args, **kwargs)


async def with_llama_index(reranker: Reranker) -> None:
    print("LlamaIndex, FunctionAgent")
    tools = [
        FunctionTool.from_defaults(lambda query, name=name: answer_of(name), name=name, description=description)
        for name, description in TOOLS.items()
    ]
    shortened = with_relevant_results(tools, max_tokens=100, reranker=reranker)
    retriever = RelevantToolRetriever(shortened, top_n=8, reranker=reranker)

    def script(messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
        if messages[-1].role == "tool":
            return ChatMessage(role="assistant", content=ANSWER)
        arguments = {"query": "paid vacation in the first year"}
        call = ToolCallBlock(tool_name=WANTED, tool_kwargs=arguments, tool_call_id="call-1")
        return ChatMessage(role="assistant", blocks=[call])

    agent = FunctionAgent(tool_retriever=retriever, llm=ScriptedLLM(response_generator=script))
    run = agent.run(QUESTION)
    async for event in run.stream_events():
        if isinstance(event, ToolCallResult):
            text = event.tool_output.content
            print(f"of {len(HANDBOOK):,} characters it reads {len(text):,}:\n{text}")
    print(f"answer: {(await run).response.content}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a directory; without it, the bundled cross-encoder")
    reranker = Reranker(parser.parse_args().model, cache=20_000)

    with_create_agent(reranker)
    with_tool_node(reranker)
    asyncio.run(with_llama_index(reranker))
    schemas = [{"type": "function", "function": {"name": name, "description": TOOLS[name]}} for name in TOOLS]
    print(f"\nwithout a framework: {json.dumps(rank_tools(QUESTION, schemas, top_n=1, reranker=reranker)[0])}")


if __name__ == "__main__":
    main()
