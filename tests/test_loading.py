"""Checkpoints and graphs as they are published: the right logits on every engine, or an error that says why."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from checkpoints import CHAT_TEMPLATE, POSITIONS, QUERY, TEXTS, tiny
from onnx import TensorProto, helper
from sentence_transformers import CrossEncoder
from test_backends import converted, expected

from rerank_plugins import Reranker, Settings
from rerank_plugins.backends import load_backend
from rerank_plugins.backends._files import ModelFiles, converted_directory
from rerank_plugins.conversion import convert
from rerank_plugins.errors import ConfigurationError, ModelLoadError
from rerank_plugins.testing import check_backend_contract

GRAPH_ENGINES = ("onnx", "openvino")


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; `...` takes one out."""
    values = json.loads(file.read_text()) if file.exists() else {}
    values.update({key: value for key, value in changes.items() if value is not ...})
    file.write_text(json.dumps({key: value for key, value in values.items() if changes.get(key) is not ...}))


def copy_of(source: str, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def logits(model: Path | str, engine: str = "auto", **keywords: Any) -> np.ndarray:
    return Reranker(model, backend=engine, precision="fp32", **keywords).logits(QUERY, TEXTS)


def by_sentence_transformers(model: Path | str, **keywords: Any) -> np.ndarray:
    encoder = CrossEncoder(str(model), device="cpu", **keywords)
    pairs = [(QUERY, text) for text in TEXTS]
    # One at a time: a decoder without a padding token takes no more.
    return encoder.predict(pairs, batch_size=1, activation_fn=torch.nn.Identity())


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForMaskedLM"])
def test_an_encoder_is_no_reranker_and_never_gets_a_random_head(kind: str, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    getattr(transformers, kind).from_pretrained(tiny("bert")).save_pretrained(encoder)
    transformers.AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(encoder)
    for load in (lambda: Reranker(encoder).prepare(), lambda: convert(encoder, tmp_path / "graph")):
        with pytest.raises(ModelLoadError, match="no classification head.*an embedding model is no reranker"):
            load()
    # Its configuration alone does not make it one.
    edit(encoder / "config.json", architectures=["BertForSequenceClassification"])
    for load in (lambda: Reranker(encoder).prepare(), lambda: convert(encoder, tmp_path / "graph")):
        with pytest.raises(
            ModelLoadError, match=r"lacks weights that BertForSequenceClassification needs: .*classifier"
        ):
            load()


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ("classifier.", r"needs: classifier\.bias, classifier\.weight\. It has no classification head"),
        ("bert.encoder.layer.1.", r"needs: bert\.encoder\.layer\.1\..* and 8 more\. The checkpoint is incomplete"),
        ("bert.pooler.dense.weight", r"needs: bert\.pooler\.dense\.weight"),
    ],
)
def test_missing_weights_are_named(taken: str, message: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = copy_of(tiny("bert"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(taken)}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=message):
        Reranker(model).prepare()
    edit(model / "config.json", auto_map={"AutoModelForSequenceClassification": "code.Model"})
    with pytest.raises(ModelLoadError, match="trust_remote_code=True"):
        Reranker(model).prepare()


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a head, whose chat template takes a query and a document."""
    model = copy_of(tiny("causal-qwen3"), tmp_path_factory.mktemp("decoder") / "seq-cls")
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(model)
    config.num_labels = 1
    transformers.Qwen3ForSequenceClassification(config).save_pretrained(model)
    return model


def test_a_decoder_with_a_head_reads_its_chat_template(decoder: Path, tmp_path: Path) -> None:
    right = by_sentence_transformers(decoder)
    assert np.abs(logits(decoder, "torch") - right).max() < 1e-4
    saved = tmp_path / "saved"
    CrossEncoder(str(decoder), device="cpu").save_pretrained(str(saved))
    assert np.abs(logits(saved, "torch") - right).max() < 1e-4
    out = tmp_path / "graph"
    convert(decoder, out)
    for engine in GRAPH_ENGINES:
        assert np.abs(logits(out, engine) - right).max() < 1e-4
    instruction = "Find passages about bears."
    encoder = CrossEncoder(str(decoder), device="cpu")
    told = encoder.predict([(QUERY, text) for text in TEXTS], prompt=instruction, activation_fn=torch.nn.Identity())
    for model, engine in ((decoder, "torch"), (out, "onnx")):
        assert np.abs(logits(model, engine, instruction=instruction) - told).max() < 1e-4


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content[0].text }}|{% endfor %}",
        "{{ messages[1].content }} ? {{ messages[0].content }} ? {{ messages[0].content }}",
    ],
)
def test_templates_render_as_transformers_renders_them(template: str, decoder: Path, tmp_path: Path) -> None:
    model = copy_of(str(decoder), tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    texts = ["  two  spaces \n", "short", "Straße é 熊猫"]
    encoder = CrossEncoder(str(model), device="cpu")
    right = encoder.predict([(QUERY, text) for text in texts], batch_size=1, activation_fn=torch.nn.Identity())
    ours = Reranker(model, precision="fp32").logits(QUERY, texts)
    assert np.abs(ours - right).max() < 1e-4


def test_a_decoder_without_a_usable_prompt_is_refused_whatever_its_family(tmp_path: Path) -> None:
    model = copy_of(tiny("causal-qwen3"), tmp_path / "chat")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}")
    with pytest.raises(ModelLoadError, match="chat template does not put the role 'query' and 'document' into"):
        Reranker(model).prepare()
    named = copy_of(str(model), tmp_path / "Qwen3-Reranker-0.6B")
    assert Reranker(named).backend_name == "torch"
    edit(named / "config.json", auto_map={"AutoModel": "modeling_other.Model"})
    with pytest.raises(ModelLoadError, match="brings its own code"):
        Reranker(named, threads=1).prepare()


def test_a_decoder_without_a_padding_token_scores_several_texts(decoder: Path, tmp_path: Path) -> None:
    model = copy_of(str(decoder), tmp_path / "model")
    edit(model / "config.json", pad_token_id=None)
    right = by_sentence_transformers(model)
    assert np.abs(logits(model, "torch") - right).max() < 1e-4
    edit(model / "tokenizer_config.json", pad_token=...)
    check_backend_contract(load_backend(Settings(str(model), backend="torch", precision="fp32")))
    assert np.abs(logits(model, "torch") - right).max() < 1e-4


# -- one model, one score ---------------------------------------------------------------------------------------------


def test_every_engine_reads_the_published_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, normalizers

    model = copy_of(tiny("bert"), tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    # What transformers would build anew from the vocabulary does not have it.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("panda", "bear"), tokenizer.normalizer])
    tokenizer.save(str(model / "tokenizer.json"))
    edit(model / "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=True)
    convert(model, tmp_path / "graph")
    found = logits(model, "torch")
    assert np.abs(found - expected("bert")).max() > 1e-3
    for engine in GRAPH_ENGINES:
        assert np.abs(logits(tmp_path / "graph", engine) - found).max() < 1e-4
    plain = logits(tiny("bert"), "torch")
    texts = [text.replace("panda", "bear") for text in TEXTS]
    query = QUERY.replace("panda", "bear")
    assert np.abs(Reranker(tiny("bert"), precision="fp32").logits(query, texts) - found).max() < 1e-4
    assert np.abs(plain - found).max() > 1e-3


@pytest.mark.parametrize("change", ["prompt", "tokenizer", "head"])
def test_a_converted_graph_is_only_found_for_what_it_was_made_of(change: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    CrossEncoder(tiny("bert"), device="cpu").save_pretrained(str(source), create_model_card=False)
    directory = converted_directory(ModelFiles(source, "x"))
    shutil.copytree(converted("bert"), directory)
    assert Reranker(source, precision="fp32").backend_name == "openvino"
    if change == "prompt":
        edit(source / "config_sentence_transformers.json", prompts={"q": "search: "}, default_prompt_name="q")
    elif change == "tokenizer":
        text = (source / "tokenizer.json").read_text().replace('"lowercase": true', '"lowercase": false')
        (source / "tokenizer.json").write_text(text)
    else:
        (source / "2_Dense").mkdir()
        (source / "2_Dense/config.json").write_text("{}")
    assert Reranker(source, backend="auto", precision="fp32", threads=1).backend_name == "torch"


# -- graphs -----------------------------------------------------------------------------------------------------------


def graph_of(family: str, target: Path) -> tuple[Path, Any]:
    directory = copy_of(converted(family), target)
    return directory, onnx.load(str(directory / "model.onnx"))


def test_inputs_are_cast_to_what_the_graph_takes(tmp_path: Path) -> None:
    directory, model = graph_of("bert", tmp_path / "graph")
    casts = []
    for value in model.graph.input:
        value.type.tensor_type.elem_type = TensorProto.INT32
        for node in model.graph.node:
            node.input[:] = [f"{name}_64" if name == value.name else name for name in node.input]
        casts.append(helper.make_node("Cast", [value.name], [f"{value.name}_64"], to=TensorProto.INT64))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(directory / "model.onnx"))
    for engine in GRAPH_ENGINES:
        assert np.abs(logits(directory, engine) - expected("bert")).max() < 1e-4


def test_the_logits_are_found_among_other_outputs(tmp_path: Path) -> None:
    directory, model = graph_of("bert", tmp_path / "graph")
    hidden = next(node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization")
    model.graph.output.insert(0, helper.make_tensor_value_info(hidden, TensorProto.FLOAT, None))
    onnx.save(model, str(directory / "model.onnx"))
    for engine in GRAPH_ENGINES:
        assert np.abs(logits(directory, engine) - expected("bert")).max() < 1e-4


@pytest.mark.parametrize(("rows", "tokens"), [(1, None), (3, None), (None, 64), (2, 64)])
def test_fixed_shapes_are_honoured(rows: int | None, tokens: int | None, tmp_path: Path) -> None:
    directory, model = graph_of("bert", tmp_path / "graph")
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        for size, fixed in zip(sizes, (rows, tokens), strict=True):
            if fixed is not None:
                size.Clear()
                size.dim_value = fixed
    if rows is not None:
        size = model.graph.output[0].type.tensor_type.shape.dim[0]
        size.Clear()
        size.dim_value = rows
    onnx.save(model, str(directory / "model.onnx"))
    right = Reranker(converted("bert"), backend="onnx", max_length=tokens).logits(QUERY, TEXTS)
    for engine in GRAPH_ENGINES:
        assert np.abs(logits(directory, engine) - right).max() < 1e-4


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_a_graph_of_something_else_says_so_when_it_is_loaded(engine: str, tmp_path: Path) -> None:
    directory, model = graph_of("bert", tmp_path / "graph")
    hidden = next(node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization")
    del model.graph.output[:]
    for name, sizes in (
        ("last_hidden_state", ["batch", "tokens", 32]),
        ("sentence_embedding", ["batch", 32]),
        ("logits", ["batch", "tokens", 32]),
    ):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        changed.graph.node.append(helper.make_node("Identity", [hidden], [name]))
        changed.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
        onnx.save(changed, str(directory / "model.onnx"))
        with pytest.raises(ModelLoadError, match="embedding model|causal language model or a tagger"):
            Reranker(directory, backend=engine).prepare()


def test_auto_takes_torch_where_the_graph_is_the_encoders(tmp_path: Path) -> None:
    model = copy_of(tiny("bert"), tmp_path / "both")
    _, graph = graph_of("bert", tmp_path / "graph")
    hidden = next(node.output[0] for node in graph.graph.node if node.op_type == "LayerNormalization")
    del graph.graph.output[:]
    graph.graph.output.append(helper.make_tensor_value_info(hidden, TensorProto.FLOAT, None))
    (model / "onnx").mkdir()
    onnx.save(graph, str(model / "onnx/model.onnx"))
    reranker = Reranker(model, precision="fp32")
    assert np.abs(reranker.logits(QUERY, TEXTS) - expected("bert")).max() < 1e-4
    assert reranker.backend_name == "torch"


def test_auto_on_a_gpu_takes_a_graph_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rerank_plugins.backends._torch_on_gpu", lambda device: True)
    assert Reranker(converted("electra"), threads=2).backend_name == "openvino"


@pytest.mark.parametrize("location", ["model.onnx_data", "model.onnx.data", "5f3c9a1e-weights"])
def test_weights_beside_the_graph_are_found_through_links(location: str, tmp_path: Path) -> None:
    directory, model = graph_of("bert", tmp_path / "graph")
    (directory / "model.onnx").unlink()
    onnx.save(model, str(directory / "model.onnx"), save_as_external_data=True, location=location, size_threshold=0)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("model.onnx", location):
        shutil.move(directory / name, blobs / f"{len(name)}")
        (directory / name).symlink_to(blobs / f"{len(name)}")
    for engine in (*GRAPH_ENGINES, "auto"):
        assert np.abs(logits(directory, engine) - expected("bert")).max() < 1e-4
    assert not list(blobs.glob(".graph-*"))


def test_dynamic_int8_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    directory = copy_of(converted("bert"), tmp_path / "graph")
    quantize_dynamic(str(directory / "model.onnx"), str(directory / "q.onnx"), weight_type=QuantType.QInt8)
    (directory / "q.onnx").replace(directory / "model.onnx")
    edit(directory / "config.json", rerank_plugins=...)
    for engine, precision in (("auto", "auto"), ("onnx", "int8"), ("openvino", "int8")):
        backend = load_backend(Settings(str(directory), backend=engine, precision=precision))  # type: ignore[arg-type]
        assert (backend.precision, backend.name) == ("int8", "onnx" if engine == "auto" else engine)
        check_backend_contract(backend)
        found = Reranker(directory, backend=engine, precision=precision).logits(QUERY, TEXTS)  # type: ignore[arg-type]
        assert np.corrcoef(found, expected("bert"))[0, 1] > 0.9
    with pytest.raises(ConfigurationError, match="model.onnx is stored as int8"):
        Reranker(directory, backend="onnx", precision="fp32").prepare()


def test_fp16_is_a_graph_that_is_stored_so_or_an_error_that_sends_nobody_in_circles(tmp_path: Path) -> None:
    for engine in GRAPH_ENGINES:
        with pytest.raises(ConfigurationError, match=r"precision='fp16' is not available.*use backend='torch'"):
            Reranker(converted("bert"), backend=engine, precision="fp16").prepare()
    directory, model = graph_of("bert", tmp_path / "graph")
    half = {item.name for item in model.graph.initializer if item.data_type == TensorProto.FLOAT}
    for item in model.graph.initializer:
        if item.name in half:
            values = onnx.numpy_helper.to_array(item).astype(np.float16)
            item.CopyFrom(onnx.numpy_helper.from_array(values, f"{item.name}_half"))
    casts = [helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT) for name in sorted(half)]
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (directory / "model.onnx").unlink()
    onnx.save(model, str(directory / "model_fp16.onnx"))
    for engine in GRAPH_ENGINES:
        reranker = Reranker(directory, backend=engine, precision="fp16")
        assert np.abs(reranker.logits(QUERY, TEXTS) - expected("bert")).max() < 0.05
        assert reranker.precision == "fp16"


# -- lengths and classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["xlm-roberta", "roberta"])
@pytest.mark.parametrize("lacks", ["model_type", "pad_token_id", "both", "null"])
def test_the_longest_pair_of_roberta_is_known_without_the_configurations_help(
    family: str, lacks: str, tmp_path: Path
) -> None:
    directory = copy_of(converted(family), tmp_path / "graph")
    gone = {"model_type": ("model_type", "architectures"), "pad_token_id": ("pad_token_id",), "null": ()}.get(
        lacks, ("model_type", "pad_token_id", "architectures")
    )
    edit(directory / "config.json", rerank_plugins=..., **dict.fromkeys(gone, ...))
    if lacks == "null":
        edit(directory / "config.json", pad_token_id=None)
    edit(directory / "tokenizer_config.json", model_max_length=...)
    for engine in GRAPH_ENGINES:
        reranker = Reranker(directory, backend=engine, precision="fp32")
        assert np.abs(reranker.logits(QUERY, TEXTS) - expected(family)).max() < 1e-4
        assert reranker.max_length == POSITIONS
    if lacks in ("pad_token_id", "null"):
        model = copy_of(tiny(family), tmp_path / "model")
        edit(model / "config.json", pad_token_id=None if lacks == "null" else ...)
        edit(model / "tokenizer_config.json", model_max_length=...)
        assert np.abs(logits(model, "torch") - expected(family)).max() < 1e-4


def test_settings_for_the_length_and_prompts_count_where_sentence_transformers_reads_them(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    CrossEncoder(tiny("bert"), device="cpu").save_pretrained(str(saved), create_model_card=False)
    edit(saved / "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 40}})
    right = by_sentence_transformers(saved)
    assert np.abs(right - expected("bert")).max() > 1e-3
    convert(saved, tmp_path / "graph")
    for model, engine in ((saved, "torch"), (tmp_path / "graph", "onnx"), (tmp_path / "graph", "openvino")):
        assert np.abs(logits(model, engine) - right).max() < 1e-4
    # Without modules.json nobody has saved those settings for this model.
    plain = copy_of(tiny("bert"), tmp_path / "plain")
    (plain / "onnx").mkdir()
    shutil.copy(Path(converted("bert")) / "model.onnx", plain / "onnx/model.onnx")
    edit(plain / "config_sentence_transformers.json", prompts={"q": "search: "}, default_prompt_name="q")
    edit(plain / "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 40}})
    assert np.abs(by_sentence_transformers(plain) - expected("bert")).max() < 1e-4
    for engine in ("torch", *GRAPH_ENGINES):
        assert np.abs(logits(plain, engine) - expected("bert")).max() < 1e-4


@pytest.mark.parametrize("engine", ["torch", *GRAPH_ENGINES])
def test_two_classes_without_names_are_two_on_every_engine(engine: str, tmp_path: Path) -> None:
    source = tiny("bert-2class") if engine == "torch" else converted("bert-2class")
    model = copy_of(source, tmp_path / "model")
    edit(model / "config.json", id2label=..., label2id=..., num_labels=..., rerank_plugins=...)
    for label in (None, 1, "LABEL_1"):
        assert np.abs(logits(model, engine, label=label) - expected("bert-2class")).max() < 1e-4
    assert np.abs(logits(model, engine, label=0) + expected("bert-2class")).max() < 1e-4


def test_the_class_that_says_not_is_never_ranked_by_unless_asked_for(tmp_path: Path) -> None:
    model = copy_of(converted("bert-2class"), tmp_path / "model")
    edit(model / "config.json", id2label={"0": "entailment", "1": "not_entailment"})
    with pytest.raises(ConfigurationError, match="label="):
        Reranker(model).prepare()
    assert np.abs(logits(model, "onnx", label="entailment") + expected("bert-2class")).max() < 1e-4


# -- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError("Could not determine home directory."), OSError("no such file")])
def test_auto_passes_an_engine_over_whose_import_fails(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from rerank_plugins import _engines
    from rerank_plugins._extras import import_extra

    def broken(module: str) -> None:
        raise failure

    def openvino() -> Any:
        monkeypatch.setattr("importlib.import_module", broken)
        try:
            return import_extra("openvino", "openvino")
        finally:
            monkeypatch.undo()

    monkeypatch.setattr(_engines, "openvino", openvino)
    assert Reranker(converted("roberta"), threads=1).backend_name == "onnx"


def test_a_missing_directory_is_no_hub_id() -> None:
    for name in ("/models/nope", "./missing", "~/missing", "a/b/c"):
        with pytest.raises(ModelLoadError, match="There is no directory"):
            Reranker(name).prepare()
    graph = f"{converted('bert')}/model.onnx"
    with pytest.raises(ModelLoadError, match="is a file. Give the directory it lies in"):
        Reranker(graph).prepare()


def test_the_log_says_what_was_loaded_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "rerank_plugins"):
        Reranker(tiny("electra"), precision="fp32", threads=2).prepare()
    (loaded,) = [record for record in caplog.records if record.levelno == logging.INFO]
    assert loaded.name == "rerank_plugins"
    for part in (tiny("electra"), "on torch in fp32", "not openvino", "no ONNX graph"):
        assert part in loaded.getMessage()
    assert any("onnx cannot run it" in record.getMessage() for record in caplog.records)


def test_nothing_is_logged_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    Reranker(converted("electra"), backend="onnx", threads=2).prepare()
    assert capfd.readouterr() == ("", "")


def test_an_adapter_scores_with_its_base(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    encoder = CrossEncoder(tiny("bert"), device="cpu")
    torch.manual_seed(1)
    encoder.add_adapter(
        LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False, target_modules=["query", "value"])
    )
    encoder.save_pretrained(str(tmp_path / "adapter"), create_model_card=False)
    right = by_sentence_transformers(tmp_path / "adapter")
    reranker = Reranker(tmp_path / "adapter", precision="fp32")
    assert np.abs(reranker.logits(QUERY, TEXTS) - right).max() < 1e-4
    assert np.abs(right - expected("bert")).max() > 1e-3
    # The base decides the score too.
    base = copy_of(tiny("bert"), tmp_path / "base")
    edit(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(base))
    before = load_backend(Settings(str(tmp_path / "adapter"), threads=1)).fingerprint
    edit(base / "config.json", note="another")
    assert load_backend(Settings(str(tmp_path / "adapter"), threads=2)).fingerprint != before
    with pytest.raises(ModelLoadError, match=r"adapter \(LoRA\).*merge_and_unload"):
        Reranker(tmp_path / "adapter", backend="onnx").prepare()


def test_the_chat_template_of_the_tests_is_one_that_takes_both_roles() -> None:
    assert "'query'" in CHAT_TEMPLATE
    assert "'document'" in CHAT_TEMPLATE
