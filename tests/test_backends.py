"""One contract and one set of scores for every engine and every family."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import EXTRA, FAMILIES, QUERY, TEXTS, tiny

from rerank_plugins import Reranker, Settings
from rerank_plugins.backends import PairLogits, load_backend
from rerank_plugins.backends import load as loading
from rerank_plugins.backends._files import ModelFiles, converted_directory
from rerank_plugins.backends.base import LocalBackend
from rerank_plugins.backends.openvino import OpenVinoBackend
from rerank_plugins.backends.torch import TorchBackend
from rerank_plugins.conversion import convert
from rerank_plugins.errors import ConfigurationError, MissingDependencyError, ModelLoadError, ScoringError
from rerank_plugins.testing import FakeBackend, check_backend_contract

ALL = (*FAMILIES, *EXTRA)
PAIRED = tuple(family for family in ALL if not family.startswith("causal"))


@cache
def converted(family: str, int8: bool = False) -> str:
    source = Path(tiny(family))
    out = source.parent / f"{family}-onnx{'-int8' if int8 else ''}"
    convert(str(source), out, int8=int8)
    return str(out)


def model_of(family: str, engine: str) -> str:
    return tiny(family) if engine == "torch" else converted(family)


ENGINES = [
    *((family, "torch") for family in ALL),
    *((family, engine) for family in PAIRED for engine in ("onnx", "openvino")),
]


@cache
def expected(family: str) -> np.ndarray:
    """sentence-transformers' own logits, whose classes are folded as the policy says."""
    import torch
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(tiny(family))
    logits = encoder.predict([(QUERY, text) for text in TEXTS], activation_fn=torch.nn.Identity())
    if logits.ndim == 1:
        return logits
    probability = torch.from_numpy(logits.astype(np.float64)).softmax(-1)[:, 1]
    return torch.logit(probability).numpy()


@pytest.mark.parametrize(("family", "engine"), ENGINES)
def test_scores_and_order_equal_sentence_transformers(family: str, engine: str) -> None:
    label = "entailment" if family == "bert-nli" else None
    reranker = Reranker(model_of(family, engine), backend=engine, precision="fp32", label=label)
    assert np.abs(reranker.logits(QUERY, TEXTS) - expected(family)).max() < 1e-4
    ranking = reranker.rank(QUERY, TEXTS)
    assert [item.index for item in ranking] == np.argsort(-expected(family), kind="stable").tolist()
    assert {item.index for item in ranking if item.truncated} >= {9}
    assert (reranker.backend_name, reranker.precision) == (engine, "fp32")


def test_the_tiny_models_tell_the_texts_apart() -> None:
    for family in ALL:
        assert np.diff(np.sort(expected(family))).min() > 1e-4, family


@pytest.mark.parametrize(("family", "engine"), ENGINES)
def test_every_backend_keeps_the_contract(family: str, engine: str) -> None:
    model = model_of(family, engine)
    check_backend_contract(load_backend(Settings(model=model, backend=engine, precision="fp32")))
    # Whatever "auto" takes here: half precision has three digits.
    check_backend_contract(load_backend(Settings(model=model, backend=engine)), tolerance=0.1)


def test_the_fake_backend_keeps_the_contract() -> None:
    check_backend_contract(FakeBackend())
    check_backend_contract(FakeBackend(lambda query, text: 1 / (1 + len(text)), emits="probability"))


