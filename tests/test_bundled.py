"""The bundled model: golden scores, the same on every engine, and no worse than its card says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rerank_plugins import Reranker
from rerank_plugins.backends import pairs as backend_pairs
from rerank_plugins.models import bundled_directory
from rerank_plugins.testing import check_backend_contract

pytestmark = pytest.mark.bundled

GOLDEN = json.loads((Path(__file__).parent / "golden_bundled.json").read_text(encoding="utf-8"))
"""Written by recipes/minilm_l6/golden.py with ONNX Runtime; made again with every new model."""


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_golden_scores(backend: str) -> None:
    reranker = Reranker(backend=backend, precision="fp32")
    for query, texts in GOLDEN["queries"].items():
        logits = reranker.logits(query, list(texts))
        expected = np.array(list(texts.values()), dtype=np.float32)
        assert np.abs(logits - expected).max() < 1e-3, query
        assert np.argsort(-logits).tolist() == np.argsort(-expected).tolist(), query


def test_golden_scores_put_the_answer_first() -> None:
    """The first text of each query answers it; the others share its words or its topic."""
    reranker = Reranker()
    english = {query: texts for query, texts in GOLDEN["queries"].items() if query.isascii() and query != "long text"}
    first = {query: reranker.rank(query, list(texts))[0].index == 0 for query, texts in english.items()}
    assert len(first) == 6
    assert all(first.values()), first


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_the_bundled_model_keeps_the_contract(backend: str) -> None:
    exact = Reranker(backend=backend, precision="fp32")
    check_backend_contract(exact.prepare()._backend, tolerance=1e-3)
    check_backend_contract(Reranker(backend=backend).prepare()._backend, tolerance=0.2)


def test_scores_are_probabilities_that_mean_something() -> None:
    ranking = Reranker().rank(
        "what is the capital of france", ["Paris is the capital of France.", "Bread is made of flour and water."]
    )
    assert ranking[0].score > 0.5 > ranking[1].score


def test_the_card_and_the_files_are_complete_and_small() -> None:
    directory = bundled_directory()
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert {"model.onnx", "tokenizer.json", "tokenizer_config.json", "config.json", "README.md"} <= set(files)
    assert sum(files.values()) < 25 * 2**20
    card = (directory / "README.md").read_text(encoding="utf-8")
    for word in ("English", "trec-dl20", "clapnq-dev", "selqa-test", "cranfield", "CC BY", "recipes/minilm_l6"):
        assert word in card, word


def test_tokens_are_the_same_wherever_the_parts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Reranker().prepare()._backend.encoder
    pairs = [(f"query {i}", "word " * (i * 70)) for i in range(10)]
    texts = [text for _, text in pairs]
    whole, offsets = encoder.encode(pairs), encoder.offsets(texts)
    monkeypatch.setattr(backend_pairs, "_AT_ONCE", 3)
    for pair, expected in zip(encoder.encode(pairs), whole, strict=True):
        assert pair.ids.tolist() == expected.ids.tolist()
        assert pair.type_ids.tolist() == expected.type_ids.tolist()
        assert pair.truncated == expected.truncated
    assert encoder.offsets(texts) == offsets
