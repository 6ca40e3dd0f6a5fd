"""How a cross-encoder is trained, and how it went."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from rerank_plugins.errors import ConfigurationError

Loss = Literal["mix", "listwise", "binary"]


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How to train.

    Attributes:
        minutes: Time budget; the learning rate follows the elapsed share of it. Give this or ``steps``.
        steps: Number of optimiser steps, for runs that can be repeated exactly.
        learning_rate: Peak rate of the trunk.
        head_learning_rate: Peak rate of the head.
        warmup: Share of the run during which the rates rise.
        weight_decay: AdamW's.
        groups_per_step: Queries in a step.
        micro_batch: Pairs in one forward pass; pairs of a step are sorted by length first.
        max_length: Tokens per pair while training.
        loss: ``"mix"`` of both, or one alone: ``"listwise"`` is the cross-entropy of each group's target with the
            softmax of its logits, ``"binary"`` the cross-entropy of each judged gain with the sigmoid of its logit.
        binary_weight: Weight of the binary loss in the mix, which gives the logits an absolute level.
        ema: Decay of the averaged weights, which are what is measured and kept.
        evaluations: How often the dev groups are measured.
        patience: Stop after this many evaluations without a better one; None goes on to the end.
        checkpoint_s: Seconds between checkpoints.
        seed: Seed of the order of the groups.
        bf16: Run the matrix products in bfloat16; None does so where the device is faster in it.
        device: A torch device; None chooses.
    """

    minutes: float | None = None
    steps: int | None = None
    learning_rate: float = 5e-5
    head_learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    groups_per_step: int = 8
    micro_batch: int = 32
    max_length: int = 160
    loss: Loss = "mix"
    binary_weight: float = 0.1
    ema: float = 0.998
    evaluations: int = 4
    patience: int | None = None
    checkpoint_s: float = 120.0
    seed: int = 0
    bf16: bool | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            got = "neither" if self.minutes is None else "both"
            raise ConfigurationError(f"Give one of minutes=... and steps=...; got {got}.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigurationError(f"minutes must be a positive number; got {self.minutes}.")
        if self.steps is not None and self.steps < 1:
            raise ConfigurationError(f"steps must be at least 1; got {self.steps}.")
        for name in ("learning_rate", "head_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} must be a positive number; got {getattr(self, name)}.")
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


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run gave.

    Attributes:
        steps: Optimiser steps taken.
        pairs: Pairs seen.
        seconds: Time spent, over all resumptions.
        measures: Mean dev measure at each evaluation: the first before any training, the last of the mean of the
            best and the last weights.
        best: The best of them; its weights are in the model.
        by_kind: The best evaluation, kind by kind.
        stopped_early: Whether patience ran out before the budget.
    """

    steps: int
    pairs: int
    seconds: float
    measures: tuple[float, ...]
    best: float
    by_kind: dict[str, float] = field(default_factory=dict)
    stopped_early: bool = False
