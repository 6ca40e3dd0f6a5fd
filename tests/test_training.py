from __future__ import annotations

import copy
import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny
from rerank_plugins.training._bundled import SHARED_WORDS, shared_words
from rerank_plugins.training._warm_start import from_graph
from transformers import AutoTokenizer, BertModel

from rerank_plugins import Reranker
from rerank_plugins._minilm import minilm_directory
from rerank_plugins.backends._late_interaction import (
    LateInteractionScore,
    build_cross_encoder,
    load_cross_encoder,
)
from rerank_plugins.conversion import convert
from rerank_plugins.errors import ConfigurationError, InputError, ModelLoadError
from rerank_plugins.models import bundled_directory
from rerank_plugins.training import (
    Group,
    Pair,
    TrainingConfig,
    fit,
    read_pairs,
    train,
)
from rerank_plugins.training import _api as api
from rerank_plugins.training._data import (
    evaluation_groups,
    groups_from_pairs,
    is_held_out,
    is_trained_on,
    normalise,
    read_data,
    read_groups,
    split_pairs,
    write_groups,
)
from rerank_plugins.training._loop import Scorer, batches, evaluate_groups, ndcg
from rerank_plugins.training._mining import (
    distilled_groups,
    labelled_groups,
    pseudo_queries,
    top,
    without_sentence,
)

# What follows what must be learnt: no word of a query is in its answer.
RIDDLES = {
    "panda": "bamboo", "paris": "capital", "revert": "history", "faiss": "vector",
    "fox": "dog", "china": "mountains", "search": "library", "commit": "older",
}  # fmt: skip


def riddles(count: int, seed: int) -> list[Group]:
    rng = random.Random(seed)
    groups = []
    for _ in range(count):
        query = rng.choice(list(RIDDLES))
        others = rng.sample([answer for q, answer in RIDDLES.items() if q != query], 3)
        passages = (f"the {RIDDLES[query]}", *(f"the {answer}" for answer in others))
        groups.append(Group(f"what of {query}", passages, (1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), "riddle"))
    return groups


def tiny_model() -> Any:
    return build_cross_encoder(tiny("bert"), max_length=64, device="cpu", model_kwargs={"attn_implementation": "eager"})


def config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "steps": 60, "learning_rate": 3e-3, "head_learning_rate": 1e-2, "freeze_embeddings": False,
        "ema": 0.9, "bf16": False, "evaluations": 3, "checkpoint_s": 0.0, "device": "cpu", "max_length": 32,
    }  # fmt: skip
    return TrainingConfig(**(settings | changes))


def weights(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for part in model for parameter in part.parameters()]


# --- data ---


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


GOOD = '{"query": "q", "passage": "p", "label": 1}'


