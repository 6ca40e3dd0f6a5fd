"""The file listings and configurations of published rerankers, as tiny seeded checkpoints.

`build(NAME)` returns a directory with exactly the files of the repository that `REPOSITORIES[NAME]` names, config.json
with its keys. Files that nothing may read are there with contents that are no model.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layout_parts as parts
import torch
import transformers as tf
from checkpoints import CHAT_TEMPLATE
from layout_parts import DROP, edit, exported, labels, put, save, seeded

UNREAD = b"this file is not to be read"
IDENTITY = "torch.nn.modules.linear.Identity"
PAIR = ("input_ids", "attention_mask")
"""What graphs of families without token types take."""


def _unread(directory: Path, *names: str) -> None:
    for name in names:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(UNREAD)


def _card(directory: Path, **front_matter: object) -> None:
    lines = [f"{key}: {value}" for key, value in front_matter.items()]
    (directory / "README.md").write_text("\n".join(["---", *lines, "---", "", "A model card.", ""]))
    (directory / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")


# -- BERT, ELECTRA and RoBERTa ----------------------------------------------------------------------------------------


def _bert(directory: Path, n_labels: int = 1, **changes: object) -> None:
    config = parts.bert_config(parts.wordpiece_tokenizer(directory), num_labels=n_labels)
    save(seeded(lambda: tf.BertForSequenceClassification(config)), directory, **changes)


def ms_marco_minilm(directory: Path) -> None:
    _bert(
        directory,
        **labels("LABEL_0"),
        gradient_checkpointing=False,
        position_embedding_type="absolute",
        sentence_transformers={"activation_fn": IDENTITY, "version": "4.1.0.dev0"},
    )
    _card(directory, pipeline_tag="text-ranking", library_name="sentence-transformers")
    graph = exported("bert", directory)
    put(graph, directory / "onnx/model.onnx")
    variants = ("O1", "O2", "O3", "O4")
    put(parts.decoy(graph), *(directory / f"onnx/model_{variant}.onnx" for variant in variants))
    rounded = ("qint8_arm64", "qint8_avx512", "qint8_avx512_vnni", "quint8_avx2")
    put(parts.dynamic_int8(graph), *(directory / f"onnx/model_{variant}.onnx" for variant in rounded))
    _unread(directory, "flax_model.msgpack", "pytorch_model.bin")
    _unread(directory, *(f"openvino/openvino_model{kind}" for kind in (".xml", ".bin")))
    _unread(directory, *(f"openvino/openvino_model_qint8_quantized{kind}" for kind in (".xml", ".bin")))


def without_segments(directory: Path) -> None:
    """A tokenizer whose configuration leaves out token_type_ids, under a model and a graph that have them."""
    ms_marco_minilm(directory)
    edit(directory / "tokenizer_config.json", model_input_names=list(PAIR))


def baked_tokenizer(directory: Path) -> None:
    """A tokenizer.json that was saved while it cut and padded."""
    ms_marco_minilm(directory)
    edit(
        directory / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 100},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
    )


def convbert(directory: Path) -> None:
    """Convolutions over tokens, which reach into padding."""
    config = tf.ConvBertConfig(
        vocab_size=parts.wordpiece_tokenizer(directory),
        embedding_size=32,
        head_ratio=2,
        max_position_embeddings=parts.POSITIONS,
        pad_token_id=0,
        num_labels=1,
        **parts.SIZES,
    )
    edit(directory / "tokenizer_config.json", tokenizer_class="ConvBertTokenizer")
    save(seeded(lambda: tf.ConvBertForSequenceClassification(config)), directory, **labels("LABEL_0"))
    _card(directory)


def rounded_variants(directory: Path) -> None:
    """The graphs of a repository without the one in float32."""
    xenova_minilm(directory)
    (directory / "onnx/model.onnx").unlink()


def xenova_minilm(directory: Path) -> None:
    _bert(directory, **labels("LABEL_0"), _name_or_path="cross-encoder/ms-marco-MiniLM-L-6-v2", torch_dtype=DROP)
    graph = exported("bert", directory)
    (directory / "model.safetensors").unlink()
    _card(directory, library_name="transformers.js", base_model="cross-encoder/ms-marco-MiniLM-L-6-v2")
    (directory / "quantize_config.json").write_text(json.dumps({"per_channel": True, "reduce_range": True}))
    put(graph, directory / "onnx/model.onnx")
    put(parts.half(graph), directory / "onnx/model_fp16.onnx")
    put(parts.dynamic_int8(graph), *(directory / f"onnx/model_{kind}.onnx" for kind in ("int8", "quantized", "uint8")))
    put(parts.four_bits(graph), *(directory / f"onnx/model_{kind}.onnx" for kind in ("bnb4", "q4", "q4f16")))


def monobert(directory: Path) -> None:
    _bert(directory, n_labels=2, id2label=DROP, label2id=DROP, torch_dtype=DROP, transformers_version=DROP)
    for name in ("model.safetensors", "tokenizer.json"):
        (directory / name).unlink()
    _unread(directory, "pytorch_model.bin", "flax_model.msgpack", "tf_model.h5")
    _card(directory)


def monobert_converted(directory: Path) -> None:
    """The same after the Hub's conversion to safetensors, with a graph. config.json still names no classes."""
    _bert(directory, n_labels=2, id2label=DROP, label2id=DROP, torch_dtype=DROP, transformers_version=DROP)
    put(exported("bert-2", directory), directory / "onnx/model.onnx")
    _unread(directory, "pytorch_model.bin", "tf_model.h5")
    _card(directory)


