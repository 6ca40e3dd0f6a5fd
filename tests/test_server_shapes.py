"""Whatever JSON comes, it is a request that can be ranked or an error with a message; nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette")

from rerank_plugins import Reranker
from rerank_plugins.server._shapes import Refused, answer, error_body, parse, shape_of
from rerank_plugins.testing import FakeBackend

PATHS = ("/v2/rerank", "/v1/rerank", "/rerank", "/infinity/rerank", "/")
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
names = ["query", "documents", "texts", "top_n", "return_documents", "raw_scores", "use_activation", "truncate"]
names += ["truncation_side", "truncation_direction", "truncate_prompt_tokens", "instruction", "return_text", "model"]
texts = st.lists(st.text(max_size=5) | st.fixed_dictionaries({"text": st.text(max_size=5)}) | values, max_size=4)
requests = st.fixed_dictionaries(
    {}, optional={name: texts | values if name in ("documents", "texts") else values for name in names}
)
likely = st.fixed_dictionaries(
    {"query": st.text(min_size=1, max_size=5)},
    optional={
        "documents": st.lists(st.text(max_size=5), min_size=1, max_size=5),
        "texts": st.lists(st.text(max_size=5), min_size=1, max_size=5),
        "top_n": st.none() | st.integers(0, 6),
        "return_documents": st.none() | st.booleans(),
        "raw_scores": st.none() | st.booleans(),
        "return_text": st.none() | st.booleans(),
    },
)


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(PATHS), body=requests | likely | values)
def test_any_json(path: str, body: Any) -> None:
    content = json.dumps(body).encode()
    refused: Refused | None = None
    try:
        ask = parse(path, content, agent="", max_texts=5, raw=False)
    except Refused as error:
        refused = error
    if refused is not None:
        assert 400 <= refused.status < 500
        assert json.loads(error_body(shape_of(path, content), refused.status, refused.message, refused.kind))
        return
    said = json.loads(answer(ask, Reranker(FakeBackend()).rank(ask.query, ask.texts), "m"))
    indices = [row["index"] for row in (said if isinstance(said, list) else said["results"])]
    assert len(set(indices)) == len(indices) == min(len(ask.texts), ask.top_n or len(ask.texts))


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=40))
def test_any_bytes(content: bytes) -> None:
    with pytest.raises(Refused):
        parse("/rerank", content, agent="", max_texts=5, raw=False)
