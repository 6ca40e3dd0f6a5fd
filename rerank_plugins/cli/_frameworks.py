"""The same retrieval and reranking, once in each framework, as a user would write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rerank_plugins import Reranker
from rerank_plugins._extras import import_extra
from rerank_plugins.cli._corpus import langchain_community
from rerank_plugins.cli._index import Embedder, PassageIndex

__all__ = ["FRAMEWORKS", "Hit", "LangChainSearch", "LlamaIndexSearch", "Search"]


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found: its row in the index, and the score of the stage that found it."""

    row: int
    score: float


class Search(Protocol):
    """Two stages; the second takes what the first found."""

    def retrieve(self, question: str) -> list[Hit]:
        """The k nearest passages, nearest first; scores are cosines."""
        ...

    def rerank(self, question: str) -> list[Hit]:
        """The best of what `retrieve` found last, best first; scores are the cross-encoder's."""
        ...


class LangChainSearch:
    """LangChain's FAISS vector store, and `rerank_plugins.langchain.CrossEncoderRerank`."""

    def __init__(self, index: PassageIndex, embedder: Embedder, reranker: Reranker, *, k: int, top_n: int) -> None:
        vectorstores = langchain_community("vectorstores")
        strategies = langchain_community("vectorstores.utils")
        docstores = langchain_community("docstore.in_memory")
        from langchain_core.documents import Document
        from langchain_core.embeddings import Embeddings

        from rerank_plugins.langchain import CrossEncoderRerank

        class Embedding(Embeddings):
            def embed_query(self, text: str) -> list[float]:
                return embedder.query(text)

            def embed_documents(self, texts: list[str]) -> list[list[float]]:
                return [embedder.query(text) for text in texts]

        documents = {
            str(row): Document(passage.text, id=str(row), metadata={"source": passage.source})
            for row, passage in enumerate(index.passages)
        }
        self._store = vectorstores.FAISS(
            Embedding(),
            index.faiss,
            docstores.InMemoryDocstore(documents),
            dict(enumerate(documents)),
            distance_strategy=strategies.DistanceStrategy.MAX_INNER_PRODUCT,
        )
        self._compressor = CrossEncoderRerank(reranker=reranker, top_n=top_n)
        self._k = k
        self._found: list[Document] = []

    def retrieve(self, question: str) -> list[Hit]:
        """The k nearest passages, nearest first; scores are cosines."""
        pairs = self._store.similarity_search_with_score(question, k=self._k)
        self._found = [document for document, _ in pairs]
        return [Hit(int(document.id), float(score)) for document, score in pairs]

    def rerank(self, question: str) -> list[Hit]:
        """The best of what `retrieve` found last, best first; scores are the cross-encoder's."""
        best = self._compressor.compress_documents(self._found, question)
        return [Hit(int(document.id or 0), document.metadata["relevance_score"]) for document in best]


class LlamaIndexSearch:
    """LlamaIndex's FAISS vector store, and `rerank_plugins.llama_index.CrossEncoderRerank`."""

    def __init__(self, index: PassageIndex, embedder: Embedder, reranker: Reranker, *, k: int, top_n: int) -> None:
        faiss_store: Any = import_extra("llama_index.vector_stores.faiss", "demo")
        from llama_index.core import StorageContext, VectorStoreIndex
        from llama_index.core.data_structs import IndexDict
        from llama_index.core.embeddings import BaseEmbedding
        from llama_index.core.schema import TextNode
        from llama_index.core.storage.docstore import SimpleDocumentStore

        from rerank_plugins.llama_index import CrossEncoderRerank

        class Embedding(BaseEmbedding):
            def _get_query_embedding(self, query: str) -> list[float]:
                return embedder.query(query)

            async def _aget_query_embedding(self, query: str) -> list[float]:
                return embedder.query(query)

            def _get_text_embedding(self, text: str) -> list[float]:
                return embedder.query(text)

        nodes = [
            TextNode(
                id_=str(row),
                text=passage.text,
                metadata={"source": passage.source},
                excluded_embed_metadata_keys=["source"],
                excluded_llm_metadata_keys=["source"],
            )
            for row, passage in enumerate(index.passages)
        ]
        docstore = SimpleDocumentStore()
        docstore.add_documents(nodes)
        vectors = VectorStoreIndex(
            index_struct=IndexDict(nodes_dict={node.node_id: node.node_id for node in nodes}),
            storage_context=StorageContext.from_defaults(
                docstore=docstore, vector_store=faiss_store.FaissVectorStore(index.faiss)
            ),
            embed_model=Embedding(),
        )
        self._retriever = vectors.as_retriever(similarity_top_k=k)
        self._postprocessor = CrossEncoderRerank(reranker=reranker, top_n=top_n)
        self._found: list[Any] = []

    def retrieve(self, question: str) -> list[Hit]:
        """The k nearest passages, nearest first; scores are cosines."""
        self._found = self._retriever.retrieve(question)
        return [Hit(int(item.node.node_id), item.get_score()) for item in self._found]

    def rerank(self, question: str) -> list[Hit]:
        """The best of what `retrieve` found last, best first; scores are the cross-encoder's."""
        best = self._postprocessor.postprocess_nodes(self._found, query_str=question)
        return [Hit(int(item.node.node_id), item.get_score()) for item in best]


FRAMEWORKS: dict[str, type[LangChainSearch] | type[LlamaIndexSearch]] = {
    "langchain": LangChainSearch,
    "llama-index": LlamaIndexSearch,
}
