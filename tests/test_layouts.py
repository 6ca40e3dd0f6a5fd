"""What every published layout of a reranker gives on every engine, downloaded from a hub on loopback."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import layouts
import numpy as np
import pytest
import torch
import transformers as tf
from hub import Hub
from layout_parts import POSITIONS
from loader import Loader
from tokenizers import Tokenizer

QUERY = "what do ﬁve pandas 熊猫 eat…"
TEXTS = [
    "The giant panda is a bear that lives in the mountains of central China and eats bamboo.",
    "Paris is the capital and most populous city of France.",
    "大熊猫是一种生活在中国的熊，主要以竹子为食。",
    "Ｆｕｌｌ－ｗｉｄｔｈ letters, a ½ ﬁlled cup\u00a0of tea… and nothing   else",
    "Pandas \U0001f43c love bamboo \U0001f38b; été, naïve, Straße.",
    "short",
    "The quick brown fox jumps over the lazy dog. " * 40,
]
"""The fourth tells tokenizers apart that normalise otherwise; the last is longer than any of the models takes."""

HEAVY = re.compile(
    r"\.(safetensors|onnx|bin|h5|msgpack|ot|xml|data|index)$|onnx_data$|[0-9a-f]{8}-[0-9a-f-]{27}$|\.incomplete$"
)
"""Names of files with weights, whatever their format. An index of shards is none."""


@dataclass(frozen=True)
class Scores:
    """The engine scores, and these files with weights are fetched for it, no other."""

    fetches: tuple[str, ...]
    reference: str = "tokenizer.json"
    engine: str | None = None
    precision: str = "fp32"
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refuses:
    """A `ModelLoadError` or `ConfigurationError` that matches all patterns; at most these files are fetched."""

    patterns: tuple[str, ...]
    fetches: tuple[str, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)


def scores(*fetches: str, **others: Any) -> Scores:
    return Scores(fetches, **others)


def refuses(*patterns: str, fetches: tuple[str, ...] = (), **keywords: Any) -> Refuses:
    return Refuses(patterns, fetches, keywords)


GRAPH, WEIGHTS = "onnx/model.onnx", "model.safetensors"
NO_GRAPH = refuses(r"no ONNX graph", r"rerank-plugins convert|backend='torch'")
NO_WEIGHTS = refuses(r"only|no weights|safetensors", r"backend=.?'(auto|onnx|openvino)'|backend='auto'|leave backend")
DECODER_GRAPH = refuses(r"decoder|[Cc]ausal|prompt|chat template", r"backend='torch'")
OTHER_DECODER = r"chat.template|prompt"
NO_GRAPH_OR_PROMPT = refuses(r"no ONNX graph|chat.template|prompt|trust_remote_code")
PICKLE = refuses(r"pytorch_model\.bin", r"safetensors")
EMBEDDING = r"embedding model|no classification head"
POINTERS = refuses(r"[Gg]it.LFS|git lfs", r"git lfs pull|hf download")
INCOMPLETE = refuses(r"model-0000\d-of-0000\d\.safetensors")


def everywhere(graph: Any, torch_: Any, reference: str = "tokenizer.json", **label: Any) -> dict[str, Any]:
    """Scores on every engine: the files that a graph's engines and torch fetch."""
    of_graph = scores(*graph, reference=reference, keywords=label)
    return {
        "onnx": of_graph,
        "openvino": of_graph,
        "torch": scores(*torch_, reference=reference, keywords=label),
        "auto": scores(*graph, reference=reference, engine="openvino", keywords=label),
    }


def graph_alone(*graph: str, torch_: Any = NO_WEIGHTS, reference: str = "graph") -> dict[str, Any]:
    of_graph = scores(*graph, reference=reference)
    return {
        "onnx": of_graph,
        "openvino": of_graph,
        "torch": torch_,
        "auto": scores(*graph, reference=reference, engine="openvino"),
    }


def torch_alone(*weights: str, reference: str = "sentence-transformers", without: Any = NO_GRAPH) -> dict[str, Any]:
    of_torch = scores(*weights, reference=reference)
    return {
        "onnx": without,
        "openvino": without,
        "torch": of_torch,
        "auto": scores(*weights, reference=reference, engine="torch"),
    }


def nowhere(*patterns: str, fetches: tuple[str, ...] = (), of_graph: Refuses | None = None) -> dict[str, Any]:
    refusal = refuses(*patterns, fetches=fetches)
    return {"onnx": of_graph or refusal, "openvino": of_graph or refusal, "torch": refuses(*patterns), "auto": refusal}


def shards(number: int) -> tuple[str, ...]:
    return tuple(f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1))


