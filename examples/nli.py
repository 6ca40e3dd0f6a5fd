"""Natural language inference: which claims follow from a text?

    python examples/nli.py

An NLI cross-encoder has three classes. `label` chooses the one to rank by; the score is its probability. The
text is the query (the premise) and the claims are the candidates (the hypotheses): such models are trained on
pairs in that order.

Needs: pip install "rerank-plugins[torch]", and the model from the Hub or --model DIRECTORY.
"""

from __future__ import annotations

import argparse

from rerank_plugins import Reranker

MODEL = "cross-encoder/nli-deberta-v3-base"
REPORT = "The bridge was closed on Monday for repairs, and it will open again in two weeks."
CLAIMS = [
    "The bridge is open today.",
    "The bridge is being repaired.",
    "The bridge was built a hundred years ago.",
    "Nobody can cross the bridge at the moment.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"a Hub id or a directory; {MODEL} by default")
    args = parser.parse_args()

    # Both share one loaded copy of the model.
    rerankers = {label: Reranker(args.model, label=label) for label in ("entailment", "contradiction")}
    for label, reranker in rerankers.items():
        print(f"{label}: {REPORT}")
        for item in reranker.rank(REPORT, CLAIMS):
            print(f"  {item.score:.3f}  {item.text}")


if __name__ == "__main__":
    main()
