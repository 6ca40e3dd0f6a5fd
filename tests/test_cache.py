from __future__ import annotations

import asyncio
import copy
import hashlib
import os
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tiny

from rerank_plugins import Reranker
from rerank_plugins.backends._files import ModelFiles
from rerank_plugins.cache import FileCache, MemoryCache, _database, _scored
from rerank_plugins.errors import ConfigurationError, ScoringError
from rerank_plugins.testing import FakeBackend, word_overlap

TEXTS = ["a red fox", "blue whale", "", "a red fox", "  ", "red \ud800 surrogate", "fox fox fox"]
LONG = ["the quick brown fox jumps over the lazy dog. " * 4, "short", "pandas eat bamboo in china. " * 5]


def fake(**keywords: Any) -> FakeBackend:
    return FakeBackend(**{"fingerprint": "weights-1", **keywords})


def scored_texts(backend: FakeBackend) -> list[str]:
    return [text for call in backend.calls for _, text in call]


def digest(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def stores(tmp_path: Path) -> dict[str, Callable[[], Any]]:
    from langchain_classic.storage import LocalFileStore
    from langchain_core.stores import InMemoryByteStore

    return {
        "int": lambda: 1000,
        "memory": lambda: MemoryCache(1000),
        "str": lambda: str(tmp_path / "deep" / "scores.sqlite"),
        "path": lambda: tmp_path / "scores.sqlite",
        "file": lambda: FileCache(tmp_path / "file.sqlite"),
        "langchain-memory": InMemoryByteStore,
        "langchain-file": lambda: LocalFileStore(tmp_path / "store"),
    }


STORES = ("int", "memory", "str", "path", "file", "langchain-memory", "langchain-file")


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORES)
def test_a_pair_is_scored_once_and_gives_what_it_gave(kind: str, tmp_path: Path) -> None:
    plain = Reranker(fake())
    backend = fake()
    cached = Reranker(backend, cache=stores(tmp_path)[kind]())
    for query, texts in [("red fox", TEXTS), ("red fox", TEXTS[::-1]), ("red fox", ["new", *TEXTS]), ("whale", TEXTS)]:
        assert cached.rank(query, texts) == plain.rank(query, texts)
        assert cached.logits(query, texts).tolist() == plain.logits(query, texts).tolist()
    distinct = {text for text in TEXTS if text.strip()}
    assert scored_texts(backend) == [*dict.fromkeys(t for t in TEXTS if t.strip()), "new", *scored_texts(backend)[-4:]]
    assert set(scored_texts(backend)[-4:]) == distinct


def test_nothing_is_cached_unless_asked() -> None:
    backend = fake()
    reranker = Reranker(backend)
    reranker.logits("q", ["a"])
    reranker.logits("q", ["a"])
    assert len(backend.calls) == 2


def test_query_and_text_are_told_apart_wherever_the_border_is() -> None:
    backend = fake(logit=lambda query, text: float(len(query)))
    cached = Reranker(backend, cache=100)
    pairs = [("ab", "c"), ("a", "bc"), ("a", "b"), ("b", "a"), ("a\ud800", "x"), ("a\ud801", "x"), ("a\ufffd", "x")]
    for query, text in pairs * 2:
        assert cached.logits(query, [text]).tolist() == [len(query)]
    assert len(backend.calls) == len(pairs)


def test_label_scale_and_calibration_need_no_new_scores() -> None:
    def logits(query: str, text: str) -> list[float]:
        return [float(len(text)), 1.0, word_overlap(query, text)]

    cache = MemoryCache()
    backend = fake(logit=logits, labels=("contradiction", "neutral", "entailment"))
    for i, keywords in enumerate(
        [
            {"label": "entailment"},
            {"label": 0},
            {"label": 1, "scale": "logit"},
            {"label": 1, "calibration": {"slope": 2.0, "intercept": -1.0}},
        ]
    ):
        plain = Reranker(fake(logit=logits, labels=backend.labels), **keywords)
        cached = Reranker(backend, cache=cache, **keywords)
        assert cached.rank("red fox", TEXTS, top_n=i + 1) == plain.rank("red fox", TEXTS, top_n=i + 1)
    assert len(backend.calls) == 1


def test_probabilities_stay_probabilities() -> None:
    backend = fake(logit=lambda query, text: 1 / (1 + len(text)), emits="probability")
    cached, plain = Reranker(backend, cache=10), Reranker(backend)
    assert [cached.rank("q", TEXTS) for _ in range(2)] == [plain.rank("q", TEXTS)] * 2