@pytest.mark.parametrize(
    "line",
    [
        '{"query": "q", "passage": "p"',
        "[1, 2]",
        '{"passage": "p", "label": 1}',
        '{"query": " ", "passage": "p", "label": 1}',
        '{"query": "q", "passage": 3, "label": 1}',
        '{"query": "q", "passage": "p", "label": "yes"}',
        '{"query": "q", "passage": "p", "label": true}',
        '{"query": "q", "passage": "p", "label": 2}',
        '{"query": "q", "passage": "p", "label": NaN}',
        '{"query": "q", "passage": "p", "label": 1, "split": "training"}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD, "", line)

    with pytest.raises(InputError, match=r"pairs\.jsonl, line 3"):
        read_pairs(path)


def test_bad_data_is_told_before_any_training(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD, "{}")

    with pytest.raises(InputError, match="line 2"):
        train(path, tmp_path / "out", trunk=tiny("bert"), steps=1)
    assert not (tmp_path / "out").exists()


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", GOOD)
    folder = tmp_path / "two"
    folder.mkdir()
    with gzip.open(folder / "pairs.jsonl.gz", "wt") as out:
        out.write('{"query": "r", "passage": "p", "label": 0, "split": "dev", "more": 1}\n')

    assert read_pairs([tmp_path / "one.jsonl", folder]) == [Pair("q", "p", 1.0), Pair("r", "p", 0.0, "dev")]
    with pytest.raises(ConfigurationError, match="missing"):
        read_pairs(tmp_path / "missing.jsonl")


def test_own_splits_are_used_and_never_overlap() -> None:
    pairs = [
        Pair("a", "x", 1, "train"),
        Pair("A?", "y", 1, "dev"),
        Pair("b", "z", 1, "train"),
        Pair("c", "z", 1, "test"),
    ]

    training, dev = split_pairs(pairs)

    assert [pair.query for pair in training] == ["b"]
    assert [pair.query for pair in dev] == ["A?"]


def test_without_splits_a_tenth_of_the_queries_is_held_out() -> None:
    pairs = [Pair(f"question {n}", passage, 1) for n in range(1000) for passage in ("x", "y")]

    training, dev = split_pairs(pairs)

    assert 60 < len({pair.query for pair in dev}) < 140
    assert not {normalise(pair.query) for pair in dev} & {normalise(pair.query) for pair in training}
    assert is_held_out("Some  question?") == is_held_out("some question")


def test_groups_have_one_positive_and_no_duplicate() -> None:
    pairs = [
        Pair("q", "good", 1),
        Pair("q", "good", 1),
        Pair("q", "fine", 0.5),
        *(Pair("q", f"bad {n}", 0) for n in range(9)),
    ]

    groups = groups_from_pairs(pairs, 4)

    assert [group.passages[0] for group in groups] == ["good", "fine"]
    for group in groups:
        assert len(set(group.passages)) == 4
        assert group.gains[0] > max(group.gains[1:])
        assert group.target == pytest.approx([gain / sum(group.gains) for gain in group.gains])
    assert groups_from_pairs([Pair("q", "good", 1)], 4) == []
    assert groups_from_pairs([Pair("q", "good", 1), Pair("q", "fine", 0.5)], 4)[0].gains == (1.0, 0.5)
    (measured,) = evaluation_groups(pairs)
    assert len(measured.passages) == 11


def test_groups_survive_writing(tmp_path: Path) -> None:
    groups = [Group("q", ("ü", "b"), (0.9, 0.1), (1.0, 0.0), "k", judged=False)]
    write_groups(tmp_path / "groups.jsonl", groups)

    assert read_groups(tmp_path / "groups.jsonl") == groups


# --- mining ---


def unit(*rows: list[float]) -> np.ndarray:
    matrix = np.array(rows, dtype=np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def test_top_is_sorted_and_may_be_empty() -> None:
    passages = unit([1, 0], [1, 1], [0, 1])

    indices, values = top(unit([0, 1]), passages, 2)

    assert indices.tolist() == [[2, 1]]
    assert values[0, 0] == pytest.approx(1.0)
    assert top(unit([0, 1]), passages[:0], 5)[0].shape == (1, 0)


def test_likely_false_negatives_are_left_out() -> None:
    texts = ["answer", "as good an answer", "hard", "harder", "easy"]
    vectors = unit([1, 0.5], [1, 0.45], [1, 1.6], [1, 1.2], [0, 1])
    question = [("question", {"answer": 1.0})]

    (group,) = labelled_groups(question, unit([1, 0.1]), texts, vectors, [], vectors[:0], size=4, margin=0.05)

    assert group.passages[0] == "answer"
    assert "as good an answer" not in group.passages
    assert sum(group.target) == pytest.approx(1.0, abs=1e-3)
    assert group.target[0] > 0.6


def test_pseudo_queries_come_from_their_passage() -> None:
    sentences = [f"Sentence number {n} tells about topic{n} and topic{n + 1} in some detail." for n in range(30)]
    passages = [("Title", " ".join(sentences[n : n + 4])) for n in range(25)]

    made = pseudo_queries(passages, 80, seed=1)

    assert len(made) == 80
    assert {kind for _, _, kind in made} >= {"keywords", "span", "sentence"}
    for query, source, kind in made:
        text = passages[source][1]
        if kind == "keywords":
            assert all(word in text.lower() for word in query.split())
        elif kind != "title":
            assert query in text
    assert pseudo_queries(passages, 80, seed=1) == made
    assert sentences[1] not in without_sentence(" ".join(sentences[:4]), sentences[1])


def test_distilled_targets_follow_the_encoder() -> None:
    texts = [f"text {n}" for n in range(60)]
    vectors = unit(*([1.0, n / 20] for n in range(60)))

    (group,) = distilled_groups([("query", 0, "span")], vectors[:1], texts, vectors, size=8, seed=0)

    assert group.passages[0] == "text 0"
    assert len(set(group.passages)) == 8
    order = [int(text.split()[1]) for text in group.passages]
    assert [t for _, t in sorted(zip(order, group.target, strict=True))] == sorted(group.target, reverse=True)
    assert sum(group.target) == pytest.approx(1.0, abs=1e-3)


def test_shared_words_add_to_the_cosines_of_cut_queries() -> None:
    texts = ["ships sail on water", "ships sail on ice", *(f"ships carry cargo {n}" for n in range(60))]
    vectors = unit(*([1.0, 0.0] for _ in texts))
    bonus = shared_words(AutoTokenizer.from_pretrained(minilm_directory("train")), texts)

    (group,) = distilled_groups([("sail on water", 0, "span")], vectors[:1], texts, vectors, size=8, bonus=bonus)

    found = bonus("sail on water", texts)
    assert found[0] > found[1] > found[2] == 0
    assert found[0] < SHARED_WORDS
    assert group.target[0] == max(group.target)
    # What other passages stand beside it changes nothing: longer ones pad it.
    assert bonus("sail on water", [texts[0], texts[2] * 9])[0] == pytest.approx(found[0])


# --- the head ---


def features(segments: list[tuple[int, int]], width: int, dim: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random vectors of pairs with so many query and document tokens, [CLS] and [SEP]s beside them."""
    mask, types = (
        torch.zeros(len(segments), width, dtype=torch.long),
        torch.zeros(len(segments), width, dtype=torch.long),
    )
    hidden = torch.zeros(len(segments), width, dim)
    for row, (query, document) in enumerate(segments):
        length = query + document + 3
        hidden[row, :length] = torch.randn(length, dim, generator=torch.Generator().manual_seed(seed + row))
        mask[row, :length] = 1
        types[row, query + 2 : length] = 1
    # Words of a small vocabulary, so that query and document share some.
    ids = torch.randint(3, 9, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask
    return {"token_embeddings": hidden, "input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def test_head_is_what_its_docstring_says() -> None:
    head = LateInteractionScore(8, 9)
    with torch.no_grad():
        head.linear.weight.normal_(generator=torch.Generator().manual_seed(1))
        head.linear.bias.fill_(0.3)
        head.scale.fill_(0.5)
        head.shift.fill_(-1.0)
    given = features([(3, 5)], 14)

    hidden = given["token_embeddings"][0]
    query, document = hidden[1:4], hidden[5:10]
    cosine = torch.cosine_similarity(query.mean(0), document.mean(0), dim=0)
    maxsim = torch.cosine_similarity(query[:, None], document[None], dim=-1).amax(1).mean()
    expected = 0.5 * (head.linear(hidden[0])[0] + 14 * cosine + 6 * maxsim) - 1

    assert head(given)["scores"].shape == (1, 1)
    assert head(given)["scores"].item() == pytest.approx(expected.item(), abs=1e-4)


def rare_and_common() -> LateInteractionScore:
    """A head that knows that token 3 is rare, and that every document has token 8."""
    head = LateInteractionScore(8, 9)
    head.know_rarity([[8, 8, 3], *([8, token] for token in (4, 5, 6, 7) * 3)], special=[0, 1, 2])
    return head


def test_rarity_is_the_idf_of_bm25() -> None:
    head = rare_and_common()

    assert head.idf[3] == pytest.approx(np.log(1 + 12.5 / 1.5))
    assert head.idf[4] == pytest.approx(np.log(1 + 10.5 / 3.5))
    assert head.idf[8] == pytest.approx(np.log(1 + 0.5 / 13.5))
    assert not head.idf[:3].any()
    with pytest.raises(InputError, match="at least one document"):
        head.know_rarity([])


def test_shared_words_count_by_how_rare_they_are() -> None:
    head, without = rare_and_common(), LateInteractionScore(8, 9)
    given = features([(3, 5)], 14)

    def lexical(query: list[int], document: list[int]) -> float:
        given["input_ids"][0, :11] = torch.tensor([1, *query, 2, *document, 2])
        return head(given)["scores"].item() - without(given)["scores"].item()

    usual = 0.9 * (0.6 + 0.4 * 5 / 80)
    weight = 7 * (5 / 120) ** 0.3
    idf = head.idf
    assert lexical([3, 4, 8], [5, 6, 5, 6, 7]) == pytest.approx(0, abs=1e-5)
    assert lexical([3, 3, 3], [5, 3, 5, 3, 7]) == pytest.approx(weight * 2 / (2 + usual), abs=1e-4)
    mixed = (idf[3] * 1 / (1 + usual) + idf[8] * 3 / (3 + usual)) / (idf[3] + idf[8] + idf[4])
    assert lexical([3, 4, 8], [8, 8, 3, 8, 7]) == pytest.approx(float(weight * mixed), abs=1e-4)
    assert lexical([3, 4, 8], [3, 5, 5, 5, 5]) > lexical([3, 4, 8], [8, 8, 8, 8, 8])
    # [SEP] of both texts is no shared word, and [UNK] no known one.
    assert lexical([2, 2, 2], [2, 2, 2, 2, 2]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("length", "share"), [(1, (1 / 120) ** 0.3), (60, 0.5**0.3), (120, 1.0), (300, 1.0)])
def test_shared_words_count_less_in_short_documents(length: int, share: float) -> None:
    head = rare_and_common()
    ids = torch.full((1, length + 1), 3)
    query = torch.cat([torch.ones(1, 1), torch.zeros(1, length)], 1)

    found = float(head.lexical(ids, query, 1 - query))

    assert found == pytest.approx(share * length / (length + 0.9 * (0.6 + 0.4 * length / 80)), abs=1e-5)


both_heads = pytest.mark.parametrize("make", [lambda: LateInteractionScore(8, 9), rare_and_common])


@both_heads
def test_head_does_not_see_padding(make: Callable[[], LateInteractionScore]) -> None:
    head = make()
    narrow, wide = features([(3, 5)], 11), features([(3, 5)], 32)
    wide["input_ids"][0, :11] = narrow["input_ids"][0]
    wide["token_embeddings"][0, 11:] = 7.0

    torch.testing.assert_close(head(narrow)["scores"], head(wide)["scores"])


@both_heads
@pytest.mark.parametrize("segments", [(0, 0), (0, 4), (4, 0), (1, 1)])
def test_head_is_finite_without_tokens(segments: tuple[int, int], make: Callable[[], LateInteractionScore]) -> None:
    given = features([segments], 12)
    given["token_embeddings"].requires_grad_()
    head = make()

    score = head(given)["scores"]
    score.sum().backward()

    assert torch.isfinite(score).all()
    assert torch.isfinite(given["token_embeddings"].grad).all()  # type: ignore[arg-type]
    given["attention_mask"] = torch.zeros_like(given["attention_mask"])
    assert torch.isfinite(head({**given, "token_embeddings": torch.zeros(1, 12, 8)})["scores"]).all()


def test_head_needs_segments(tmp_path: Path) -> None:
    given = features([(2, 2)], 8)
    del given["token_type_ids"]

    with pytest.raises(ModelLoadError, match="token_type_ids"):
        LateInteractionScore(8, 9)(given)
    with pytest.raises(ModelLoadError, match="token_type_ids"):
        build_cross_encoder(tiny("roberta"), device="cpu")


def token_vectors(model: Any, query: str, *texts: str) -> Any:
    """Vectors of the first text's pair, padded to the longest."""
    tokens = model[0].tokenizer([query] * len(texts), list(texts), padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model[0](dict(tokens))["token_embeddings"][0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_far_below_zero_the_bias_parts_the_texts(attention: str) -> None:
    model, faint, free = (
        build_cross_encoder(
            tiny("bert"), device="cpu", cross_bias=bias, model_kwargs={"attn_implementation": attention}
        ).eval()
        for bias in (-1e4, -3.0, 0.0)
    )
    query = "what of panda"
    length = len(model[0].tokenizer(query)["input_ids"])

    def change(of: Any) -> float:
        one, other = (token_vectors(of, query, text)[:length] for text in ("the bamboo", "no capital"))
        return float((one - other).abs().max())

    assert change(model) == 0
    assert 0 < change(faint) < change(free)
    # The text still reads [CLS], as it did alone.
    assert (token_vectors(model, "paris", "the bamboo")[-1] - token_vectors(model, "fox", "the bamboo")[-1]).any()


def test_the_bias_leaves_padding_unseen() -> None:
    model = tiny_model().eval()
    alone = token_vectors(model, "what of panda", "the bamboo")

    beside = token_vectors(model, "what of panda", "the bamboo", "the bamboo " * 9)

    torch.testing.assert_close(beside[: len(alone)], alone)
    half = build_cross_encoder(tiny("bert"), device="cpu", model_kwargs={"dtype": torch.float16}).eval()
    assert torch.isfinite(token_vectors(half, "what of panda", "the bamboo", "the bamboo " * 9)).all()


@pytest.mark.parametrize(("family", "bias"), [("bert", -3), ("electra", -3), ("deberta-v2", 0)])
def test_only_trunks_that_add_their_mask_get_a_bias(family: str, bias: float) -> None:
    model = build_cross_encoder(tiny(family), max_length=64, device="cpu").eval()

    assert model[1].cross_bias == bias
    text = model.predict([("what of panda", "the bamboo")], activation_fn=torch.nn.Identity())
    beside = model.predict(
        [("what of panda", "the bamboo"), ("paris", "the capital " * 9)], activation_fn=torch.nn.Identity()
    )
    assert np.isfinite(beside).all()
    np.testing.assert_allclose(beside[:1], text, atol=1e-4)


def test_a_copy_has_a_trunk_of_its_own() -> None:
    model = tiny_model().eval()
    copied = copy.deepcopy(model)
    before = token_vectors(model, "what of panda", "the bamboo")
    with torch.no_grad():
        for parameter in copied[0].parameters():
            parameter.zero_()

    torch.testing.assert_close(token_vectors(model, "what of panda", "the bamboo"), before)
    assert not token_vectors(copied, "what of panda", "the bamboo").any()


def test_without_a_bias_the_trunk_is_as_it_was() -> None:
    model = build_cross_encoder(tiny("bert"), device="cpu", cross_bias=0.0).eval()
    trunk = BertModel.from_pretrained(tiny("bert")).eval()
    tokens = model[0].tokenizer(["what of panda"], ["the bamboo"], return_tensors="pt")

    with torch.inference_mode():
        expected = trunk(**tokens).last_hidden_state[0]

    torch.testing.assert_close(token_vectors(model, "what of panda", "the bamboo"), expected)


def test_a_saved_model_is_loaded_without_remote_code(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model[1].linear.weight.normal_()
        model[1].shift.fill_(2.0)
    pairs = [("what of panda", "the bamboo"), ("paris", "the capital " * 40)]
    expected = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)

    loaded = load_cross_encoder(tmp_path / "model", device="cpu")

    found = loaded.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert loaded.num_labels == 1
    assert loaded[1].cross_bias == model[1].cross_bias != 0
    (tmp_path / "model" / "1_LateInteractionScore" / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="could not be loaded"):
        load_cross_encoder(tmp_path / "model", device="cpu")


# --- measuring and calibrating ---


def test_ndcg_counts_ties_against_the_model() -> None:
    assert ndcg([3.0, 2.0, 1.0], [1, 0, 0]) == pytest.approx(1.0)
    assert ndcg([1.0, 1.0], [1, 0]) == pytest.approx(1 / np.log2(3))
    assert ndcg([1.0, 2.0, 3.0], [0.7, 0.2, 0.1]) < ndcg([3.0, 2.0, 1.0], [0.7, 0.2, 0.1])


# --- the loop ---


def test_settings_are_checked() -> None:
    for wrong in ({}, {"steps": 1, "minutes": 1.0}, {"steps": 0}, {"minutes": -1.0}):
        with pytest.raises(ConfigurationError):
            TrainingConfig(**wrong)  # type: ignore[arg-type]


def test_an_epoch_has_every_group_once() -> None:
    groups = riddles(101, 0)

    seen = [id(group) for batch in batches(groups, 8, 0, 0) for group in batch]

    assert sorted(seen) == sorted(map(id, groups))
    assert seen != [id(group) for batch in batches(groups, 8, 0, 1) for group in batch]


def test_scores_do_not_depend_on_micro_batches() -> None:
    model = tiny_model()
    queries, texts = ["panda"] * 5, ["the " * n for n in (1, 20, 3, 9, 14)]
    scores = [
        Scorer(model, max_length=32, micro_batch=size, bf16=False, device="cpu")(queries, texts).detach()
        for size in (1, 2, 8)
    ]

    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_training_improves_and_can_be_repeated(tmp_path: Path) -> None:
    model = tiny_model()
    result = fit(model, riddles(160, 0), riddles(40, 1), config(), tmp_path / "a")

    assert result.steps == 60
    assert max(result.measures) > result.measures[0] + 0.1
    assert result.best == max(result.measures)
    scorer = Scorer(model, max_length=32, micro_batch=32, bf16=False, device="cpu")
    assert evaluate_groups(scorer, riddles(40, 1))[0] == pytest.approx(result.best, abs=1e-6)

    again = tiny_model()
    fit(again, riddles(160, 0), riddles(40, 1), config(), tmp_path / "b")
    for one, other in zip(weights(model), weights(again), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    groups = riddles(96, 0)
    whole = tiny_model()
    fit(whole, groups, [], config(steps=40), tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(news: str, share: float) -> None:
        if news.startswith("step 20:"):
            raise Killed

    with pytest.raises(Killed):
        fit(tiny_model(), groups, [], config(steps=40), tmp_path / "cut", kill)
    resumed = tiny_model()
    seen: list[str] = []
    result = fit(resumed, groups, [], config(steps=40), tmp_path / "cut", lambda news, share: seen.append(news))

    assert result.steps == 40
    assert len(seen) == 2  # steps 20 and 40: the checkpoint is of step 19
    for one, other in zip(weights(whole), weights(resumed), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with pytest.raises(ConfigurationError, match="other settings"):
        fit(tiny_model(), groups, [], config(steps=41), tmp_path / "cut")


def test_time_budget_is_kept(tmp_path: Path) -> None:
    result = fit(tiny_model(), riddles(32, 0), [], config(steps=None, minutes=0.02), tmp_path)

    assert result.steps > 0
    assert 1.0 < result.seconds < 5.0


# --- from data to a model ---


def test_train_makes_a_model_that_loads(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        for query, answer in RIDDLES.items():
            rows.append({"query": f"{number} what of {query}", "passage": f"{number} the {answer}", "label": 1})
    path = write(tmp_path / "pairs.jsonl", *map(json.dumps, rows))
    news: list[float] = []

    trained = train(
        path, tmp_path / "model", trunk=tiny("bert"), steps=6, max_length=32, device="cpu",
        progress=lambda stage, share: news.append(share),
    )  # fmt: skip

    assert trained.result.steps == 6
    assert trained.conversion is not None
    assert trained.conversion.weights == "int8"
    assert trained.ece_after is not None
    assert news
    loaded = load_cross_encoder(tmp_path / "model", device="cpu")
    assert float(loaded[1].scale) == pytest.approx(trained.scale)
    assert np.isfinite(loaded.predict([("panda", "the bamboo")], show_progress_bar=False)).all()
    assert (tmp_path / "model" / "onnx" / "model.onnx").is_file()
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert facts["result"]["steps"] == 6

    with pytest.raises(ConfigurationError, match="overwrite"):
        train(path, tmp_path / "model", trunk=tiny("bert"), steps=1)
    again = train(
        path,
        tmp_path / "second",
        trunk=tmp_path / "model",
        steps=1,
        max_length=32,
        device="cpu",
        export=False,
    )
    assert again.conversion is None
    tokenizer = loaded[0].tokenizer
    words = tokenizer("the bamboo", add_special_tokens=False)["input_ids"]
    assert (loaded[1].idf[words] > 0).all()
    assert not loaded[1].idf[tokenizer.all_special_ids].any()
    assert torch.equal(load_cross_encoder(again.path, device="cpu")[1].idf, loaded[1].idf)


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files")
def test_a_trained_model_is_true_and_readable(tmp_path: Path) -> None:
    rows = [
        {"query": f"{number} what of {query}", "passage": f"{number} the {text}", "label": int(text == answer)}
        for number in range(30)
        for query, answer in RIDDLES.items()
        for text in RIDDLES.values()
    ]
    path = write(tmp_path / "pairs.jsonl", *map(json.dumps, rows))
    out = tmp_path / "model"
    trained = train(path, out, trunk=tiny("bert"), steps=2, mine=False, export=False, max_length=32, device="cpu")

    for file in [out, *out.rglob("*")]:
        assert file.stat().st_mode & 0o044 == 0o044, file
    dev = evaluation_groups(split_pairs(read_data(path).pairs)[1])
    assert trained.held_out == len(dev)
    with Reranker() as bundled:
        logits = [bundled.logits(group.query, group.passages) for group in dev]
    expected = np.mean([ndcg(values, group.gains) for values, group in zip(logits, dev, strict=True)])
    assert trained.bundled == pytest.approx(expected)
    card = (out / "README.md").read_text()
    assert f"On the same queries rerank-plugins/minilm-l6 has nDCG@10 {expected:.4f}." in card
    assert (f"**{len(dev)} held-out queries are few" in card) == (len(dev) < 50)

    # The model knows these judgements, and no others.
    other = write(tmp_path / "other.jsonl", *map(json.dumps, rows[1:]))
    tested = write(tmp_path / "tested.jsonl", *map(json.dumps, [{**row, "split": "test"} for row in rows]))
    assert [is_trained_on(out, file) for file in (path, other, tested, tmp_path)] == [True, False, False, True]
    assert not is_trained_on(tmp_path, path)


def test_minutes_are_those_of_the_whole_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        *(json.dumps({"query": f"q {n}", "positive": f"good {n}", "negative": "bad"}) for n in range(30)),
    )
    budgets = []

    class Caught(Exception):
        pass

    def stop(*arguments: object, budget_s: float | None) -> None:
        budgets.append(budget_s)
        raise Caught

    monkeypatch.setattr(api, "fit", stop)
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr(api, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    for settings in ({"minutes": 10.0}, {"minutes": 10.0, "export": False}, {"minutes": 1.0}, {"steps": 1}):
        with pytest.raises(Caught):
            train(path, tmp_path / "model", trunk=tiny("bert"), mine=False, device="cpu", **settings)  # type: ignore[arg-type]
    # What went before took 100 s, the export is expected to take 30; a quarter is for training in any case.
    assert budgets == [470.0, 500.0, 15.0, None]


def test_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        *(json.dumps({"query": f"q{n}", "passage": "p", "label": 0}) for n in range(5)),
    )

    with pytest.raises(InputError, match="relevant"):
        train(path, tmp_path / "out", trunk=tiny("bert"), steps=1)


def test_the_bundled_model_can_be_trained_further(tmp_path: Path) -> None:
    model = from_graph(bundled_directory() / "model.onnx")
    texts = ["git revert undoes a commit", "git add stages files", "a fox jumps over a dog"]
    got = model.predict([("how do I undo a commit", text) for text in texts], activation_fn=torch.nn.Identity())
    assert np.abs(got - Reranker(precision="fp32").logits("how do I undo a commit", texts)).max() < 1e-3
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "".join(
            json.dumps({"query": f"what of {query}", "passage": f"the {answer}", "label": int(answer == right)}) + "\n"
            for query, right in RIDDLES.items()
            for answer in RIDDLES.values()
        )
    )
    trained = train(data, tmp_path / "mine", trunk="bundled", steps=1, mine=False, export=False)
    assert "base_model" not in (trained.path / "README.md").read_text()
    # A few pairs say less of how rare words are than what the bundled model knows.
    assert torch.equal(load_cross_encoder(trained.path, device="cpu")[1].idf, model[1].idf)
    assert Reranker(trained.path, backend="torch").rank("what of paris", ["the bamboo", "the capital"]).items


def test_what_is_learned_from_rounded_weights_outlives_rounding_them_again() -> None:
    graph = bundled_directory() / "model.onnx"
    rounded, drawn = from_graph(graph), from_graph(graph, seed=3)
    for number in (0, 5):
        here, there = (model[0].auto_model.encoder.layer[number].output.dense.weight for model in (rounded, drawn))
        step = here.abs().amax(1, keepdim=True) / 127
        integers = (here / step).round()
        # But for the few at half a step, where the last bit of a float decides.
        assert ((there / step).round() != integers).float().mean() < 1e-4
        # Training moves every weight by a fifth of a step.
        assert torch.equal((here / step + 0.2).round(), integers)
        moved = (there / step + 0.2).round() - integers
        assert moved.mean().item() == pytest.approx(0.2, abs=0.01)


def test_a_graph_without_our_head_is_refused(tmp_path: Path) -> None:
    convert(tiny("bert"), tmp_path, int8=True)
    with pytest.raises(ModelLoadError, match="no late-interaction head"):
        from_graph(tmp_path / "model.onnx")
