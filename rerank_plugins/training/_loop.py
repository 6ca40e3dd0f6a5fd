"""The training loop: listwise, by elapsed time or by steps, resumable."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rerank_plugins._extras import import_extra
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.training._config import TrainingConfig, TrainingResult
from rerank_plugins.training._data import Group
from rerank_plugins.training._mining import native_bf16, torch_device
from rerank_plugins.training._model import body_and_head

Progress = Callable[[str, float], None]


def ndcg(scores: Sequence[float] | NDArray[Any], gains: Sequence[float], k: int = 10) -> float:
    """nDCG@k of one list with graded gains. Ties count against the order, as the worse of the two."""
    # ir-measures wants whole-number judgements and run files; here the gains are a teacher's probabilities.
    graded = np.asarray(gains, dtype=np.float64)
    discount = 1 / np.log2(np.arange(2, k + 2))
    order = np.lexsort((graded, -np.asarray(scores, dtype=np.float64)))[:k]
    ideal = np.sort(graded)[::-1][:k]
    return float((graded[order] * discount[: len(order)]).sum() / (ideal * discount[: len(ideal)]).sum())


def batches(groups: Sequence[Group], per_step: int, seed: int, epoch: int) -> Iterator[list[Group]]:
    """One epoch in random order, where groups of like length go together so that little is padding."""
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
    """Runs a cross-encoder over pairs, in micro-batches of like length."""

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
            # Multiples of 32: every new shape costs a kernel compilation on a CPU.
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


def ndcg_by_kind(
    groups: Sequence[Group], scores: Sequence[Sequence[float] | NDArray[Any]]
) -> tuple[float, dict[str, float]]:
    """nDCG@10 over groups, given each one's scores: the mean over kinds (0 without groups), and each kind."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for group, found in zip(groups, scores, strict=True):
        kinds[group.kind].append(ndcg(found, group.gains))
    by_kind = {kind: float(np.mean(values)) for kind, values in sorted(kinds.items())}
    return (float(np.mean(list(by_kind.values()))) if by_kind else 0.0), by_kind


