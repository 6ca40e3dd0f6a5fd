"""Directories of strangers: each is refused by an error that names file and key, quickly, and nothing of it runs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from layout_parts import DROP, edit
from loader import Loader

from rerank_plugins import Reranker
from rerank_plugins.conversion import convert
from rerank_plugins.errors import ModelLoadError, RerankError

QUERY, TEXTS = "what do pandas eat?", ["The panda eats bamboo.", "Paris is a city.", "short"]
WITHIN_S = 30.0
"""Only against hanging: the slowest takes a second or two, and more on a busy machine."""
GIB = 2**30


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    loader = Loader(tmp_path_factory.mktemp("home"), memory=8 * GIB, first=layouts.build("ms_marco_minilm"))
    yield loader
    loader.close()


def copied(layout: str, directory: Path) -> Path:
    target = directory / "model"
    shutil.copytree(layouts.build(layout), target)
    return target


def saved(directory: Path, *modules: object) -> None:
    """Makes a directory one that sentence-transformers saved, with more modules after the transformer."""
    (directory / "modules.json").write_text(json.dumps([FIRST, *modules]))
    edit(
        directory / "sentence_bert_config.json",
        transformer_task="sequence-classification",
        modality_config={"text": {"method": "forward", "method_output_name": "logits"}},
        module_output_name="scores",
    )


FIRST = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}


def refused(
    loader: Loader, directory: Path, engine: str, *words: str, kinds: tuple[str, ...] = ("ModelLoadError",)
) -> None:
    """Asserts a short error that has all the words, in time."""
    found = loader.ask(str(directory), QUERY, TEXTS, within_s=WITHIN_S, backend=engine)
    assert found.get("error") in kinds, found
    for word in words:
        assert word in found["message"], found
    assert len(found["message"]) < 2500


# -- values of a wrong type, and absurd numbers -----------------------------------------------------------------------

INFINITY, NAN = float("inf"), float("nan")
DEEP = "[" * 10_000 + "]" * 10_000
VALUES: dict[tuple[str, str], list[object]] = {
    ("config.json", "num_labels"): [10**9, "abc", INFINITY, -3, 1.5, [1], {}],
    ("config.json", "id2label"): [
        {"0.5": "a"},
        {"x": "a"},
        {"-1": "a"},
        {"1" * 5000: "a"},
        "LABEL_0",
        5,
        {str(i): f"name {i}" for i in range(1_000_000)},
    ],
    ("config.json", "architectures"): [5, {}, "BertForSequenceClassification", [1], [None]],
    ("config.json", "model_type"): [[], 5, {"a": 1}],
    ("config.json", "max_position_embeddings"): ["x", [1], -5, 1.5, INFINITY, NAN, 10**30],
    ("config.json", "pad_token_id"): ["x", 2**63, -7, [0], 0.5, 10**9],
    ("config.json", "rerank_plugins"): ["x", [1], 5],
    ("config.json", "auto_map"): ["x", [1], {"AutoConfig": 5}],
    ("tokenizer_config.json", "model_max_length"): ["512x", NAN, [1], -1, {}],
    ("tokenizer_config.json", "pad_token_type_id"): ["x", -1, 4_000_000_000],
    ("tokenizer_config.json", "tokenizer_class"): [5, []],
    ("sentence_bert_config.json", "max_seq_length"): ["x", -1, 1.5, []],
    ("sentence_bert_config.json", "processing_kwargs"): ["x", {"text": 5}, {"text": {"max_length": "x"}}],
    ("config_sentence_transformers.json", "prompts"): [["a"], "x", {"q": 5}],
    ("config_sentence_transformers.json", "default_prompt_name"): [{}, 5, "not among the prompts"],
}
ENGINES = {
    "tokenizer_class": ("torch",),
    "pad_token_type_id": ("onnx", "torch"),
}


def shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:20]}... of {len(text)}"


WRONG = [
    pytest.param(file, key, value, engine, id=f"{file}-{key}-{shown(value)}-{engine}")
    for (file, key), values in VALUES.items()
    for value in values
    for engine in ENGINES.get(key, ("onnx", "torch"))
]


@pytest.mark.parametrize(("file", "key", "value", "engine"), WRONG)
def test_a_wrong_value_is_named(
    file: str, key: str, value: object, engine: str, loader: Loader, tmp_path: Path
) -> None:
    directory = copied("ms_marco_minilm", tmp_path)
    if file in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        saved(directory)
        edit(directory / "config_sentence_transformers.json", prompts={"q": "query: "}, default_prompt_name="q")
    edit(directory / file, **({"id2label": DROP, "label2id": DROP} if key == "num_labels" else {}), **{key: value})
    refused(loader, directory, engine, file, key)


FILES = [
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
]
CONTENTS = {
    "deep": DEEP.encode(),
    "deep in a key": b'{"a": ' + DEEP.encode() + b"}",
    "empty": b"",
    "text": b"not JSON",
    "number": b"5",
    "bytes": b"\xff\xfe\x00\x01",
    "half": b'{"architectures": ["Bert',
    "null": b"null",
}


@pytest.mark.parametrize("engine", ["onnx", "torch"])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_that_is_no_json_object_is_named(
    file: str, content: str, engine: str, loader: Loader, tmp_path: Path
) -> None:
    directory = copied("ms_marco_minilm", tmp_path)
    if "sentence" in file:
        saved(directory)
    (directory / file).write_bytes(CONTENTS[content])
    refused(loader, directory, engine, file)


def _tokenizer(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        file = directory / "tokenizer.json"
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))

    return make


def _id_too_large(value: dict[str, Any]) -> None:
    value["model"]["vocab"]["panda"] = 2**31 + 5


def _id_beyond_the_model(value: dict[str, Any]) -> None:
    """A token that the model has no vector for."""
    value["model"]["vocab"]["the"] = len(value["model"]["vocab"]) + 5000


def _type_too_large(value: dict[str, Any]) -> None:
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 4_000_000_000}}],
        "special_tokens": {},
    }


def _type_beyond_the_model(value: dict[str, Any]) -> None:
    _type_too_large(value)
    value["post_processor"]["pair"][1]["Sequence"]["type_id"] = 7


@pytest.mark.parametrize("engine", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize("change", [_id_too_large, _id_beyond_the_model, _type_too_large, _type_beyond_the_model])
def test_tokens_that_the_model_has_not(
    change: Callable[[dict[str, Any]], None], engine: str, loader: Loader, tmp_path: Path
) -> None:
    directory = copied("ms_marco_minilm", tmp_path)
    _tokenizer(change)(directory)
    # One that never comes up in a text does no harm, so it may be told where it does.
    refused(loader, directory, engine, "token", kinds=("ModelLoadError", "ScoringError"))


MODULES: dict[str, list[object]] = {
    "a number": [5],
    "no type": [{"idx": 0, "name": "0", "path": ""}],
    "a type that is a number": [{**FIRST, "type": 5}],
    "a path that is a number": [{**FIRST, "path": 5}],
    "a path outside": [
        FIRST,
        {"idx": 1, "name": "1", "path": "../../outside", "type": "sentence_transformers.models.Dense"},
    ],
    "an absolute path": [FIRST, {"idx": 1, "name": "1", "path": "/etc", "type": "sentence_transformers.models.Dense"}],
    "a function": [FIRST, {"idx": 1, "name": "1", "path": "1_A", "type": "os.abort"}],
    "a function of torch": [FIRST, {"idx": 1, "name": "1", "path": "1_A", "type": "torch.utils.collect_env.main"}],
    "very many": [FIRST] * 100_000,
}


@pytest.mark.parametrize("case", MODULES)
def test_modules_that_cannot_be(case: str, loader: Loader, tmp_path: Path) -> None:
    directory = copied("ms_marco_minilm", tmp_path)
    saved(directory)
    (directory / "modules.json").write_text(json.dumps(MODULES[case]))
    refused(loader, directory, "torch", "modules.json")


def test_a_prompt_of_megabytes_is_refused(loader: Loader, tmp_path: Path) -> None:
    directory = copied("ms_marco_minilm", tmp_path)
    saved(directory)
    edit(
        directory / "config_sentence_transformers.json",
        prompts={"q": "search " * 1_500_000},
        default_prompt_name="q",
    )
    for engine in ("onnx", "torch"):
        refused(loader, directory, engine, "config_sentence_transformers.json", "prompts")


# -- weights from elsewhere -------------------------------------------------------------------------------------------


def _indexed(directory: Path, name: str) -> None:
    """An index by which all weights are in the file of that name."""
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    edit(directory / "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(names, name))


@pytest.mark.parametrize("where", ["../outside.safetensors", "sub/../../outside.safetensors", "absolute"])
def test_an_index_that_points_outside(where: str, loader: Loader, tmp_path: Path) -> None:
    directory = copied("ms_marco_minilm", tmp_path)
    _indexed(directory, str(tmp_path / "outside.safetensors") if where == "absolute" else where)
    (directory / "sub").mkdir()
    shutil.move(directory / "model.safetensors", tmp_path / "outside.safetensors")
    shutil.rmtree(directory / "onnx")
    for engine in ("torch", "auto"):
        refused(loader, directory, engine, "model.safetensors.index.json", "outside")
    with pytest.raises(ModelLoadError, match=r"model\.safetensors\.index\.json"):
        convert(str(directory), tmp_path / "converted")


@pytest.mark.parametrize(
    "value", [[], 5, {"weight_map": []}, {"weight_map": {"a": 5}}, {"weight_map": {"a": "missing.safetensors"}}]
)
def test_an_index_that_is_none(value: object, loader: Loader, tmp_path: Path) -> None:
    directory = copied("ms_marco_minilm", tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(value))
    refused(loader, directory, "torch", "safetensors")


@pytest.mark.parametrize("engine", ["onnx", "openvino", "auto"])
@pytest.mark.parametrize("where", ["../weights.bin", "absolute"])
def test_a_graph_whose_weights_are_outside(where: str, engine: str, loader: Loader, tmp_path: Path) -> None:
    import onnx

    directory = copied("xenova_minilm", tmp_path)
    graph = directory / "onnx/model.onnx"
    model = onnx.load(str(graph))
    onnx.save(model, str(graph), save_as_external_data=True, location="weights.bin", size_threshold=0)
    outside = directory / "weights.bin" if where != "absolute" else tmp_path / "weights.bin"
    shutil.move(directory / "onnx/weights.bin", outside)
    model = onnx.load(str(graph), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin" if where != "absolute" else str(outside)
    graph.write_bytes(model.SerializeToString())
    refused(loader, directory, engine, "weights.bin")


def test_damaged_weights_are_named(loader: Loader, tmp_path: Path) -> None:
    directory = copied("ms_marco_minilm", tmp_path)
    weights = directory / "model.safetensors"
    for content in (
        b"",
        b"\x00" * 8,
        b"\xff" * 64,
        (2**62).to_bytes(8, "little") + b"{}",
        b"PK\x03\x04 a zip file",
        DEEP.encode(),
    ):
        weights.write_bytes(content)
        refused(loader, directory, "torch", "model.safetensors")
    graph = directory / "onnx/model.onnx"
    for content in (b"", b"\xff" * 64, DEEP.encode()):
        graph.write_bytes(content)
        for engine in ("onnx", "openvino"):
            refused(loader, directory, engine, "model.onnx")


# -- pickles ----------------------------------------------------------------------------------------------------------


class _Marks:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def _pickled(directory: Path) -> None:
    """The weights as a pickle that anything could load, beside no other."""
    from safetensors.torch import load_file

    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    shutil.rmtree(directory / "onnx")


def _decoy(directory: Path) -> None:
    (directory / "decoy").mkdir()
    shutil.copy(directory / "model.safetensors", directory / "decoy/x.safetensors")
    _pickled(directory)


def _indexed_pickle(directory: Path) -> None:
    _indexed(directory, "pytorch_model-00001-of-00001.bin")
    (directory / "model.safetensors.index.json").rename(directory / "pytorch_model.bin.index.json")
    _decoy(directory)
    (directory / "pytorch_model.bin").rename(directory / "pytorch_model-00001-of-00001.bin")


def _index_of_pickles(directory: Path) -> None:
    _indexed(directory, "pytorch_model.bin")
    _decoy(directory)


def _under_the_name_of_safetensors(directory: Path) -> None:
    _pickled(directory)
    (directory / "pytorch_model.bin").rename(directory / "model.safetensors")


@pytest.mark.parametrize("make", [_pickled, _decoy, _indexed_pickle, _index_of_pickles, _under_the_name_of_safetensors])
def test_no_pickle_is_read(make: Callable[[Path], None], loader: Loader, tmp_path: Path) -> None:
    directory = copied("ms_marco_minilm", tmp_path)
    make(directory)
    for engine in ("torch", "auto"):
        refused(loader, directory, engine, "safetensors")
    with pytest.raises(ModelLoadError, match="safetensors"):
        convert(str(directory), tmp_path / "converted")


@pytest.mark.parametrize("module", ["2_Dense", "4_Dense", "3_LayerNorm"])
def test_no_pickle_of_a_head_is_read(module: str, loader: Loader, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    directory = copied("ettin_reranker", tmp_path)
    weights = directory / module / "model.safetensors"
    torch.save(load_file(weights), directory / module / "pytorch_model.bin")
    weights.unlink()
    refused(loader, directory, "torch", module, "safetensors")


def test_no_pickle_of_an_adapter_is_read(loader: Loader, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    directory = copied("lora", tmp_path)
    edit(directory / "adapter_config.json", base_model_name_or_path=str(layouts.build("ms_marco_minilm")))
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()
    refused(loader, directory, "torch", "adapter_model", "safetensors")


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path, loader: Loader) -> None:
    directory = copied("ms_marco_minilm", tmp_path)
    marker = tmp_path / "marker"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (directory / name).write_bytes(pickle.dumps(_Marks(marker)))
    found = loader.ask(str(directory), QUERY, TEXTS, backend="torch", precision="fp32")
    right = loader.ask(str(layouts.build("ms_marco_minilm")), QUERY, TEXTS, backend="torch", precision="fp32")
    assert found["logits"] == pytest.approx(right["logits"], abs=1e-5)
    assert not marker.exists()


# -- code -------------------------------------------------------------------------------------------------------------

CALLED = "torch.utils.collect_env.main"


def _activation(directory: Path, old: bool = False) -> None:
    if old:
        edit(directory / "config.json", sentence_transformers=DROP, sbert_ce_default_activation_function=CALLED)
    else:
        edit(directory / "config.json", sentence_transformers={"activation_fn": CALLED, "version": "5.4.0"})


def _activation_of_modules(directory: Path) -> None:
    saved(directory)
    edit(directory / "config_sentence_transformers.json", activation_fn=CALLED, model_type="CrossEncoder")


@pytest.mark.parametrize(
    "make", [_activation, lambda directory: _activation(directory, old=True), _activation_of_modules]
)
def test_no_function_that_a_config_names_is_called(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.utils.collect_env

    called: list[str] = []
    monkeypatch.setattr(torch.utils.collect_env, "main", lambda: called.append("main"))
    directory = copied("ms_marco_minilm", tmp_path)
    make(directory)
    right = Reranker(layouts.build("ms_marco_minilm"), backend="torch", precision="fp32").logits(QUERY, TEXTS)
    assert Reranker(directory, backend="torch", precision="fp32").logits(QUERY, TEXTS) == pytest.approx(right, abs=1e-5)
    convert(str(directory), tmp_path / "converted")
    assert called == []


def test_no_activation_of_a_head_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.utils.collect_env

    called: list[str] = []
    monkeypatch.setattr(torch.utils.collect_env, "main", lambda: called.append("main"))
    directory = copied("ettin_reranker", tmp_path)
    edit(directory / "2_Dense/config.json", activation_function=CALLED)
    with pytest.raises(ModelLoadError, match="2_Dense"):
        Reranker(directory, backend="torch").prepare()
    assert called == []


def _code(directory: Path, marker: Path) -> None:
    (directory / "own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass A: pass\n")


@pytest.mark.parametrize(
    ("layout", "file", "changes"),
    [
        ("ms_marco_minilm", "config.json", {"auto_map": {"AutoModelForSequenceClassification": "own.A"}}),
        ("ms_marco_minilm", "config.json", {"auto_map": {"AutoConfig": "own.A"}, "model_type": "own"}),
        (
            "ms_marco_minilm",
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["own.A", "own.A"]}, "tokenizer_class": "A"},
        ),
        ("ms_marco_minilm", "modules.json", [FIRST, {"idx": 1, "name": "1", "path": "", "type": "own.A"}]),
        ("qwen3_reranker_modules", "config.json", {"auto_map": {"AutoModelForCausalLM": "own.A"}}),
    ],
)
@pytest.mark.parametrize("engine", ["onnx", "torch", "auto"])
def test_no_code_of_the_directory_runs(layout: str, file: str, changes: Any, engine: str, tmp_path: Path) -> None:
    directory, marker = copied(layout, tmp_path), tmp_path / "marker"
    _code(directory, marker)
    if isinstance(changes, list):
        (directory / file).write_text(json.dumps(changes))
    else:
        edit(directory / file, **changes)
    try:
        Reranker(directory, backend=engine).logits(QUERY, TEXTS)
    except RerankError as error:
        told = str(error)
    else:
        told = "trust_remote_code"
    assert any(words in told for words in ("trust_remote_code", file, "no ONNX graph"))
    assert not marker.exists()


# -- templates --------------------------------------------------------------------------------------------------------

ROLES = "{{ messages[0].content }} {{ messages[1].content }}"
TEMPLATES = {
    "ten gigabytes": ROLES + "{{ 'a' * 10 ** 10 }}",
    "a gigabyte by joining": ROLES + "{{ ('a' * 10 ** 5 + ',') * 10 ** 4 }}",
    "loops without end": ROLES + "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3,
    "a large number": ROLES + "{{ 9 ** 9 ** 9 }}",
    "a regular width": ROLES + "{{ '%999999999d' % 1 }}",
    "a formatted width": ROLES + "{{ '{:>999999999}'.format(1) }}",
    "a filter's width": ROLES + "{{ 'a' | center(999999999) }}",
    "recursion": "{% macro m(x) %}{{ m(x) }}{% endmacro %}" + ROLES + "{{ m(1) }}",
    "raises": "{{ raise_exception('only user and assistant') }}",
    "raises for the roles": "{% for m in messages %}{% if m.role not in ('user', 'system') %}"
    "{{ raise_exception('unknown role') }}{% endif %}{{ m.content }}{% endfor %}",
    "private attributes": ROLES + "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "no such filter": ROLES + "{{ 1 | nothing }}",
    "no syntax": "{% if %}",
    "another file": "{% include '/etc/passwd' %}" + ROLES,
    "undefined": "{{ a.b.c }}",
    "a division": ROLES + "{{ 1 / 0 }}",
}


# A causal model and one with a head go the same way to their template: a few are enough for the other one.
@pytest.mark.parametrize(
    ("layout", "case"),
    [
        *(("qwen3_reranker_modules", case) for case in TEMPLATES),
        *(("qwen3_seq_cls_modules", case) for case in ("ten gigabytes", "raises", "no syntax")),
    ],
)
def test_a_template_that_cannot_be_rendered_is_an_error(layout: str, case: str, loader: Loader, tmp_path: Path) -> None:
    directory = copied(layout, tmp_path)
    (directory / "chat_template.jinja").write_text(TEMPLATES[case])
    refused(loader, directory, "torch", "template")


@pytest.mark.parametrize("value", [5, ["x"], {"a": 1}, [{"name": "default"}], [{"name": 5, "template": 6}]])
def test_a_template_that_is_no_text(value: object, loader: Loader, tmp_path: Path) -> None:
    directory = copied("qwen3_reranker_modules", tmp_path)
    (directory / "chat_template.jinja").unlink()
    edit(directory / "tokenizer_config.json", chat_template=value)
    refused(loader, directory, "torch", "template")


def test_a_template_that_only_some_texts_set_off(loader: Loader, tmp_path: Path) -> None:
    directory = copied("qwen3_reranker_modules", tmp_path)
    (directory / "chat_template.jinja").write_text(
        ROLES + "{% if 'bamboo' in messages[1].content %}{{ 'a' * 10 ** 10 }}{% endif %}"
    )
    found = loader.ask(str(directory), QUERY, TEXTS, within_s=WITHIN_S, backend="torch")
    # Where a template does not run for each text, there is nothing to refuse.
    assert "logits" in found or found["error"] in ("ModelLoadError", "ScoringError"), found