def bert_base_uncased(directory: Path) -> None:
    """A language model: everything but a classifier."""
    config = parts.bert_config(parts.wordpiece_tokenizer(directory))
    save(seeded(lambda: tf.BertForMaskedLM(config)), directory, gradient_checkpointing=False)
    _unread(directory, "flax_model.msgpack", "pytorch_model.bin", "rust_model.ot", "tf_model.h5")
    _card(directory, pipeline_tag="fill-mask")


def without_a_layer(directory: Path) -> None:
    """A checkpoint whose config.json promises more layers than its weights have."""
    _bert(directory, **labels("LABEL_0"))
    edit(directory / "config.json", num_hidden_layers=3)


def qnli_electra(directory: Path) -> None:
    vocabulary = parts.wordpiece_tokenizer(directory)
    edit(directory / "tokenizer_config.json", tokenizer_class="ElectraTokenizer")
    config = tf.ElectraConfig(
        vocab_size=vocabulary,
        embedding_size=16,
        max_position_embeddings=parts.POSITIONS,
        pad_token_id=0,
        num_labels=1,
        **parts.SIZES,
    )
    model = seeded(lambda: tf.ElectraForSequenceClassification(config))
    save(
        model,
        directory,
        **labels("LABEL_0"),
        sentence_transformers={"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "4.0.1"},
    )
    put(exported("electra", directory), directory / "onnx/model.onnx")
    _unread(directory, "pytorch_model.bin", "flax_model.msgpack", "onnx/model_O1.onnx")
    _card(directory, pipeline_tag="text-ranking")


def _roberta(directory: Path, **changes: object) -> None:
    config = tf.RobertaConfig(
        vocab_size=parts.roberta_tokenizer(directory),
        max_position_embeddings=parts.POSITIONS + 2,
        pad_token_id=1,
        type_vocab_size=1,
        num_labels=1,
        layer_norm_eps=1e-5,
        **parts.SIZES,
    )
    save(seeded(lambda: tf.RobertaForSequenceClassification(config)), directory, **labels("LABEL_0"), **changes)
    put(exported("roberta", directory, PAIR), directory / "onnx/model.onnx")
    _unread(directory, "pytorch_model.bin", "flax_model.msgpack", "onnx/model_O4.onnx")
    _unread(directory, "openvino/openvino_model.xml", "openvino/openvino_model.bin")
    _card(directory, pipeline_tag="text-ranking")


def quora_roberta(directory: Path) -> None:
    _roberta(directory, gradient_checkpointing=False)


def stsb_roberta(directory: Path) -> None:
    """As quora's, with neither pad_token_id nor a limit of the tokenizer: what the oldest transformers left out."""
    _roberta(directory)
    edit(directory / "config.json", pad_token_id=DROP, bos_token_id=DROP, eos_token_id=DROP)
    edit(directory / "tokenizer_config.json", model_max_length=DROP)


# -- XLM-RoBERTa ------------------------------------------------------------------------------------------------------


def _xlm_roberta(directory: Path, **changes: object) -> Path:
    """Returns the graph."""
    config = parts.xlm_roberta_config(parts.xlm_roberta_tokenizer(directory), num_labels=1)
    save(seeded(lambda: tf.XLMRobertaForSequenceClassification(config)), directory, **labels("LABEL_0"), **changes)
    _card(directory, pipeline_tag="text-classification")
    return exported("xlm-roberta", directory, PAIR)


def bge_reranker_base(directory: Path) -> None:
    put(_xlm_roberta(directory, output_past=True), directory / "onnx/model.onnx")
    _unread(directory, "pytorch_model.bin")


def bge_reranker_large(directory: Path) -> None:
    parts.external(_xlm_roberta(directory, output_past=True), directory / "onnx/model.onnx", "model.onnx_data")
    _unread(directory, "pytorch_model.bin")


def bge_reranker_v2_m3(directory: Path) -> None:
    _xlm_roberta(directory, output_past=True)
    _unread(directory, "assets/BEIR-bge-en-v1.5.png")


def bge_m3_onnx_o3(directory: Path) -> None:
    """A graph alone, its weights in model.onnx.data."""
    graph = _xlm_roberta(directory)
    for name in ("model.safetensors", "sentencepiece.bpe.model"):
        (directory / name).unlink()
    parts.external(graph, directory / "model.onnx", "model.onnx.data")


def bge_m3_onnx_uuid(directory: Path) -> None:
    """A graph alone, its weights in a file whose name says nothing."""
    graph = _xlm_roberta(directory)
    (directory / "model.safetensors").unlink()
    parts.external(graph, directory / "model.onnx", "5a0b0ef2-9a3a-11ef-b7d7-0242ac1c000c")


GEMMA_PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)


