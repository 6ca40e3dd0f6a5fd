from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from checkpoints import QUERY, TEXTS, _raw_tokenizer
from tokenizers import Tokenizer

from rerank_plugins.backends.pairs import PairEncoder
from rerank_plugins.errors import InputError

KINDS = ("wordpiece", "unigram", "bpe-roberta")
MAX_LENGTH = 24


def render(pairs: Sequence[tuple[str, str]], instruction: str | None) -> list[str]:
    begin = instruction or "Judge."
    return [f"{begin}\n<Query>: {query}\n<Document>: {text}<|end|>\nyes or no?" for query, text in pairs]


def encoder(kind: str, rendered: bool = False) -> PairEncoder:
    tokenizer = Tokenizer.from_str(_raw_tokenizer(kind).to_str())
    if not rendered:
        return PairEncoder(tokenizer, limit=512, max_length=MAX_LENGTH)
    suffix = tokenizer.encode("<|end|>\nyes or no?", add_special_tokens=False).ids[-4:]
    return PairEncoder(tokenizer, limit=512, max_length=80, render=render, suffix_ids=suffix)


def spied(encoder: PairEncoder) -> list[int]:
    """The characters of each text that the tokenizer is given from now on."""
    seen: list[int] = []
    real = encoder.tokenizer

    class Spy:
        def encode_batch_fast(self, texts: list[Any], **kwargs: Any) -> Any:
            seen.extend(sum(map(len, text)) if isinstance(text, tuple) else len(text) for text in texts)
            return real.encode_batch_fast(texts, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    encoder.tokenizer = Spy()  # type: ignore[assignment]
    return seen


def long_texts() -> list[str]:
    chance = random.Random(7)
    words = " ".join(TEXTS).split()
    blanks = (" ", "  ", "\n", "\n\n", "\t", "\u3000", " \u200b ", " " * 40)
    texts = ["".join(chance.choice(words) + chance.choice(blanks) for _ in range(3000)) for _ in range(6)]
    texts += ["".join(chance.choice(words) for _ in range(3000)) for _ in range(4)]
    texts += [
        TEXTS[2] * 500,
        "é" * 9000,
        "e\u0301" * 9000,
        "-=" * 4000,
        "aaa" * 5000,
        "." * 20_000,
        "a" * 20_000 + " bear",
    ]
    texts += [
        " " * 20_000 + "panda",
        "\n" * 5000 + "a b c " * 2000,
        "short " + "汉" * 9000,
        "\ud83d" * 9000,
        "🐼" * 5000,
    ]
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_has_the_tokens_that_all_of_it_has(kind: str) -> None:
    made = encoder(kind)
    for text in long_texts():
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        whole = made.tokenizer.encode(QUERY, clean)
        excess = max(0, len(whole.ids) - MAX_LENGTH)
        of_text = [i for i, which in enumerate(whole.sequence_ids) if which == 1]
        dropped = set(of_text[len(of_text) - excess :])
        (pair,) = made.encode([(QUERY, text)])
        assert pair.ids.tolist() == [id for i, id in enumerate(whole.ids) if i not in dropped], text[:40]
        assert pair.truncated == (excess > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_in_a_prompt_has_the_tokens_that_all_of_it_has(kind: str) -> None:
    made = encoder(kind, rendered=True)
    for text in long_texts():
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        whole = made.tokenizer.encode(render([(QUERY, clean)], None)[0], add_special_tokens=False).ids
        (pair,) = made.encode([(QUERY, text)])
        kept = whole[: 80 - len(made.suffix_ids)] + made.suffix_ids.tolist() if len(whole) > 80 else whole
        assert pair.ids.tolist() == kept, text[:40]


@pytest.mark.parametrize("make", [lambda: encoder("wordpiece"), lambda: encoder("unigram", rendered=True)])
def test_of_a_huge_text_only_the_beginning_is_tokenised(make: Callable[[], PairEncoder]) -> None:
    made = make()
    seen = spied(made)
    made.encode([(QUERY, "pandas eat bamboo " * 1_000_000), (QUERY, TEXTS[2] * 1_000_000)])
    assert sum(seen) < 50_000


def test_a_huge_query_is_refused_or_cut_by_its_beginning() -> None:
    query = "what do pandas eat " * 1_000_000
    made = encoder("wordpiece")
    seen = spied(made)
    with pytest.raises(InputError, match="leaves no room"):
        made.encode([(query, "bamboo")])
    cut = made.configured(max_length=MAX_LENGTH, instruction=None, truncate_query=True)
    (pair,) = cut.encode([(query, "bamboo")])
    (whole,) = cut.encode([(query[:4000], "bamboo")])
    assert pair.ids.tolist() == whole.ids.tolist()
    assert pair.truncated
    assert sum(seen) < 50_000