@pytest.mark.parametrize("keywords", [{}, {"passage_length": 16, "passage_overlap": 4}, {"max_length": 24}])
def test_the_bundled_model_gives_the_same_from_a_file_without_tokenising(
    keywords: dict[str, Any], tmp_path: Path
) -> None:
    reranker = Reranker(**keywords)
    plain = reranker.rank("what do pandas eat", [*LONG, *TEXTS])
    cached = Reranker(**keywords, cache=tmp_path / "scores.sqlite")
    assert cached.rank("what do pandas eat", [*LONG, *TEXTS]) == plain
    again = Reranker(**keywords, cache=tmp_path / "scores.sqlite").prepare()
    again._loaded().encoder = None  # type: ignore[attr-defined]
    found = again.rank("what do pandas eat", [*TEXTS, *LONG])
    by_text = {item.text: (item.logit, item.score, item.truncated, item.spans) for item in plain}
    assert all(by_text[item.text] == (item.logit, item.score, item.truncated, item.spans) for item in found)
    assert any(item.truncated for item in found) is ("max_length" in keywords)


def test_a_score_that_is_not_finite_is_not_kept() -> None:
    values = iter([float("nan"), 1.0])
    cached = Reranker(fake(logit=lambda query, text: next(values)), cache=10)
    with pytest.raises(ScoringError):
        cached.logits("q", ["a"])
    assert cached.logits("q", ["a"]).tolist() == [1.0]


# -- what shares and what does not -------------------------------------------------------------------------------------


def test_settings_that_decide_a_logit_never_share() -> None:
    cache = MemoryCache()
    engines = [Reranker(backend=name).prepare() for name in ("onnx", "openvino")]
    made: list[dict[str, Any]] = [
        {"backend": "onnx"},
        {"backend": "onnx", "max_length": 40},
        {"backend": "onnx", "max_length": 41},
        {"backend": "onnx", "instruction": "Find animals. "},
        {"backend": "onnx", "instruction": ""},
        {"backend": "onnx", "passage_length": 16},
        {"backend": "openvino", "precision": "fp32"},
    ]
    for n, keywords in enumerate(made, start=1):
        found = Reranker(**keywords, cache=cache).logits("what do pandas eat", LONG)
        assert len(cache) == n * len(LONG)
        assert found == pytest.approx(Reranker(**keywords).logits("what do pandas eat", LONG), abs=1e-4)
    assert {engine.backend_name for engine in engines} == {"onnx", "openvino"}


def test_another_fingerprint_name_or_precision_never_shares() -> None:
    cache = MemoryCache()
    for n, (name, precision, fingerprint) in enumerate(
        [("x", "fp32", "1"), ("y", "fp32", "1"), ("x", "bf16", "1"), ("x", "fp32", "2")], start=1
    ):
        backend = fake(logit=lambda query, text, n=n: float(n), fingerprint=fingerprint)
        backend.name, backend.precision = name, precision
        assert Reranker(backend, cache=cache).logits("q", ["a"]).tolist() == [n]


def test_fake_backends_do_not_share_unless_told() -> None:
    cache = MemoryCache()
    assert Reranker(FakeBackend(lambda query, text: 1.0), cache=cache).logits("q", ["a"]).tolist() == [1]
    assert Reranker(FakeBackend(lambda query, text: 2.0), cache=cache).logits("q", ["a"]).tolist() == [2]


def test_a_checkpoint_that_is_replaced_or_in_another_precision_never_shares(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    cache = MemoryCache()
    keywords: dict[str, Any] = {"backend": "torch", "device": "cpu", "cache": cache}
    directory = tmp_path / "model"
    shutil.copytree(tiny("bert"), directory)
    texts = ["pandas eat bamboo", "paris"]
    first = Reranker(directory, **keywords).logits("pandas", texts)
    assert Reranker(tiny("bert"), **keywords).logits("pandas", texts).tolist() == first.tolist()
    assert len(cache) == 2  # the same content in another directory is the same model
    half = Reranker(directory, **keywords, precision="bf16").logits("pandas", texts)
    assert len(cache) == 4
    assert not np.array_equal(half, first)
    held = Reranker(directory, **keywords)
    held._loaded()
    weights = load_file(directory / "model.safetensors")
    save_file({name: 2 * values for name, values in weights.items()}, tmp_path / "new", metadata={"format": "pt"})
    os.replace(tmp_path / "new", directory / "model.safetensors")
    assert held.logits("pandas", texts).tolist() == first.tolist()  # still the weights that were loaded
    del held
    second = Reranker(directory, **keywords).logits("pandas", texts)
    assert not np.array_equal(first, second)


def model_directory(root: Path) -> Path:
    (root / "onnx").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "other.json"):
        (root / name).write_text("{}")
    for name in ("model.safetensors", "modeling.py", "README.md", "onnx/model.onnx", "onnx/weights", "onnx/x.onnx"):
        (root / name).write_text(name)
    return root


