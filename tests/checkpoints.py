"""Tiny seeded checkpoints of every family, made when the tests start: real architectures, real tokenizers."""

from __future__ import annotations

import collections
import functools
import math
import pydoc_data.topics
import tempfile
from pathlib import Path

FAMILIES = ("bert", "electra", "roberta", "distilroberta", "xlm-roberta", "deberta-v2", "modernbert")
"""Families with a one-logit classification head."""

EXTRA = ("bert-2class", "bert-nli", "causal-qwen3")

CHAT_TEMPLATE = (
    "<|im_start|>system\n"
    "{%- set system = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first %}"
    "{{ system if system else 'Judge whether the Document meets the Query.' }}<|im_end|>\n"
    "<|im_start|>user\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<Document>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<|im_end|>\n"
    "<|im_start|>assistant\n"
)

TEXTS = [
    "The giant panda is a bear that lives in the mountains of central China and eats bamboo.",
    "Paris is the capital and most populous city of France.",
    "大熊猫是一种生活在中国的熊，主要以竹子为食。",
    "北京是中华人民共和国的首都，也是全国的政治中心。",
    "Pandas \U0001f43c love bamboo \U0001f38b and naps \U0001f634; été, naïve, Straße, Ελλάδα, привет.",
    "short",
    "FAISS is a library for efficient similarity search. 向量检索很快。 Written at Facebook AI Research \U0001f680.",
    "a b c d e f g " * 8,
    "Git revert makes a new commit that undoes an older one, 撤销 提交, without rewriting history. " * 12,
    "The quick brown fox jumps over the lazy dog. " * 80,
]
"""Short, long, CJK, emoji and mixed texts; the last one is longer than any of the tiny models takes."""

QUERY = "what do pandas 熊猫 eat \U0001f43c?"
POSITIONS = 256


_HEAD_SCALE = {"electra": 4.0, "deberta-v2": 2.0}


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rerank-plugins-checkpoints-")


