"""What other rerankers get wrong, one test each, against the core. The adapters' tests hold the same for theirs."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checkpoints import tiny

from rerank_plugins import Candidate, Reranker
from rerank_plugins.errors import ConfigurationError, InputError, ScoringError
from rerank_plugins.testing import FakeBackend


def fixed(*logits: float, emits: str = "logit") -> Reranker:
    return Reranker(FakeBackend(lambda query, text: logits[int(text)], emits=emits))  # type: ignore[arg-type]


def texts(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def test_a_negative_top_n_does_not_drop_the_last() -> None:
    with pytest.raises(ConfigurationError):
        fixed(1.0, 2.0).rank("q", texts(2), top_n=-1)


def test_nan_does_not_outrank_the_best() -> None:
    with pytest.raises(ScoringError, match="'1'"):
        fixed(0.1, math.nan, 5.0).rank("q", texts(3), top_n=2)


def test_one_tokenizer_in_many_threads_keeps_its_length() -> None:
    long = "panda " * 900
    short, full = Reranker(tiny("bert"), max_length=40), Reranker(tiny("bert"))
    lengths = [r._loaded().encoder for r in (short, full)]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: len(lengths[i % 2].encode([("q", long)])[0].ids), range(300)))
    assert found == [40, 256] * 150


def test_a_long_text_is_cut_visibly_and_the_query_never() -> None:
    reranker = Reranker(tiny("bert"))
    encoder = reranker._loaded().encoder  # type: ignore[attr-defined]
    query = "panda bamboo " * 30
    pair = encoder.encode([(query, "paris " * 300)])[0]
    query_ids = encoder.tokenizer.encode(query, add_special_tokens=False).ids
    assert pair.ids[1 : 1 + len(query_ids)].tolist() == query_ids
    assert reranker.rank(query, ["paris " * 300])[0].truncated
    with pytest.raises(InputError):
        reranker.rank(query * 5, ["paris"])


def test_there_is_a_threshold() -> None:
    assert [item.index for item in fixed(-3.0, 3.0, 0.1).rank("q", texts(3), min_score=0.5)] == [1, 2]


def test_scores_do_not_depend_on_the_other_candidates() -> None:
    reranker = fixed(-3.0, 3.0, 0.1)
    alone = reranker.rank("q", ["2"])[0].score
    assert alone == next(item.score for item in reranker.rank("q", texts(3)) if item.index == 2)


def test_a_probability_in_range_is_not_taken_for_a_logit_nor_the_other_way_round() -> None:
    # Logits that all happen to lie in 0..1 are still logits.
    assert fixed(0.9, 0.1).rank("q", texts(2))[0].score == pytest.approx(1 / (1 + math.exp(-0.9)), abs=1e-6)
    assert fixed(0.9, 0.1, emits="probability").rank("q", texts(2))[0].score == pytest.approx(0.9, abs=1e-6)


def test_saturated_sigmoids_still_have_an_order() -> None:
    ranking = fixed(17.0, 20.0, 18.0, 40.0, 39.0).rank("q", texts(5))
    assert [item.index for item in ranking] == [3, 4, 1, 2, 0]
    assert np.float32(ranking[2].score) == np.float32(ranking[3].score) == 1.0
    assert ranking[2].score > ranking[3].score > ranking[4].score


def test_scores_go_into_json() -> None:
    item = Reranker(tiny("bert")).rank("q", ["a"])[0]
    assert json.loads(json.dumps({"score": item.score, "logit": item.logit})) == {
        "score": item.score,
        "logit": item.logit,
    }


def test_candidates_are_not_mutated() -> None:
    metadata = {"relevance_score": 0.1, "tags": ["x"]}
    candidates = [Candidate("1", id="b", metadata=metadata), Candidate("0", id="a", metadata=metadata)]
    before = list(candidates)
    ranking = fixed(1.0, 0.0).rank("q", candidates)
    assert candidates == before
    assert metadata == {"relevance_score": 0.1, "tags": ["x"]}
    assert [item.candidate.id for item in ranking] == ["a", "b"]


def test_remote_code_is_off_unless_asked() -> None:
    assert Reranker("a/b").config["trust_remote_code"] is False


def test_the_model_is_loaded_once_for_all_calls_and_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    from rerank_plugins.backends import load as loading

    loads: list[object] = []
    real = loading._load
    monkeypatch.setattr(loading, "_load", lambda spec: loads.append(spec) or real(spec))
    rerankers = [Reranker(tiny("xlm-roberta"), device="cpu", max_length=length) for length in (None, 64, 64)]
    for reranker in rerankers * 3:
        reranker.rank("q", ["a", "b"])
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("family", "limit"), [("bert", 256), ("roberta", 256), ("xlm-roberta", 256), ("deberta-v2", 256)]
)
def test_a_text_longer_than_the_positions_does_not_crash(family: str, limit: int) -> None:
    reranker = Reranker(tiny(family))
    assert reranker.max_length == 256
    assert np.isfinite(reranker.logits("q", ["word " * 2000])).all()


def test_a_decoder_without_a_pad_token_scores_in_batches(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import shutil

    shutil.copytree(tiny("causal-qwen3"), tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    reranker = Reranker(tmp_path / "model")
    batch = ["short", "a rather longer text about pandas and bamboo"]
    alone = [float(reranker.logits("q", [text])[0]) for text in batch]
    assert reranker.logits("q", batch).tolist() == pytest.approx(alone, abs=1e-4)


def test_the_end_of_a_decoders_prompt_survives_truncation() -> None:
    encoder = Reranker(tiny("causal-qwen3"))._loaded().encoder  # type: ignore[attr-defined]
    pair = encoder.encode([("q", "word " * 2000)])[0]
    assert pair.truncated
    assert len(pair.ids) == 256
    assert encoder.tokenizer.decode(pair.ids.tolist(), skip_special_tokens=False).endswith(
        "<|im_end|>\n<|im_start|>assistant"
    )


def test_no_candidates_are_no_error() -> None:
    assert list(Reranker(tiny("bert")).rank("q", [])) == []