@pytest.mark.parametrize(
    ("name", "torch", "graph"),
    [
        ("config.json", True, True),
        ("tokenizer.json", True, True),
        ("other.json", True, False),
        ("model.safetensors", True, False),
        ("modeling.py", True, False),
        ("onnx/model.onnx", False, True),
        ("onnx/weights", False, True),
        ("onnx/x.onnx", False, False),
        ("README.md", False, False),
    ],
)
def test_a_fingerprint_is_of_the_files_that_an_engine_reads(
    name: str, torch: bool, graph: bool, tmp_path: Path
) -> None:
    root, other = model_directory(tmp_path / "a"), model_directory(tmp_path / "b")
    (other / name).write_text('{"changed": 1}')
    found = []
    for path in (root, other):
        files = ModelFiles(path, "x")
        found.append((files.fingerprint(), files.fingerprint(path / "onnx/model.onnx")))
    assert (found[0][0] != found[1][0], found[0][1] != found[1][1]) == (torch, graph)


def test_files_that_changed_since_they_were_loaded_have_no_fingerprint_in_common(tmp_path: Path) -> None:
    root = model_directory(tmp_path / "a")
    before, loaded, also = (ModelFiles(root, "x") for _ in range(3))
    first = before.fingerprint()
    (root / "model.safetensors").write_text("MODEL.safetensors")
    later = ModelFiles(root, "x").fingerprint()
    assert len({first, later, loaded.fingerprint(), also.fingerprint()}) == 4
    assert loaded.fingerprint() == loaded.fingerprint()
    assert before.fingerprint() == first


class Bare:
    def score_pairs(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.asarray([len(text) for _, text in pairs], dtype=np.float32)


def test_a_ready_backend_must_tell_its_fingerprint() -> None:
    bare = Bare()
    assert Reranker(bare).logits("q", ["a"]).tolist() == [1]
    for told in (None, "", 3):
        bare.fingerprint = told  # type: ignore[attr-defined]
        with pytest.raises(ConfigurationError, match="fingerprint"):
            Reranker(bare, cache=10).prepare()
    cache = MemoryCache()
    for told in ("one", lambda: "two"):
        bare.fingerprint = told  # type: ignore[attr-defined]
        assert Reranker(bare, cache=cache).logits("q", ["a"]).tolist() == [1]
    assert len(cache) == 2


# -- bounds and configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [0, -1, True, False, 1.5, "", object(), {"a": 1}])
def test_what_cannot_be_a_cache_is_refused_at_once(cache: object) -> None:
    with pytest.raises(ConfigurationError, match=r"cache|max_pairs"):
        Reranker(fake(), cache=cache)  # type: ignore[arg-type]


def test_bounds_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for size in (0, 65535, 1e9, True):
        with pytest.raises(ConfigurationError, match="max_bytes"):
            FileCache(tmp_path / "x", max_bytes=size)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="max_pairs"):
        MemoryCache(max_pairs=2.0)  # type: ignore[arg-type]


def test_memory_keeps_what_was_used_last() -> None:
    cache = MemoryCache(max_pairs=3)
    cache.mset([("a", b"1"), ("b", b"2"), ("c", b"3")])
    assert cache.mget(["a", "missing"]) == [b"1", None]
    cache.mset([("d", b"4")])
    assert cache.mget(["a", "b", "c", "d"]) == [b"1", None, b"3", b"4"]


def test_a_file_stays_below_its_bound_and_keeps_what_is_used(tmp_path: Path) -> None:
    path, bound = tmp_path / "scores.sqlite", 2 * 65536
    cache = FileCache(path, max_bytes=bound)
    cache.mset([(digest("favourite"), b"kept")])
    for batch in range(150):
        cache.mset([(digest((batch, i)), b"x" * 15) for i in range(50)])
        assert cache.mget([digest("favourite")]) == [b"kept"]
        assert None not in cache.mget([digest((max(0, batch - 3), i)) for i in range(50)])
        pages = cache._connection.execute("PRAGMA page_count").fetchone()[0]  # type: ignore[union-attr]
        assert pages * 4096 <= bound
    assert cache.mget([digest((0, 0))]) == [None]
    cache.close()
    assert path.stat().st_size <= bound