ETTIN = (WEIGHTS, "2_Dense/model.safetensors", "3_LayerNorm/model.safetensors", "4_Dense/model.safetensors")
HAS_PEFT = importlib.util.find_spec("peft") is not None
HAS_SENTENCEPIECE = importlib.util.find_spec("sentencepiece") is not None
LORA = ("adapter_model.safetensors",)

MATRIX: dict[str, dict[str, Any]] = {
    "ms_marco_minilm": {
        **everywhere([GRAPH], [WEIGHTS]),
        # Calibrated here, from the exact weights.
        "openvino int8": scores(GRAPH, reference="near", precision="int8"),
    },
    "xenova_minilm": {
        **graph_alone(GRAPH, reference="tokenizer.json of ms_marco_minilm"),
        "onnx int8": scores("onnx/model_int8.onnx", reference="near ms_marco_minilm", precision="int8"),
        "openvino int8": scores(GRAPH, reference="near ms_marco_minilm", precision="int8"),
        "onnx fp16": scores("onnx/model_fp16.onnx", reference="near ms_marco_minilm", precision="fp16"),
    },
    "without_segments": everywhere([GRAPH], [WEIGHTS], reference="sentence-transformers"),
    "baked_tokenizer": everywhere([GRAPH], [WEIGHTS], reference="tokenizer.json of ms_marco_minilm"),
    "convbert": torch_alone(WEIGHTS, reference="tokenizer.json"),
    "rounded_variants": {
        "onnx": scores(
            "onnx/model_fp16.onnx",
            reference="near ms_marco_minilm",
            precision="fp16",
            keywords={"precision": "auto"},
        ),
        "torch": NO_WEIGHTS,
    },
    "monobert": {"onnx": PICKLE, "openvino": PICKLE, "torch": PICKLE, "auto": PICKLE},
    "monobert_converted": {
        **everywhere([GRAPH], [WEIGHTS]),
        "onnx label=1": scores(GRAPH, keywords={"label": 1}),
        "torch label=1": scores(WEIGHTS, keywords={"label": 1}),
        "onnx label=LABEL_1": scores(GRAPH, keywords={"label": "LABEL_1"}),
    },
    "bert_base_uncased": {
        "onnx": NO_GRAPH,
        "openvino": NO_GRAPH,
        "torch": refuses(r"classifier|classification head", fetches=(WEIGHTS,)),
        "auto": refuses(r"classifier|classification head", fetches=(WEIGHTS,)),
    },
    "without_a_layer": {
        "onnx": NO_GRAPH,
        "openvino": NO_GRAPH,
        "torch": refuses(r"encoder\.layer\.2\.", fetches=(WEIGHTS,)),
        "auto": refuses(r"encoder\.layer\.2\.", fetches=(WEIGHTS,)),
    },
    "qnli_electra": everywhere([GRAPH], [WEIGHTS]),
    "quora_roberta": everywhere([GRAPH], [WEIGHTS]),
    "stsb_roberta": everywhere([GRAPH], [WEIGHTS]),
    "bge_reranker_base": everywhere([GRAPH], [WEIGHTS]),
    "bge_reranker_large": everywhere([GRAPH, "onnx/model.onnx_data"], [WEIGHTS]),
    "bge_reranker_v2_m3": torch_alone(WEIGHTS, reference="tokenizer.json"),
    "bge_m3_onnx_o3": graph_alone("model.onnx", "model.onnx.data", reference="tokenizer.json of bge_reranker_base"),
    "bge_m3_onnx_uuid": graph_alone(
        "model.onnx", "5a0b0ef2-9a3a-11ef-b7d7-0242ac1c000c", reference="tokenizer.json of bge_reranker_base"
    ),
    "bge_reranker_v2_gemma": torch_alone(*shards(2), reference="gemma's prompt", without=DECODER_GRAPH),
    "jina_reranker_v1_turbo": graph_alone(GRAPH, torch_=refuses(r"trust_remote_code=True")),
    "jina_reranker_v2": {
        **graph_alone(GRAPH, torch_=refuses(r"trust_remote_code=True")),
        "torch trusted": scores(WEIGHTS, reference="own code", keywords={"trust_remote_code": True}),
    },
    "mxbai_rerank_v1": everywhere([GRAPH], [WEIGHTS]),
    "nli_deberta_v3": {
        **everywhere([GRAPH], [WEIGHTS], label="entailment"),
        "onnx unnamed": refuses(r"label=", r"contradiction.*entailment.*neutral", fetches=(GRAPH,)),
        "torch unnamed": refuses(r"label=", r"contradiction.*entailment.*neutral", fetches=(WEIGHTS,)),
    },
    "nli_deberta_v3_sentencepiece": {
        "onnx": NO_GRAPH,
        "torch": scores(WEIGHTS, reference="sentencepiece", keywords={"label": "entailment"})
        if HAS_SENTENCEPIECE
        else refuses(r"pip install.*sentencepiece"),
    },
    "deberta_zeroshot": {
        **everywhere([GRAPH], [WEIGHTS], label="entailment"),
        "onnx by column": scores(GRAPH, keywords={"label": 0}),
    },
    "gte_reranker_modernbert": everywhere([GRAPH], [WEIGHTS]),
    "granite_reranker": torch_alone(WEIGHTS, reference="tokenizer.json"),
    "ettin_reranker": torch_alone(
        *ETTIN, without=refuses(r"head|logits|2_Dense", r"backend='torch'|rerank-plugins convert", fetches=(GRAPH,))
    ),
    "qwen3_reranker": torch_alone(WEIGHTS, reference="qwen's prompt", without=DECODER_GRAPH),
    "qwen3_reranker_modules": torch_alone(WEIGHTS, without=DECODER_GRAPH),
    "qwen3_seq_cls": torch_alone(WEIGHTS, reference="qwen's prompt"),
    "qwen3_seq_cls_modules": torch_alone(WEIGHTS),
    "qwen3_seq_cls_no_pad": torch_alone(WEIGHTS, reference="as qwen3_seq_cls_modules"),
    "qwen3_chat": nowhere(OTHER_DECODER, of_graph=NO_GRAPH_OR_PROMPT),
    "zerank_1": nowhere(r"trust_remote_code|own code|chat.template|prompt", of_graph=NO_GRAPH_OR_PROMPT),
    "mxbai_rerank_v2": nowhere(OTHER_DECODER, of_graph=NO_GRAPH_OR_PROMPT),
    "onnx_community_qwen3": {
        **nowhere(r"decoder|[Cc]ausal|language model", r"graph", fetches=(GRAPH,)),
        "torch": refuses(r"only an ONNX graph|no weights"),
    },
    "lora": {
        "onnx": refuses(r"LoRA|[Aa]dapter", r"merge_and_unload|rerank-plugins convert|backend='torch'"),
        "openvino": refuses(r"LoRA|[Aa]dapter", r"merge_and_unload|rerank-plugins convert|backend='torch'"),
        **dict.fromkeys(
            ("torch", "auto"),
            scores(*LORA, WEIGHTS, reference="merged", engine="torch")
            if HAS_PEFT
            else refuses(r"cross-encoder/ms-marco-MiniLM-L6-v2", r"pip install peft", r"merge_and_unload"),
        ),
    },
    "flashrank_tinybert": graph_alone(reference="tokenizer.json of ms_marco_minilm"),
    "flashrank_minilm_q": {
        "onnx": scores(reference="near ms_marco_minilm", precision="int8", keywords={"precision": "auto"}),
        "auto": scores(
            reference="near ms_marco_minilm", precision="int8", engine="onnx", keywords={"precision": "auto"}
        ),
        "onnx int8": scores(reference="near ms_marco_minilm", precision="int8"),
        "openvino int8": scores(reference="near ms_marco_minilm", precision="int8"),
        "torch": NO_WEIGHTS,
    },
    "vectrix_reranker": graph_alone(reference="tokenizer.json of ms_marco_minilm"),
    "graph_and_tokenizer": graph_alone(reference="tokenizer.json of ms_marco_minilm"),
    "graph_and_vocabulary": {
        "onnx": refuses(r"tokenizer\.json", r"backend='torch'", fetches=(GRAPH,)),
        "torch": scores(WEIGHTS, reference="tokenizer.json of ms_marco_minilm"),
        "auto": scores(WEIGHTS, reference="tokenizer.json of ms_marco_minilm", engine="torch"),
    },
    "all_minilm": nowhere(EMBEDDING, fetches=(GRAPH,)),
    "embedding_graph": {
        **nowhere(EMBEDDING, fetches=("model.onnx",)),
        "torch": refuses(r"only an ONNX graph|no weights"),
    },
    "openvino_ir": nowhere(r"OpenVINO", r"openvino_model\.xml"),
    "half_downloaded": {"torch": INCOMPLETE, "auto": INCOMPLETE, "onnx": refuses("no ONNX graph")},
    "half_a_file": dict.fromkeys(
        ("torch", "auto"), refuses(r"model\.safetensors", r"incomplete|truncated|cut|damaged|download")
    ),
    "git_lfs_checkout": dict.fromkeys(("onnx", "openvino", "torch", "auto"), POINTERS),
}