def evaluate_groups(scorer: Scorer, groups: Sequence[Group]) -> tuple[float, dict[str, float], NDArray[np.float32]]:
    """nDCG@10 over groups: the mean over kinds, each kind, and every logit in order."""
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
    return (*ndcg_by_kind(groups, logits), joined)


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
    """Trains ``model`` in place, and leaves the best averaged weights in it.

    Kill it at any time: the same call goes on from the last checkpoint in ``checkpoints``, with optimiser,
    averages and place in the data. A run by ``steps`` then ends with the same weights as one that was never
    interrupted.

    On two cores of a shared AMD Zen 5 lists of eight passages went through at 59 pairs a second, and through
    sentence-transformers' ``CrossEncoderTrainer`` (6.2, binary loss, defaults, bf16, the same pairs) at 11: it
    trains the embeddings too, and its batches are neither of like length nor of few shapes.

    Args:
        model: A `CrossEncoder` of sentence-transformers with one logit.
        groups: What to learn from.
        dev: What to choose the best weights by; without any, the last averaged weights are kept.
        config: How to train.
        checkpoints: Directory of this run alone.
        progress: Called with a line of news and the share done.
        budget_s: Seconds that training and measuring may take, over all resumptions, where `config` goes by minutes;
            None is all of its minutes. A run that goes on keeps what it began with.

    Raises:
        ConfigurationError: If there is nothing to learn from, nothing to stop early by, or the checkpoints are those
            of another run.
    """
    torch: Any = import_extra("torch", "train")
    if config.loss == "binary":
        groups = [group for group in groups if group.judged]
    if not groups:
        raise ConfigurationError("There is nothing to train on: no query has both a positive and a negative passage.")
    if config.patience is not None and not dev:
        raise ConfigurationError("patience needs dev groups to measure, and there are none. Leave it at None.")
    device = torch_device(config.device)
    folder = Path(checkpoints)
    folder.mkdir(parents=True, exist_ok=True)
    # Evaluation mode throughout: dropout costs time and, over a single epoch, helps nothing.
    model.to(device).eval()
    scorer = _scorer(model, config, device)
    torch.manual_seed(config.seed)
    body, head = body_and_head(model)
    parts: list[dict[str, Any]] = [
        {
            "params": [p for p in body if p.ndim > 1],
            "weight_decay": config.weight_decay,
            "peak": config.learning_rate,
        },
        {"params": [p for p in body if p.ndim <= 1], "weight_decay": 0.0, "peak": config.learning_rate},
        {"params": head, "weight_decay": 0.0, "peak": config.head_learning_rate},
    ]
    trained = [p for part in parts for p in part["params"]]
    optimizer = torch.optim.AdamW(parts, lr=0.0)
    average = [p.detach().clone() for p in trained]
    state: dict[str, Any] = {
        "step": 0,
        "pairs": 0,
        "seconds": 0.0,
        "measures": [],
        "best": -math.inf,
        "stale": 0,
        "by_kind": {},
        "next": 0.0,
        "stopped_early": False,
        "finished": False,
        "budget_s": budget_s if budget_s is not None else 60 * (config.minutes or 1),
        "measure_s": 0.0,
    }
    signature = json.dumps(
        {
            **{k: v for k, v in asdict(config).items() if k not in {"device", "checkpoint_s"}},
            "groups": [_digest(groups), _digest(dev)],
        }
    )
    latest, best_file = folder / "checkpoint.pt", folder / "best.pt"
    resumed = latest.is_file()
    if resumed:
        saved = torch.load(latest, map_location=device, weights_only=True)
        if saved["signature"] != signature:
            raise ConfigurationError(
                f"{latest} belongs to a run with other settings or data. Delete it or choose another directory."
            )
        with torch.no_grad():
            for p, value in zip(trained, saved["weights"], strict=True):
                p.copy_(value)
        average = list(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        state |= saved["state"]

    began = time.monotonic() - state["seconds"]

    def save(path: Path, content: dict[str, Any]) -> None:
        part = path.with_suffix(".part")
        torch.save(content, part)
        part.replace(path)

    def checkpoint() -> None:
        state["seconds"] = time.monotonic() - began
        save(
            latest,
            {
                "signature": signature,
                "weights": [p.detach() for p in trained],
                "average": average,
                "optimizer": optimizer.state_dict(),
                "state": state,
            },
        )

    def swap(values: Sequence[Any]) -> list[Any]:
        before = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for p, value in zip(trained, values, strict=True):
                p.copy_(value)
        return before

    def share() -> float:
        if config.steps is not None:
            return float(state["step"]) / config.steps
        # At the end the weights are measured twice more, which is part of the time.
        budget = max(state["budget_s"] - 2 * state["measure_s"], 0.5 * state["budget_s"])
        return float((time.monotonic() - began) / budget)

    def measure(values: Sequence[Any]) -> None:
        before = swap(values)
        started = time.monotonic()
        mean, by_kind, _ = evaluate_groups(scorer, dev)
        state["measure_s"] = time.monotonic() - started
        state["measures"].append(mean)
        if mean > state["best"]:
            state["best"], state["by_kind"], state["stale"] = mean, by_kind, 0
            save(best_file, {"weights": [p.detach() for p in trained]})
        else:
            state["stale"] += 1
        swap(before)
        if progress is not None:
            progress(f"step {state['step']}: {_news(mean, by_kind)}", min(1.0, share()))

    per_epoch = math.ceil(len(groups) / config.groups_per_step)
    last_saved = time.monotonic()
    running = 0.0
    stop = state["stopped_early"]
    while not stop and share() < 1:
        epoch, skip = divmod(state["step"], per_epoch)
        for number, chosen in enumerate(batches(groups, config.groups_per_step, config.seed, epoch)):
            if number < skip:
                continue
            done = share()
            if done >= 1:
                stop = True
                break
            if dev and done >= state["next"]:
                state["next"] += 1 / max(1, config.evaluations)
                measure(average)
                stop = state["stopped_early"] = config.patience is not None and state["stale"] >= config.patience
                # The best weights on disk and what is known of them belong together.
                checkpoint()
                last_saved = time.monotonic()
                if stop:
                    break
            rate = min(done / config.warmup, (1 - done) / (1 - config.warmup), 1.0) if config.warmup else 1 - done
            for part in optimizer.param_groups:
                part["lr"] = part["peak"] * max(rate, 1e-3)
            loss = _loss(torch, scorer, chosen, config, device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            state["step"] += 1
            state["pairs"] += sum(len(group.passages) for group in chosen)
            decay = min(config.ema, (1 + state["step"]) / (10 + state["step"]))
            with torch.no_grad():
                torch._foreach_mul_(average, decay)
                torch._foreach_add_(average, [p.detach() for p in trained], alpha=1 - decay)
            value = float(loss.detach())
            running = value if not running else 0.98 * running + 0.02 * value
            if progress is not None and state["step"] % 20 == 0:
                speed = state["pairs"] / (time.monotonic() - began)
                progress(f"step {state['step']}: loss {running:.4f}, {speed:.0f} pairs/s", min(1.0, share()))
            if time.monotonic() - last_saved >= config.checkpoint_s:
                checkpoint()
                last_saved = time.monotonic()
    if dev and not state["finished"]:
        if not state["stopped_early"]:
            measure(average)
        best = torch.load(best_file, map_location=device, weights_only=True)["weights"]
        # The mean of two points of one run is often better than both.
        measure([(one + other) / 2 for one, other in zip(best, average, strict=True)])
    state["finished"] = True
    checkpoint()
    swap(torch.load(best_file, map_location=device, weights_only=True)["weights"] if dev else average)
    return TrainingResult(
        steps=state["step"],
        pairs=state["pairs"],
        seconds=time.monotonic() - began,
        measures=tuple(state["measures"]),
        best=float(state["best"]) if dev else math.nan,
        by_kind=dict(state["by_kind"]),
        stopped_early=state["stopped_early"],
    )


def _scorer(model: Any, config: TrainingConfig, device: str) -> Scorer:
    bf16 = native_bf16(device) if config.bf16 is None else config.bf16
    return Scorer(model, max_length=config.max_length, micro_batch=config.micro_batch, bf16=bf16, device=device)


def _news(mean: float, by_kind: dict[str, float]) -> str:
    return f"dev nDCG@10 {mean:.4f} ({' '.join(f'{kind} {value:.3f}' for kind, value in by_kind.items())})"


def _digest(groups: Sequence[Group]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        digest.update(json.dumps([group.query, group.passages, group.target, group.gains]).encode())
    return digest.hexdigest()


def _loss(torch: Any, scorer: Scorer, groups: Sequence[Group], config: TrainingConfig, device: str) -> Any:
    logits = scorer([g.query for g in groups for _ in g.passages], [text for g in groups for text in g.passages])
    functional = torch.nn.functional
    parts = logits.split([len(group.passages) for group in groups])
    weight = {"mix": config.binary_weight, "listwise": 0.0, "binary": 1.0}[config.loss]
    loss = torch.zeros((), device=device)
    if config.loss != "binary":
        listwise = [
            -(torch.tensor(group.target, device=device) * functional.log_softmax(part, -1)).sum()
            for group, part in zip(groups, parts, strict=True)
        ]
        loss = torch.stack(listwise).mean()
    judged = [(group, part) for group, part in zip(groups, parts, strict=True) if group.judged]
    if judged and weight:
        gains = torch.tensor([gain for group, _ in judged for gain in group.gains], device=device)
        judged_logits = torch.cat([part for _, part in judged])
        # Over all groups, so that a step's mix of judged and unjudged ones does not change what a judged pair
        # counts.
        binary = functional.binary_cross_entropy_with_logits(judged_logits, gains, reduction="sum") / len(groups)
        loss = loss + weight * binary
    return loss