def test_a_smaller_bound_shrinks_the_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    with_room = FileCache(path)
    for batch in range(10):
        with_room.mset([(digest((batch, i)), b"x" * 50) for i in range(500)])
    with_room.close()
    assert path.stat().st_size > 4 * 65536
    small = FileCache(path, max_bytes=65536)
    small.mset([(digest("new"), b"new")])
    small.close()
    assert path.stat().st_size <= 65536


def test_reading_writes_nothing(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "scores.sqlite")
    cache.mset([(digest(i), b"x") for i in range(1200)])
    cache.close()
    before = (tmp_path / "scores.sqlite").read_bytes()
    assert cache.mget([digest(i) for i in range(1201)]) == [b"x"] * 1200 + [None]
    cache.close()
    assert (tmp_path / "scores.sqlite").read_bytes() == before


def test_copies_share_and_pickles_carry_configuration(tmp_path: Path) -> None:
    backend = fake()
    for cache in (100, MemoryCache(50), str(tmp_path / "a.sqlite"), FileCache(tmp_path / "b.sqlite", 1 << 20)):
        reranker = Reranker(backend, cache=cache)
        reranker.logits("q", ["a", "b"])
        backend.calls.clear()
        for copied in (copy.copy(reranker), copy.deepcopy(reranker)):
            copied.logits("q", ["a", "b"])
        assert backend.calls == []
        assert reranker.config["cache"] == cache
    memory, file = MemoryCache(7), FileCache(tmp_path / "c.sqlite", 1 << 20)
    memory.mset([("a", b"1")])
    again, opened = pickle.loads(pickle.dumps(memory)), pickle.loads(pickle.dumps(file))
    assert (again.max_pairs, len(again)) == (7, 0)
    assert (opened.path, opened.max_bytes) == (file.path, 1 << 20)
    assert repr(Reranker(cache=memory)) == "Reranker(model='rerank-plugins/minilm-l6', cache=MemoryCache(max_pairs=7))"
    assert Reranker(cache=Path("x.sqlite")).config["cache"] == "x.sqlite"
    away = pickle.loads(pickle.dumps(Reranker("a/b", cache=file)))
    assert away.config["cache"].path == file.path


def test_making_a_reranker_touches_no_file_and_closing_it_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    reranker = Reranker(fake(), cache=path)
    assert not path.exists()
    with reranker:
        reranker.logits("q", ["a"])
        assert Path(f"{path}-wal").exists()
    assert not Path(f"{path}-wal").exists()
    assert reranker.logits("q", ["a"]).shape == (1,)


# -- one flight --------------------------------------------------------------------------------------------------------


class Gated:
    """A logit that reports each text, and waits for leave to go on with the first one of a name."""

    def __init__(self, *gated: str) -> None:
        self.started = {text: threading.Event() for text in gated}
        self.leave = {text: threading.Event() for text in gated}

    def __call__(self, query: str, text: str) -> float:
        if text in self.started:
            self.started[text].set()
            assert self.leave[text].wait(20)
        return float(len(text))


@pytest.mark.parametrize("kind", ["memory", "file", "langchain-memory"])
def test_a_pair_asked_for_twice_at_once_is_computed_once(kind: str, tmp_path: Path) -> None:
    gate = Gated("slow", "own")
    backend = fake(logit=gate)
    cache = stores(tmp_path)[kind]()
    first, second = Reranker(backend, cache=cache), Reranker(backend, cache=cache)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first.logits, "q", ["slow", "b"])
        assert gate.started["slow"].wait(20)
        two = pool.submit(second.logits, "q", ["b", "own", "slow"])
        # It has claimed what is free once it computes that.
        assert gate.started["own"].wait(20)
        gate.leave["own"].set()
        gate.leave["slow"].set()
        assert one.result(20).tolist() == [4, 1]
        assert two.result(20).tolist() == [1, 3, 4]
    assert backend.calls == [[("q", "slow"), ("q", "b")], [("q", "own")]]
    assert _scored._flights == {}


def test_a_pair_that_landed_between_look_and_claim_is_not_computed_again() -> None:
    backend = fake()
    cache = MemoryCache()

    class LandsMeanwhile:
        looks = 0

        def mget(self, keys: list[str]) -> list[bytes | None]:
            found = cache.mget(keys)
            self.looks += 1
            if self.looks == 1:
                Reranker(backend, cache=cache).logits("q", ["a", "b"])
            return found

        mset = staticmethod(cache.mset)

    assert Reranker(backend, cache=LandsMeanwhile()).logits("q", ["a", "b"]).shape == (2,)
    assert backend.calls == [[("q", "a"), ("q", "b")]]


