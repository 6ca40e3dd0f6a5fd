"""From a cross-encoder checkpoint to one ONNX file that the base install can run, and proof that it scores
the same."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._engines import onnxruntime
from rerank_plugins._extras import import_extra
from rerank_plugins._paths import read_as_umask_says, writable_directory
from rerank_plugins._quiet import no_progress_bars
from rerank_plugins.backends import quantisation
from rerank_plugins.backends.base import collate
from rerank_plugins.backends.checkpoint import Checkpoint
from rerank_plugins.backends.load import open_weights
from rerank_plugins.backends.pairs import PairEncoder
from rerank_plugins.conversion._first_token import first_token_only
from rerank_plugins.conversion._weights import store
from rerank_plugins.errors import ConfigurationError, ModelLoadError, ScoringError

__all__ = ["ConversionReport", "convert", "silent"]

MAX_LOGIT_DIFFERENCE = 1e-4
"""Largest difference between a float32 graph and its source that `convert` accepts."""
MIN_RANK_CORRELATION = 0.99
"""Smallest Spearman correlation between an int8 graph and its source that `convert` accepts."""

_QUERIES = (
    "how do I sort a list of dictionaries by a key",
    "capital of France",
    "What is the difference between a process and a thread, and when should I use each of them?",
    "如何在Python中读取文件？",
    "東京の人口は何人ですか",
    "🎉 emoji query 🚀",
    "naïve café Ünïcödé",
    "x",
)
_TEXTS = (
    "Use sorted(items, key=lambda item: item['name']) to sort a list of dictionaries by one of their keys.",
    "Paris is the capital and largest city of France, on the river Seine.",
    "A process has its own address space; threads of one process share memory. " * 6,
    "使用 open() 函数可以读取文件的内容，例如 with open('a.txt') as f: print(f.read())。",
    "東京都の人口は約1400万人で、日本で最も人口の多い都市である。",
    "🚀🚀 To the moon! 🎉 Emojis are characters outside the basic multilingual plane. 👩‍💻",
    "Crème brûlée is a dessert of rich custard with a layer of hardened caramelised sugar.",
    "no",
    "The committee met on Tuesday to discuss the budget, but no decision was taken. " * 10,
)


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What `convert` made and how it compares with its source.

    Attributes:
        path: The directory.
        source: The checkpoint that was converted.
        weights: ``"fp32"`` or ``"int8"``.
        bytes: Size of the graph file, and of the weights beside it where it is too large for one file.
        inputs: Names of the graph's inputs.
        n_labels: Columns of ``logits``.
        pairs: How many pairs were compared.
        max_difference: Largest absolute difference of logits to the float32 source.
        rank_correlation: Spearman correlation with the source's logits.
        exporter: ``"torchscript"`` or ``"dynamo"``.
    """

    path: Path
    source: str
    weights: str
    bytes: int
    inputs: tuple[str, ...]
    n_labels: int
    pairs: int
    max_difference: float
    rank_correlation: float
    exporter: str


