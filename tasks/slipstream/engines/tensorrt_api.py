"""TensorRT's Python module, whichever this environment has, and the differences between them.

| | TensorRT 10 | TensorRT 11 | TensorRT for RTX 1 |
| --- | --- | --- | --- |
| module | `tensorrt` | `tensorrt` | `tensorrt_rtx_bindings` |
| strongly typed network | a flag | always | always |
| builds for | the GPU that it sees | the GPU that it sees | named compute capabilities, also without a GPU |
| kernels are chosen | at build time, by timing | at build time, by timing | at load time, compiled on the GPU |
| cache | timing cache | timing cache | runtime cache |

Compared by introspection of the modules of `tensorrt` 11.4 and TensorRT for RTX 1.7.1; 10 by NVIDIA's migration guide.
"""

from collections.abc import Iterator
from contextlib import contextmanager

try:
    import tensorrt as trt
except ModuleNotFoundError:
    import tensorrt_rtx_bindings as trt

__all__ = ["DISTRIBUTIONS", "FLAVOUR", "MAJOR", "MESSAGES", "NAME", "RTX", "VERSION", "Messages", "Said", "trt"]

RTX: bool = trt.__name__ == "tensorrt_rtx_bindings"
FLAVOUR = "tensorrt-rtx" if RTX else "tensorrt"
NAME = "TensorRT for RTX" if RTX else "TensorRT"
VERSION: str = trt.__version__
MAJOR = int(VERSION.partition(".")[0])
DISTRIBUTIONS = (
    *("tensorrt", "tensorrt-cu12-bindings", "tensorrt-cu13-bindings"),
    *("tensorrt-rtx", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx-cu13-bindings"),
)


class Messages(trt.ILogger):  # type: ignore[misc]  # TensorRT has no type information
    """Collects TensorRT's messages. There is one, since TensorRT uses the first logger of a process for everything."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._kept: list[tuple[trt.ILogger.Severity, str]] | None = None

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT."""
        if self._kept is not None:
            self._kept.append((severity, msg))

    @contextmanager
    def kept(self) -> Iterator["Said"]:
        """Collect TensorRT's messages while the context lasts."""
        messages = Said()
        self._kept = messages.lines
        try:
            yield messages
        finally:
            self._kept = None


class Said:
    """Messages of TensorRT: (severity, text)."""

    def __init__(self) -> None:
        self.lines: list[tuple[trt.ILogger.Severity, str]] = []

    def errors(self) -> str:
        """Return the distinct errors, without TensorRT's source locations and consequential errors."""
        bad = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
        texts = dict.fromkeys(text.partition(" In ")[0].strip() for severity, text in self.lines if severity in bad)
        reasons = [t for t in texts if "checkMacros.cpp" not in t and not t.startswith("ModelImporter.cpp")]
        return "; ".join(reasons or texts) or "it says no reason"


MESSAGES = Messages()