def test_a_waiter_fills_its_own_store() -> None:
    gate = Gated("slow", "own")
    backend = fake(logit=gate)
    stores = MemoryCache(), MemoryCache()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(Reranker(backend, cache=stores[0]).logits, "q", ["slow"])
        assert gate.started["slow"].wait(20)
        two = pool.submit(Reranker(backend, cache=stores[1]).logits, "q", ["own", "slow"])
        assert gate.started["own"].wait(20)
        for leave in gate.leave.values():
            leave.set()
        one.result(20), two.result(20)
    assert [len(store) for store in stores] == [1, 2]


@pytest.mark.parametrize("error", [ScoringError("broken"), KeyboardInterrupt()])
def test_the_error_of_a_flight_reaches_its_caller_alone(error: BaseException) -> None:
    gate = Gated("slow", "own")
    failures = [error]

    def logit(query: str, text: str) -> float:
        found = gate(query, text)
        if text == "slow" and failures:
            raise failures.pop()
        return found

    backend = fake(logit=logit)
    reranker = Reranker(backend, cache=100)

    def caught(texts: list[str]) -> object:
        try:
            return reranker.logits("q", texts).tolist()
        except BaseException as raised:
            return raised

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(caught, ["slow"])
        assert gate.started["slow"].wait(20)
        two = pool.submit(caught, ["slow", "own"])
        assert gate.started["own"].wait(20)
        gate.leave["own"].set()
        gate.leave["slow"].set()
        assert one.result(20) is error
        assert two.result(20) == [4, 3]
    assert backend.calls == [[("q", "slow")], [("q", "own")], [("q", "slow")]]
    assert _scored._flights == {}


async def test_a_cancelled_caller_costs_the_others_nothing() -> None:
    gate = Gated("slow", "own")
    reranker = Reranker(fake(logit=gate), cache=100)
    one = asyncio.create_task(reranker.alogits("q", ["slow"]))
    await asyncio.to_thread(gate.started["slow"].wait, 20)
    two = asyncio.create_task(reranker.alogits("q", ["slow", "own"]))
    await asyncio.to_thread(gate.started["own"].wait, 20)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    for leave in gate.leave.values():
        leave.set()
    assert (await two).tolist() == [4, 3]


def test_many_threads_with_overlapping_pairs_and_failures_neither_hang_nor_differ() -> None:
    failing = random.Random(1)
    lock = threading.Lock()

    def logit(query: str, text: str) -> float:
        with lock:
            fails = failing.random() < 0.02
        if fails:
            raise ScoringError("broken")
        return float(text)

    rerankers = [Reranker(fake(logit=logit), cache=8) for _ in range(4)]

    def work(seed: int) -> int:
        choice, failures = random.Random(seed), 0
        for _ in range(60):
            texts = [str(choice.randrange(12)) for _ in range(choice.randrange(1, 9))]
            try:
                assert choice.choice(rerankers).logits("q", texts).tolist() == [float(text) for text in texts]
            except ScoringError:
                failures += 1
        return failures

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, seed) for seed in range(8)]
        assert sum(future.result(60) for future in futures) > 0
    assert _scored._flights == {}


# -- stores that fail --------------------------------------------------------------------------------------------------


def rubbish() -> dict[str, Callable[[str, bytes], Any]]:
    nan = np.float32("nan").tobytes()
    return {
        "empty": lambda key, value: b"",
        "short": lambda key, value: value[:-1],
        "long": lambda key, value: value + b"x",
        "flipped": lambda key, value: value[:-3] + bytes([value[-3] ^ 1]) + value[-2:],
        "of another key": lambda key, value: _scored._encode("other", _scored._decode(key, value)),  # type: ignore[arg-type]
        "not finite": lambda key, value: _scored._encode(key, _scored._Row(1, nan, b"\0")),
        "str": lambda key, value: "rubbish",
        "random": lambda key, value: os.urandom(len(value)),
    }


