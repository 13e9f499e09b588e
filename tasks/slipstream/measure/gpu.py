"""NVIDIA GPUs of this machine: identity and utilization, from the driver through nvidia-ml-py (NVML).

NVML numbers GPUs in the order of their PCI addresses and does not follow CUDA_VISIBLE_DEVICES; CUDA numbers those that
it may use. A device is therefore named by CUDA's number and looked up in NVML by its PCI address.
"""

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from slipstream.errors import EngineError

MIB = 2**20
EVERY_S = 0.1
"""NVML averages its utilization over 1/6 to 1 s, depending on the device, so more frequent polls give no more
information."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, by CUDA's number."""

    ordinal: int
    name: str
    compute_capability: str
    """`8.6` and the like, which determines the available instructions."""
    driver: str
    """Version of the driver, such as `580.95.05`; empty if NVML does not report it."""
    pci_address: str


def find(ordinal: int) -> Gpu:
    """Return the GPU with CUDA's number `ordinal`. Raise EngineError with the reason if it is not here."""
    try:
        from cuda.bindings import runtime as cuda
    except ImportError as error:
        raise EngineError(f"{error}: CUDA's Python bindings (cuda-bindings) are not in this environment") from error
    count = ask(cuda.cudaGetDeviceCount(), "no NVIDIA GPU on this machine")
    if ordinal >= count:
        raise EngineError(f"no GPU number {ordinal}; this machine has {count}, counted from 0")
    properties = ask(cuda.cudaGetDeviceProperties(ordinal), f"GPU {ordinal}")
    address = ask(cuda.cudaDeviceGetPCIBusId(32, ordinal), f"GPU {ordinal}")
    return Gpu(
        ordinal=ordinal,
        name=_text(properties.name),
        compute_capability=f"{properties.major}.{properties.minor}",
        driver=_driver(),
        pci_address=_text(address),
    )


def ask(answer: tuple[Any, ...], what: str) -> Any:
    """Return the value of a CUDA function's answer, or None if it has none. Raise EngineError for an error code."""
    error, *values = answer
    if int(error) != 0:
        from cuda.bindings import runtime as cuda

        _, text = cuda.cudaGetErrorString(error)
        raise EngineError(f"{what}: {_text(text)} (CUDA error {int(error)})")
    return values[0] if values else None


@dataclass
class Usage:
    """Observed use of a GPU while something ran."""

    before_mib: float | None = None
    """Memory in use before, by any process."""
    memory_mib: list[float] = field(default_factory=list)
    utilization: list[float] = field(default_factory=list)
    """Share of the time, in percent, in which a kernel ran."""

    def metrics(self) -> dict[str, float]:
        """Return `gpu_memory_mib` (peak, above the use before) and `gpu_utilization` (mean, %); empty if unmeasured."""
        figures = {}
        if self.memory_mib and self.before_mib is not None:
            figures["gpu_memory_mib"] = max(0.0, max(self.memory_mib) - self.before_mib)
        if self.utilization:
            figures["gpu_utilization"] = statistics.fmean(self.utilization)
        return figures


@contextmanager
def watch(ordinal: int | None) -> Iterator[Usage]:
    """Watch a GPU, by CUDA's number, while the context lasts; without a GPU or NVML, nothing is recorded."""
    usage = Usage()
    handle = None if ordinal is None else _handle(ordinal)
    if handle is None:
        yield usage
        return
    usage.before_mib = _memory_mib(handle)
    stop = threading.Event()
    thread = threading.Thread(target=_sample, args=(handle, usage, stop), daemon=True, name="gpu")
    thread.start()
    try:
        yield usage
    finally:
        stop.set()
        thread.join()


def _sample(handle: object, usage: Usage, stop: threading.Event) -> None:
    import pynvml

    while not stop.wait(EVERY_S):
        usage.memory_mib.append(_memory_mib(handle))
        usage.utilization.append(float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))


def _memory_mib(handle: object) -> float:
    import pynvml

    return float(pynvml.nvmlDeviceGetMemoryInfo(handle).used) / MIB


def _handle(ordinal: int) -> object:
    """Return NVML's handle of a GPU; None if there is no such GPU or no NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByPciBusId(find(ordinal).pci_address)
    except (ImportError, EngineError):
        return None
    except pynvml.NVMLError:
        return None


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return _text(pynvml.nvmlSystemGetDriverVersion())
    except ImportError:
        return ""
    except pynvml.NVMLError:
        return ""


def _text(value: str | bytes) -> str:
    return value.split(b"\0")[0].decode() if isinstance(value, bytes) else value.rstrip("\0")
