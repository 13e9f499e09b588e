"""Properties of this machine that targets depend on."""

import shutil
import subprocess
from dataclasses import dataclass

from slipstream import hardware

BF16_FEATURES = {"avx512_bf16", "amx_bf16"}
MANY = 4
"""Maximum threads for one inference: small models gain nothing from more, and servers answer several at a time."""


@dataclass(frozen=True)
class Machine:
    """Facts that targets are chosen by."""

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
    """Inspect this machine."""
    description = hardware.describe()
    return Machine(
        hardware.sentence(), int(description["cores"]), frozenset(description["cpu_features"].split()), _gpus()
    )


def _gpus() -> tuple[str, ...]:
    """Return names of NVIDIA GPUs, from their driver; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    return (
        tuple(line.strip() for line in completed.stdout.splitlines() if line.strip())
        if completed.returncode == 0
        else ()
    )