def test_the_contract_finds_a_backend_that_depends_on_the_batch() -> None:
    class Shifting(FakeBackend):
        def logits(self, pairs):  # type: ignore[no-untyped-def]
            logits, truncated = super().logits(pairs)
            return PairLogits(logits + len(pairs), truncated)

    with pytest.raises(AssertionError, match="alone"):
        check_backend_contract(Shifting())


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_int8_keeps_the_order_and_does_not_depend_on_the_batch(family: str, engine: str) -> None:
    reranker = Reranker(converted(family, int8=True), backend=engine)
    logits = reranker.logits(QUERY, TEXTS)
    assert reranker.precision == "int8"
    assert np.corrcoef(logits, expected(family))[0, 1] > 0.99
    alone = np.array([reranker.logits(QUERY, [text])[0] for text in TEXTS])
    # A last digit that padding changes can be what decides where an activation is rounded to.
    assert np.abs(logits - alone).max() < 0.02 * np.ptp(logits)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_openvino_sees_few_widths_and_scores_as_with_all(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Settings(converted(family), backend="openvino", precision="fp32")
    backend = load_backend(spec).configured(max_length=45, instruction=None)
    assert isinstance(backend, OpenVinoBackend)
    widths: list[int] = []
    forward = backend.forward
    monkeypatch.setattr(backend, "forward", lambda batch: widths.append(batch.input_ids.shape[1]) or forward(batch))
    # From a few tokens to more than fit.
    pairs = [(QUERY, "a" + " a" * n) for n in range(60)]

    padded = np.array([backend.logits([pair]).logits[0, 0] for pair in pairs])
    assert {width for width in widths if width % 8} == {45}, "45 is what a pair may have"
    assert max(widths) == 45
    few = len(set(widths))

    widths.clear()
    monkeypatch.setattr(OpenVinoBackend, "width_step", 1)
    exact = np.array([backend.logits([pair]).logits[0, 0] for pair in pairs])
    assert len(set(widths)) > 4 * few
    assert padded == pytest.approx(exact, abs=1e-5)


def test_int8_does_not_overflow_on_processors_without_vnni() -> None:
    code = "import sys; from rerank_plugins import Reranker; from checkpoints import QUERY, TEXTS; " + (
        "print(*Reranker(sys.argv[1], backend='openvino', precision='int8').logits(QUERY, TEXTS).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, converted("roberta")],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    rounded = [float(logit) for logit in done.stdout.split()]
    assert np.corrcoef(expected("roberta"), rounded)[0, 1] > 0.95


def test_the_bundled_model_in_int8_keeps_the_order() -> None:
    query = "how do I undo a commit?"
    exact = Reranker(backend="openvino", precision="fp32").logits(query, TEXTS)
    rounded = Reranker(backend="openvino", precision="int8").logits(query, TEXTS)
    clear = np.abs(exact[:, None] - exact[None, :]) > 1.0
    assert ((exact[:, None] > exact[None, :]) == (rounded[:, None] > rounded[None, :]))[clear].all()


@pytest.mark.parametrize(
    ("name", "flags", "faster"),
    [
        ("Intel(R) Xeon(R) Processor", {"avx512_bf16", "amx_bf16"}, True),
        ("Intel(R) Xeon(R) Processor", {"avx512_bf16"}, False),
        ("AMD EPYC 9B45", {"avx512_bf16"}, True),
    ],
)
def test_auto_takes_bf16_where_the_processor_is_faster_in_it(
    name: str, flags: set[str], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    monkeypatch.setattr("rerank_plugins._machine.processor", lambda: (name, frozenset(flags)))
    has = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert Reranker(converted("bert"), backend="openvino").precision == ("bf16" if has and faster else "fp32")


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_batching_changes_no_score(budget: int) -> None:
    backend = load_backend(Settings(model=tiny("bert")))
    other = backend.configured(max_length=None, instruction=None)
    other.token_budget = budget  # type: ignore[attr-defined]
    pairs = [(QUERY, text) for text in TEXTS]
    assert np.abs(backend.logits(pairs).logits - other.logits(pairs).logits).max() < 1e-5


@pytest.mark.parametrize("engine", ["torch", "onnx", "openvino"])
def test_batches_that_are_split_for_their_padding_change_no_score(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split = load_backend(Settings(model=model_of("bert", engine), backend=engine, precision="fp32"))
    assert isinstance(split, LocalBackend)
    whole = split.configured(max_length=None, instruction=None)
    whole.batch_cost = whole.token_budget
    # A text of many tokens among several of few.
    pairs = [(QUERY, text) for text in ("a bird", "the sea at night", "a " * 100, "a fish", "two birds", "three fish")]
    sizes: list[int] = []
    logits = []
    for backend in (split, whole):
        forward = backend.forward
        monkeypatch.setattr(
            backend, "forward", lambda batch, run=forward: sizes.append(len(batch.input_ids)) or run(batch)
        )
        logits.append(backend.logits(pairs).logits)

    assert sizes == [1, 5, 6]
    assert np.abs(logits[0] - logits[1]).max() < 1e-5
    assert (np.argsort(logits[0]) == np.argsort(logits[1])).all()


# -- how "auto" decides -------------------------------------------------------------------------------------------


def test_auto_takes_a_graph_where_there_is_one(tmp_path: Path) -> None:
    assert Reranker(tiny("bert")).backend_name == "torch"
    assert Reranker(converted("bert")).backend_name == "openvino"
    # The layout of Hub repositories.
    hub = tmp_path / "hub"
    shutil.copytree(tiny("bert"), hub)
    (hub / "onnx").mkdir()
    shutil.copy(Path(converted("bert")) / "model.onnx", hub / "onnx" / "model.onnx")
    assert Reranker(hub).backend_name == "openvino"
    assert Reranker(hub, backend="torch").backend_name == "torch"


def test_auto_takes_onnxruntime_without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert Reranker(converted("electra"), threads=1).backend_name == "onnx"


def test_auto_finds_what_was_converted_earlier(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny("distilroberta"), source)
    assert Reranker(source, precision="fp32").backend_name == "torch"
    directory = converted_directory(ModelFiles(source, "x"))
    shutil.copytree(converted("distilroberta"), directory)
    assert Reranker(source).backend_name == "openvino"


def test_auto_takes_torch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_gpu_driver", lambda: True)
    monkeypatch.setattr("rerank_plugins.backends.torch.default_device", lambda: "cuda")
    assert loading._torch_on_gpu(None)
    assert not loading._torch_on_gpu("cpu")
    monkeypatch.setattr("rerank_plugins.backends.torch.default_device", lambda: "cpu")
    assert not loading._torch_on_gpu(None)


def test_without_torch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModelLoadError, match=r'pip install "rerank-plugins\[torch\]".*rerank-plugins convert'):
        Reranker(tiny("electra")).prepare()


def test_a_missing_engine_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rerank-plugins\[openvino\]"'):
        Reranker(converted("roberta"), backend="openvino", precision="fp32").prepare()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rerank-plugins\[torch\]"'):
        Reranker(tiny("roberta"), backend="torch", precision="fp16").prepare()


# -- what cannot be had -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"model": tiny("bert"), "backend": "onnx"}, ModelLoadError, "rerank-plugins convert"),
        ({"model": tiny("causal-qwen3"), "backend": "onnx"}, ModelLoadError, "backend='torch'"),
        (
            {"model": tiny("bert"), "backend": "torch", "precision": "int8"},
            ConfigurationError,
            "convert MODEL OUT --int8",
        ),
        ({"model": tiny("bert"), "revision": "main"}, ConfigurationError, "local directory"),
        ({"backend": "torch"}, ConfigurationError, "bundled model is an ONNX graph"),
        ({"model": "no-such-directory"}, ModelLoadError, "hf download no-such-directory"),
        ({"model": "not//a valid id"}, ModelLoadError, "neither a local directory nor a Hub id"),
    ],
)
def test_what_cannot_be_had_is_a_clear_error(keywords: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Reranker(**keywords).prepare()  # type: ignore[arg-type]


def test_more_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="precision='fp16' is not available"):
        Reranker(converted("bert"), backend="onnx", precision="fp16").prepare()
    with pytest.raises(ConfigurationError, match="device='cuda' needs the torch backend"):
        Reranker(converted("bert"), backend="onnx", device="cuda").prepare()
    with pytest.raises(ModelLoadError, match=r"expected config\.json"):
        Reranker(tmp_path).prepare()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.onnx"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(converted("bert"), broken)
    (broken / file).write_bytes(b"{not json")
    with pytest.raises(ModelLoadError, match=file.replace(".", r"\.")):
        Reranker(broken).prepare()


def test_pickles_are_refused(tmp_path: Path) -> None:
    import torch

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny("bert"), pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pickle"):
        Reranker(pickled).prepare()


def test_remote_code_needs_consent(tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    shutil.copytree(tiny("bert"), remote)
    config = json.loads((remote / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {
        "AutoConfig": "code.MyConfig",
        "AutoModelForSequenceClassification": "code.MyModel",
    }
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "code.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
        "from transformers import BertConfig as MyConfig, BertForSequenceClassification as MyModel\n"
    )
    with pytest.raises(ModelLoadError, match="trust_remote_code=True"):
        Reranker(remote, backend="torch").prepare()
    assert not list(tmp_path.rglob("ran"))


# -- torch only ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_the_order_of_clear_differences(precision: str) -> None:
    reranker = Reranker(tiny("bert"), backend="torch", precision=precision)
    logits = reranker.logits(QUERY, TEXTS)
    assert reranker.precision == precision
    assert np.corrcoef(logits, expected("bert"))[0, 1] > 0.99
    assert np.abs(logits - expected("bert")).max() > 1e-6


def test_an_instruction_reaches_a_causal_model_as_its_system_prompt() -> None:
    import torch
    from sentence_transformers import CrossEncoder

    instruction = "Find passages about bears."
    pairs = [(QUERY, text) for text in TEXTS]
    theirs = CrossEncoder(tiny("causal-qwen3")).predict(pairs, prompt=instruction, activation_fn=torch.nn.Identity())
    ours = Reranker(tiny("causal-qwen3"), instruction=instruction).logits(QUERY, TEXTS)
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(ours - expected("causal-qwen3")).max() > 1e-3


def test_a_causal_model_without_a_reranking_template_gets_the_published_prompt(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = tmp_path / "Qwen3-Reranker-0.6B"
    shutil.copytree(tiny("causal-qwen3"), plain)
    (plain / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}")
    ours = Reranker(plain).logits("the query", ["the text"])[0]
    tokenizer = AutoTokenizer.from_pretrained(plain)
    prompt = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a '
        "web search query, retrieve relevant passages that answer the query\n<Query>: the query\n<Document>: the text"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    logits = AutoModelForCausalLM.from_pretrained(plain)(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert ours == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-4)


def test_saved_prompts_are_used_by_every_engine(tmp_path: Path) -> None:
    """sentence-transformers puts a checkpoint's default prompt before the query; a graph must not forget it."""
    import torch
    from sentence_transformers import CrossEncoder

    prompted = tmp_path / "prompted"
    CrossEncoder(tiny("bert"), prompts={"query": "search: "}, default_prompt_name="query").save_pretrained(
        str(prompted)
    )
    theirs = CrossEncoder(str(prompted)).predict([(QUERY, text) for text in TEXTS], activation_fn=torch.nn.Identity())
    assert np.abs(theirs - expected("bert")).max() > 1e-3
    assert np.abs(Reranker(prompted, backend="torch").logits(QUERY, TEXTS) - theirs).max() < 1e-4
    out = tmp_path / "graph"
    convert(str(prompted), out)
    assert np.abs(Reranker(out, backend="onnx").logits(QUERY, TEXTS) - theirs).max() < 1e-4


def test_a_batch_that_the_memory_cannot_hold_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = Reranker(tiny("bert"), backend="torch").prepare()
    before = reranker.logits(QUERY, TEXTS)
    backend = reranker._backend
    assert isinstance(backend, TorchBackend)
    sizes: list[int] = []
    whole = type(backend.model).forward

    def forward(self: Any, features: dict[str, Any], **keywords: Any) -> Any:
        sizes.append(len(features["input_ids"]))
        if sizes[-1] > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return whole(self, features, **keywords)

    monkeypatch.setattr(type(backend.model), "forward", forward)
    limit = 2
    assert np.abs(reranker.logits(QUERY, TEXTS) - before).max() < 1e-5
    assert max(sizes) > 2 >= sizes[-1]
    limit = 0
    with pytest.raises(ScoringError, match="more than the memory"):
        reranker.logits(QUERY, TEXTS)
