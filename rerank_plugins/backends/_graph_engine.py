"""What the engines for ONNX graphs share: which graph of a model they take, and how pairs go into it."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rerank_plugins.backends import quantisation
from rerank_plugins.backends._files import ModelFiles, converted_directory
from rerank_plugins.backends.base import Batch, LocalBackend
from rerank_plugins.backends.checkpoint import Checkpoint
from rerank_plugins.backends.graphs import DTYPES, Graph, beside, graph_names, read_graph
from rerank_plugins.backends.pairs import EncodedPair
from rerank_plugins.backends.weights import why_no_head, why_no_weights
from rerank_plugins.errors import ConfigurationError, ModelLoadError, RerankError, ScoringError
from rerank_plugins.settings import Settings

__all__ = ["BATCH_COST", "TOKEN_BUDGET", "Feeds", "GraphBackend", "check_device", "graph_error", "source", "take_graph"]

TOKEN_BUDGET = 1024
"""Padded tokens in a batch: enough to fill the cores, small enough for the activations to stay in cache."""
BATCH_COST = 32
"""What a batch costs besides its tokens, in tokens: its weights are read anew."""
Feeds: TypeAlias = "list[dict[str, NDArray[Any]]]"
"""Inputs of a graph, one batch after the other."""


def check_device(settings: Settings) -> None:
    """Refuse devices that only PyTorch has.

    Raises:
        ConfigurationError: `device` is none that a graph runs on.
    """
    if settings.device not in (None, "cpu", "CPU"):
        raise ConfigurationError(
            f"device={settings.device!r} needs the torch backend; ONNX graphs run on the CPU here. "
            "Use backend='torch', or leave device at None."
        )


def take_graph(checkpoint: Checkpoint, precision: str) -> tuple[Checkpoint, list[Graph]]:
    """Graphs of a model that give logits, those for a precision first.

    The model's own; or, where it has none, the one that ``rerank-plugins convert`` made of these very files.

    Returns:
        What describes them, and at least one graph.

    Raises:
        ModelLoadError: There is none.
    """
    try:
        return checkpoint, _logit_graphs(checkpoint, precision)
    except ModelLoadError:
        converted = converted_directory(checkpoint.files)
        if not (converted / "model.onnx").is_file():
            raise
    other = Checkpoint(ModelFiles(converted, checkpoint.name))
    return other, _logit_graphs(other, precision)


def _logit_graphs(checkpoint: Checkpoint, precision: str) -> list[Graph]:
    names = graph_names(checkpoint.files, precision)
    if not names:
        raise ModelLoadError(_no_graph(checkpoint))
    if not checkpoint.folder_has("tokenizer.json"):
        # Told before a graph is fetched that could not be used.
        checkpoint.tokenizer()
    heads = [module.folder for module in checkpoint.modules[1:] if module.folder]
    if (why := why_no_head(checkpoint)) is not None and checkpoint.modules:
        raise ModelLoadError(f"{checkpoint.name!r} is no reranker: {why}.")
    if heads and checkpoint.files.remote:
        raise ModelLoadError(
            f"{checkpoint.name!r} has its head in modules of its own ({', '.join(heads)}), which no published graph "
            f"holds. Make one with: rerank-plugins convert {checkpoint.name} OUT   or take backend='torch'."
        )
    graphs: list[Graph] = []
    reasons: list[RerankError] = []
    for name in names:
        try:
            graph = read_graph(checkpoint.files, name)
            graph.logits(checkpoint.hidden_size)
        except ModelLoadError as error:
            reasons.append(error)
            # The others are forms of the same graph: not worth a download, nor better than what is damaged.
            if checkpoint.files.remote or PurePosixPath(name).stem == "model":
                break
            continue
        graphs.append(graph)
        if fits(graph, precision):
            break
    if not graphs:
        hint = ""
        if why_no_weights(checkpoint) is None:
            hint = f" Use backend='torch', or make one with: rerank-plugins convert {checkpoint.name} OUT"
        raise ModelLoadError(f"{reasons[0]}{hint}")
    return graphs


def fits(graph: Graph, precision: str) -> bool:
    """Whether a graph is stored as a precision asks, so that no other need be looked at."""
    rounded = graph.quantisation in ("static", "dynamic")
    if precision == "int8":
        return graph.quantisation is not None
    if precision == "fp16":
        return graph.half and not rounded
    return precision == "auto" or not (rounded or graph.half)


def _no_graph(checkpoint: Checkpoint) -> str:
    message = f"{checkpoint.name!r} has no ONNX graph (onnx/model.onnx or model.onnx)"
    if checkpoint.adapter_config.values:
        base = checkpoint.adapter_config.text("base_model_name_or_path")
        return (
            f"{message}: it is an adapter (LoRA) of {base!r}. Use it with backend='torch', or merge it there once "
            "(merge_and_unload(), then save_pretrained(DIR)) and convert DIR."
        )
    if (why := why_no_weights(checkpoint)) is not None:
        return f"{message}, and {why}."
    if checkpoint.is_causal:
        return f"{message}. Causal language models run on backend='torch'."
    return (
        f"{message}. Make one with: rerank-plugins convert {checkpoint.name} OUT   and use OUT, or take "
        "backend='torch'."
    )


@contextmanager
def source(graph: Graph, calibration: Feeds | None) -> Iterator[tuple[str | bytes, str]]:
    """What an engine loads: the path of a graph, or the content and digest of the int8 one that is made of it here."""
    with beside(graph) as path:
        if calibration is None:
            yield str(path), ""
            return
        content = quantisation.quantised(path, calibration)
    yield content, hashlib.sha256(content).hexdigest()


class GraphBackend(LocalBackend):
    """An ONNX graph on some engine, which adds `run`.

    Args:
        checkpoint: The model.
        graph: Its graph.
        precision: What it computes in. ``"int8"`` for a float32 graph makes an int8 one of it, see
            `rerank_plugins.backends.quantisation`.
    """

    def __init__(self, checkpoint: Checkpoint, graph: Graph, precision: str) -> None:
        tokenizer = checkpoint.tokenizer()
        encoder = checkpoint.encoder(tokenizer, graph=graph, prompt=checkpoint.prompt(tokenizer))
        self.output = graph.logits(checkpoint.hidden_size)
        self.inputs = {value.name: DTYPES[value.dtype] for value in graph.inputs}
        checkpoint.check_ids(tokenizer, with_types="token_type_ids" in self.inputs)
        shapes = [value.shape for value in graph.inputs if value.shape is not None and len(value.shape) == 2]
        self._fixed_rows = next((shape[0] for shape in shapes if shape[0]), None)
        self._fixed_tokens = next((shape[1] for shape in shapes if shape[1]), None)
        if self._fixed_tokens:
            encoder.limit = min(encoder.limit, self._fixed_tokens)
            encoder = encoder.configured(max_length=None, instruction=None)
        # Scales that are taken over a batch: a score would depend on what else is in it, and on its padding.
        self._alone = graph.quantisation == "dynamic" or checkpoint.sees_padding
        self._reads_segments = checkpoint.reads_segments
        super().__init__(encoder, token_budget=TOKEN_BUDGET, batch_cost=BATCH_COST)
        if self._alone:
            self.token_budget = self.batch_cost = 1
        self._files, self._graph, self._told_labels = checkpoint.files, graph, checkpoint.labels
        self.precision = precision
        self.made = ""
        """Digest of the int8 graph that was made; empty where the stored one runs."""

    def calibration(self) -> Feeds | None:
        """Inputs to make an int8 graph with, where one has to be made."""
        if self.precision != "int8" or self._graph.quantisation in ("static", "dynamic"):
            return None
        pairs = self.encoder.encode(quantisation.calibration_pairs())
        return [self.feeds(self.collate([pair])) for pair in pairs]

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Digest of the graph, its weights, the tokenizer and the configuration. Reads them at the first use."""
        return self._files.fingerprint(self._graph.path) + self.made

    @abstractmethod
    def run(self, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The output `self.output` for inputs of one batch."""

    def try_out(self) -> None:
        """Score one short pair, which tells the number of classes and whether the graph works.

        Raises:
            ModelLoadError: It does not.
        """
        try:
            logits = self.forward(self.collate(self.encoder.encode([("a", "b")])))
        except RerankError as error:
            raise ModelLoadError(f"{self._graph.path} cannot score: {error}") from error
        if logits.ndim != 2:
            raise ModelLoadError(
                f"{self._graph.path} gives an output of shape {logits.shape} for one pair; expected (1, n_labels). It "
                "is the graph of an encoder or a language model, not of a cross-encoder."
            )
        told = self._told_labels or ()
        n = logits.shape[1]
        self.labels = told if len(told) == n else tuple(f"LABEL_{i}" for i in range(n))

    def collate(self, pairs: Sequence[EncodedPair], step: int = 1) -> Batch:
        """As `LocalBackend.collate`; without padding for a graph whose score would depend on it."""
        return super().collate(pairs, self._fixed_tokens or (1 if self._alone else step))

    def feeds(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """The graph's inputs for one batch, in the types that it takes."""
        arrays = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if "token_type_ids" in self.inputs:
            types = batch.token_type_ids
            arrays["token_type_ids"] = types if self._reads_segments else np.zeros_like(types)
        if "position_ids" in self.inputs:
            arrays["position_ids"] = (batch.attention_mask.cumsum(-1) - 1).clip(min=0)
        return {name: arrays[name].astype(dtype, copy=False) for name, dtype in self.inputs.items()}

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits of one batch, shape (n_pairs, n_labels)."""
        feeds = self.feeds(batch)
        n, rows = len(batch.input_ids), self._fixed_rows
        try:
            if rows is None or rows == n:
                return _as_matrix(self.run(feeds))
            # A graph for so many pairs: the last call is filled up with its last pair.
            parts = []
            for start in range(0, n, rows):
                chosen = np.minimum(np.arange(start, start + rows), n - 1)
                parts.append(_as_matrix(self.run({name: array[chosen] for name, array in feeds.items()})))
            return np.concatenate(parts)[:n]
        except Exception as error:
            raise ScoringError(
                f"{self.name} failed on a batch of shape {batch.input_ids.shape}: {str(error)[:1000]}"
            ) from error


def _as_matrix(logits: NDArray[Any]) -> NDArray[np.float32]:
    matrix = np.asarray(logits).astype(np.float32, copy=False)
    return matrix[:, None] if matrix.ndim == 1 else matrix


def graph_error(engine: str, path: Path, model: str, error: Exception) -> ModelLoadError:
    """The error for a graph that an engine does not take."""
    return ModelLoadError(f"{engine} cannot load {path} of {model!r}: {str(error)[:2000]}")
