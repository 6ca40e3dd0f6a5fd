"""Teaches six layers what twelve know.

    python recipes/minilm_l6/train.py OUT/teacher OUT/pool OUT/student --minutes 75

The student starts as every second layer of the teacher. In every step the teacher reads the same pairs; the student
imitates its hidden states after each second layer, its logits, and the order in each list. Stops by the clock; the rate
is near zero then.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, BertForSequenceClassification

Listed = dict[str, Any]
LISTS, PARTS, MAX_LENGTH, PEAK, WARM_UP = 2, 2, 256, 4e-4, 0.03
ANSWERED = ("tools", "howto")
"""Kinds whose known answer is taught to be first, whatever the three models say."""
NAMES = ("hidden", "logits", "order", "MSE")
BF16 = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def rounds(path: Path, rng: random.Random) -> Iterator[Listed]:
    """Lists in random order, each once before any comes again; the file is read anew from time to time."""
    seen: set[str] = set()
    while True:
        with path.open(encoding="utf-8") as lines:
            new = [listed for listed in map(json.loads, lines) if listed["kind"] + listed["query"] not in seen]
        chosen = rng.sample(new, min(512, len(new)))
        if len(chosen) < LISTS:
            seen.clear()
            continue
        seen |= {listed["kind"] + listed["query"] for listed in chosen}
        # Neighbours of about one length are padded less.
        chosen.sort(key=lambda listed: sum(map(len, listed["passages"])) + rng.random() * 800)
        steps = [chosen[start : start + LISTS] for start in range(0, len(chosen) - LISTS + 1, LISTS)]
        rng.shuffle(steps)
        for step in steps:
            yield from step


class Pairs:
    """The pairs of some lists as batches of one length each."""

    def __init__(self, tokenizer: Any, lists: list[Listed], parts: int) -> None:
        queries = [listed["query"] for listed in lists for _ in listed["passages"]]
        passages = [text for listed in lists for text in listed["passages"]]
        encoded = tokenizer(queries, passages, truncation="longest_first", max_length=MAX_LENGTH)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        self.order = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = -(-len(self.order) // parts)
        self.batches = [
            tokenizer.pad(
                {name: [column[row] for row in self.order[start : start + size]] for name, column in encoded.items()},
                pad_to_multiple_of=16,
                return_tensors="pt",
            )
            for start in range(0, len(self.order), size)
        ]

    def sorted_back(self, logits: list[Tensor]) -> Tensor:
        """Logits of all batches in the order of the pairs."""
        found = torch.cat(logits).float().flatten()
        return torch.empty_like(found).index_copy(0, torch.tensor(self.order), found)


def targets(listed: Listed, teacher: Tensor) -> Tensor:
    """The teacher's logits, or for a kind that three models teach the mean of z-scores, with the teacher's spread."""
    if "others" not in listed:
        return teacher
    three = torch.stack([teacher, *torch.tensor(listed["others"])])
    mean = ((three - three.mean(1, keepdim=True)) / three.std(1, keepdim=True).clamp_min(1e-3)).mean(0)
    goal = teacher.mean() + teacher.std().clamp_min(2.5) * mean / mean.std().clamp_min(1e-3)
    answer = listed["answer"]
    if answer is not None and listed["kind"] in ANSWERED:
        others = torch.cat([goal[:answer], goal[answer + 1 :]])
        goal[answer] = torch.maximum(goal[answer], others.max() + 1)
    return goal


def student_of(teacher: BertForSequenceClassification) -> BertForSequenceClassification:
    """Every second layer, with embeddings, pooler and head."""
    student = copy.deepcopy(teacher)
    layers = student.bert.encoder.layer
    student.bert.encoder.layer = torch.nn.ModuleList(layers[row] for row in range(1, len(layers), 2))
    student.config.num_hidden_layers = len(student.bert.encoder.layer)
    student.bert.embeddings.requires_grad_(False)
    return student


def read(
    student: BertForSequenceClassification, teacher: BertForSequenceClassification, tokenizer: Any, lists: list[Listed]
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of hidden states (relative), logits (Huber) and order (KL); the logits; their targets."""
    hidden, ours, theirs = [], [], []
    pairs = Pairs(tokenizer, lists, PARTS)
    for batch in pairs.batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=BF16):
            with torch.no_grad():
                taught = teacher(**batch, output_hidden_states=True)
            seen = student(**batch, output_hidden_states=True)
        mask = batch["attention_mask"].bool()
        for row, state in enumerate(seen.hidden_states[1:], 1):
            goal = taught.hidden_states[2 * row][mask].float()
            hidden.append((state[mask].float() - goal).square().mean() / goal.var())
        ours.append(seen.logits)
        theirs.append(taught.logits)
    logits, taught_logits = pairs.sorted_back(ours), pairs.sorted_back(theirs)
    sizes = [len(listed["passages"]) for listed in lists]
    goals = [targets(*item) for item in zip(lists, taught_logits.split(sizes), strict=True)]
    order = [
        functional.kl_div((mine / 2).log_softmax(0), (goal / 2).softmax(0), reduction="sum")
        for mine, goal in zip(logits.split(sizes), goals, strict=True)
    ]
    goal = torch.cat(goals)
    losses = (torch.stack(hidden).mean(), functional.huber_loss(logits, goal, delta=3.0), torch.stack(order).mean())
    return torch.stack(losses), logits, goal


