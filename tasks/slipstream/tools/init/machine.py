"""This machine, as far as targets depend on it."""

import shutil
import subprocess
from dataclasses import dataclass

from slipstream import hardware

BF16_FEATURES = {"avx512_bf16", "amx_bf16"}
MANY = 4
"""Threads for one inference, at most: small models gain nothing from more, and servers answer several at a time."""


@dataclass(frozen=True)
class Machine:
    """What targets are chosen by."""

    sentence: str
    cores: int
    features: frozenset[str]
    gpus: tuple[str, ...]
    """Names of NVIDIA GPUs."""

    @property
    def threads(self) -> int:
        """Threads for one inference."""
        return min(self.cores, MANY)

    @property
    def bf16(self) -> bool:
        """Whether the CPU computes in BF16."""
        return bool(self.features & BF16_FEATURES)


def this_machine() -> Machine:
    """Look at this machine."""
    description = hardware.describe()
    return Machine(
        hardware.sentence(), int(description["cores"]), frozenset(description["cpu_features"].split()), _gpus()
    )


def _gpus() -> tuple[str, ...]:
    """Names of NVIDIA GPUs, as their driver tells; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    return (
        tuple(line.strip() for line in completed.stdout.splitlines() if line.strip())
        if completed.returncode == 0
        else ()
    )
