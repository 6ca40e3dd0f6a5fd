"""One directory that every contender can read: the checkpoint, and the ONNX graphs made from it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rerank_plugins import models
from rerank_plugins._extras import import_extra
from rerank_plugins._minilm import minilm_directory
from rerank_plugins.backends._files import ModelFiles, converted_directory
from rerank_plugins.backends.checkpoint import Checkpoint
from rerank_plugins.backends.load import open_weights
from rerank_plugins.conversion import convert
from rerank_plugins.conversion._convert import silent
from rerank_plugins.errors import ConfigurationError

__all__ = ["DEFAULT_NAME", "Model", "prepare_model"]

MAX_LENGTH = 512
"""Tokens of a pair, at most: what LlamaIndex and FlashRank cut at whatever the model takes."""
DEFAULT_NAME = "all-MiniLM-L6-v2 with a seeded head"
_OWN = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is ready for every contender.

    Attributes:
        path: Its directory, with ``model.onnx`` and, where int8 was asked for, ``model_int8.onnx``.
        name: What it is called.
        config: Its ``config.json``.
        max_length: Tokens at which everybody cuts a pair.
        has_checkpoint: Whether there are weights for PyTorch.
    """

    path: Path
    name: str
    config: dict[str, Any]
    max_length: int
    has_checkpoint: bool

    def tokenizer(self) -> Tokenizer:
        """A tokenizer that cuts at `max_length`."""
        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length)
        return tokenizer

    def lengths(self, query: str, texts: Collection[str]) -> list[int]:
        """Tokens of each pair of the query and a text, special ones among them."""
        return [len(item.ids) for item in self.tokenizer().encode_batch([(query, text) for text in texts])]


def prepare_model(
    model: str | None, work: Path, *, int8: bool, graph: bool, progress: Callable[[str, float], None]
) -> Model:
    """Make the directory. Graphs are made by `convert`, and kept in the user's cache for the next time.

    Args:
        model: A directory, a Hub id, the name of the bundled model, or None for a MiniLM-L6 with a seeded head.
        work: An empty directory, to put it in.
        int8: Also make the graph with int8 weights.
        graph: Make the graphs; otherwise the checkpoint alone, where there is one.
        progress: Takes a line of news and the share done.

    Raises:
        ConfigurationError: The model gives more than one logit a pair, or is a causal language model.
        MissingDependencyError: What requirements/benchmarks.txt names is not installed.
        ModelLoadError: The model is missing, or cannot be converted.
    """
    if model is None:
        progress("making a model", 0.0)
        found = Checkpoint(ModelFiles(_seeded(work / "source"), DEFAULT_NAME))
    elif model == models.BUNDLED_NAME:
        found = Checkpoint(ModelFiles(models.bundled_directory(), model))
    elif _is_graph_only(Path(model).expanduser()):
        found = Checkpoint(ModelFiles(Path(model).expanduser(), model))
    else:
        found = open_weights(model)
    files, labels = found.files, found.labels or ("LABEL_0",)
    if found.is_causal or len(labels) != 1:
        raise ConfigurationError(
            f"{found.name!r} is {'a causal language model' if found.is_causal else f'a head of {labels}'}: "
            "expected a cross-encoder with one logit, which is what all contenders can load."
        )
    has_checkpoint = any(files.path.glob("*.safetensors"))
    target = work / "model"
    target.mkdir(parents=True)
    for item in files.path.iterdir():
        if item.name not in _OWN and item.name not in ("onnx", "openvino", "rerank_plugins") and item.suffix != ".onnx":
            _link(item, target / item.name)
    source = files.path
    if has_checkpoint and graph:
        kept = work / "converted" if model is None else converted_directory(files)
        source = _converted(model or str(files.path), kept, int8=False, progress=progress)
    if has_checkpoint and graph and int8:
        quantised = _converted(
            model or str(files.path), kept.with_name(kept.name + "-int8"), int8=True, progress=progress
        )
        _link(quantised / "model.onnx", target / "model_int8.onnx")
    for file in [*source.glob("model.onnx*"), *source.glob("onnx/model.onnx*")]:
        if not (target / file.name).exists():
            _link(file, target / file.name)
    max_length = min(found.limit(), MAX_LENGTH)
    _write_settings(found, source, target, max_length)
    return Model(target, found.name, found.config.values, max_length, has_checkpoint)


def _is_graph_only(path: Path) -> bool:
    return path.is_dir() and not any(path.glob("*.safetensors")) and any(path.rglob("model.onnx"))


def _converted(model: str, kept: Path, *, int8: bool, progress: Callable[[str, float], None]) -> Path:
    if not (kept / "model.onnx").is_file():
        convert(model, kept, int8=int8, progress=lambda stage, share: progress(f"converting: {stage}", share))
    return kept


def _write_settings(found: Checkpoint, source: Path, target: Path, max_length: int) -> None:
    """The settings that contenders read, so that all cut and pad alike."""
    tokenizer_file = next(
        path / "tokenizer.json" for path in (found.files.path, source) if (path / "tokenizer.json").exists()
    )
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    content["truncation"] = content["padding"] = None
    (target / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = dict(found.tokenizer_config.values)
    settings["model_max_length"] = max_length
    settings.pop("max_length", None)
    _write(target / "tokenizer_config.json", settings)
    named = {key: settings[key] for key in _SPECIAL if settings.get(key)}
    tokens = {key: token["content"] if isinstance(token, dict) else token for key, token in named.items()}
    _write(target / "special_tokens_map.json", tokens)
    pad_id = found.encoder(Tokenizer.from_str(json.dumps(content))).pad_id
    _write(target / "config.json", {**found.config.values, "pad_token_id": pad_id})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError:
        # Windows lets only some users make links.
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def _seeded(directory: Path) -> Path:
    """The trunk of all-MiniLM-L6-v2 under a head whose logits spread as those of a trained one do."""
    torch = import_extra("torch", "train")
    transformers = import_extra("transformers", "train")
    trunk = minilm_directory("train")
    # Progress bars, and a report that the head is new: it is meant to be.
    with torch.random.fork_rng(devices=[]), silent(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification.from_pretrained(trunk, num_labels=1)
        with torch.no_grad():
            model.classifier.weight.normal_(0, 1)
        model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(trunk, model_max_length=MAX_LENGTH).save_pretrained(directory)
    return directory
