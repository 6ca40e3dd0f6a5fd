"""Write tests/golden_bundled.json: logits of the bundled model, for the test that no change moves them.

python recipes/minilm_l6/golden.py
"""

import json
from pathlib import Path

from rerank_plugins import Reranker

QUERIES = {
    "how do I undo a commit in git": [
        "git revert creates a new commit that undoes the changes of an earlier one.",
        "git add stages the changes of a file for the next commit.",
        "The committee undid its decision on Monday.",
    ],
    "what do giant pandas eat": [
        "The giant panda's diet is over 99 percent bamboo shoots and leaves.",
        "Giant pandas live in a few mountain ranges in central China, mainly in Sichuan.",
        "Pandas is a Python library for data analysis.",
    ],
    "who wrote the novel moby dick": [
        "Moby-Dick is an 1851 novel by American writer Herman Melville.",
        "The whale is the largest animal that has ever lived.",
        "Charles Dickens wrote many novels in Victorian London.",
    ],
    "python list sort reverse": [
        "Call items.sort(reverse=True) to sort a list in place in descending order.",
        "A tuple is an immutable sequence of objects.",
        "The python is a large snake that kills by constriction.",
    ],
    "symptoms of iron deficiency": [
        "Tiredness, shortness of breath, pale skin and brittle nails are common signs of too little iron in the blood.",
        "Iron is a chemical element with the symbol Fe and atomic number 26.",
        "The Iron Age followed the Bronze Age.",
    ],
    "when was the eiffel tower built": [
        "Construction of the Eiffel Tower began in January 1887 and ended in March 1889.",
        "The Eiffel Tower has three levels for visitors, with restaurants on the first and second.",
        "Gustave Eiffel was a French civil engineer.",
    ],
    "熊猫吃什么 🐼": ["大熊猫主要吃竹子。", "巴黎是法国的首都。", "🎋"],
    "long text": ["word " * 1000, "A long text is a text that has many words.", "short"],
}

if __name__ == "__main__":
    reranker = Reranker(backend="onnx")
    golden = {
        query: {text: round(float(logit), 5) for text, logit in zip(texts, reranker.logits(query, texts), strict=True)}
        for query, texts in QUERIES.items()
    }
    path = Path(__file__).parents[2] / "tests" / "golden_bundled.json"
    path.write_text(json.dumps({"model": reranker.model_name, "queries": golden}, indent=1, ensure_ascii=False) + "\n")
    for query, scores in golden.items():
        print(query, *(f"\n  {logit:8.3f}  {text[:80]}" for text, logit in scores.items()))