CASES = [(layout, case, MATRIX[layout][case]) for layout in MATRIX for case in MATRIX[layout]]


# -- right values -----------------------------------------------------------------------------------------------------


def _folded(logits: np.ndarray, label: str | int | None, names: dict[int, str]) -> np.ndarray:
    """The log-odds of the class; of two, of the second one where none is named."""
    if logits.ndim == 1 or logits.shape[1] == 1:
        return logits.reshape(-1)
    column = {name: i for i, name in names.items()}[label] if isinstance(label, str) else 1 if label is None else label
    others = np.delete(logits.astype(np.float64), column, axis=1)
    return logits[:, column] - np.log(np.exp(others).sum(1))


def _by_ids(model: Any, rows: list[tuple[list[int], list[int]]]) -> np.ndarray:
    found = []
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    with torch.inference_mode():
        for ids, types in rows:
            given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            if takes_types:
                given["token_type_ids"] = torch.tensor([types])
            found.append(model(**given).logits[0])
    return torch.stack(found).float().numpy()


def _pairs(tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    tokenizer.enable_truncation(POSITIONS, strategy="only_second")
    tokenizer.no_padding()
    return [(encoding.ids, encoding.type_ids) for encoding in (tokenizer.encode(QUERY, text) for text in TEXTS)]


def published_tokens(name: str, label: str | int | None) -> np.ndarray:
    """transformers' model over the tokens of the published tokenizer.json."""
    directory = layouts.build(name)
    model = tf.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    logits = _by_ids(model, _pairs(Tokenizer.from_file(str(directory / "tokenizer.json"))))
    return _folded(logits, label, model.config.id2label)


def sentence_transformers(name: str, label: str | int | None = None) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(layouts.build(name)), device="cpu")
    logits = encoder.predict([(QUERY, text) for text in TEXTS], activation_fn=torch.nn.Identity())
    return _folded(np.asarray(logits), label, encoder.config.id2label)


