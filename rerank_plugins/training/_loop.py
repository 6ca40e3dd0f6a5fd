"""Training loop of cross-encoders: a budget of time or steps, resumable."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins._machine import native_bf16
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.training._data import Group
from rerank_plugins.training._mining import torch_device
from rerank_plugins.training._model import body_and_head
from rerank_plugins.training._results import TrainingResult
from rerank_plugins.training.settings import Progress, TrainingConfig


def ndcg(scores: Sequence[float] | NDArray[Any], gains: Sequence[float], k: int = 10) -> float:
    """nDCG@k of one list with graded gains. Ties are broken against the model: the lower gain comes first.

    Not ir-measures, which takes whole-number judgements alone, nor scikit-learn's ``ndcg_score``, whose mean over ties
    flatters a model that scores all passages alike.
    """
    graded = np.asarray(gains, dtype=np.float64)
    discount = 1 / np.log2(np.arange(2, k + 2))
    order = np.lexsort((graded, -np.asarray(scores, dtype=np.float64)))[:k]
    ideal = np.sort(graded)[::-1][:k]
    return float((graded[order] * discount[: len(order)]).sum() / (ideal * discount[: len(ideal)]).sum())


def batches(groups: Sequence[Group], per_step: int, seed: int, epoch: int) -> Iterator[list[Group]]:
    """Batches of one epoch in random order. Groups of similar length share a batch, which saves padding."""
    rng = random.Random(f"{seed}-{epoch}")
    order = list(groups)
    rng.shuffle(order)
    for start in range(0, len(order), per_step * 32):
        part = order[start : start + per_step * 32]
        part.sort(key=lambda group: sum(min(len(text), 900) for text in group.passages) / len(group.passages))
        cut = [part[i : i + per_step] for i in range(0, len(part), per_step)]
        rng.shuffle(cut)
        yield from cut


class Scorer:
    """Cross-encoder scoring in micro-batches of pairs of similar length."""

    def __init__(self, model: Any, *, max_length: int, micro_batch: int, bf16: bool, device: str) -> None:
        self._torch: Any = import_extra("torch", "train")
        self.model, self.tokenizer = model, model.tokenizer
        self._typed = "token_type_ids" in self.tokenizer.model_input_names
        self._max_length, self._micro_batch, self._bf16, self._device = max_length, micro_batch, bf16, device

    def __call__(self, queries: Sequence[str], passages: Sequence[str], micro_batch: int | None = None) -> Any:
        """Logits, a float32 tensor (n,), in input order."""
        torch = self._torch
        size = micro_batch or self._micro_batch
        encoded = self.tokenizer(
            list(queries),
            list(passages),
            truncation="longest_first",
            max_length=self._max_length,
            return_token_type_ids=self._typed,
            return_attention_mask=False,
        )
        ids = encoded["input_ids"]
        types = encoded["token_type_ids"] if self._typed else [[0] * len(row) for row in ids]
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        logits = []
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            # Multiples of 32: on a CPU, each new shape compiles a kernel.
            width = -(-max(len(ids[row]) for row in rows) // 32) * 32
            batch = np.zeros((3, len(rows), width), dtype=np.int64)
            batch[0] = self.tokenizer.pad_token_id or 0
            for place, row in enumerate(rows):
                length = len(ids[row])
                batch[0, place, :length], batch[1, place, :length], batch[2, place, :length] = (
                    ids[row],
                    1,
                    types[row],
                )
            tensors = torch.from_numpy(batch).to(self._device)
            features = {"input_ids": tensors[0], "attention_mask": tensors[1]}
            if self._typed:
                features["token_type_ids"] = tensors[2]
            with torch.autocast(self._device.split(":")[0], dtype=torch.bfloat16, enabled=self._bf16):
                scores = self.model(features)["scores"]
            logits.append(scores.float().reshape(len(rows)))
        flat = torch.cat(logits)
        return flat[torch.tensor(np.argsort(order, kind="stable"), device=flat.device)]


def mean_ndcg(groups: Sequence[Group], scores: Sequence[Sequence[float] | NDArray[Any]]) -> float:
    """Mean nDCG@10 of groups, given each one's scores; 0 without groups."""
    values = [ndcg(found, group.gains) for group, found in zip(groups, scores, strict=True)]
    return float(np.mean(values)) if values else 0.0