@pytest.mark.parametrize("kind", rubbish())
def test_rubbish_from_a_store_is_a_miss(kind: str) -> None:
    class Store(MemoryCache):
        def mget(self, keys: list[str]) -> list[Any]:  # type: ignore[override]
            found = super().mget(keys)
            return [v if v is None or i else rubbish()[kind](keys[i], v) for i, v in enumerate(found)]

    backend = fake()
    reranker = Reranker(backend, cache=Store())
    expected = Reranker(fake()).rank("red fox", TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [reranker.rank("red fox", TEXTS) for _ in range(2)] == [expected] * 2
    assert backend.calls[1:] == [[("red fox", "a red fox")]]


@pytest.mark.parametrize("broken", ["mget", "mset", "length"])
def test_a_store_that_fails_is_told_once_and_costs_no_result(broken: str) -> None:
    class Store(MemoryCache):
        def mget(self, keys: list[str]) -> list[bytes | None]:  # type: ignore[override]
            if broken == "mget":
                raise OSError("no connection")
            return super().mget(keys)[broken == "length" :]

        def mset(self, pairs: list[tuple[str, bytes]]) -> None:  # type: ignore[override]
            if broken == "mset":
                raise OSError("no connection")
            super().mset(pairs)

    reranker = Reranker(fake(), cache=Store())
    with pytest.warns(RuntimeWarning, match="cannot be") as told:
        found = [reranker.rank("red fox", TEXTS) for _ in range(3)]
    assert len(told) == 1
    assert found == [Reranker(fake()).rank("red fox", TEXTS)] * 3


def test_a_file_that_cannot_be_made_is_told_once_and_costs_no_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reranker = Reranker(fake(), cache=tmp_path / "file" / "scores.sqlite")
    with pytest.warns(RuntimeWarning, match="cannot be read") as told:
        assert [len(reranker.rank("red fox", TEXTS)) for _ in range(3)] == [7] * 3
    assert len(told) == 1


def test_a_full_disk_costs_no_result_and_no_kept_score(tmp_path: Path) -> None:
    cache, backend = FileCache(tmp_path / "scores.sqlite"), fake()
    reranker = Reranker(backend, cache=cache)
    reranker.logits("q", ["a"])
    connection = cache._connection
    assert connection is not None
    connection.execute("PRAGMA max_page_count = 1")
    many = [f"text {i}" for i in range(2000)]
    with pytest.warns(RuntimeWarning, match="cannot be written.*full"):
        assert reranker.logits("q", many).shape == (2000,)
    connection.execute("PRAGMA max_page_count = 100000")
    backend.calls.clear()
    reranker.logits("q", ["a"])
    assert backend.calls == []
    reranker.logits("q", many)
    reranker.logits("q", many)
    assert len(backend.calls) == 1


def test_a_file_that_another_process_holds_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_database, "BUSY_TIMEOUT_S", 0.01)
    path = tmp_path / "scores.sqlite"
    reranker = Reranker(fake(), cache=path)
    reranker.logits("q", ["a"])
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.warns(RuntimeWarning, match="cannot be written.*locked"):
        assert reranker.logits("q", ["a", "b"]).shape == (2,)
    holder.close()


def test_the_database_of_something_else_stays_untouched(tmp_path: Path) -> None:
    path = tmp_path / "app.sqlite"
    with sqlite3.connect(path) as theirs:
        theirs.execute("CREATE TABLE users (name TEXT)")
    theirs.close()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="something else"):
        Reranker(fake(), cache=path).logits("q", ["a"])
    assert path.read_bytes() == before


