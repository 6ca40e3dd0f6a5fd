"""What published checkpoints are made of: weights, tokenizers, configurations and graphs, tiny and seeded."""

from __future__ import annotations

import functools
import io
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from checkpoints import _corpus, _raw_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils import logging

POSITIONS = 128
"""Tokens that every tiny model takes."""
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
DROP = object()
"""The value of a key that `edit` takes out."""

logging.disable_progress_bar()


@functools.cache
def workshop() -> Path:
    """Where graphs that several layouts share are kept until the process ends."""
    return Path(_workshop().name)


@functools.cache
def _workshop() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rerank-plugins-layouts-")


def edit(file: Path, **changes: object) -> None:
    """Changes keys of a JSON file, or makes one."""
    value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    value.update(changes)
    kept = {key: item for key, item in value.items() if item is not DROP}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")


# -- tokenizers, as transformers 4 published them ---------------------------------------------------------------------


def _special_tokens(directory: Path, names: dict[str, str], **config: object) -> None:
    (directory / "special_tokens_map.json").write_text(json.dumps(names))
    edit(directory / "tokenizer_config.json", clean_up_tokenization_spaces=True, **names, **config)


_BERT_NAMES = {
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "pad_token": "[PAD]",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
}
_ROBERTA_NAMES = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
}


def wordpiece_tokenizer(directory: Path, model_max_length: int = POSITIONS) -> int:
    """BERT's: tokenizer.json, vocab.txt and the two configurations. Returns the size of the vocabulary."""
    tokenizer = _raw_tokenizer("wordpiece")
    tokenizer.save(str(directory / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    (directory / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    _special_tokens(
        directory,
        _BERT_NAMES,
        do_basic_tokenize=True,
        do_lower_case=True,
        model_max_length=model_max_length,
        never_split=None,
        strip_accents=None,
        tokenize_chinese_chars=True,
        tokenizer_class="BertTokenizer",
    )
    return len(vocabulary)


def roberta_tokenizer(directory: Path) -> int:
    """RoBERTa's byte-level BPE: tokenizer.json, vocab.json, merges.txt and the two configurations."""
    tokenizer = _raw_tokenizer("bpe-roberta")
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))
    _special_tokens(
        directory,
        _ROBERTA_NAMES,
        add_prefix_space=False,
        errors="replace",
        model_max_length=POSITIONS,
        tokenizer_class="RobertaTokenizer",
        trim_offsets=True,
    )
    return tokenizer.get_vocab_size()


def modernbert_tokenizer(directory: Path) -> int:
    """ModernBERT's: tokenizer.json and the two configurations, no other file."""
    tokenizer = _raw_tokenizer("bpe-modernbert")
    tokenizer.save(str(directory / "tokenizer.json"))
    _special_tokens(
        directory,
        _BERT_NAMES,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=POSITIONS,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    return tokenizer.get_vocab_size()


@functools.cache
def _sentencepiece(**pieces: object) -> bytes:
    """A sentencepiece model with the normalisation that the published ones have, nmt_nfkc."""
    import sentencepiece

    lines = [line[:4000] for text in _corpus() for line in text.splitlines() if line.strip()]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=1200,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **pieces,
    )
    return written.getvalue()


def _parsed(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return proto


def deberta_tokenizer(directory: Path, json_file: bool = True) -> int:
    """DeBERTa-v3's: spm.model, and the tokenizer.json that transformers 4 made of it."""
    model = _sentencepiece(
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
    )
    proto = _parsed(model)
    (directory / "spm.model").write_bytes(model)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Strip(),
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    if json_file:
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "added_tokens.json").write_text(json.dumps({"[MASK]": len(pieces)}))
    _special_tokens(
        directory,
        {"bos_token": "[CLS]", "eos_token": "[SEP]", **_BERT_NAMES},
        do_lower_case=False,
        model_max_length=POSITIONS,
        sp_model_kwargs={},
        split_by_punct=False,
        tokenizer_class="DebertaV2Tokenizer",
        vocab_type="spm",
    )
    return tokenizer.get_vocab_size()


def xlm_roberta_tokenizer(directory: Path, *, sentencepiece_file: bool = True, limit: int | None = POSITIONS) -> int:
    """XLM-RoBERTa's: sentencepiece.bpe.model, and the tokenizer.json that transformers 4 made of it."""
    model = _sentencepiece(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    proto = _parsed(model)
    if sentencepiece_file:
        (directory / "sentencepiece.bpe.model").write_bytes(model)
    pieces = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [(piece.piece, piece.score) for piece in proto.pieces[3:]]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=3))
    tokenizer.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    _special_tokens(directory, _ROBERTA_NAMES, model_max_length=limit or DROP, tokenizer_class="XLMRobertaTokenizer")
    return tokenizer.get_vocab_size()