def evaluate_groups(scorer: Scorer, groups: Sequence[Group]) -> tuple[float, NDArray[np.float32]]:
    """Mean nDCG@10 of groups, and the logits of all their passages, float32 (n,), in order."""
    import torch

    order = sorted(range(len(groups)), key=lambda i: sum(len(t) for t in groups[i].passages))
    found: dict[int, NDArray[np.float32]] = {}
    with torch.inference_mode():
        for start in range(0, len(order), 16):
            rows = order[start : start + 16]
            queries = [groups[row].query for row in rows for _ in groups[row].passages]
            texts = [text for row in rows for text in groups[row].passages]
            scores = scorer(queries, texts, 32).float().cpu().numpy()
            at = 0
            for row in rows:
                found[row] = scores[at : at + len(groups[row].passages)]
                at += len(groups[row].passages)
    logits = [found[row] for row in range(len(groups))]
    joined = np.concatenate(logits) if logits else np.zeros(0, dtype=np.float32)
    return mean_ndcg(groups, logits), joined


def fit(
    model: Any,
    groups: Sequence[Group],
    dev: Sequence[Group],
    config: TrainingConfig,
    checkpoints: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    budget_s: float | None = None,
) -> TrainingResult:
    """Trains ``model`` in place and leaves the best averaged weights in it.

    A killed run resumes from its last checkpoint in ``checkpoints``: optimiser, averages and place in the data. A run
    by ``steps`` ends with the same weights whether it was interrupted or not.

    Not sentence-transformers' ``CrossEncoderTrainer`` (6.2, binary loss, defaults, bfloat16), which was five times
    slower: 11 pairs a second instead of 59, on the same pairs in lists of eight, on two cores of a shared AMD Zen 5.
    It also trains the embeddings, and its batches have more padding and more shapes.

    Args:
        model: A `CrossEncoder` of sentence-transformers with one logit.
        groups: Training groups.
        dev: Groups that choose the best weights; without any, the last averaged weights are kept.
        config: Settings of the loop.
        checkpoints: Directory of this run alone.
        progress: Called with a line of news and the share done.
        budget_s: Seconds of training and measuring, over all resumptions, where `config` has minutes; None is all of
            them. A resumed run keeps its first budget.

    Raises:
        ConfigurationError: No groups, patience without dev groups, or checkpoints of another run.
    """
    if not groups:
        raise ConfigurationError("There is nothing to train on: no query has both a positive and a negative passage.")
    if config.patience is not None and not dev:
        raise ConfigurationError("patience needs dev groups to measure, and there are none. Leave it at None.")
    run = _Run(model, groups, dev, config, Path(checkpoints), progress)
    run.state.budget_s = budget_s if budget_s is not None else 60 * (config.minutes or 1)
    run.resume()
    while not run.ended:
        run.epoch()
    return run.finish()


@dataclass(slots=True)
class _State:
    """Progress of a run, as a checkpoint keeps it.

    Attributes:
        step: Optimiser steps taken.
        pairs: Pairs seen.
        seconds: Time spent up to the last checkpoint.
        measures: nDCG@10 of the dev groups at each evaluation.
        best: The best of them.
        stale: Evaluations since the best one.
        next: Share of the run at which the dev groups are measured next.
        stopped_early: Whether patience ran out.
        finished: Whether all is done, including the last evaluations.
        budget_s: Seconds of the whole run.
        measure_s: Seconds of the last evaluation.
    """

    step: int = 0
    pairs: int = 0
    seconds: float = 0.0
    measures: list[float] = field(default_factory=list)
    best: float = -math.inf
    stale: int = 0
    next: float = 0.0
    stopped_early: bool = False
    finished: bool = False
    budget_s: float = 0.0
    measure_s: float = 0.0


