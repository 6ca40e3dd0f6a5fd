"""All contenders in turn, round by round."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from harness import _process
from harness._contenders import AGAINST, Contender, adapters, missing, opponents, our_engines
from harness._model import Model, prepare_model
from harness._quality import compare_orders
from harness._report import Overhead, Report, Row, Size, machine, versions
from harness._work import Call, Work, read_work, sample_work, short_calls
from harness._workers import Worker
from rerank_plugins.errors import ConfigurationError, ScoringError

__all__ = ["run"]

SHORT_CALLS = 20
"""Short calls of a contender's turn."""
SETTLE_S = 0.02
"""Seconds before a turn, in which the threads of the one before stop spinning and go to sleep."""
LONGEST_S = 120.0
"""Seconds that one call of the memory measurements may be expected to take."""

Progress = Callable[[str, float], None]


@dataclass(slots=True)
class _Entry:
    """A contender with its process, and what was found of it."""

    contender: Contender
    worker: Worker
    orders: list[list[int]] = field(default_factory=list)
    logits: list[list[float | None]] | None = None
    seconds: list[float] = field(default_factory=list)
    short: list[float] = field(default_factory=list)


def run(
    model: str | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    candidates: int = 100,
    queries: int = 3,
    against: Sequence[str | Contender] = ("all",),
    backends: Sequence[str] = ("onnx", "openvino", "torch"),
    precisions: Sequence[str] = ("fp32",),
    threads: int | None = None,
    rounds: int = 3,
    short: bool = False,
    process: bool = False,
    sizes: Sequence[int] = _process.SIZES,
    longest_s: float = LONGEST_S,
    progress: Progress | None = None,
) -> Report:
    """Compare our engines with what else there is.

    Every contender has a process of its own, which waits while others have their turn, with the same number of threads
    on the CPU. Each first reranks everything once, unmeasured, for its orders and logits; then all take turns, round by
    round, each round beginning with another one. Ratios are of the same round. What is timed is the call from texts, in
    the objects that the contender takes, to its ranked result. Inputs are made before the clock starts.

    All models are loaded at once, one copy each: for large ones, name fewer contenders.

    Args:
        model: A directory or Hub id of a cross-encoder with one logit; the bundled model by its name; None for
            all-MiniLM-L6-v2 under a seeded head, whose order means nothing but can be compared.
        data: A folder in BEIR layout; None takes paragraphs of Python's manual.
        candidates: Candidates of each query.
        queries: How many queries.
        against: Names of `AGAINST`, ``"all"`` for all of them, ``"module:function"``, or contenders.
        backends: Our engines: ``"onnx"``, ``"openvino"``, ``"torch"``.
        precisions: ``"fp32"``, ``"bf16"``, ``"int8"`` (weights; on OpenVINO activations too), for the engines that have
            them.
        threads: Threads of every engine; None takes one for each core that this process may use.
        rounds: Turns of each contender.
        short: Also measure calls with 10 candidates of 50 tokens, and what the adapters add to `Reranker.score`.
        process: Also measure import time, start to first score, and memory, in fresh processes.
        sizes: Numbers of candidates for time and memory; those of `process`.
        longest_s: Seconds; numbers of candidates that would take longer are left out, and named.
        progress: Takes a line of news and the share done.

    Raises:
        ConfigurationError: A name or number that cannot work, or nothing is left to measure.
        InputError: The data cannot be used.
        MissingDependencyError: An extra that is needed is not installed.
        ModelLoadError: The model is missing or cannot be converted.
    """
    for name, value in (("candidates", candidates), ("queries", queries), ("rounds", rounds)):
        if value < 1:
            raise ConfigurationError(f"{name} must be 1 or more; got {value}.")
    if threads is not None and threads < 1:
        raise ConfigurationError(f"threads must be 1 or more, or None; got {threads}.")
    threads = threads or _cores()
    wanted = [*opponents(against), *our_engines(backends, precisions)]
    tell = progress or (lambda news, share: None)
    work = sample_work(queries, candidates) if data is None else read_work(data, queries, candidates)
    with tempfile.TemporaryDirectory(prefix="rerank-plugins-benchmark-") as directory, ExitStack() as stack:
        made = prepare_model(
            model,
            Path(directory),
            int8="int8" in precisions,
            graph=any(contender.reads == "graph" for contender in wanted),
            progress=lambda news, share: tell(news, 0.1 * share),
        )
        benchmark = _Benchmark(made, work, threads, rounds, stack, tell)
        benchmark.load(wanted)
        reference = benchmark.reference()
        benchmark.measure()
        overheads = benchmark.adapters() if short else []
        if short:
            benchmark.measure_short()
        fresh, measured = benchmark.in_fresh_processes(sizes, longest_s) if process else ({}, [])
        return benchmark.report(reference, fresh, overheads, measured)