def by_graph(name: str) -> np.ndarray:
    """ONNX Runtime on the published graph, pair by pair."""
    import onnxruntime

    directory = layouts.build(name)
    session = onnxruntime.InferenceSession(
        str(next(file for file in (directory / "onnx/model.onnx", directory / "model.onnx") if file.exists()))
    )
    wanted = {node.name for node in session.get_inputs()}
    rows = []
    for ids, types in _pairs(Tokenizer.from_file(str(directory / "tokenizer.json"))):
        given = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types}
        rows.append(session.run(["logits"], {k: np.array([v]) for k, v in given.items() if k in wanted})[0][0])
    return np.array(rows)[:, 0]


def sentencepiece_tokens(name: str, label: str | int | None) -> np.ndarray:
    """The tokens that sentencepiece itself makes."""
    import sentencepiece

    directory = layouts.build(name)
    processor = sentencepiece.SentencePieceProcessor(str(directory / "spm.model"))
    rows = []
    for text in TEXTS:
        query = processor.encode(QUERY)
        document = processor.encode(text)[: POSITIONS - len(query) - 3]
        rows.append(([1, *query, 2, *document, 2], [0] * (len(query) + 2) + [1] * (len(document) + 1)))
    model = tf.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    return _folded(_by_ids(model, rows), label, model.config.id2label)


def gemma_prompt(name: str) -> np.ndarray:
    """As the model card scores: "A: query", "B: passage" and the prompt, a line each; the logit of "Yes"."""
    directory = layouts.build(name)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = tf.AutoModelForCausalLM.from_pretrained(directory).eval()
    yes = tokenizer.token_to_id("Yes")
    found = []
    for text in TEXTS:
        rendered = f"A: {QUERY}\nB: {text}\n{layouts.GEMMA_PROMPT}"
        with torch.inference_mode():
            found.append(float(model(input_ids=torch.tensor([tokenizer.encode(rendered).ids])).logits[0, -1, yes]))
    return np.array(found)


_QWEN_BEFORE = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_QWEN_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_QWEN_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def qwen_prompt(name: str) -> np.ndarray:
    """As the model card scores: the logit of "yes" minus that of "no", or the classifier that was made of the two."""
    directory = layouts.build(name)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    causal = name == "qwen3_reranker"
    kind = tf.AutoModelForCausalLM if causal else tf.AutoModelForSequenceClassification
    model = kind.from_pretrained(directory).eval()
    found = []
    for text in TEXTS:
        body = f"<Instruct>: {_QWEN_INSTRUCTION}\n<Query>: {QUERY}\n<Document>: {text}"
        ids = torch.tensor([tokenizer.encode(_QWEN_BEFORE + body + _QWEN_AFTER).ids])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
        if causal:
            found.append(
                float(logits[0, -1, tokenizer.token_to_id("yes")] - logits[0, -1, tokenizer.token_to_id("no")])
            )
        else:
            found.append(float(logits[0, 0]))
    return np.array(found)


