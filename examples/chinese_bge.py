"""Chinese and multilingual reranking in LangChain with BAAI/bge-reranker-base.

    python examples/chinese_bge.py

Needs: pip install "rerank-plugins[langchain,torch]", and the model from the Hub or --model DIRECTORY.
"""

from __future__ import annotations

import argparse

from langchain_core.documents import Document

from rerank_plugins.langchain import CrossEncoderRerank

MODEL = "BAAI/bge-reranker-base"
QUESTION = "大熊猫吃什么？"
DOCUMENTS = [
    Document("北京是中华人民共和国的首都。", metadata={"source": "北京"}),
    Document("大熊猫生活在四川、陕西和甘肃的山区。", metadata={"source": "大熊猫的分布"}),
    Document("大熊猫主要以竹子为食，每天可以吃掉几十公斤。", metadata={"source": "大熊猫的食性"}),
    Document("竹子是生长最快的植物之一。", metadata={"source": "竹子"}),
    Document("Giant pandas live almost entirely on bamboo.", metadata={"source": "panda (en)"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"a Hub id or a directory; {MODEL} by default")
    args = parser.parse_args()

    # As base_compressor of a ContextualCompressionRetriever it does the same to what a retriever finds.
    rerank = CrossEncoderRerank(model=args.model, top_n=3)
    print(QUESTION)
    for document in rerank.compress_documents(DOCUMENTS, QUESTION):
        score, source = document.metadata["relevance_score"], document.metadata["source"]
        print(f"{score:.3f}  {document.page_content}  [{source}]")


if __name__ == "__main__":
    main()