class _Benchmark:
    def __init__(self, model: Model, work: Work, threads: int, rounds: int, stack: ExitStack, tell: Progress) -> None:
        self.model, self.work, self.threads, self.rounds = model, work, threads, rounds
        self.stack, self.tell = stack, tell
        self.calls = work.calls
        self.lengths = [model.lengths(query, texts) for query, texts in self.calls]
        self.entries: list[_Entry] = []
        self.notes: list[str] = []
        self.turns: list[str] = []

    # -- loading ------------------------------------------------------------------------------------------------

    def load(self, wanted: Sequence[Contender]) -> None:
        """Start everybody, and let everybody rerank once."""
        for number, contender in enumerate(wanted):
            self.tell(f"loading {contender.name}", 0.1 + 0.2 * number / len(wanted))
            if (entry := self._start(contender)) is not None:
                self.entries.append(entry)
        if not any(entry.contender.ours for entry in self.entries):
            raise ConfigurationError("None of our engines can run here: " + "; ".join(self.notes))

    def _start(self, contender: Contender) -> _Entry | None:
        if absent := missing(contender):
            how = f": pip install {contender.install}" if contender.install else ""
            self._leave_out(contender, f"{', '.join(absent)} not installed{how}")
            return None
        if contender.reads == "checkpoint" and not self.model.has_checkpoint:
            self._leave_out(contender, f"needs safetensors, and {self.model.name} is an ONNX graph alone")
            return None
        worker = self.stack.enter_context(Worker(self.threads))
        try:
            worker.load(contender, self.model.path)
            found = worker.ask("rank", name=contender.name, calls=self.calls, logits=True)
        except ScoringError as error:
            worker.close()
            self._leave_out(contender, str(error))
            return None
        for (_, texts), order in zip(self.calls, found["orders"], strict=True):
            if sorted(order) != list(range(len(texts))):
                worker.close()
                self._leave_out(contender, "did not return every candidate once")
                return None
        return _Entry(contender, worker, found["orders"], found["logits"])

    def _leave_out(self, contender: Contender, why: str) -> None:
        self.notes.append(f"{contender.name}: {why}")

    def reference(self) -> _Entry:
        """The exact order: sentence-transformers' in fp32, or, without a checkpoint, our first engine's in fp32."""
        exact = AGAINST["sentence-transformers"]
        if (found := next((entry for entry in self.entries if entry.contender == exact), None)) is not None:
            return found
        if self.model.has_checkpoint and not missing(exact) and (started := self._start(exact)) is not None:
            started.worker.close()
            return started
        ours = [entry for entry in self.entries if entry.contender.ours]
        return next((entry for entry in ours if entry.contender.precision == "fp32"), ours[0])

    # -- measuring ----------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """The rounds over the work."""
        for number in range(self.rounds):
            for entry in self._round(number):
                share = 0.3 + 0.4 * (number + self.entries.index(entry) / len(self.entries)) / self.rounds
                self.tell(f"round {number + 1} of {self.rounds}: {entry.contender.name}", share)
                seconds = self._time(entry, self.calls)
                if seconds is not None:
                    entry.seconds.append(sum(seconds))
                    self.turns.append(entry.contender.name)

    def _round(self, number: int) -> Iterator[_Entry]:
        """Everybody once. Each round begins with another one, so that nobody always follows the same one."""
        first = number % len(self.entries)
        yield from [*self.entries[first:], *self.entries[:first]]

    def _time(self, entry: _Entry, calls: Sequence[Call]) -> list[float] | None:
        time.sleep(SETTLE_S)
        try:
            found: list[float] = entry.worker.ask("time", name=entry.contender.name, calls=calls)["seconds"]
        except ScoringError as error:
            self._leave_out(entry.contender, str(error))
            self.entries.remove(entry)
            return None
        return found

    def measure_short(self) -> None:
        """Rounds of short calls."""
        calls = short_calls(self.model, SHORT_CALLS)
        for entry in self.entries:
            self._time(entry, calls[:2])
        for number in range(self.rounds):
            self.tell(f"short calls, round {number + 1} of {self.rounds}", 0.7 + 0.1 * number / self.rounds)
            for entry in self._round(number):
                entry.short += self._time(entry, calls) or []

    def adapters(self) -> list[Overhead]:
        """What each adapter adds to `Reranker.score`, in one process, with one loaded copy."""
        engine = next(entry.contender for entry in self.entries if entry.contender.ours)
        calls = short_calls(self.model, SHORT_CALLS)
        seconds: dict[str, list[float]] = {}
        with Worker(self.threads) as worker:
            for contender in adapters(engine):
                if absent := missing(contender):
                    self._leave_out(contender, f"{', '.join(absent)} not installed")
                    continue
                try:
                    worker.load(contender, self.model.path)
                    worker.ask("time", name=contender.name, calls=calls[:2])
                except ScoringError as error:
                    self._leave_out(contender, str(error))
                    continue
                seconds[contender.name] = []
            for _ in range(self.rounds):
                # Call by call: the difference is smaller than what the machine drifts by in a round.
                for call in calls:
                    for name, found in seconds.items():
                        found += worker.ask("time", name=name, calls=[call])["seconds"]
        if "Reranker.score" not in seconds:
            return []
        base = np.asarray(seconds["Reranker.score"])
        return [
            Overhead(
                engine.name,
                name,
                float(np.median(found)),
                added := float(np.median(np.asarray(found) - base)),
                added / float(np.median(base)),
            )
            for name, found in seconds.items()
        ]

    def in_fresh_processes(
        self, sizes: Sequence[int], longest_s: float
    ) -> tuple[dict[str, tuple[float, float]], list[Size]]:
        """Import and start of everybody, and time and memory by the number of candidates."""
        # The others' models would take the memory that is measured.
        for entry in self.entries:
            entry.worker.close()
        contenders = [entry.contender for entry in self.entries]
        self.tell("imports and first scores", 0.8)
        fresh, failed = _process.import_and_start(
            contenders, self.model, short_calls(self.model, 1)[0], self.threads, self.rounds
        )
        self.notes += [f"{name}: import and first score not measured: {why}" for name, why in failed.items()]
        found: list[Size] = []
        for number, contender in enumerate(contenders):
            share = 0.85 + 0.15 * number / len(contenders)
            self.tell(f"memory and time of {contender.name}", share)
            measured, note = _process.measure_sizes(contender, self.model, sizes, self.threads, longest_s)
            found += measured
            self.notes += [note] if note else []
        return fresh, found

    # -- reporting ----------------------------------------------------------------------------------------------

    def report(
        self,
        reference: _Entry,
        fresh: dict[str, tuple[float, float]],
        overheads: Sequence[Overhead],
        sizes: Sequence[Size],
    ) -> Report:
        """The figures of everybody who finished."""
        if not self.entries:
            raise ConfigurationError("No contender finished: " + "; ".join(self.notes))
        documents = sum(len(texts) for _, texts in self.calls)
        baseline = self.entries[0]
        rows = []
        for entry in self.entries:
            row = self._row(entry, baseline, reference, documents)
            importing, first = fresh.get(row.name, (None, None))
            peaks = [s.peak_bytes for s in sizes if s.name == row.name and s.candidates == _process.MEMORY_CANDIDATES]
            rows.append(replace(row, import_s=importing, first_score_s=first, peak_bytes=peaks[0] if peaks else None))
        self.tell("done", 1.0)
        return Report(
            model=self.model.name,
            data=self.work.name,
            judged=self.work.judged,
            queries=len(self.calls),
            documents=documents,
            tokens=sum(map(sum, self.lengths)),
            max_length=self.model.max_length,
            threads=self.threads,
            rounds=self.rounds,
            baseline=baseline.contender.name,
            reference=reference.contender.name,
            rows=tuple(rows),
            overheads=tuple(overheads),
            sizes=tuple(sizes),
            notes=tuple(self.notes),
            turns=tuple(self.turns),
            machine=machine(),
            versions=versions(),
        )

    def _row(self, entry: _Entry, baseline: _Entry, reference: _Entry, documents: int) -> Row:
        quality = compare_orders(self.work, entry.orders, entry.logits, reference.orders, reference.logits)
        seconds = np.asarray(entry.seconds)
        ratios = np.asarray(baseline.seconds) / seconds
        return Row(
            name=entry.contender.name,
            ours=entry.contender.ours,
            precision=entry.contender.precision,
            documents_per_s=documents / statistics.median(entry.seconds),
            ratio=float(np.median(ratios)),
            ratio_low=float(ratios.min()),
            ratio_high=float(ratios.max()),
            ndcg=quality.ndcg,
            ndcg_difference=quality.ndcg_difference,
            overlap=quality.overlap,
            same_order=quality.same_order,
            logit_difference=quality.logit_difference,
            seconds=tuple(entry.seconds),
            short_p50_s=float(np.percentile(entry.short, 50)) if entry.short else None,
            short_p95_s=float(np.percentile(entry.short, 95)) if entry.short else None,
        )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