def bge_reranker_v2_gemma(directory: Path) -> None:
    config = tf.GemmaConfig(
        vocab_size=parts.gemma_tokenizer(directory),
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **parts.SIZES,
    )
    changes = {"rope_parameters": DROP, "rope_theta": 10000.0, "rope_scaling": None, "use_cache": False}
    save(seeded(lambda: tf.GemmaForCausalLM(config)), directory, shards=2, **changes)
    (directory / "generation_config.json").unlink(missing_ok=True)
    _unread(directory, "tokenizer.model", "assets/llm-index.png")
    _card(directory, pipeline_tag="text-classification", library_name="transformers")


# -- repositories with code of their own ------------------------------------------------------------------------------

_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

{config_class}


class {model}(PreTrainedModel):
    config_class = {config}

    def __init__(self, config):
        super().__init__(config)
        self.embedder = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.gated = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, **others):
        mask = attention_mask.unsqueeze(-1).to(self.gated.weight.dtype)
        hidden = torch.tanh(self.gated(self.embedder(input_ids))) * mask
        position = 1 + torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(-1) * 0.01
        pooled = (hidden * position).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(pooled))
"""


def _own_code(directory: Path, vocabulary: int, names: tuple[str, str, str, str], **config: object) -> Any:
    """Writes a model of its own as two modules; returns it with seeded weights."""
    configuration, config_name, modeling, model_name = names
    config_class = f"class {config_name}(PretrainedConfig):\n    model_type = {config.get('model_type', '')!r}"
    (directory / f"{configuration}.py").write_text(f"from transformers import PretrainedConfig\n\n\n{config_class}\n")
    code = _CODE.format(
        config_class=f"from .{configuration} import {config_name}", config=config_name, model=model_name
    )
    (directory / f"{modeling}.py").write_text(code)
    scope: dict[str, Any] = {"__name__": f"tests_{modeling}"}
    exec(_CODE.format(config_class=config_class, config=config_name, model=model_name), scope)
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "num_labels": 1}
    model = seeded(lambda: scope[model_name](scope[config_name](**sizes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def jina_reranker_v1_turbo(directory: Path) -> None:
    vocabulary = parts.roberta_tokenizer(directory)
    names = ("configuration_bert", "JinaBertConfig", "modeling_bert", "JinaBertForSequenceClassification")
    model = _own_code(directory, vocabulary, names, model_type="bert")
    save(model, directory)
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").unlink()
    edit(
        directory / "config.json",
        architectures=["JinaBertModel"],
        attention_probs_dropout_prob=0.1,
        auto_map={
            "AutoConfig": "configuration_bert.JinaBertConfig",
            "AutoModel": "modeling_bert.JinaBertModel",
            "AutoModelForMaskedLM": "modeling_bert.JinaBertForMaskedLM",
            "AutoModelForSequenceClassification": "modeling_bert.JinaBertForSequenceClassification",
        },
        classifier_dropout=None,
        emb_pooler="mean",
        feed_forward_type="geglu",
        hidden_act="gelu",
        hidden_size=32,
        intermediate_size=64,
        layer_norm_eps=1e-12,
        max_position_embeddings=parts.POSITIONS,
        model_type="bert",
        num_attention_heads=4,
        num_hidden_layers=2,
        pad_token_id=0,
        position_embedding_type="alibi",
        torch_dtype="float32",
        transformers_version="4.41.2",
        type_vocab_size=2,
        use_cache=True,
        vocab_size=written["vocab_size"],
    )
    graph = parts.workshop() / "jina-v1.onnx"
    if not graph.exists():
        parts.export(model, graph, PAIR)
    put(graph, directory / "onnx/model.onnx")
    put(parts.dynamic_int8(graph), directory / "onnx/model_quantized.onnx")
    put(parts.half(graph), directory / "onnx/model_fp16.onnx")
    _unread(directory, "pytorch_model.bin")
    _card(directory, library_name="transformers", pipeline_tag="text-classification")


def jina_reranker_v2(directory: Path) -> None:
    """config.json without model_type, tokenizer_config.json without a limit: 1026 positions, of which 1024 are used."""
    vocabulary = parts.xlm_roberta_tokenizer(directory, sentencepiece_file=False, limit=None)
    names = (
        "configuration_xlm_roberta",
        "XLMRobertaFlashConfig",
        "modeling_xlm_roberta",
        "XLMRobertaForSequenceClassification",
    )
    save(_own_code(directory, vocabulary, names), directory)
    (directory / "config.json").unlink()
    edit(
        directory / "config.json",
        architectures=["XLMRobertaForSequenceClassification"],
        attention_probs_dropout_prob=0.1,
        auto_map={
            "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
            "AutoModel": "modeling_xlm_roberta.XLMRobertaModel",
            "AutoModelForSequenceClassification": "modeling_xlm_roberta.XLMRobertaForSequenceClassification",
        },
        bos_token_id=0,
        classifier_dropout=None,
        eos_token_id=2,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        hidden_size=32,
        **labels("LABEL_0"),
        initializer_range=0.02,
        intermediate_size=64,
        layer_norm_eps=1e-5,
        max_position_embeddings=parts.POSITIONS + 2,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_labels=1,
        output_past=True,
        pad_token_id=1,
        position_embedding_type="absolute",
        torch_dtype="float32",
        transformers_version="4.40.0",
        truncation_side="right",
        type_vocab_size=1,
        use_cache=False,
        use_flash_attn=True,
        vocab_size=vocabulary,
    )
    # The graph has positions, as the published one: more tokens than it has room for are an error of the engine's.
    config = parts.xlm_roberta_config(vocabulary, num_labels=1)
    graph = parts.workshop() / "jina-v2.onnx"
    if not graph.exists():
        parts.export(seeded(lambda: tf.XLMRobertaForSequenceClassification(config)), graph, PAIR)
    put(graph, directory / "onnx/model.onnx")
    put(parts.dynamic_int8(graph), *(directory / f"onnx/model_{kind}.onnx" for kind in ("int8", "quantized", "uint8")))
    put(parts.half(graph), directory / "onnx/model_fp16.onnx")
    put(parts.four_bits(graph), *(directory / f"onnx/model_{kind}.onnx" for kind in ("bnb4", "q4")))
    _card(directory, library_name="transformers", pipeline_tag="text-ranking")


# -- DeBERTa-v3 -------------------------------------------------------------------------------------------------------


def _deberta(directory: Path, *names: str, json_file: bool = True, **changes: object) -> Path:
    """Returns the graph."""
    config = parts.deberta_config(parts.deberta_tokenizer(directory), num_labels=len(names))
    model = seeded(lambda: tf.DebertaV2ForSequenceClassification(config), head=2.0)
    save(model, directory, **labels(*names), legacy=DROP, **changes)
    _card(directory, pipeline_tag="text-ranking")
    graph = exported(f"deberta-{len(names)}", directory, PAIR)
    if not json_file:
        for name in ("tokenizer.json", "added_tokens.json"):
            (directory / name).unlink()
    return graph


def mxbai_rerank_v1(directory: Path) -> None:
    graph = _deberta(directory, "LABEL_0")
    put(graph, directory / "onnx/model.onnx")
    put(parts.dynamic_int8(graph), directory / "onnx/model_quantized.onnx")


def nli_deberta_v3(directory: Path) -> None:
    put(_deberta(directory, "contradiction", "entailment", "neutral"), directory / "onnx/model.onnx")
    _unread(directory, "pytorch_model.bin", "onnx/model_O4.onnx", "onnx/model_qint8_avx512.onnx")
    _unread(directory, "openvino/openvino_model.xml", "openvino/openvino_model.bin")


def nli_deberta_v3_sentencepiece(directory: Path) -> None:
    """As it was before it had a tokenizer.json: spm.model alone."""
    _deberta(directory, "contradiction", "entailment", "neutral", json_file=False)
    _unread(directory, "pytorch_model.bin")


def deberta_zeroshot(directory: Path) -> None:
    put(_deberta(directory, "entailment", "not_entailment", pooler_dropout=0), directory / "onnx/model.onnx")
    put(parts.workshop() / "deberta-2.onnx", directory / "onnx/model_quantized.onnx")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spm.model"):
        shutil.copy(directory / name, directory / "onnx" / name)


# -- ModernBERT -------------------------------------------------------------------------------------------------------

_MODERNBERT = {
    "rope_parameters": DROP,
    "layer_types": DROP,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "classifier_activation": "gelu",
    "classifier_dropout": 0.0,
    "reference_compile": False,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
}


def _modernbert(directory: Path, pooling: str, **changes: object) -> None:
    config = parts.modernbert_config(parts.modernbert_tokenizer(directory), num_labels=1, classifier_pooling=pooling)
    model = seeded(lambda: tf.ModernBertForSequenceClassification(config))
    save(model, directory, **labels("LABEL_0"), **_MODERNBERT, **changes)
    _card(directory, pipeline_tag="text-ranking")


def gte_reranker_modernbert(directory: Path) -> None:
    _modernbert(directory, "mean")
    graph = exported("modernbert", directory, PAIR)
    put(graph, directory / "onnx/model.onnx")
    put(parts.dynamic_int8(graph), *(directory / f"onnx/model_{kind}.onnx" for kind in ("int8", "quantized", "uint8")))
    put(parts.half(graph), directory / "onnx/model_fp16.onnx")
    put(parts.four_bits(graph), *(directory / f"onnx/model_{kind}.onnx" for kind in ("bnb4", "q4", "q4f16")))


def granite_reranker(directory: Path) -> None:
    _modernbert(
        directory,
        "cls",
        sentence_transformers={"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "4.0.2"},
    )


def ettin_reranker(directory: Path) -> None:
    """The head stands in modules beside the encoder, and onnx/model.onnx is the encoder alone."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    trunk = directory / "trunk"
    trunk.mkdir()
    config = parts.modernbert_config(parts.modernbert_tokenizer(trunk))
    save(seeded(lambda: tf.ModernBertModel(config)), trunk, **_MODERNBERT)
    torch.manual_seed(11)
    modules = [
        Transformer(str(trunk), transformer_task="feature-extraction"),
        Pooling(32, pooling_mode="cls"),
        Dense(32, 32, bias=False, activation_function=torch.nn.GELU()),
        LayerNorm(32),
        Dense(32, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    CrossEncoder(modules=modules, device="cpu").save_pretrained(str(directory), create_model_card=False)
    put(exported("modernbert-trunk", trunk, PAIR, "last_hidden_state"), directory / "onnx/model.onnx")
    shutil.rmtree(trunk)
    _card(directory, pipeline_tag="text-ranking", library_name="sentence-transformers")


# -- decoders ---------------------------------------------------------------------------------------------------------

_QWEN = {
    "rope_parameters": DROP,
    "layer_types": DROP,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
}


def _qwen3(directory: Path, template: str | None = parts.QWEN_CHAT_TEMPLATE, **config: object) -> tf.Qwen3Config:
    vocabulary = parts.qwen_tokenizer(directory, template)
    specials = json.loads((directory / "added_tokens.json").read_text())
    return tf.Qwen3Config(
        vocab_size=vocabulary,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40960,
        bos_token_id=specials["<|endoftext|>"],
        eos_token_id=specials["<|im_end|>"],
        tie_word_embeddings=True,
        **{**parts.SIZES, **config},
    )


def _qwen3_causal(directory: Path, template: str | None = parts.QWEN_CHAT_TEMPLATE, **changes: object) -> None:
    config = _qwen3(directory, template)
    shards = changes.pop("shards", 1)
    save(seeded(lambda: tf.Qwen3ForCausalLM(config)), directory, shards=shards, **_QWEN, **changes)  # type: ignore[arg-type]


def qwen3_reranker(directory: Path) -> None:
    """As first published: no modules.json, and Qwen's own chat template."""
    _qwen3_causal(directory)
    _card(directory, base_model="\n- Qwen/Qwen3-0.6B-Base", library_name="transformers", pipeline_tag="text-ranking")


def qwen3_reranker_modules(directory: Path) -> None:
    """With modules.json, a LogitScore and a template for the roles, as sentence-transformers publishes it."""
    _qwen3_causal(directory, None)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _sentence_transformers(
        directory,
        "text-generation",
        "causal_logits",
        {
            "name": "1",
            "path": "1_LogitScore",
            "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
        },
    )
    vocabulary = json.loads((directory / "vocab.json").read_text())
    edit(directory / "1_LogitScore/config.json", true_token_id=vocabulary["yes"], false_token_id=vocabulary["no"])
    _card(directory, pipeline_tag="text-ranking", library_name="sentence-transformers")


def _sentence_transformers(directory: Path, task: str, output: str, *modules: dict[str, Any]) -> None:
    first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    listed = [first, *({"idx": i + 1, **module} for i, module in enumerate(modules))]
    (directory / "modules.json").write_text(json.dumps(listed, indent=2))
    forward = {"method": "forward", "method_output_name": "logits"}
    edit(
        directory / "sentence_bert_config.json",
        transformer_task=task,
        modality_config={"text": forward, "message": {**forward, "format": "flat"}},
        module_output_name=output,
    )
    edit(
        directory / "config_sentence_transformers.json",
        __version__={"sentence_transformers": "5.4.0", "transformers": "5.3.0", "pytorch": "2.10.0"},
        activation_fn=IDENTITY,
        default_prompt_name=None,
        model_type="CrossEncoder",
        prompts={},
    )


def _qwen3_classifier(directory: Path, template: str | None) -> None:
    config = _qwen3(directory, template, num_labels=1)
    config.pad_token_id = config.bos_token_id
    save(seeded(lambda: tf.Qwen3ForSequenceClassification(config)), directory, **labels("LABEL_0"), **_QWEN)


def qwen3_seq_cls(directory: Path) -> None:
    """The head of two tokens as a classifier, under Qwen's own chat template."""
    _qwen3_classifier(directory, parts.QWEN_CHAT_TEMPLATE)
    _card(directory, base_model="Qwen/Qwen3-Reranker-0.6B", pipeline_tag="text-ranking")


def qwen3_seq_cls_modules(directory: Path) -> None:
    _qwen3_classifier(directory, None)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _sentence_transformers(directory, "sequence-classification", "scores")
    _card(directory, pipeline_tag="text-ranking", library_name="sentence-transformers")


def qwen3_seq_cls_no_pad(directory: Path) -> None:
    """The same with neither pad token nor pad_token_id in config.json, which transformers cannot batch."""
    qwen3_seq_cls_modules(directory)
    edit(directory / "config.json", pad_token_id=DROP)


def qwen3_chat(directory: Path) -> None:
    """A chat model, whose files are those of the reranker."""
    _qwen3_causal(directory)
    edit(directory / "generation_config.json", do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    _card(directory, base_model="\n- Qwen/Qwen3-0.6B-Base", library_name="transformers", pipeline_tag="text-generation")


def zerank_1(directory: Path) -> None:
    _qwen3_causal(directory, shards=2, auto_map={"AutoConfig": "modeling_zeranker.ZEConfig"})
    (directory / "modeling_zeranker.py").write_text("raise RuntimeError('code of the repository was run')\n")
    _card(directory, base_model="\n- Qwen/Qwen3-4B", library_name="sentence-transformers", pipeline_tag="text-ranking")


def mxbai_rerank_v2(directory: Path) -> None:
    vocabulary = parts.qwen_tokenizer(directory)
    specials = json.loads((directory / "added_tokens.json").read_text())
    config = tf.Qwen2Config(
        vocab_size=vocabulary,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        bos_token_id=specials["<|endoftext|>"],
        eos_token_id=specials["<|im_end|>"],
        tie_word_embeddings=True,
        **parts.SIZES,
    )
    save(seeded(lambda: tf.Qwen2ForCausalLM(config)), directory, **{**_QWEN, "max_window_layers": 21})
    _card(directory, library_name="transformers", pipeline_tag="text-ranking")


def onnx_community_qwen3(directory: Path) -> None:
    """A decoder's graph, which keeps keys and values, and nothing else."""
    import onnx
    from onnx import TensorProto, helper

    _qwen3_causal(directory)
    (directory / "model.safetensors").unlink()
    past = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    present = [name.replace("past_key_values", "present") for name in past]
    ids = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in (*PAIR, "position_ids")]
    cache = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2, "p", 8]) for n in past]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 4])
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2, "p", 8]) for n in present]
    nodes = [helper.make_node("OneHot", ["input_ids", "depth", "values"], ["logits"])]
    nodes += [helper.make_node("Identity", [a], [b]) for a, b in zip(past, present, strict=True)]
    constants = [
        helper.make_tensor("depth", TensorProto.INT64, [], [4]),
        helper.make_tensor("values", TensorProto.FLOAT, [2], [0.0, 1.0]),
    ]
    graph = helper.make_graph(nodes, "decoder", [*ids, *cache], [logits, *outputs], constants)
    (directory / "onnx").mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        str(directory / "onnx/model.onnx"),
    )
    for kind in ("fp16", "int8", "q4", "q4f16", "quantized"):
        shutil.copy(directory / "onnx/model.onnx", directory / f"onnx/model_{kind}.onnx")
    _card(directory, library_name="transformers.js", base_model="Qwen/Qwen3-Reranker-0.6B")