class _Run:
    """One run of `fit`: model, optimiser, averaged weights, state, and checkpoints on disk."""

    def __init__(
        self,
        model: Any,
        groups: Sequence[Group],
        dev: Sequence[Group],
        config: TrainingConfig,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self._torch: Any = import_extra("torch", "train")
        self.groups, self.dev, self.config, self.progress = groups, dev, config, progress
        self.device = torch_device(config.device)
        folder.mkdir(parents=True, exist_ok=True)
        self.latest, self.best_file = folder / "checkpoint.pt", folder / "best.pt"
        # Evaluation mode throughout: dropout costs time and does not help over a single epoch.
        model.to(self.device).eval()
        bf16 = native_bf16(self.device, "train") if config.bf16 is None else config.bf16
        self.scorer = Scorer(
            model, max_length=config.max_length, micro_batch=config.micro_batch, bf16=bf16, device=self.device
        )
        self._torch.manual_seed(config.seed)
        body, head = body_and_head(model)
        matrices, others = [p for p in body if p.ndim > 1], [p for p in body if p.ndim <= 1]
        parts = [
            {"params": matrices, "weight_decay": config.weight_decay, "peak": config.learning_rate},
            {"params": others, "weight_decay": 0.0, "peak": config.learning_rate},
            {"params": head, "weight_decay": 0.0, "peak": config.head_learning_rate},
        ]
        self.trained = [*matrices, *others, *head]
        self.optimizer = self._torch.optim.AdamW(parts, lr=0.0)
        self.average = [p.detach().clone() for p in self.trained]
        settings = {k: v for k, v in asdict(config).items() if k not in {"device", "checkpoint_s"}}
        # Identifies the run.
        self.signature = json.dumps({**settings, "groups": [_digest(groups), _digest(dev)]})
        self.state = _State()
        self.began = self.last_saved = time.monotonic()
        self.ended = False
        self.running = 0.0

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Resume from the latest checkpoint, if there is one.

        Raises:
            ConfigurationError: The checkpoint is of another run.
        """
        if self.latest.is_file():
            saved = self._torch.load(self.latest, map_location=self.device, weights_only=True)
            if saved["signature"] != self.signature:
                raise ConfigurationError(
                    f"{self.latest} belongs to a run with other settings or data. Delete it or choose another "
                    "directory."
                )
            self.put(saved["weights"])
            self.average = list(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state = _State(**saved["state"])
        self.began = time.monotonic() - self.state.seconds
        self.ended = self.state.stopped_early or self.share() >= 1
        self.last_saved = time.monotonic()

    def checkpoint(self) -> None:
        """Write a checkpoint atomically."""
        self.state.seconds = time.monotonic() - self.began
        content = {
            "signature": self.signature,
            "weights": [p.detach() for p in self.trained],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "state": asdict(self.state),
        }
        self._save(self.latest, content)
        self.last_saved = time.monotonic()

    def _save(self, path: Path, content: dict[str, Any]) -> None:
        part = path.with_suffix(".part")
        self._torch.save(content, part)
        part.replace(path)

    def put(self, values: Sequence[Any]) -> None:
        """Load weights into the model."""
        with self._torch.no_grad():
            for p, value in zip(self.trained, values, strict=True):
                p.copy_(value)

    def best_weights(self) -> Any:
        """Weights of the best evaluation."""
        return self._torch.load(self.best_file, map_location=self.device, weights_only=True)["weights"]

    # -- time and measures ----------------------------------------------------------------------------------------

    def share(self) -> float:
        """Share of the run that is done; 1 is the end."""
        if self.config.steps is not None:
            return self.state.step / self.config.steps
        # The budget includes what follows: two evaluations, and a calibration that costs about as much as one.
        budget_s = max(self.state.budget_s - 3 * self.state.measure_s, 0.5 * self.state.budget_s)
        return (time.monotonic() - self.began) / budget_s

    def measure(self, weights: Sequence[Any]) -> None:
        """Measure the dev groups with these weights; the best weights are saved."""
        before = [p.detach().clone() for p in self.trained]
        self.put(weights)
        started = time.monotonic()
        mean, _ = evaluate_groups(self.scorer, self.dev)
        self.state.measure_s = time.monotonic() - started
        self.state.measures.append(mean)
        if mean > self.state.best:
            self.state.best, self.state.stale = mean, 0
            self._save(self.best_file, {"weights": [p.detach() for p in self.trained]})
        else:
            self.state.stale += 1
        self.put(before)
        if self.progress is not None:
            self.progress(f"step {self.state.step}: dev nDCG@10 {mean:.4f}", min(1.0, self.share()))

    # -- training -------------------------------------------------------------------------------------------------

    def epoch(self) -> None:
        """Train to the end of the current epoch, or of the run."""
        config, state = self.config, self.state
        number, skip = divmod(state.step, math.ceil(len(self.groups) / config.groups_per_step))
        for place, chosen in enumerate(batches(self.groups, config.groups_per_step, config.seed, number)):
            if place < skip:
                continue
            done = self.share()
            if done < 1 and self.dev and done >= state.next:
                state.next += 1 / max(1, config.evaluations)
                self.measure(self.average)
                state.stopped_early = config.patience is not None and state.stale >= config.patience
                # The best weights on disk and what is known of them belong together.
                self.checkpoint()
            if done >= 1 or state.stopped_early:
                self.ended = True
                return
            self.step(chosen, done)
            if time.monotonic() - self.last_saved >= config.checkpoint_s:
                self.checkpoint()
        self.ended = self.share() >= 1

    def step(self, chosen: Sequence[Group], done: float) -> None:
        """One optimiser step, with the learning rates of a share of the run, and one of the averages."""
        config, state = self.config, self.state
        rate = min(done / config.warmup, (1 - done) / (1 - config.warmup), 1.0) if config.warmup else 1 - done
        for part in self.optimizer.param_groups:
            part["lr"] = part["peak"] * max(rate, 1e-3)
        loss = _loss(self._torch, self.scorer, chosen, config, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        state.step += 1
        state.pairs += sum(len(group.passages) for group in chosen)
        decay = min(config.ema, (1 + state.step) / (10 + state.step))
        with self._torch.no_grad():
            self._torch._foreach_mul_(self.average, decay)
            self._torch._foreach_add_(self.average, [p.detach() for p in self.trained], alpha=1 - decay)
        value = float(loss.detach())
        self.running = value if not self.running else 0.98 * self.running + 0.02 * value
        if self.progress is not None and state.step % 20 == 0:
            speed = state.pairs / (time.monotonic() - self.began)
            self.progress(f"step {state.step}: loss {self.running:.4f}, {speed:.0f} pairs/s", min(1.0, self.share()))

    def finish(self) -> TrainingResult:
        """Measure the last weights, and give the model the best ones."""
        state = self.state
        if self.dev and not state.finished:
            if not state.stopped_early:
                self.measure(self.average)
            late = self.config.steps is None and time.monotonic() - self.began + state.measure_s > state.budget_s
            # The mean of two points of one run is often better than both, but not worth more time than was given.
            if not late:
                both = zip(self.best_weights(), self.average, strict=True)
                self.measure([(one + other) / 2 for one, other in both])
        state.finished = True
        self.checkpoint()
        self.put(self.best_weights() if self.dev else self.average)
        return TrainingResult(
            steps=state.step,
            pairs=state.pairs,
            seconds=time.monotonic() - self.began,
            measures=tuple(state.measures),
            best=state.best if self.dev else None,
            stopped_early=state.stopped_early,
        )


def _digest(groups: Sequence[Group]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        digest.update(json.dumps([group.query, group.passages, group.target, group.gains]).encode())
    return digest.hexdigest()


def _loss(torch: Any, scorer: Scorer, groups: Sequence[Group], config: TrainingConfig, device: str) -> Any:
    logits = scorer([g.query for g in groups for _ in g.passages], [text for g in groups for text in g.passages])
    functional = torch.nn.functional
    weight = {"mix": config.binary_weight, "listwise": 0.0, "binary": 1.0}[config.loss]
    loss = torch.zeros((), device=device)
    if config.loss != "binary":
        listwise = [
            -(torch.tensor(group.target, device=device) * functional.log_softmax(part, -1)).sum()
            for group, part in zip(groups, logits.split([len(group.passages) for group in groups]), strict=True)
        ]
        loss = torch.stack(listwise).mean()
    if weight:
        gains = torch.tensor([gain for group in groups for gain in group.gains], device=device)
        # A sum over the passages of each list, as in the listwise loss, and the mean over lists.
        binary = functional.binary_cross_entropy_with_logits(logits, gains, reduction="sum") / len(groups)
        loss = loss + weight * binary
    return loss
