"""The options of the engine `tensorrt`, and what they imply for where an engine may run."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from slipstream.engines.base import Options, read_options
from slipstream.errors import EngineError
from slipstream.spec import Target

DEVICE = re.compile(r"GPU(\.(?P<ordinal>\d+))?")
CAPABILITY = re.compile(r"\d+\.\d")


class TensorRTOptions(Options):
    """Options of the engine `tensorrt`."""

    compute_capability: float | str | None = None
    """Compute capability to build for, such as `8.6`, or several, such as `"8.6, 8.9, 12.0"`; by default, that of the
    GPU here. Only TensorRT for RTX builds for other GPUs than the one here."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """Which other GPUs the engine also runs on, at some cost in speed; `ampere_plus` is 8.0 or more (only TensorRT)."""
    version_compatible: bool = False
    """Whether later versions of the same major TensorRT also load the engine (only TensorRT)."""
    level: Annotated[int, Field(ge=0, le=5)] | None = None
    """Builder optimization level: higher tries more kernels and takes longer; by default, TensorRT's own choice (3)."""
    workspace_mib: Annotated[int, Field(ge=1)] | None = None
    """Maximum scratch memory of a layer on the GPU, in MiB; by default, all of it."""
    sparse: bool = False
    """Whether weights with the 2:4 pattern use the GPU's sparse kernels (compute capability 8.0 or more)."""
    tf32: bool = False
    """Whether FP32 layers may compute in TF32, which has ten bits of mantissa. Off, so that f32 means FP32."""
    cuda_graph: bool = True
    """Whether the usual batch sizes are run as CUDA graphs, which saves the cost of launching each kernel."""
    timing_cache: bool = True
    """Whether timings or compiled kernels for this GPU are kept and reused on every machine with the same GPU."""
    profile: Literal["nsys", "perf"] | None = None
    """Profiler that records some inferences in `validate`, as an artifact; its program must be installed."""

    @field_validator("compute_capability")
    @classmethod
    def _capabilities(cls, value: float | str | None) -> float | str | None:
        if value is not None and not all(CAPABILITY.fullmatch(c) for c in _listed(value)):
            raise ValueError(f"{value!r} is not one or more compute capabilities such as 8.6, separated by commas")
        return value

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities to build ahead of time for, in order; empty means the GPU here."""
        listed = () if self.compute_capability is None else _listed(self.compute_capability)
        return tuple(sorted(dict.fromkeys(listed), key=ranked))


def _listed(value: float | str) -> tuple[str, ...]:
    return tuple(part.strip() for part in str(value).split(","))


def ranked(capability: str) -> tuple[int, int]:
    """Return a compute capability as numbers: 12.0 is above 8.9."""
    major, minor = capability.split(".")
    return int(major), int(minor)


def options_of(target: Target) -> TensorRTOptions:
    """Return the target's options. Raise EngineError."""
    return read_options(target, TensorRTOptions)


def ordinal_of(target: Target) -> int:
    """Return CUDA's number of the target's device: 0 for `GPU`, 1 for `GPU.1`. Raise EngineError."""
    match = DEVICE.fullmatch(target.device)
    if match is None:
        raise EngineError(
            f"tensorrt: no device {target.device!r}; it runs on NVIDIA GPUs, and never on the CPU: set the target's "
            "`device` to GPU (the first one) or GPU.1 (the second)"
        )
    return int(match["ordinal"] or 0)