# -- adapters, folders of other libraries, and what is no reranker ----------------------------------------------------


def lora(directory: Path) -> None:
    """What CrossEncoder.add_adapter and save_pretrained write: no config.json."""
    from safetensors.torch import save_file

    parts.wordpiece_tokenizer(directory)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        for name in ("query", "value"):
            prefix = f"base_model.model.bert.encoder.layer.{layer}.attention.self.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, 32, generator=generator) * 0.3
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(32, 4, generator=generator) * 0.3
    tensors["base_model.model.classifier.weight"] = torch.randn(1, 32, generator=generator)
    tensors["base_model.model.classifier.bias"] = torch.randn(1, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    edit(
        directory / "adapter_config.json",
        base_model_name_or_path=REPOSITORIES["ms_marco_minilm"],
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        init_lora_weights=True,
        lora_alpha=8,
        lora_dropout=0.1,
        modules_to_save=["classifier", "score"],
        peft_type="LORA",
        r=4,
        revision=None,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    _sentence_transformers(directory, "sequence-classification", "scores")
    edit(
        directory / "sentence_bert_config.json",
        modality_config={"text": {"method": "forward", "method_output_name": "logits"}},
    )
    _card(directory, base_model=REPOSITORIES["ms_marco_minilm"], library_name="sentence-transformers")


def lora_merged() -> Any:
    """The base model with the adapter's weights added to its own: what `lora` has to score as."""
    from safetensors.torch import load_file

    model = tf.AutoModelForSequenceClassification.from_pretrained(build("ms_marco_minilm"))
    tensors = load_file(build("lora") / "adapter_model.safetensors")
    state = model.state_dict()
    for name, tensor in tensors.items():
        plain = name.removeprefix("base_model.model.")
        if plain.endswith("lora_A.weight"):
            other = tensors[name.replace("lora_A", "lora_B")]
            state[plain.replace("lora_A.", "")] += (8 / 4) * other @ tensor
        elif "lora" not in plain:
            state[plain] = tensor
    model.load_state_dict(state)
    return model.eval()


def flashrank_tinybert(directory: Path) -> None:
    """What FlashRank's zip file holds: a graph under a name of its own."""
    _bert(directory, **labels("LABEL_0"))
    put(exported("bert", directory), directory / "flashrank-TinyBERT-L-2-v2.onnx")
    (directory / "model.safetensors").unlink()


def flashrank_minilm_q(directory: Path) -> None:
    """The same with activations that are rounded by the range of their batch."""
    _bert(directory, **labels("LABEL_0"))
    put(parts.dynamic_int8(exported("bert", directory)), directory / "flashrank-MiniLM-L-12-v2_Q.onnx")
    (directory / "model.safetensors").unlink()


def vectrix_reranker(directory: Path) -> None:
    """A graph and a tokenizer, without config.json."""
    _bert(directory)
    put(exported("bert", directory), directory / "model.onnx")
    (directory / "model.safetensors").unlink()
    (directory / "config.json").unlink()
    (directory / "vectrix_config.json").write_text(json.dumps({"model_type": "reranker", "quantized": False}))


def graph_and_tokenizer(directory: Path) -> None:
    """The least that says enough: model.onnx and tokenizer.json."""
    vectrix_reranker(directory)
    for file in list(directory.iterdir()):
        if file.name not in ("model.onnx", "tokenizer.json"):
            file.unlink()


def graph_and_vocabulary(directory: Path) -> None:
    """A graph and weights, whose tokenizer is vocab.txt alone: what torch can read and a graph's engine cannot."""
    ms_marco_minilm(directory)
    (directory / "tokenizer.json").unlink()


def all_minilm(directory: Path) -> None:
    """An embedding model."""
    config = parts.bert_config(parts.wordpiece_tokenizer(directory))
    save(seeded(lambda: tf.BertModel(config)), directory, gradient_checkpointing=False)
    put(exported("bert-trunk", directory, output="last_hidden_state"), directory / "onnx/model.onnx")
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    (directory / "modules.json").write_text(json.dumps(modules, indent=2))
    edit(directory / "1_Pooling/config.json", word_embedding_dimension=32, pooling_mode_mean_tokens=True)
    edit(directory / "sentence_bert_config.json", max_seq_length=parts.POSITIONS, do_lower_case=False)
    edit(directory / "config_sentence_transformers.json", __version__={"sentence_transformers": "2.0.0"})
    _unread(directory, "pytorch_model.bin", "rust_model.ot", "tf_model.h5", "onnx/model_O4.onnx", "train_script.py")
    _unread(directory, "openvino/openvino_model.xml", "openvino/openvino_model.bin")
    _card(directory, pipeline_tag="sentence-similarity", library_name="sentence-transformers")


def embedding_graph(directory: Path) -> None:
    """An embedding model's graph, whose only output is one vector a text."""
    import onnx

    all_minilm(directory)
    for file in list(directory.rglob("*")):
        if file.is_file() and file.name not in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            file.unlink()
    shutil.rmtree(directory / "1_Pooling", ignore_errors=True)
    model = onnx.load(str(parts.workshop() / "bert-trunk.onnx"))
    (output,) = model.graph.output
    pooled = onnx.helper.make_node("ReduceMean", [output.name], ["sentence_embedding"], axes=[1], keepdims=0)
    model.graph.node.append(pooled)
    del model.graph.output[:]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("sentence_embedding", onnx.TensorProto.FLOAT, ["batch_size", 32])
    )
    onnx.save(model, str(directory / "model.onnx"))


def openvino_ir(directory: Path) -> None:
    """OpenVINO's own format, and no graph."""
    import openvino

    _bert(directory, **labels("LABEL_0"))
    graph = exported("bert", directory)
    (directory / "model.safetensors").unlink()
    openvino.save_model(openvino.convert_model(str(graph)), str(directory / "openvino_model.xml"))
    for name in ("openvino_tokenizer", "openvino_detokenizer"):
        _unread(directory, f"{name}.xml", f"{name}.bin")
    (directory / "openvino_config.json").write_text(json.dumps({"dtype": "fp16"}))
    _card(directory, base_model="cross-encoder/ms-marco-MiniLM-L6-v2")


def half_downloaded(directory: Path) -> None:
    """What `hf download --local-dir` leaves when it is interrupted: one of two shards, and a part of the other."""
    config = parts.bert_config(parts.wordpiece_tokenizer(directory), num_labels=1)
    save(seeded(lambda: tf.BertForSequenceClassification(config)), directory, shards=2, **labels("LABEL_0"))
    last = max(directory.glob("model-*.safetensors"))
    part = directory / ".cache/huggingface/download" / f"{last.name}.0123456789abcdef.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    last.unlink()


def half_a_file(directory: Path) -> None:
    """Weights of which the end is missing."""
    _bert(directory, **labels("LABEL_0"))
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def git_lfs_checkout(directory: Path) -> None:
    """What `git clone` without git-lfs leaves: pointers where the large files are."""
    ms_marco_minilm(directory)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
    for file in directory.rglob("*"):
        if file.suffix in (".safetensors", ".onnx", ".bin", ".msgpack", ".xml") or file.name == "tokenizer.json":
            file.write_text(
                pointer.format("4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393", 90868376)
            )


REPOSITORIES: dict[str, str | None] = {
    "ms_marco_minilm": "cross-encoder/ms-marco-MiniLM-L6-v2",
    "xenova_minilm": "Xenova/ms-marco-MiniLM-L-6-v2",
    "without_segments": "someone/without-segments",
    "baked_tokenizer": "someone/baked-tokenizer",
    "convbert": "someone/convbert",
    "rounded_variants": "someone/rounded-variants",
    "monobert": "amberoad/bert-multilingual-passage-reranking-msmarco",
    "monobert_converted": "castorini/monobert-large-msmarco",
    "bert_base_uncased": "google-bert/bert-base-uncased",
    "without_a_layer": "someone/fine-tuned",
    "qnli_electra": "cross-encoder/qnli-electra-base",
    "quora_roberta": "cross-encoder/quora-roberta-base",
    "stsb_roberta": "cross-encoder/stsb-roberta-base",
    "bge_reranker_base": "BAAI/bge-reranker-base",
    "bge_reranker_large": "BAAI/bge-reranker-large",
    "bge_reranker_v2_m3": "BAAI/bge-reranker-v2-m3",
    "bge_m3_onnx_o3": "EmbeddedLLM/bge-reranker-v2-m3-onnx-o3-cpu",
    "bge_m3_onnx_uuid": "arnauld-a/bge-reranker-v2-m3-onnx",
    "bge_reranker_v2_gemma": "BAAI/bge-reranker-v2-gemma",
    "jina_reranker_v1_turbo": "jinaai/jina-reranker-v1-turbo-en",
    "jina_reranker_v2": "jinaai/jina-reranker-v2-base-multilingual",
    "mxbai_rerank_v1": "mixedbread-ai/mxbai-rerank-xsmall-v1",
    "nli_deberta_v3": "cross-encoder/nli-deberta-v3-base",
    "nli_deberta_v3_sentencepiece": "cross-encoder/nli-deberta-v3-xsmall",
    "deberta_zeroshot": "MoritzLaurer/deberta-v3-base-zeroshot-v2.0",
    "gte_reranker_modernbert": "Alibaba-NLP/gte-reranker-modernbert-base",
    "granite_reranker": "ibm-granite/granite-embedding-reranker-english-r2",
    "ettin_reranker": "cross-encoder/ettin-reranker-32m-v1",
    "qwen3_reranker": "Qwen/Qwen3-Reranker-0.6B",
    "qwen3_reranker_modules": "cross-encoder-testing/Qwen3-Reranker-0.6B-STv6",
    "qwen3_seq_cls": "tomaarsen/Qwen3-Reranker-0.6B-seq-cls",
    "qwen3_seq_cls_modules": "cross-encoder-testing/Qwen3-Reranker-0.6B-seq-cls-STv6",
    "qwen3_seq_cls_no_pad": "someone/decoder-without-pad-token",
    "qwen3_chat": "Qwen/Qwen3-0.6B",
    "zerank_1": "zeroentropy/zerank-1",
    "mxbai_rerank_v2": "mixedbread-ai/mxbai-rerank-base-v2",
    "onnx_community_qwen3": "onnx-community/Qwen3-Reranker-0.6B-ONNX",
    "lora": "someone/reranker-lora",
    "flashrank_tinybert": None,
    "flashrank_minilm_q": None,
    "vectrix_reranker": None,
    "graph_and_tokenizer": None,
    "graph_and_vocabulary": "someone/vocabulary-alone",
    "all_minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "embedding_graph": "someone/embedding-graph",
    "openvino_ir": "OpenVINO/ms-marco-MiniLM-L6-v2-fp16-ov",
    "half_downloaded": None,
    "half_a_file": None,
    "git_lfs_checkout": None,
}
"""Each layout and the repository that has it; None where it is a directory on disk."""


@functools.cache
def build(name: str) -> Path:
    """The directory of a layout, made on first use and kept until the process ends."""
    repository = REPOSITORIES[name] or name
    directory = parts.workshop() / name / repository.rsplit("/", 1)[-1]
    directory.mkdir(parents=True)
    make: Callable[[Path], None] = globals()[name]
    make(directory)
    return directory
