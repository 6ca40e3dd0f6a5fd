"""The kinds of rerank servers, by name."""

from __future__ import annotations

from rerank_plugins.backends.http.dialects._dialect import Ask, Dialect
from rerank_plugins.backends.http.dialects.cohere import COHERE
from rerank_plugins.backends.http.dialects.infinity import INFINITY
from rerank_plugins.backends.http.dialects.jina import JINA
from rerank_plugins.backends.http.dialects.mixedbread import MIXEDBREAD
from rerank_plugins.backends.http.dialects.nim import NIM
from rerank_plugins.backends.http.dialects.pinecone import PINECONE
from rerank_plugins.backends.http.dialects.tei import TEI
from rerank_plugins.backends.http.dialects.vllm import VLLM
from rerank_plugins.backends.http.dialects.voyage import VOYAGE

__all__ = ["DIALECTS", "Ask", "Dialect"]

DIALECTS = {dialect.name: dialect for dialect in (COHERE, JINA, VLLM, INFINITY, TEI, VOYAGE, NIM, MIXEDBREAD, PINECONE)}