QWEN_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or message.role == 'system' or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""A chat template that knows no query and no document, as Qwen's own."""


def qwen_tokenizer(directory: Path, chat_template: str | None = QWEN_CHAT_TEMPLATE) -> int:
    """Qwen's byte-level BPE: tokenizer.json, vocab.json, merges.txt, added_tokens.json and the two configurations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.model.save(str(directory))
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    added = {token: tokenizer.token_to_id(token) for token in (*specials, "<think>", "</think>")}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    _special_tokens(
        directory,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        add_prefix_space=False,
        add_bos_token=False,
        bos_token=None,
        errors="replace",
        model_max_length=131072,
        split_special_tokens=False,
        tokenizer_class="Qwen2Tokenizer",
        unk_token=None,
        **({} if chat_template is None else {"chat_template": chat_template}),
    )
    return tokenizer.get_vocab_size()


def gemma_tokenizer(directory: Path) -> int:
    """Gemma's BPE over whole lines: tokenizer.json and the two configurations. Every text begins with <bos>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Only while training: merges never cross words then.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([line for text in _corpus() for line in text.splitlines()], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(directory / "tokenizer.json"))
    _special_tokens(
        directory,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        add_bos_token=True,
        add_eos_token=False,
        model_max_length=1000000000000000019884624838656,
        sp_model_kwargs={},
        tokenizer_class="GemmaTokenizer",
    )
    return tokenizer.get_vocab_size()


# -- weights and configurations ---------------------------------------------------------------------------------------


def save(model: Any, directory: Path, *, shards: int = 1, **changes: object) -> None:
    """Writes weights and config.json, the latter as transformers 4 did."""
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.eval().save_pretrained(directory, max_shard_size="1GB" if shards == 1 else math.ceil(size / shards))
    edit(
        directory / "config.json",
        **{"dtype": DROP, "torch_dtype": "float32", "transformers_version": "4.44.2", **changes},
    )


