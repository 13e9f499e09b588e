"""Measurements of `slipstream bench` for one spec: `measure` writes them in the spec's environment, `page` draws
them."""

from slipstream.contract import Document
from slipstream.contract.evidence import Interval, Latency, Noise


class Subject(Document):
    """The eager baseline, or one cell's engine."""

    name: str
    latency: Latency
    quality: float | None
    """The spec's metric, in percent, as found by stage 1; None if stage 1 has no evidence of the subject."""
    drop_pp: Interval | None = None
    size_bytes: int | None = None
    peak_memory_mib: float | None = None
    """Maximum that loading the engine and its first requests add to the resident memory of a separate process."""
    speedup_eager: Interval | None = None
    speedup_reference: Interval | None = None
    """Relative to the baseline's FP32 engine on the same target."""
    status: str = ""
    """Stage 1's answer; empty for the eager baseline."""


class Bench(Document):
    """One interleaved run: all subjects share the same rounds."""

    spec: str
    run: str
    date: str
    framework: str
    metric: str
    confidence: float
    engines: dict[str, str]
    """Engine of each target."""
    machine: dict[str, str]
    hardware: str
    versions: dict[str, str]
    noise: Noise
    crowded: bool
    """Whether other processes took cores that the eager baseline needs; there is no speed-up against it then."""
    subjects: tuple[Subject, ...]
    """The eager baseline first, then the cells in the spec's order."""
