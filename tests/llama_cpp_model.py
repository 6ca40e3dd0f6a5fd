"""Makes ``xlm_roberta.gguf``: a tiny seeded XLM-RoBERTa reranker, for the real llama.cpp server.

``python tests/llama_cpp_model.py`` writes it anew (needs gguf). Tests make the same model for our own engines from
`save`, so weights and vocabulary come from NumPy's frozen `RandomState` and from the words below, and from nothing
that changes with a version.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np

GGUF = Path(__file__).parent / "data" / "xlm_roberta.gguf"
HIDDEN, LAYERS, HEADS, FEED_FORWARD, POSITIONS = 32, 2, 2, 64, 512
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
_TEXT = """the a of to and in is that for it as was with be by on not he his but at are this have from or had an they
which one you were her all she there would their we him been has when who will more no if out so what up said
its about into than them can only other new some could time these two may then do first any my now such like
our over man me even most made after also did many before must through back years where much your way well
down should because each just those people how too little state good very make world still own see men work
long get here between both life being under never day same another know while last might us great old year off
come since against go came right used take three red blue fox whale snow panda bear bamboo china city capital
france paris git commit undo revert file water sea light house tree river mountain bird fish horse paper book
school music song film game war peace king queen law art science energy star moon sun earth fire wind rain ice
food bread milk fruit apple plant animal human child mother ing ed er ly tion s es un re"""
WORDS = _TEXT.split()


def vocabulary() -> list[tuple[str, float]]:
    """Pieces of a Unigram tokenizer with their log-probabilities: special tokens, words, characters."""
    endings = 9
    pieces = list(dict.fromkeys([f"▁{word}" for word in WORDS[:-endings]] + WORDS[-endings:]))
    characters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation, *"éèüß熊猫北京中国的是"]
    characters = [character for character in characters if character not in pieces]
    return [
        *((special, 0.0) for special in SPECIALS),
        *((piece, -3.0 - 0.01 * i) for i, piece in enumerate(pieces)),
        *((character, -9.0 - 0.01 * i) for i, character in enumerate(characters)),
    ]


def weights() -> dict[str, np.ndarray]:
    """The tensors, by their names in transformers."""
    random = np.random.RandomState(20261128)

    def tensor(*shape: int, scale: float = 0.25) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    tensors: dict[str, np.ndarray] = {}

    def linear(name: str, n_out: int, n_in: int, scale: float = 0.25) -> None:
        tensors[f"{name}.weight"] = tensor(n_out, n_in, scale=scale)
        tensors[f"{name}.bias"] = tensor(n_out, scale=0.1)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1.0 + tensor(HIDDEN, scale=0.1)
        tensors[f"{name}.bias"] = tensor(HIDDEN, scale=0.1)

    embeddings = "roberta.embeddings"
    tensors[f"{embeddings}.word_embeddings.weight"] = tensor(len(vocabulary()), HIDDEN, scale=1.0)
    tensors[f"{embeddings}.position_embeddings.weight"] = tensor(POSITIONS + 2, HIDDEN, scale=0.3)
    tensors[f"{embeddings}.token_type_embeddings.weight"] = tensor(1, HIDDEN)
    norm(f"{embeddings}.LayerNorm")
    for i in range(LAYERS):
        layer = f"roberta.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{name}", HIDDEN, HIDDEN)
        linear(f"{layer}.attention.output.dense", HIDDEN, HIDDEN)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", FEED_FORWARD, HIDDEN)
        linear(f"{layer}.output.dense", HIDDEN, FEED_FORWARD)
        norm(f"{layer}.output.LayerNorm")
    linear("classifier.dense", HIDDEN, HIDDEN)
    linear("classifier.out_proj", 1, HIDDEN, scale=1.5)
    return tensors


def save(directory: Path) -> str:
    """Save the model as a checkpoint of transformers."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.Unigram(vocabulary(), unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": POSITIONS,
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "model_input_names": ["input_ids", "attention_mask"],
                **special,
            }
        )
    )
    config = {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "model_type": "xlm-roberta",
        "vocab_size": len(vocabulary()),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FEED_FORWARD,
        "max_position_embeddings": POSITIONS + 2,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights(), directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


_GGUF_NAMES = {
    "roberta.embeddings.word_embeddings": "token_embd",
    "roberta.embeddings.token_type_embeddings": "token_types",
    "roberta.embeddings.position_embeddings": "position_embd",
    "roberta.embeddings.LayerNorm": "token_embd_norm",
    "classifier.dense": "cls",
    "classifier.out_proj": "cls.output",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("roberta.encoder.layer."):
        number, _, part = stem.removeprefix("roberta.encoder.layer.").partition(".")
        return f"blk.{number}.{_GGUF_NAMES[part]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.{kind}"


def write_gguf(path: Path) -> None:
    """Write the model as llama.cpp's converter does."""
    import gguf

    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("tiny seeded XLM-RoBERTa")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    pieces = vocabulary()
    kinds = gguf.TokenType
    special = {"<unk>": kinds.UNKNOWN, "<s>": kinds.CONTROL, "<pad>": kinds.CONTROL, "</s>": kinds.CONTROL}
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([score for _, score in pieces])
    writer.add_token_types([special.get(piece, kinds.NORMAL) for piece, _ in pieces])
    writer.add_token_type_count(1)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(False)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_sep_token_id(2)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_add_sep_token(True)
    for name, tensor in weights().items():
        # Positions begin behind the padding's here, at 0 there.
        values = tensor[2:] if "position_embeddings" in name else tensor
        writer.add_tensor(_gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_gguf(GGUF)