def seeded(make: Callable[[], Any], head: float = 4.0, seed: int = 7) -> Any:
    """A model of random weights whose head spreads the logits over some units."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[0] in ("classifier", "classifier.out_proj", "score"):
                parameter.mul_(head)
    return model.eval()


def bert_config(vocabulary: int, **others: object) -> tf.BertConfig:
    return tf.BertConfig(
        vocab_size=vocabulary, max_position_embeddings=POSITIONS, pad_token_id=0, **{**SIZES, **others}
    )


def xlm_roberta_config(vocabulary: int, **others: object) -> tf.XLMRobertaConfig:
    sizes = {"max_position_embeddings": POSITIONS + 2, "pad_token_id": 1, "type_vocab_size": 1}
    return tf.XLMRobertaConfig(vocab_size=vocabulary, layer_norm_eps=1e-5, **{**SIZES, **sizes, **others})


def deberta_config(vocabulary: int, **others: object) -> tf.DebertaV2Config:
    return tf.DebertaV2Config(
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        type_vocab_size=0,
        layer_norm_eps=1e-7,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        position_buckets=64,
        relative_attention=True,
        share_att_key=True,
        **{**SIZES, **others},
    )


def modernbert_config(vocabulary: int, **others: object) -> tf.ModernBertConfig:
    return tf.ModernBertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        local_attention=32,
        **{**SIZES, **others},
    )


def labels(*names: str) -> dict[str, object]:
    """Class names as config.json has them."""
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


# -- graphs -----------------------------------------------------------------------------------------------------------


class _Outputs(torch.nn.Module):
    def __init__(self, model: Any, inputs: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.model, self.inputs, self.output = model, inputs, output

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return getattr(self.model(**dict(zip(self.inputs, tensors, strict=True))), self.output)


def export(model: Any, file: Path, inputs: tuple[str, ...] = INPUTS, output: str = "logits") -> Path:
    """An ONNX graph of a model with dynamic shapes, by the exporter that the published ones were made with."""
    ids = torch.randint(5, 90, (2, 9))
    # Padding, so that the trace has the mask.
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    file.parent.mkdir(parents=True, exist_ok=True)
    axes = {0: "batch_size", 1: "sequence_length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Outputs(model, inputs, output).eval(),
            tuple(given[name] for name in inputs),
            str(file),
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes={**dict.fromkeys(inputs, axes), output: {0: "batch_size"} if output == "logits" else axes},
            dynamo=False,
            opset_version=17,
        )
    return file


def exported(name: str, directory: Path, inputs: tuple[str, ...] = INPUTS, output: str = "logits") -> Path:
    """The graph of the checkpoint in `directory`, made once for all layouts that give it the same name."""
    file = workshop() / f"{name}.onnx"
    if not file.exists():
        kind = tf.AutoModelForSequenceClassification if output == "logits" else tf.AutoModel
        export(kind.from_pretrained(directory, attn_implementation="eager"), file, inputs, output)
    return file


def put(graph: Path, *files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(graph, file)


def dynamic_int8(graph: Path) -> Path:
    """The graph with weights of int8 and activations that are rounded by the range of their batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = graph.with_suffix(".dynamic-int8.onnx")
    if not file.exists():
        import logging as standard

        standard.disable(standard.WARNING)
        quantize_dynamic(str(graph), str(file), weight_type=QuantType.QInt8)
        standard.disable(standard.NOTSET)
    return file


def half(graph: Path) -> Path:
    """The graph with weights of fp16, inputs and outputs as they were."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    file = graph.with_suffix(".fp16.onnx")
    if not file.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx.save(convert_float_to_float16(onnx.load(str(graph)), keep_io_types=True), str(file))
    return file


def decoy(graph: Path) -> Path:
    """The graph with 100 added to its logits: scores tell when a variant ran that nobody asked for."""
    import onnx

    file = graph.with_suffix(".decoy.onnx")
    if not file.exists():
        model = onnx.load(str(graph))
        (output,) = model.graph.output
        for node in model.graph.node:
            node.output[:] = ["undecoyed" if name == output.name else name for name in node.output]
        model.graph.initializer.append(onnx.helper.make_tensor("hundred", onnx.TensorProto.FLOAT, [1], [100.0]))
        model.graph.node.append(onnx.helper.make_node("Add", ["undecoyed", "hundred"], [output.name]))
        onnx.save(model, str(file))
    return file


def four_bits(graph: Path) -> Path:
    """The decoy with weights of four bits, which stay integers in the graph."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    file = graph.with_suffix(".four-bits.onnx")
    if not file.exists():
        quantizer = MatMulNBitsQuantizer(onnx.load(str(decoy(graph))), block_size=16, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(file), False)
    return file


def external(graph: Path, file: Path, weights: str) -> None:
    """The graph with its weights in a file beside it."""
    import onnx

    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.load(str(graph)), str(file), save_as_external_data=True, location=weights, size_threshold=0)
