"""Where sentences begin and end, in many scripts and in texts that have none."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_plugins._texts import is_blank
from rerank_plugins.sentences import split_sentences

SPLIT = [
    ["Git is fast.", "It is free!", "Is it small?", "Yes…", "So it seems"],
    ["Dr. Smith met Mrs. Jones at St. Mary's.", "They talked."],
    ["See Fig. 3 and p. 12 of vol. 2.", "It is on Sept. 3."],
    ["He said no.", "Then he left."],
    ["J. K. Rowling wrote it, e.g. in 1999.", "It sold well."],
    ["It happened in the U.S.", "The trial took years."],
    ["The U.S. Senate met at 5 p.m. Eastern time.", "Pi is 3.14."],
    ['"Stop!" he said.', '"I will not."', "She (Ann) laughed.", "(All did.)"],
    ["“Really?”", "‘No.’", "«Oui.»", "So be it."],
    ["What?! really?", "Wait...", "What?"],
    ["Use git v2.40.1 or node.js.", "Ask www.example.org for more."],
    ["Git is free software.", "git revert undoes a commit.", "iPhones are sold since 2007.", "npm is newer."],
    ["Acme Corp. said so, approx. at 5 a.m. in the U.S. state.", "Then..., i.e. later?! he left."],
    ["so it is, e.g. here.", "the u.s. does it!", "dr. smith (of no. 3) did too."],
    ["大熊猫是一种熊。", "它生活在中国！", "真的吗？", "是的"],
    ["他说：“你好。”", "然后走了。"],
    ["「はい。」と言った。", "次の文です。"],
    ["圆周率是３．１４。", "好．"],
    ["नमस्ते।", "कैसे हो?"],
    ["مرحبا بك؟", "نعم."],
    ["Привет, мир.", "Как дела?"],
    ["Ça va M. Dupont, n'est-ce pas ?", "Oui !"],
    ["Es kostet z.B. Geld.", "Vgl. Kapitel 3."],
]


@pytest.mark.parametrize("sentences", SPLIT, ids=lambda parts: parts[0][:20])
def test_sentences_of_many_scripts(sentences: list[str]) -> None:
    for blank in ("" if ord(sentences[0][0]) > 0x3000 else " ", "\n", "  \t"):
        text = blank + blank.join(sentences) + blank
        assert [text[start:end] for start, end in split_sentences(text)] == sentences


def parts(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


def test_lines() -> None:
    wrapped = "This is a paragraph whose lines have hard ends, which\nis how PDFs and e-mails have it. Its\nend.\n"
    assert parts(wrapped) == [
        "This is a paragraph whose lines have hard ends, which\nis how PDFs and e-mails have it.",
        "Its\nend.",
    ]
    assert parts("Introduction\nGit is fast.\r\n\r\nit goes on") == ["Introduction", "Git is fast.", "it goes on"]
    assert parts("1. Open it\n2. Close it. Then wait.\n- done\n* gone\n(a) A. One\n| x | y |") == [
        "1. Open it",
        "2. Close it.",
        "Then wait.",
        "- done",
        "* gone",
        "(a) A. One",
        "| x | y |",
    ]
    assert parts("a = 1\n    b = 2\n") == ["a = 1\n    b = 2"]


def test_signs_alone_and_blanks_are_no_sentences() -> None:
    for text in ("", " \n\u200b", "\u00a0"):
        assert parts(text) == []
    assert parts("...") == ["..."]
    assert parts("It is so. *** Next one. \U0001f600 \u2014") == ["It is so.", "*** Next one. \U0001f600 \u2014"]


def test_what_has_no_full_stops_is_cut_at_clauses_words_or_characters() -> None:
    words = parts("so it goes, and on, " * 200)
    assert len(words) == 4
    assert all(part.endswith(",") and len(part) <= 1000 for part in words)
    assert [len(part) for part in parts("x" * 2500)] == [1000, 1000, 500]
    assert [len(part) for part in parts("字" * 700)] == [333, 333, 34]
    assert [len(part) for part in parts("x\ud800" * 750)] == [1000, 500]


@given(st.text(alphabet=st.sampled_from('aA1 .。!?\n\r\t-"」’…,，字と\u200b\ud83d\ude00🙂'), max_size=200))
def test_every_visible_character_is_in_one_sentence(text: str) -> None:
    places = split_sentences(text)
    covered = 0
    for start, end in places:
        assert covered <= start < end <= len(text)
        assert is_blank(text[covered:start])
        assert text[start:end] == text[start:end].strip()
        assert not is_blank(text[start:end])
        covered = end
    assert is_blank(text[covered:])


@settings(max_examples=30)
@given(st.text(max_size=100))
def test_any_text(text: str) -> None:
    joined = "".join(parts(text))
    visible = [character for character in text if unicodedata.category(character)[0] in "LNPS"]
    assert [character for character in joined if unicodedata.category(character)[0] in "LNPS"] == visible


def test_the_work_is_linear() -> None:
    start = time.perf_counter()
    for unit in ("A sentence. ", "x", "字", ".", "\n", " ", "“", "a.", "1. ", "\n1.", "( "):
        split_sentences(unit * (200_000 // len(unit)))
    assert time.perf_counter() - start < 60