def own_code(name: str) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(layouts.build(name)), device="cpu", trust_remote_code=True, max_length=POSITIONS)
    return np.asarray(encoder.predict([(QUERY, text) for text in TEXTS], activation_fn=torch.nn.Identity()))


@functools.cache
def reference(name: str, how: str, label: str | int | None) -> np.ndarray:
    how, _, other = how.partition(" of ")
    if how == "tokenizer.json":
        return published_tokens(other or name, label)
    if how.startswith("near"):
        return published_tokens(how.removeprefix("near").strip() or name, label)
    if how.startswith("as "):
        return sentence_transformers(how.removeprefix("as "))
    if how == "merged":
        return _by_ids(layouts.lora_merged(), _pairs(Tokenizer.from_file(str(layouts.build(name) / "tokenizer.json"))))[
            :, 0
        ]
    if how == "sentencepiece":
        return sentencepiece_tokens(name, label)
    if how == "sentence-transformers":
        return sentence_transformers(name, label)
    return {"graph": by_graph, "gemma's prompt": gemma_prompt, "qwen's prompt": qwen_prompt, "own code": own_code}[how](
        name
    )


# -- the matrix -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub({}) as running:
        yield running


@pytest.fixture(scope="module")
def loader(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    loader = Loader(tmp_path_factory.mktemp("home"), hub.url)
    yield loader
    loader.close()


def ask(
    hub: Hub, loader: Loader, layout: str, case: str, expected: Scores | Refuses
) -> tuple[dict[str, Any], set[str]]:
    """Asks as on a machine that never had the model; returns the answer and the fetched files with weights."""

    def meanwhile() -> None:
        if isinstance(expected, Scores):
            reference(layout, expected.reference, expected.keywords.get("label"))

    directory, repository = layouts.build(layout), layouts.REPOSITORIES[layout]
    engine, _, asked = case.partition(" ")
    given: dict[str, Any] = {"backend": engine, "precision": "fp32"}
    if asked in ("int8", "fp16"):
        given["precision"] = asked
    given.update(expected.keywords)
    given["meanwhile"] = meanwhile
    if repository is None:
        return loader.ask(str(directory), QUERY, TEXTS, **given), set()
    served = {repository: directory}
    if layout == "lora":
        base = layouts.REPOSITORIES["ms_marco_minilm"]
        assert base is not None
        served[base] = layouts.build("ms_marco_minilm")
    hub.repositories = {name: {"main": path} for name, path in served.items()}
    hub.requests.clear()
    for name in served:
        shutil.rmtree(loader.home / "hub" / f"models--{name.replace('/', '--')}", ignore_errors=True)
    found = loader.ask(repository, QUERY, TEXTS, **given)
    return found, {name for name in hub.downloaded() if HEAVY.search(name)}


@pytest.mark.parametrize(("layout", "case", "expected"), CASES, ids=[f"{layout}-{case}" for layout, case, _ in CASES])
def test_layout(layout: str, case: str, expected: Scores | Refuses, hub: Hub, loader: Loader) -> None:
    found, fetched = ask(hub, loader, layout, case, expected)
    if isinstance(expected, Refuses):
        assert found.get("error") in ("ModelLoadError", "ConfigurationError"), found
        for pattern in expected.patterns:
            assert re.search(pattern, found["message"], re.DOTALL), f"{pattern} in: {found['message']}"
        assert fetched <= set(expected.fetches)
        return
    assert "error" not in found, found
    right = reference(layout, expected.reference, expected.keywords.get("label"))
    logits, alone = np.array(found["logits"]), np.array(found["alone"])
    engine = expected.engine or (case.split()[0] if not case.startswith("auto") else "openvino")
    assert (found["engine"], found["precision"]) == (engine, expected.precision)
    assert fetched == set(expected.fetches)
    if expected.reference.startswith("near"):
        assert np.corrcoef(logits, right)[0, 1] > 0.95, (logits, right)
        # OpenVINO's own arithmetic of int8 may round a last digit otherwise in a padded batch.
        assert np.abs(logits - alone).max() < (0.02 * np.ptp(logits) if engine == "openvino" else 1e-4)
    else:
        assert np.abs(logits - right).max() < 1e-4, (logits, right)
        assert np.abs(logits - alone).max() < 1e-4
