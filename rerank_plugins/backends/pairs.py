"""Pairs as token ids. The tokenizer is set up once and never touched again, so threads cannot disturb each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from rerank_plugins._texts import scorable
from rerank_plugins.backends._prompts import Render
from rerank_plugins.errors import ConfigurationError, QueryError

__all__ = ["EncodedPair", "PairEncoder"]

_AT_ONCE = 256
"""Texts that the tokenizer takes at once: what it gives for a text takes ten times the memory of the token ids."""
_CHARACTERS_PER_TOKEN = 8
"""How much of a long text is tokenised at first; more where it gives too few tokens."""
_MARGIN = 64
"""Tokens beyond the maximum length that must be there too: the last ones before a cut may be others without it."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of one pair, with special tokens, cut to the maximum length."""

    ids: NDArray[np.int32]
    type_ids: NDArray[np.int32]
    truncated: bool


class PairEncoder:
    """Tokenises (query, text) pairs; only the text is ever cut, at its end.

    Args:
        tokenizer: Raw tokenizer. Its truncation and padding are switched off here, once; do not share it.
        limit: Most tokens that the model takes.
        max_length: Most tokens a pair may have; None means `limit`.
        pad_id: Token id of padding.
        pad_type_id: Segment id of padding.
        pad_left: Pad before the tokens instead of after them (causal models).
        render: Turns (query, text) pairs into prompts, for models that read a chat template instead of a pair.
        suffix_ids: Tokens that end every rendered prompt and that truncation must keep.
        instruction: Put before the query (pairs) or given to `render`.

    Raises:
        ConfigurationError: `max_length` is more than `limit`, or leaves no room for a pair.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        limit: int,
        max_length: int | None = None,
        pad_id: int = 0,
        pad_type_id: int = 0,
        pad_left: bool = False,
        render: Render | None = None,
        suffix_ids: Sequence[int] = (),
        instruction: str | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.limit = limit
        self.pad_id = pad_id
        self.pad_type_id = pad_type_id
        self.pad_left = pad_left
        self.render = render
        self.suffix_ids = np.asarray(suffix_ids, dtype=np.int32)
        self.default_instruction = instruction
        self._configure(max_length, None, False)

    def _configure(self, max_length: int | None, instruction: str | None, truncate_query: bool) -> None:
        special = self.tokenizer.num_special_tokens_to_add(True) if self.render is None else len(self.suffix_ids)
        if max_length is not None and not special + 2 <= max_length <= self.limit:
            raise ConfigurationError(
                f"max_length must be between {special + 2} (special tokens, one of the query, one of the text) and "
                f"{self.limit} (the most that this model takes); got {max_length}. Leave it at None for the most."
            )
        self.max_length = self.limit if max_length is None else max_length
        self.instruction = self.default_instruction if instruction is None else instruction
        self.query_limit = (self.max_length - special) // 2 if truncate_query else None

    def configured(
        self, *, max_length: int | None, instruction: str | None, truncate_query: bool = False
    ) -> PairEncoder:
        """This encoder with other settings and the same tokenizer.

        With `truncate_query`, a query of more than half of the maximum length is cut to half of it: the same beside
        every text, so that their scores can be compared.
        """
        other = copy.copy(self)
        other._configure(max_length, instruction, truncate_query)
        return other

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        """Tokenise each pair once.

        Raises:
            QueryError: A query is so long that no token of the text fits beside it.
        """
        short = self._beginnings({part for pair in pairs for part in pair})
        pairs = [(short[query], short[text]) for query, text in pairs]
        if self.query_limit is not None:
            cut = {query: self._cut_query(query, self.query_limit) for query in {query for query, _ in pairs}}
            encoded = self._encode([(cut[query], text) for query, text in pairs])
            return [
                replace(pair, truncated=pair.truncated or cut[query] != query)
                for pair, (query, _) in zip(encoded, pairs, strict=True)
            ]
        return self._encode(pairs)

    def _beginnings(self, texts: Iterable[str]) -> dict[str, str]:
        """Of each text so much that its tokens within the maximum length are those of all of it."""
        whole = {text: scorable(text) for text in texts}
        result: dict[str, str] = {}
        wanted = self.max_length + _MARGIN
        size = _CHARACTERS_PER_TOKEN * wanted
        while True:
            result |= {text: clean for text, clean in whole.items() if len(clean) <= size}
            whole = {text: clean for text, clean in whole.items() if len(clean) > size}
            if not whole:
                return result
            heads = {text: _head(clean, size) for text, clean in whole.items()}
            # Without white space to cut at, a cut one character later must give the same.
            again = {text: clean[: size + 1] for text, clean in whole.items() if len(heads[text]) == size}
            ids = dict(zip(heads, self._text_ids(heads.values()), strict=True))
            ids_again = dict(zip(again, self._text_ids(again.values()), strict=True))
            for text, head in heads.items():
                kept = ids[text][: self.max_length]
                if len(ids[text]) >= wanted and ids_again.get(text, kept)[: self.max_length] == kept:
                    result[text] = head
                    del whole[text]
            size *= 4

    def _text_ids(self, texts: Iterable[str]) -> Iterator[list[int]]:
        encode = partial(self.tokenizer.encode_batch_fast, add_special_tokens=False)
        return (encoding.ids for encoding in _in_parts(encode, list(texts)))

    def _cut_query(self, query: str, limit: int) -> str:
        (offsets,) = self.offsets([query])
        return query if len(offsets) <= limit else query[: offsets[limit - 1][1]]

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        if self.render is not None:
            return self._encode_rendered(pairs)
        prefix = self.instruction or ""
        texts = [(scorable(prefix) + query, text) for query, text in pairs]
        encodings = _in_parts(self.tokenizer.encode_batch_fast, texts)
        return [self._cut_pair(encoding, pair[0]) for encoding, pair in zip(encodings, pairs, strict=True)]

    def _cut_pair(self, encoding: Encoding, query: str) -> EncodedPair:
        ids = np.asarray(encoding.ids, dtype=np.int32)
        types = np.asarray(encoding.type_ids, dtype=np.int32)
        excess = len(ids) - self.max_length
        if excess <= 0:
            return EncodedPair(ids, types, False)
        sequence = encoding.sequence_ids
        text_positions = [i for i, which in enumerate(sequence) if which == 1]
        if len(text_positions) <= excess:
            raise _query_too_long(query, len(ids) - len(text_positions), self.max_length)
        keep = np.ones(len(ids), dtype=np.bool_)
        keep[text_positions[-excess:]] = False
        return EncodedPair(ids[keep], types[keep], True)

    def _encode_rendered(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        assert self.render is not None
        prompts = self.render(pairs, self.instruction)
        # The template writes its special tokens itself.
        encodings = _in_parts(partial(self.tokenizer.encode_batch_fast, add_special_tokens=False), prompts)
        result = []
        fixed: dict[str, int] = {}
        for (query, _), encoding in zip(pairs, encodings, strict=True):
            ids = np.asarray(encoding.ids, dtype=np.int32)
            truncated = len(ids) > self.max_length
            if truncated:
                if query not in fixed:
                    (bare,) = self.render([(query, "")], self.instruction)
                    fixed[query] = len(self.tokenizer.encode(bare, add_special_tokens=False).ids)
                if fixed[query] >= self.max_length:
                    raise _query_too_long(query, fixed[query], self.max_length)
                ids = np.concatenate([ids[: self.max_length - len(self.suffix_ids)], self.suffix_ids])
            result.append(EncodedPair(ids, np.zeros(len(ids), dtype=np.int32), truncated))
        return result

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Start and end character of each token of each text, without special tokens."""
        encode = partial(self.tokenizer.encode_batch, add_special_tokens=False)
        return [list(encoding.offsets) for encoding in _in_parts(encode, [scorable(text) for text in texts])]


def _head(text: str, size: int) -> str:
    """At most `size` characters, cut before white space if there is some in their second half."""
    before = text[:size].rsplit(None, 1)[:-1]
    return before[0] if before and len(before[0]) >= size // 2 else text[:size]


def _in_parts(encode: Callable[[list[Any]], list[Encoding]], texts: list[Any]) -> Iterator[Encoding]:
    for start in range(0, len(texts), _AT_ONCE):
        yield from encode(texts[start : start + _AT_ONCE])


def _query_too_long(query: str, fixed: int, max_length: int) -> QueryError:
    return QueryError(
        f"The query leaves no room for a text: it takes {fixed} tokens or more with the special ones, and the maximum "
        f"length is {max_length}. Shorten the query, let it be cut by truncate_query=True, raise max_length, or use a "
        f"model that takes more. The query begins: {query[:80]!r}"
    )
