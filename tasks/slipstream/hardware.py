"""Description of this machine: part of the identity of engines and measurements, and shown with every figure."""

import os
import platform
import re
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "i8mm")

X86 = ("x86_64", "AMD64")
EXACT_SUMS = {"avx512_vnni", "avx_vnni"}
"""x86 instruction sets that add products of uint8 and int8 in 32 bits. Without them libraries use AVX2's, which adds
two products in 16 bits, and saturates."""


@cache
def describe() -> dict[str, str]:
    """Return CPU model, the instruction sets that engines choose kernels by, usable cores, memory, system."""
    fields: dict[str, str] = {}
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    description = {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cpu_features": " ".join(f for f in CPU_FEATURES if f in flags),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gib": str(round(memory / 2**30)),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return description | ({"gpu": gpus} if (gpus := _gpus()) else {})


def int8_sums() -> str:
    """Return `exact`, or `saturating` if fast kernels may saturate in sums of products of uint8 and int8."""
    x86 = platform.machine() in X86
    return "saturating" if x86 and not EXACT_SUMS & set(describe()["cpu_features"].split()) else "exact"


def _gpus(driver: Path = Path("/proc/driver/nvidia")) -> str:
    """Return NVIDIA GPUs and their driver's version from the driver's files in /proc, so that no library is needed."""
    cards = [path.read_text(errors="replace") for path in sorted(driver.glob("gpus/*/information"))]
    models = [match[1] for card in cards if (match := re.search(r"^Model:\s*(.+?)\s*$", card, re.MULTILINE))]
    version = driver / "version"
    if not models or not version.exists():
        return ", ".join(models)
    match = re.search(r"\d+\.\d+(\.\d+)?", version.read_text())
    return ", ".join(models) + (f" (driver {match[0]})" if match else "")


def sentence() -> str:
    """Return the same in readable form: `AMD EPYC, 2 cores, avx512_vnni …`."""
    d = describe()
    machine = f"{d['cpu']}, {d['cores']} cores, {d['memory_gib']} GiB, {d['cpu_features'] or 'no vector extensions'}"
    return f"{machine}; {d['gpu']}" if "gpu" in d else machine
