"""What the processor says of itself."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["processor"]


def processor() -> tuple[str, frozenset[str]]:
    """The processor's name, and the flags of what it can do; none where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(facts.get("flags", "").split())
