"""langchain-tests' own suites. `k`, the number of candidates, bounds the results, so both names pass."""

from __future__ import annotations

from typing import Any

from langchain_community.vectorstores import FAISS
from langchain_core.tools import BaseTool
from langchain_tests.integration_tests import RetrieversIntegrationTests, ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests
from test_langchain import TEXTS, WordEmbeddings

from rerank_plugins.langchain import RerankRetriever, create_rerank_tool
from rerank_plugins.testing import FakeBackend


def _retriever() -> Any:
    return FAISS.from_texts(TEXTS, WordEmbeddings()).as_retriever()


class TestRerankRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[RerankRetriever]:
        return RerankRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"retriever": _retriever(), "model": FakeBackend()}

    @property
    def retriever_query_example(self) -> str:
        return "how do I undo a commit"


class TestRerankRetrieverTopN(TestRerankRetriever):
    @property
    def num_results_arg_name(self) -> str:
        return "top_n"


class _Tool:
    @property
    def tool_constructor(self) -> BaseTool:
        return create_rerank_tool(_retriever(), model=FakeBackend())

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"query": "how do I undo a commit"}


class TestRerankToolUnit(_Tool, ToolsUnitTests):
    pass


class TestRerankToolIntegration(_Tool, ToolsIntegrationTests):
    pass