def convert(
    model: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    int8: bool = False,
    calibrate: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    opset: int = 18,
    overwrite: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> ConversionReport:
    """Exports a cross-encoder to ``model.onnx``, and checks its scores against the source before anything
    appears.

    The graph takes the tokenizer's inputs (int64) and gives ``logits``, float32 (batch, labels), before any
    activation. The directory also gets the tokenizer and a ``config.json``; every backend and both adapters
    take it as a model.

    An int8 graph is a quarter of the size, and about twice as fast on processors with VNNI. Its scales are constants,
    found over calibration texts, so that a score does not depend on its batch. ONNX Runtime and OpenVINO run the same
    file and score alike.

    Args:
        model: A local directory or a Hub id of a sequence-classification cross-encoder.
        out_dir: Where to put it. It appears only when all is done and checked.
        int8: Store weights and multiply them in int8, each output channel with its own scale.
        calibrate: JSON Lines with ``"query"`` and ``"text"``: pairs like yours, to find the ranges of activations with.
            None takes texts of this package, of many kinds.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run the repository's own Python code.
        opset: ONNX operator set.
        overwrite: Replace what is in ``out_dir``.
        progress: Called with the name of a stage and the share done.

    Returns:
        What was made, and the measured differences.

    Raises:
        ConfigurationError: If ``out_dir`` has files in it, the model is a causal language model, or the calibration
            texts are unreadable or too few.
        MissingDependencyError: If the extra ``train`` is not installed.
        ModelLoadError: If the model cannot be loaded or exported.
        ScoringError: If the graph does not score as its source does.
    """
    out = Path(out_dir).expanduser()
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"{out} is not a directory. Give a directory that is empty or not there yet.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ConfigurationError(f"{out} is not empty. Give another directory, or overwrite=True to replace it.")
    if calibrate is not None and not int8:
        raise ConfigurationError("calibrate has texts to find the scales of int8 with: give int8=True as well.")
    texts = quantisation.calibration_pairs(calibrate) if int8 else []
    for module in ("torch", "sentence_transformers", "onnx"):
        import_extra(module, "train")
    writable_directory(out.parent)
    tell = progress or (lambda stage, share: None)

    tell("load", 0.0)
    name = os.fspath(model)
    checkpoint = open_weights(name, revision=revision, trust_remote_code=trust_remote_code)
    if checkpoint.is_causal:
        raise ConfigurationError(
            f"{name!r} is a causal language model, scored by its next token; there is no such ONNX graph "
            "here. Use it with backend='torch'."
        )
    source = _load(checkpoint, trust_remote_code)

    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        report = _build(source, work, texts if int8 else None, opset, tell, out)
        read_as_umask_says(work)
        _replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    tell("done", 1.0)
    return report


def _build(
    source: _Source,
    work: Path,
    texts: Sequence[tuple[str, str]] | None,
    opset: int,
    tell: Callable[[str, float], None],
    out: Path,
) -> ConversionReport:
    """Make and check the graph in ``work``, which is to become ``out``; in int8 where there are calibration texts."""
    graph, name = work / "model.onnx", source.checkpoint.name
    tell("export", 0.2)
    inputs, exporter = _export(source, graph, opset)
    if texts is not None:
        tell("int8", 0.6)
        _round(source, graph, texts)
    tell("check", 0.7)
    pairs, difference, correlation, n_labels = _check(source, graph, inputs)
    _judge(texts is not None, name, pairs, difference, correlation)
    tell("write", 0.95)
    report = ConversionReport(
        path=out,
        source=name,
        weights="fp32" if texts is None else "int8",
        bytes=sum(file.stat().st_size for file in work.iterdir()),
        inputs=tuple(inputs),
        n_labels=n_labels,
        pairs=pairs,
        max_difference=difference,
        rank_correlation=correlation,
        exporter=exporter,
    )
    _write_config(source, work, report)
    _write_tokenizer(source, work)
    _write_settings(source, work)
    return report


@dataclass(frozen=True, slots=True)
class _Source:
    """The model to convert, and what it reads."""

    checkpoint: Checkpoint
    model: Any
    encoder: PairEncoder
    names: tuple[str, ...]
    """The inputs that it takes."""


def _load(checkpoint: Checkpoint, trust_remote_code: bool) -> _Source:
    from rerank_plugins.backends.cross_encoder import can_pad, load_checked, reading

    torch = import_extra("torch", "train")
    with no_progress_bars():
        model = load_checked(
            checkpoint,
            device="cpu",
            trust_remote_code=trust_remote_code,
            # The plain attention: the fused ones bring branches on the mask that a graph cannot hold.
            model_kwargs={"attn_implementation": "eager", "dtype": torch.float32},
        )
    if not can_pad(model):
        raise ModelLoadError(
            f"{checkpoint.name!r} has no padding token, so that a graph of it could not score several pairs at once. "
            "Name one as pad_token in tokenizer_config.json."
        )
    tokenizer, prompt = reading(checkpoint, model)
    taken = model[0].tokenizer.model_input_names
    names = tuple(name for name in ("input_ids", "attention_mask", "token_type_ids") if name in taken)
    return _Source(checkpoint, model.eval(), checkpoint.encoder(tokenizer, prompt=prompt), names)


def _encode(source: _Source, pairs: Sequence[tuple[str, str]], limit: int) -> dict[str, Any]:
    """Tensors of one batch, padded to its longest pair."""
    torch = import_extra("torch", "train")
    encoder = source.encoder.configured(max_length=min(limit, source.encoder.limit), instruction=None)
    batch = collate(encoder, encoder.encode(pairs))
    return {name: torch.from_numpy(getattr(batch, name)) for name in source.names}


def _export(source: _Source, graph: Path, opset: int) -> tuple[list[str], str]:
    torch = import_extra("torch", "train")
    names, model = list(source.names), source.model

    class Flat(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList(model)

        def forward(self, *tensors: Any) -> Any:
            features = dict(zip(names, tensors, strict=True))
            for part in self.parts:
                features = part(features)
            return features["scores"].float()

    sample = _encode(source, [(_QUERIES[0], _TEXTS[0]), (_QUERIES[1], _TEXTS[1])], 128)
    example = tuple(sample[n] for n in names)
    flat = Flat().eval()
    axes = {n: {0: "batch", 1: "tokens"} for n in names} | {"logits": {0: "batch"}}
    failures = []
    for exporter in ("torchscript", "dynamo"):
        try:
            with silent(), first_token_only(model):
                if exporter == "torchscript":
                    shapes = {"dynamic_axes": axes, "dynamo": False}
                else:
                    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
                    shapes = {"dynamic_shapes": (tuple({0: batch, 1: tokens} for _ in names),), "dynamo": True}
                torch.onnx.export(
                    flat,
                    example,
                    str(graph),
                    input_names=names,
                    output_names=["logits"],
                    opset_version=opset,
                    **shapes,
                )
            _compact(graph)
            # A graph that loads and takes another shape than the example's: a trace can freeze either.
            other = _encode(source, [(_QUERIES[2], _TEXTS[2]), (_QUERIES[0], _TEXTS[7]), ("a", "b")], 512)
            _run(_session(graph), names, other)
            return names, exporter
        except Exception as error:
            failures.append(f"{exporter}: {type(error).__name__}: {str(error).strip()[:500]}")
            for leftover in graph.parent.iterdir():
                leftover.unlink()
    raise ModelLoadError("The model could not be exported to ONNX. " + " | ".join(failures))


def _round(source: _Source, graph: Path, texts: Sequence[tuple[str, str]]) -> None:
    """Puts the int8 graph in the place of a float32 one."""
    batches = [_encode(source, [pair], source.encoder.limit) for pair in texts]
    content = quantisation.quantised(graph, [{name: batch[name].numpy() for name in source.names} for batch in batches])
    for leftover in graph.parent.iterdir():
        leftover.unlink()
    graph.write_bytes(content)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Exporters and loaders print, log and warn; a library does none of it."""
    previous = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(previous)


def _compact(graph: Path) -> None:
    """One file, no names of local paths, shared weights once."""
    onnx = import_extra("onnx", "train")
    loaded = onnx.load(str(graph))
    for node in loaded.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    for value in [
        *loaded.graph.input,
        *loaded.graph.output,
        *loaded.graph.value_info,
        *loaded.graph.initializer,
    ]:
        value.ClearField("metadata_props")
    loaded.ClearField("metadata_props")
    del loaded.graph.value_info[:]
    for leftover in graph.parent.iterdir():
        leftover.unlink()
    store(loaded, graph)


def _session(graph: Path) -> Any:
    runtime = onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    # Waiting threads that spin slow down everything else on the machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _run(session: Any, names: Sequence[str], batch: dict[str, Any]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = session.run(["logits"], {n: batch[n].numpy() for n in names})[0]
    return logits


def _batches(limit: int) -> list[list[tuple[str, str]]]:
    everything = [(query, text) for query in _QUERIES for text in _TEXTS]
    short = [pair for pair in everything if len(pair[1]) < 120]
    # A batch of one, an odd one, mixed lengths with much padding, one at the very limit.
    return [
        short[:1],
        short[1:8],
        everything[8:24],
        everything[24:56],
        [("x", "no")],
        [(_QUERIES[2], "word " * limit)],
    ]


def _check(source: _Source, graph: Path, names: Sequence[str]) -> tuple[int, float, float, int]:
    torch = import_extra("torch", "train")
    session = _session(graph)
    ours, theirs = [], []
    # Beyond this the comparison takes minutes, and nothing new happens.
    longest = min(source.encoder.limit, 1024)
    for pairs in _batches(longest):
        batch = _encode(source, pairs, longest)
        features = dict(batch)
        try:
            with torch.inference_mode():
                for module in source.model:
                    features = module(features)
            ours.append(_run(session, names, batch))
        except Exception as error:
            shape = tuple(batch["input_ids"].shape)
            raise ScoringError(
                f"{source.checkpoint.name!r} fails on a batch of shape {shape}: {str(error)[:500]}. Where that is too "
                "long, the model takes fewer tokens than its configuration says: set model_max_length in "
                "tokenizer_config.json."
            ) from error
        theirs.append(features["scores"].float().numpy())
    expected, found = np.concatenate(theirs), np.concatenate(ours)
    if not np.isfinite(found).all():
        raise ScoringError("The exported graph gives logits that are not finite. The model was not converted.")
    difference = float(np.abs(expected - found).max())
    correlation = min(_spearman(expected[:, column], found[:, column]) for column in range(expected.shape[1]))
    return len(found), difference, correlation, int(found.shape[1])


def _spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    ranks = [_ranks(values) for values in (a, b)]
    if any(rank.min() == rank.max() for rank in ranks):
        # All the same logit: the orders agree exactly if both are.
        return float(all(rank.min() == rank.max() for rank in ranks))
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 0, ties at their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    after = np.cumsum(counts)
    mean: NDArray[np.float64] = (after - counts + after - 1) / 2
    return mean[place.reshape(-1)]


def _judge(int8: bool, name: str, pairs: int, difference: float, correlation: float) -> None:
    if int8 and correlation < MIN_RANK_CORRELATION:
        raise ScoringError(
            f"In int8 {name!r} orders {pairs} pairs differently: Spearman correlation {correlation:.4f}, at "
            f"least {MIN_RANK_CORRELATION} expected (largest difference of logits {difference:.3g}). "
            "Convert without int8."
        )
    if not int8 and difference > MAX_LOGIT_DIFFERENCE:
        raise ScoringError(
            f"The exported graph of {name!r} scores {pairs} pairs differently from its source: logits differ by "
            f"up to {difference:.3g}, at most {MAX_LOGIT_DIFFERENCE} expected. It was not kept."
        )


def _write_config(source: _Source, work: Path, report: ConversionReport) -> None:
    # Code of the source's own has no part in a graph.
    config = {key: value for key, value in source.checkpoint.config.values.items() if key != "auto_map"}
    live = source.model[0].auto_model.config
    labels = {int(key): str(value) for key, value in (getattr(live, "id2label", None) or {}).items()}
    if len(labels) != report.n_labels:
        labels = {i: f"LABEL_{i}" for i in range(report.n_labels)}
    config["id2label"] = {str(key): labels[key] for key in sorted(labels)}
    config["label2id"] = {value: key for key, value in labels.items()}
    config["num_labels"] = report.n_labels
    for key in ("max_position_embeddings", "pad_token_id", "model_type"):
        if config.get(key) is None and getattr(live, key, None) is not None:
            config[key] = getattr(live, key)
    config["rerank_plugins"] = {
        "weights": report.weights,
        "source": Path(report.source).name if Path(report.source).exists() else report.source,
        "max_length": source.encoder.limit,
        "inputs": list(report.inputs),
        "checked": {
            "pairs": report.pairs,
            "max_logit_difference": report.max_difference,
            "rank_correlation": report.rank_correlation,
        },
    }
    (work / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_settings(source: _Source, work: Path) -> None:
    """What sentence-transformers keeps beside the configuration: prompts, and whether pairs go through a template."""
    checkpoint = source.checkpoint
    settings = {**checkpoint.settings.values} if checkpoint.saved else {}
    if not checkpoint.takes_messages:
        settings.pop("modality_config", None)
    elif "message" not in settings.get("modality_config", {}):
        settings["modality_config"] = {"message": {"method": "forward", "method_output_name": "logits"}}
    if settings:
        (work / "sentence_bert_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    prompts = checkpoint.files.path / "config_sentence_transformers.json"
    if checkpoint.default_prompt is not None:
        shutil.copy(prompts, work)


def _write_tokenizer(source: _Source, work: Path) -> None:
    tokenizer = source.model[0].tokenizer
    tokenizer.save_pretrained(str(work))
    published = source.checkpoint.files.path / source.checkpoint.folder / "tokenizer.json"
    if published.is_file():
        # transformers writes one that it has rebuilt, which may make other tokens.
        shutil.copy(published, work / "tokenizer.json")
    # Settings of the last call are saved too; who loads the file sets their own.
    path = work / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["truncation"] = content["padding"] = None
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    path = work / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "max_length", "pad_to_multiple_of", "stride", "truncation_strategy"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(work: Path, out: Path) -> None:
    if not out.exists():
        work.replace(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    out.replace(aside / out.name)
    try:
        work.replace(out)
    except OSError:
        (aside / out.name).replace(out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