# -- damage ------------------------------------------------------------------------------------------------------------


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    assert len(content) > 5 * 4096
    noise = random.Random(0).randbytes(len(content))
    if kind == "half":
        content = content[: len(content) // 2]
    elif kind == "stub":
        content = content[:60]
    elif kind == "text":
        content = bytearray(b"not a database at all\n" * 500)
    elif kind == "header":
        content[:100] = noise[:100]
    elif kind == "first page":
        content[100:4096] = noise[100:4096]
    elif kind == "pages":
        content[4096:] = noise[4096:]
    elif kind == "zeros":
        content[2 * 4096 :] = bytes(len(content) - 2 * 4096)
    path.write_bytes(content)


DAMAGES = ("half", "stub", "text", "header", "first page", "pages", "zeros")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_set_aside_and_rebuilt(kind: str, tmp_path: Path) -> None:
    path, texts = tmp_path / "scores.sqlite", [f"text {i}" for i in range(500)]
    with Reranker(fake(), cache=path) as reranker:
        expected = reranker.logits("text 7", texts)
    damage(path, kind)
    damaged = path.read_bytes()
    backend = fake()
    with pytest.warns(RuntimeWarning, match="set aside as .*damaged-1"):
        found = [Reranker(backend, cache=path).logits("text 7", texts).tolist() for _ in range(2)]
    assert found == [expected.tolist()] * 2
    assert (tmp_path / "scores.sqlite.damaged-1").read_bytes()[:60] == damaged[:60]
    assert scored_texts(backend) == texts
    assert len(backend.calls) == 1
    damage(path, kind)
    with pytest.warns(RuntimeWarning, match="damaged-2"):
        assert Reranker(fake(), cache=path).logits("text 7", texts).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_is_damaged_in_use_costs_no_result(kind: str, tmp_path: Path) -> None:
    path, texts = tmp_path / "scores.sqlite", [f"text {i}" for i in range(500)]
    reranker = Reranker(fake(), cache=path)
    expected = reranker.logits("text 7", texts)
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    writer.close()
    damage(path, kind)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for query in ("text 7", "text 8", "text 7"):
            found = reranker.logits(query, [*texts, query + " more"])
            assert found[:-1].tolist() == Reranker(fake()).logits(query, texts).tolist()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert Reranker(fake(), cache=path).logits("text 7", texts).tolist() == expected.tolist()
    backend = fake()
    Reranker(backend, cache=path).logits("text 7", texts)
    assert backend.calls == []


@pytest.mark.parametrize("kind", ["BLOB", "TEXT", "INTEGER"])
def test_a_value_that_is_damaged_inside_its_row_is_a_miss(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    with Reranker(fake(), cache=path) as reranker:
        expected = reranker.logits("red fox", TEXTS)
    with sqlite3.connect(path) as theirs:
        changed = "substr(value, 1, 11) || x'ff' || substr(value, 13)"
        theirs.execute(f"UPDATE scores_1_new SET value = CAST({changed} AS {kind})")
    theirs.close()
    backend = fake()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert Reranker(backend, cache=path).logits("red fox", TEXTS).tolist() == expected.tolist()
    assert len(backend.calls) == 1


def test_several_users_of_a_damaged_file_set_it_aside_once(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    caches = [FileCache(path) for _ in range(6)]
    for cache in caches[:3]:
        cache.mset([(digest(i), b"x" * 20) for i in range(500)])
    for cache in caches[1:]:
        cache.close()
    damage_target = caches[0]._connection
    assert damage_target is not None
    damage_target.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damage(path, "header")
    gate = threading.Barrier(6)

    def use(number: int) -> bool:
        gate.wait(20)
        with warnings.catch_warnings():
            caches[number].mset([(digest(("new", number, i)), b"y") for i in range(20)])
        return True

    with warnings.catch_warnings(record=True) as told, ThreadPoolExecutor(6) as pool:
        warnings.simplefilter("always")
        assert all(pool.map(use, range(6)))
        list(pool.map(lambda number: caches[number].mset([(digest(number), b"z")]), range(6)))
        for number in range(1, 6):
            assert None not in caches[0].mget([digest(("new", number, i)) for i in range(20)])
    assert sum("set aside" in str(warning.message) for warning in told) <= 1
    assert [p.name for p in tmp_path.glob("*.damaged-?")] == ["scores.sqlite.damaged-1"]


def test_a_file_that_was_replaced_while_its_damage_was_met_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.sqlite"
    late, early = FileCache(path), FileCache(path)
    late.mset([(digest("old"), b"1")])
    real = late._select

    def meets_damage(*args: Any) -> Any:
        monkeypatch.setattr(late, "_select", real)
        path.rename(tmp_path / "away")
        early.mset([(digest("new"), b"2")])
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(late, "_select", meets_damage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert late.mget([digest("old"), digest("new")]) == [None, b"2"]
    assert not list(tmp_path.glob("*.damaged-*"))


def test_a_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    one, two = FileCache(path), FileCache(path)
    one.mset([(digest("a"), b"1")])
    assert two.mget([digest("a")]) == [b"1"]
    for file in tmp_path.glob("scores.sqlite*"):
        file.unlink()
    assert one.mget([digest("a")]) == [None]
    one.mset([(digest("b"), b"2")])
    assert two.mget([digest("b")]) == [b"2"]


# -- processes ---------------------------------------------------------------------------------------------------------


WRITER = """
import sys
from rerank_plugins import Reranker
from rerank_plugins.testing import FakeBackend

path, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
reranker = Reranker(FakeBackend(lambda query, text: float(text), fingerprint="weights-1"), cache=path)
print("ready", flush=True)
sys.stdin.readline()
for i in range(rounds):
    reranker.logits(f"{name} {i}", [str(j) for j in range(20)])
    print(i, flush=True)
"""


def writers(path: Path, n: int, rounds: int) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WRITER, str(path)]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([*command, str(i), str(rounds)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for i in range(n)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return started


def assert_kept(path: Path, acknowledged: dict[int, int]) -> None:
    backend = fake(logit=lambda query, text: float(text))
    reranker = Reranker(backend, cache=path)
    texts = [str(j) for j in range(20)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, rounds in acknowledged.items():
            for i in range(rounds):
                assert reranker.logits(f"{name} {i}", texts).tolist() == [float(text) for text in texts]
    assert backend.calls == []
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    assert not list(path.parent.glob("*.damaged-*"))


def test_many_processes_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    for process in writers(path, 4, 25):
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    assert_kept(path, dict.fromkeys(range(4), 25))


def test_killed_writers_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    acknowledged = {}
    started = writers(path, 4, 1_000_000)
    for number, process in enumerate(started):
        assert process.stdout is not None
        for _ in range(10 + 3 * number):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        # All that came through before it died; a torn last line was not said.
        rest = process.communicate(timeout=60)[0]
        acknowledged[number] = 10 + 3 * number + rest.count("\n")
        assert process.returncode == -signal.SIGKILL
    assert_kept(path, acknowledged)
    survivor = fake()
    Reranker(survivor, cache=path).logits("after", ["a"])
    Reranker(survivor, cache=path).logits("after", ["a"])
    assert len(survivor.calls) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_forked_child_goes_on_with_the_cache(kind: str, tmp_path: Path) -> None:
    gate = Gated("slow")
    backend = fake(logit=gate)
    reranker = Reranker(backend, cache=stores(tmp_path)[kind]())
    reranker.logits("q", ["a", "b"])
    thread = threading.Thread(target=reranker.score, args=("q", ["slow"]))
    thread.start()
    assert gate.started["slow"].wait(20)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # A flight of a thread that the child does not have must not be waited for.
            signal.alarm(20)
            backend.calls.clear()
            assert getattr(reranker._cache.store, "_connection", None) is None  # type: ignore[union-attr]
            gate.leave["slow"].set()
            found = reranker.logits("q", ["a", "b", "slow", "child"])
            asked = [("q", "slow"), ("q", "child")]
            code = 0 if found.tolist() == [1, 1, 4, 5] and backend.calls == [asked] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.leave["slow"].set()
    thread.join(20)
    backend.calls.clear()
    reranker.logits("q", ["a", "b", "slow", "child"])
    # The child's file is ours; its memory is not.
    assert scored_texts(backend) == ([] if kind == "file" else ["child"])


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORES)
def test_langchain_takes_a_cache(kind: str, tmp_path: Path) -> None:
    from langchain_core.documents import Document

    from rerank_plugins.langchain import CrossEncoderRerank, CrossEncoderScorer

    backend, cache = fake(), stores(tmp_path)[kind]()
    documents = [Document(text) for text in TEXTS]
    rerank = CrossEncoderRerank(model=backend, cache=cache)
    plain = CrossEncoderRerank(model=fake()).compress_documents(documents, "red fox")
    assert [rerank.compress_documents(documents, "red fox") for _ in range(2)] == [plain] * 2
    assert len(backend.calls) == 1
    assert copy.deepcopy(rerank).compress_documents(documents, "red fox") == plain
    if kind != "int":
        CrossEncoderScorer(model=backend, cache=cache).score([("red fox", text) for text in TEXTS])
        assert len(backend.calls) == 1


def test_llama_index_takes_a_cache(tmp_path: Path) -> None:
    from llama_index.core.schema import NodeWithScore, TextNode

    from rerank_plugins.llama_index import CrossEncoderRerank

    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    for cache in (100, MemoryCache(), tmp_path / "a.sqlite", FileCache(tmp_path / "b.sqlite")):
        backend = fake()
        rerank = CrossEncoderRerank(model=backend, cache=cache, top_n=None)
        found = [rerank.postprocess_nodes(nodes, query_str="red fox") for _ in range(2)]
        assert [item.score for item in found[0]] == [item.score for item in found[1]]
        assert len(backend.calls) == 1
        assert CrossEncoderRerank(reranker=Reranker(backend, cache=cache)).cache is not None
    again = CrossEncoderRerank.from_json(CrossEncoderRerank(cache=tmp_path / "c.sqlite").to_json())
    assert again.cache == str(tmp_path / "c.sqlite")
    assert pickle.loads(pickle.dumps(CrossEncoderRerank(cache=MemoryCache(9)))).cache.max_pairs == 9
