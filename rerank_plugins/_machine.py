"""What the processor says of itself."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from rerank_plugins._extras import import_extra

__all__ = ["bf16_is_slow", "native_bf16", "processor"]


def processor() -> tuple[str, frozenset[str]]:
    """The processor's name, and the flags of what it can do; none where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(facts.get("flags", "").split())


def bf16_is_slow() -> bool:
    """Whether matrix products in bfloat16 are slower here than in float32, though the processor has them.

    Intel's AVX512_BF16 multiplies at half the rate of float32 where AMX is missing, as in machines whose hypervisor
    hides it; AMD's is faster than float32.
    """
    name, flags = processor()
    return name.startswith("Intel") and "avx512_bf16" in flags and "amx_bf16" not in flags


def native_bf16(device: str, extra: str) -> bool:
    """Whether a torch device multiplies bfloat16 faster than float32. Emulated, it is several times slower.

    Args:
        device: The torch device.
        extra: The extra that brings torch.
    """
    torch: Any = import_extra("torch", extra)
    kind = device.split(":")[0]
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    has = kind == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return has and not bf16_is_slow()