def gradients(
    student: BertForSequenceClassification,
    teacher: BertForSequenceClassification,
    tokenizer: Any,
    lists: list[Listed],
    weights: list[Tensor],
    shares: tuple[float, float, float],
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of the weighted losses on some lists, and the losses, with the MSE of the logits as fourth."""
    losses, logits, goal = read(student, teacher, tokenizer, lists)
    found = torch.autograd.grad((losses * torch.tensor(shares)).sum(), weights)
    return found, torch.cat([losses, (logits - goal).square().mean()[None]]).detach()


def main() -> None:
    """Trains and writes checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--threads", type=int, default=2, help="each takes a part of every step")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint of a run that was stopped")
    parser.add_argument("--done", type=float, default=0.0, help="share of the whole run that it had done")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(arguments.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    teacher = BertForSequenceClassification.from_pretrained(arguments.teacher, attn_implementation="eager").eval()
    # In eval mode the student has no dropout either.
    student = student_of(teacher)
    if arguments.start:
        student.load_state_dict(load_file(arguments.start / "model.safetensors"))
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    average = [weight.detach().clone() for weight in weights]
    optimiser = torch.optim.AdamW(weights, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    source = rounds(arguments.pool / "train.jsonl", random.Random(round(100 * arguments.done)))
    with (arguments.pool / "dev.jsonl").open(encoding="utf-8") as lines:
        dev = [json.loads(line) for _, line in zip(range(24), lines, strict=False)]

    def save(folder: Path, values: list[Tensor]) -> None:
        kept = [weight.detach().clone() for weight in weights]
        for weight, value in zip(weights, values, strict=True):
            weight.data.copy_(value)
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = list(pool.map(torch.no_grad()(lambda listed: read(student, teacher, tokenizer, [listed])), dev))
        best = sum(int(logits.argmax() == goal.argmax()) for _, logits, goal in found) / len(found)
        mse = sum(float((logits - goal).square().mean()) for _, logits, goal in found) / len(found)
        print(f"{folder.name}: dev MSE {mse:.2f}, same first {best:.2f}", flush=True)
        for weight, value in zip(weights, kept, strict=True):
            weight.data.copy_(value)

    began = saved = time.monotonic()
    step, pairs_seen, log = 0, 0, torch.zeros(4)
    while (share := (time.monotonic() - began) / (60 * arguments.minutes)) < 1:
        done = arguments.done + (1 - arguments.done) * share
        lists = [next(source) for _ in range(LISTS)]
        rate = PEAK * min(share / WARM_UP + 0.01, (1 + math.cos(math.pi * done)) / 2)
        optimiser.param_groups[0]["lr"] = rate
        # Threads with a part of the step each wait less on a busy machine than threads that share every product.
        size = LISTS // arguments.threads
        parts = [lists[start : start + size] for start in range(0, LISTS, size)]
        # First the way the teacher reads, later what comes of it.
        shares = (1 - 0.8 * done, 0.1 + 0.2 * done, 0.3 + 0.7 * done)
        found = list(
            pool.map(lambda part, shares=shares: gradients(student, teacher, tokenizer, part, weights, shares), parts)
        )
        for weight, *grads in zip(weights, *(item[0] for item in found), strict=True):
            weight.grad = torch.stack(grads).mean(0)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if step % 8 == 0:
            torch._foreach_lerp_(average, weights, min(0.5, 0.02 + 4 / (step + 1)))
        step, pairs_seen = step + 1, pairs_seen + sum(len(listed["passages"]) for listed in lists)
        log += torch.stack([item[1] for item in found]).mean(0)
        if step % 50 == 0:
            means = " ".join(f"{name} {value:.3f}" for name, value in zip(NAMES, log / 50, strict=True))
            print(f"{(time.monotonic() - began) / 60:.1f} min, step {step}, {pairs_seen} pairs: {means}", flush=True)
            log.zero_()
        if time.monotonic() - saved > 600:
            save(arguments.out / f"at-{round((time.monotonic() - began) / 60)}", average)
            saved = time.monotonic()
    save(arguments.out / "average", average)
    save(arguments.out / "last", weights)


if __name__ == "__main__":
    main()
