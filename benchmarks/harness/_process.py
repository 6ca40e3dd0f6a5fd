"""What only a fresh process shows: import time, time to the first score, and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from harness._contenders import Contender
from harness._model import Model
from harness._report import Size
from harness._work import Call, many_texts
from harness._workers import Worker
from rerank_plugins.errors import ScoringError

__all__ = ["MEMORY_CANDIDATES", "SIZES", "import_and_start", "measure_size", "measure_sizes", "memory_limit"]

SIZES = (10, 100, 1000, 10_000)
MEMORY_CANDIDATES = 1000
_QUERY = "how do I write a class that can be used in a with statement"


def import_and_start(
    contenders: Sequence[Contender], model: Model, call: Call, threads: int, rounds: int
) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """Seconds to import each contender, and from the start of a process to its first scores; medians of rounds.

    Returns:
        The two figures by name, and by name why others have none.
    """
    times: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for contender in contenders:
            if contender.name in failed:
                continue
            try:
                start = time.perf_counter()
                with Worker(threads) as worker:
                    importing = float(worker.ask("imports", modules=list(contender.modules))["seconds"])
                    worker.load(contender, model.path)
                    worker.ask("rank", name=contender.name, calls=[call], logits=False)
                    times[contender.name].append((importing, time.perf_counter() - start))
            except ScoringError as error:
                failed[contender.name] = str(error)
    medians = {
        name: (statistics.median(i for i, _ in found), statistics.median(s for _, s in found))
        for name, found in times.items()
        if name not in failed
    }
    return medians, failed


def measure_size(contender: Contender, model: Model, candidates: int, threads: int, memory: int | None) -> Size:
    """Time and most memory of one call in a fresh process.

    Raises:
        ScoringError: It failed, for example because it needed more than `memory` bytes.
    """
    texts = many_texts(candidates)
    tokens = sum(model.lengths(_QUERY, texts))
    with Worker(threads, memory) as worker:
        worker.load(contender, model.path)
        # The first call of a process also sets things up.
        worker.ask("rank", name=contender.name, calls=[(_QUERY, texts[:1])], logits=False)
        (seconds,) = worker.ask("time", name=contender.name, calls=[(_QUERY, texts)])["seconds"]
        peak = worker.ask("peak")["bytes"]
    return Size(contender.name, candidates, tokens, float(seconds), float(seconds) / tokens, peak)


def measure_sizes(
    contender: Contender,
    model: Model,
    sizes: Sequence[int],
    threads: int,
    longest_s: float,
) -> tuple[list[Size], str | None]:
    """`measure_size` from few candidates to many; a size that would take longer than `longest_s` ends it.

    Returns:
        What was measured, and why the rest was not.
    """
    found: list[Size] = []
    for size in sizes:
        if found and (expected := found[-1].seconds * size / found[-1].candidates) > longest_s:
            return found, f"{contender.name}: {size} candidates would take about {expected:.0f} s, and were left out"
        try:
            found.append(measure_size(contender, model, size, threads, memory_limit()))
        except ScoringError as error:
            return found, f"{contender.name}: failed on {size} candidates: {error}"
    return found, None


def memory_limit() -> int | None:
    """Bytes that a worker may take, so that a contender that needs more fails alone; None where nobody tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return free * 1024 * 8 // 10
