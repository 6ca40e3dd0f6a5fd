"""Tools by how well they fit a request: all the shapes that tools come in, the order, and what cannot work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from langchain_core.tools import StructuredTool
from langchain_core.tools import tool as langchain_tool
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel

from rerank_plugins import ConfigurationError, InputError, QueryError, Reranker, ScoringError
from rerank_plugins.testing import FakeBackend
from rerank_plugins.tools import (
    arank_tools,
    bm25,
    embedding_similarity,
    rank_tools,
    tool_name,
    tool_text,
    with_cache,
)

SCHEMA = {"type": "object", "properties": {"cityName": {"type": "string"}, "unit": {"type": "string"}}}
TEXT = "get weather: Forecasts the weather.\nArguments: city name, unit"


def get_weather(cityName: str, unit: str = "c") -> str:
    """Forecasts the weather."""
    return cityName + unit


class GetWeather(BaseModel):
    """Forecasts the weather."""

    cityName: str
    unit: str = "c"


SHAPES: dict[str, Any] = {
    "OpenAI chat completions": {
        "type": "function",
        "function": {"name": "get_weather", "description": "Forecasts the weather.", "parameters": SCHEMA},
    },
    "OpenAI responses": {
        "type": "function",
        "name": "getWeather",
        "description": "Forecasts the weather.",
        "parameters": SCHEMA,
    },
    "Anthropic": {"name": "get-weather", "description": "Forecasts the weather.", "input_schema": SCHEMA},
    "MCP": {"name": "get_weather", "description": "Forecasts the weather.", "inputSchema": SCHEMA},
    "Bedrock": {
        "toolSpec": {"name": "get_weather", "description": "Forecasts the weather.", "inputSchema": {"json": SCHEMA}}
    },
    "Gemini": {
        "function_declarations": [
            {"name": "get_weather", "description": "Forecasts the weather.", "parameters": SCHEMA},
        ]
    },
    "JSON schema": {**SCHEMA, "title": "GetWeather", "description": "Forecasts the weather."},
    "MCP object": SimpleNamespace(name="get_weather", description="Forecasts the weather.", inputSchema=SCHEMA),
    "function": get_weather,
    "pydantic": GetWeather,
    "LangChain": langchain_tool(get_weather),
    "LangChain, JSON schema": StructuredTool(
        name="get_weather", description="Forecasts the weather.", args_schema=SCHEMA, func=get_weather
    ),
    "LlamaIndex": FunctionTool.from_defaults(get_weather),
    "pair": ("get_weather", "Forecasts the weather."),
    "list": ["get_weather", "Forecasts the weather."],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_tool_gives_the_same_text(shape: str) -> None:
    without_arguments = shape in ("pair", "list", "Gemini")
    assert tool_text(SHAPES[shape]) == (TEXT.partition("\n")[0] if without_arguments else TEXT)
    assert tool_name(SHAPES[shape]).lower().replace("-", "").replace("_", "") == "getweather"


def test_what_else_is_said_of_a_tool() -> None:
    assert tool_text({"name": "gh_srch", "title": "Search GitHub", "description": "Finds code."}) == (
        "gh srch: Search GitHub. Finds code."
    )
    assert tool_text({"type": "web_search"}) == "web search"
    assert tool_text({"google_search": {}}) == "google search"
    assert tool_text(("getHTTPStatus2", None)) == "get http status 2"
    assert tool_text({"name": "获取天气", "description": "天气预报"}) == "获取天气: 天气预报"
    assert len(tool_text(("long", "word " * 10_000))) == 1_000


@pytest.mark.parametrize("bad", [{}, {"foo": 1}, 3, None, "get_weather", ("a", "b", "c"), ("", " "), {"name": " "}])
def test_what_is_no_tool_is_told_with_its_place(bad: Any) -> None:
    with pytest.raises(InputError, match="Tool 1 must be a JSON schema"):
        rank_tools("rain?", [("get_weather", "Forecasts the weather."), bad], reranker=Reranker(FakeBackend()))


@pytest.mark.parametrize("bad", [{"name": "x"}, "get_weather", {("a", "b")}, 3])
def test_what_is_no_list_of_tools(bad: Any) -> None:
    with pytest.raises(InputError, match="tools must be a list"):
        rank_tools("rain?", bad, reranker=Reranker(FakeBackend()))


def by_length(query: str, text: str) -> float:
    """Longer texts score higher."""
    return float(len(text))


async def test_the_tools_themselves_come_back_best_first() -> None:
    tools = [("a", "x" * n) for n in (5, 30, 20, 10)]
    reranker = Reranker(FakeBackend(by_length))
    ranked = rank_tools("request", tools, reranker=reranker)
    assert [id(tool) for tool in ranked] == [id(tools[i]) for i in (1, 2, 3, 0)]
    assert await arank_tools("request", iter(tools), 2, reranker) == [tools[1], tools[2]]
    assert rank_tools("request", [], 3, reranker) == []
    assert rank_tools("request", tools, 99, reranker) == ranked
    assert rank_tools("request", tools * 2, 2, reranker) == [tools[1], tools[1]]


def test_the_first_stage_counts_by_its_weight() -> None:
    tools = [("weather", "Rain and sun."), ("other", "A" * 40), ("third", "B" * 20)]
    reranker = Reranker(FakeBackend(by_length))
    request = "weather with rain or sun"
    assert rank_tools(request, tools, reranker=reranker, weight=0)[0] is tools[1]
    assert rank_tools(request, tools, reranker=reranker, weight=1)[0] is tools[0]
    assert rank_tools(request, tools, reranker=reranker, weight=0.7)[0] is tools[0]
    first = [0.0, 0.0, 1.0]
    asked: list[Any] = []

    def own(query: str, texts: Any) -> list[float]:
        asked.append((query, list(texts)))
        return first

    assert rank_tools(request, tools, reranker=reranker, weight=0.9, first_stage=own)[0] is tools[2]
    assert asked == [(request, [tool_text(tool) for tool in tools])]


def test_min_score_is_that_of_the_cross_encoder() -> None:
    tools = [("a", "no"), ("b", "yes")]
    reranker = Reranker(FakeBackend(lambda query, text: 2.0 if "yes" in text else -2.0))
    assert rank_tools("request", tools, reranker=reranker, min_score=0.5) == [tools[1]]
    assert rank_tools("request", tools, reranker=reranker, min_score=0.99) == []


def test_of_several_requests_the_one_that_a_tool_fits_best_counts() -> None:
    tools = [("mail", "Sends mail."), ("weather", "Forecasts rain."), ("music", "Plays songs.")]
    reranker = Reranker(FakeBackend(), scale="logit")
    both = rank_tools(["sends mail. please", "forecasts rain. please"], tools, 2, reranker)
    assert sorted(both) == tools[:2]
    with pytest.raises(InputError, match="got none"):
        rank_tools([], tools, 2, reranker)


def test_a_long_request_is_read_at_both_ends() -> None:
    backend = FakeBackend()
    request = "begin " + "x " * 5_000 + "end"
    rank_tools(request, [("a", "b")], reranker=Reranker(backend))
    assert [query for call in backend.calls for query, _ in call] == [request[:500], request[-500:]]


@pytest.mark.parametrize("settings", [{"dedup": "exact"}, {"fusion": 0.5}, {"order": "ends"}, {"spans": "sentences"}])
def test_settings_of_another_order_drop_no_tool(settings: dict[str, Any]) -> None:
    tools = [("a", "xxx"), ("a", "xxx"), ("b", "x"), ("c", "xx")]
    reranker = Reranker(FakeBackend(by_length), **settings)
    assert rank_tools("request", tools, reranker=reranker) == [tools[0], tools[1], tools[3], tools[2]]


def test_what_was_not_scored_follows_by_the_first_stage() -> None:
    def fails(query: str, text: str) -> float:
        raise ConnectionError("down")

    tools = [("a", "other"), ("b", "rain"), ("c", "else")]
    assert rank_tools("rain", tools, reranker=Reranker(FakeBackend(fails), on_error="keep_order"))[0] is tools[1]
    with pytest.raises((ScoringError, ConnectionError)):
        rank_tools("rain", tools, reranker=Reranker(FakeBackend(fails)))


@pytest.mark.parametrize(
    ("keywords", "error", "said"),
    [
        ({"top_n": 0}, ConfigurationError, "top_n"),
        ({"min_score": "high"}, ConfigurationError, "min_score"),
        ({"weight": 2}, ConfigurationError, "from 0 to 1"),
        ({"weight": True}, ConfigurationError, "from 0 to 1"),
        ({"reranker": "BAAI/bge-reranker-v2-m3"}, ConfigurationError, "must be a Reranker, got str"),
        ({"query": " "}, QueryError, "visible"),
        ({"query": None}, QueryError, "must be a str"),
        ({"first_stage": lambda query, texts: [1.0]}, ConfigurationError, "each of 2 tools"),
        ({"first_stage": lambda query, texts: [np.nan, 1.0]}, ConfigurationError, "not finite"),
    ],
)
def test_what_cannot_work_is_told(keywords: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {"query": "request", "tools": [("a", "b"), ("c", "d")], "reranker": Reranker(FakeBackend()), **keywords}
    with pytest.raises(error, match=said):
        rank_tools(**given)


def test_bm25_finds_words_parts_of_words_and_other_scripts() -> None:
    texts = ["send mail: Sends an email.", "forecast: Weather of any town.", "天气预报 城市"]
    assert bm25("emails", texts).argmax() == 0
    assert bm25("forecasting", texts).argmax() == 1
    assert bm25("明天的天气", texts).argmax() == 2
    assert bm25("zzz", texts).tolist() == [0.0, 0.0, 0.0]
    # As the formula says: two texts of one length, one of which has the word, k1 = 1.5.
    alone = bm25("ab", ["ab", "cd"])
    parts = 2  # the word and ^ab$
    assert alone[0] == pytest.approx(parts * np.log(1 + 1.5 / 1.5) * 1 * 2.5 / (1 + 1.5))


def test_an_embedding_model_is_asked_once_for_each_text() -> None:
    asked: list[str] = []

    def embed(texts: list[str]) -> Any:
        asked.extend(texts)
        return [[2.0 * ("rain" in text), 1.0 * ("mail" in text), 0.1] for text in texts]

    similarity = embedding_similarity(embed)
    texts = ["rain radar", "mail box"]
    scores = similarity("will it rain", texts)
    assert scores[0] == pytest.approx(1.0)
    assert scores[1] == pytest.approx(0.01 / np.sqrt((4.01) * (1.01)))
    similarity("a mail", texts)
    assert asked == ["will it rain", "rain radar", "mail box", "a mail"]
    with pytest.raises(ConfigurationError, match="shape"):
        embedding_similarity(lambda texts: [1.0])("a", ["b"])


def test_embeddings_are_kept_to_a_number() -> None:
    asked: list[str] = []

    def embed(texts: list[str]) -> Any:
        asked.extend(texts)
        return np.ones((len(texts), 2))

    similarity = embedding_similarity(embed, kept=3)
    for query in ("a", "b", "c", "a"):
        similarity(query, ["t"])
    assert asked.count("a") == 2


@pytest.mark.bundled
def test_the_bundled_model_is_the_default_and_keeps_its_scores() -> None:
    tools = [
        ("send_email", "Sends an email to a person."),
        ("get_forecast", "Forecasts the weather of a city for the next days."),
        ("play_music", "Plays a song or an album."),
    ]
    assert rank_tools("Will it rain in Lisbon tomorrow?", tools, 1) == [tools[1]]
    from rerank_plugins.tools import plain

    assert plain(None) is plain(None)
    assert plain(None).config["cache"] == 20_000


@pytest.mark.parametrize("settings", [{}, {"dedup": "exact"}, {"spans": "sentences", "cache": 100}])
def test_a_pair_that_is_asked_again_is_not_scored_again(settings: dict[str, Any]) -> None:
    backend = FakeBackend(lambda query, text: float(len(text)), fingerprint="lengths")
    own = with_cache(Reranker(backend, **settings))
    for _ in range(3):
        rank_tools("a request", [("first", "One."), ("second", "Another one.")], reranker=own)
    assert sum(map(len, backend.calls)) == 2