@functools.cache
def tiny(family: str) -> str:
    """The directory of a checkpoint of `family`, made on first use and kept until the process ends."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    directory = Path(_root().name) / family
    torch.manual_seed(len(family))
    tokenizer = _tokenizer(family)
    model = _model(family, len(tokenizer), tokenizer.pad_token_id)
    with torch.no_grad():
        # Without this the logits of some families spread over hundreds, of others over hundredths.
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[0] in ("classifier", "classifier.out_proj"):
                parameter.mul_(_HEAD_SCALE.get(family, 5.0))
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def _corpus() -> list[str]:
    return [
        *TEXTS * 3,
        QUERY,
        CHAT_TEMPLATE,
        *["yes", "no", "Yes", "No"] * 400,
        *list(pydoc_data.topics.topics.values())[:12],
    ]


def _pieces(normalizer, pre_tokenizer, prefix: str) -> list[tuple[str, int]]:  # type: ignore[no-untyped-def]
    """All characters and the commonest parts of words, with counts: trainers of both kinds differ from run to run."""
    counts: collections.Counter[str] = collections.Counter()
    for text in _corpus():
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)):
            for start in range(len(word)):
                for end in range(start + 1, min(start + 8, len(word)) + 1):
                    counts[(prefix if start else "") + word[start:end]] += 1
    ranked = sorted(counts.items(), key=lambda item: (len(item[0].removeprefix(prefix)) > 1, -item[1], item[0]))
    return ranked[:1500]


@functools.cache
def _raw_tokenizer(kind: str):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "wordpiece":
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        pieces = [piece for piece, _ in _pieces(normalizer, pre_tokenizer, "##")]
        vocabulary = {piece: i for i, piece in enumerate([*specials, *pieces])}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    elif kind == "unigram":
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        normalizer, pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        pieces = _pieces(normalizer, pre_tokenizer, "")
        total = sum(count for _, count in pieces)
        scored = [(piece, math.log(count / total)) for piece, count in pieces]
        tokenizer = Tokenizer(models.Unigram([*[(special, 0.0) for special in specials], *scored], unk_id=3))
        tokenizer.decoder = decoders.Metaspace()
    else:
        normalizer, pre_tokenizer = None, pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.decoder = decoders.ByteLevel()
        specials = {
            "bpe-roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            "bpe-modernbert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
            "bpe-qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        }[kind]
        trainer = trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.train_from_iterator(_corpus(), trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(specials)
    ids = {token: tokenizer.token_to_id(token) for token in specials}
    if kind == "wordpiece":
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    elif kind == "bpe-modernbert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
    elif kind in ("bpe-roberta", "unigram"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
        )
    return tokenizer


def _tokenizer(family: str):  # type: ignore[no-untyped-def]
    from transformers import PreTrainedTokenizerFast

    if family == "causal-qwen3":
        return PreTrainedTokenizerFast(
            tokenizer_object=_raw_tokenizer("bpe-qwen"),
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            padding_side="left",
            chat_template=CHAT_TEMPLATE,
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=POSITIONS,
        )
    kind = {
        "roberta": "bpe-roberta",
        "distilroberta": "bpe-roberta",
        "xlm-roberta": "unigram",
        "deberta-v2": "wordpiece",
        "modernbert": "bpe-modernbert",
    }.get(family, "wordpiece")
    angle = kind in ("bpe-roberta", "unigram")
    names = ["input_ids", "attention_mask"]
    if kind == "wordpiece":
        names.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=_raw_tokenizer(kind),
        pad_token="<pad>" if angle else "[PAD]",
        unk_token="<unk>" if angle else "[UNK]",
        cls_token="<s>" if angle else "[CLS]",
        sep_token="</s>" if angle else "[SEP]",
        mask_token="<mask>" if angle else "[MASK]",
        model_input_names=names,
        model_max_length=POSITIONS,
    )


def _model(family: str, vocab_size: int, pad_token_id: int):  # type: ignore[no-untyped-def]
    import transformers as tf

    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": pad_token_id,
        "initializer_range": 0.3,
    }
    one = {"num_labels": 1}
    if family == "bert":
        return tf.BertForSequenceClassification(tf.BertConfig(**common, **one))
    if family == "bert-2class":
        return tf.BertForSequenceClassification(tf.BertConfig(**common, num_labels=2))
    if family == "bert-nli":
        labels = ["contradiction", "entailment", "neutral"]
        return tf.BertForSequenceClassification(
            tf.BertConfig(
                **common, id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
            )
        )
    if family == "electra":
        return tf.ElectraForSequenceClassification(tf.ElectraConfig(**common, **one, embedding_size=16))
    if family in ("roberta", "distilroberta", "xlm-roberta"):
        common["max_position_embeddings"] = POSITIONS + pad_token_id + 1
        if family == "xlm-roberta":
            return tf.XLMRobertaForSequenceClassification(tf.XLMRobertaConfig(**common, **one, type_vocab_size=1))
        common["num_hidden_layers"] = 1 if family == "distilroberta" else 2
        return tf.RobertaForSequenceClassification(tf.RobertaConfig(**common, **one, type_vocab_size=1))
    if family == "deberta-v2":
        return tf.DebertaV2ForSequenceClassification(
            tf.DebertaV2Config(
                **common,
                **one,
                type_vocab_size=0,
                relative_attention=True,
                position_buckets=64,
                pos_att_type=["p2c", "c2p"],
                norm_rel_ebd="layer_norm",
                share_att_key=True,
                position_biased_input=False,
            )
        )
    if family == "modernbert":
        return tf.ModernBertForSequenceClassification(
            tf.ModernBertConfig(
                **common,
                **one,
                cls_token_id=2,
                sep_token_id=3,
                bos_token_id=2,
                eos_token_id=3,
                local_attention=32,
                classifier_pooling="mean",
            )
        )
    if family == "causal-qwen3":
        return tf.Qwen3ForCausalLM(
            tf.Qwen3Config(**common, num_key_value_heads=2, head_dim=8, eos_token_id=2, tie_word_embeddings=True)
        )
    raise ValueError(family)
