"""What `validate` measured of one engine: the `evidence` in the details of its output.

Select, report and the terminal table all read this; every figure says its unit, and a figure that was not
measured is None, never zero.
"""

from slipstream.contract import Document, StepOutput, Verdict, combine
from slipstream.spec import BASELINE


class Interval(Document):
    """An estimate with its confidence bounds."""

    estimate: float
    low: float
    high: float


class Latency(Document):
    """Latency of single requests, batch 1, as LoadGen issued them."""

    scenario: str
    """`SingleStream` or `Server`."""
    n: int
    """Queries."""
    p50_ms: float
    p90_ms: float | None = None
    p99_ms: float | None = None
    """None where there were too few queries for LoadGen's early-stopping rule at 99 % confidence."""
    rate_per_s: float
    """Completed queries a second (SingleStream), or the offered Poisson rate (Server)."""
    quantiles_ms: tuple[float, ...] = ()
    """101 evenly spaced quantiles, for drawing the distribution."""


class Noise(Document):
    """How quiet the machine was."""

    clean_rounds: int
    rounds: int
    others_cores: float | None
    """Median number of cores that other processes used during the rounds; None where /proc does not tell."""

    @property
    def noisy(self) -> bool:
        """Whether the judgement had to use rounds in which others were busy."""
        return self.clean_rounds < self.rounds


class EngineEvidence(Document):
    """All that stage 1 knows of an engine."""

    metric: str
    samples: int
    baseline_quality: float
    """Metric of the baseline run by its own framework in FP32, in percent."""
    engine_quality: float
    """Metric of the built engine on the same samples, in percent."""
    drop_pp: Interval
    """Drop against the baseline in percentage points; `high` is the one-sided bound that the gate uses."""
    worst_class: str
    worst_class_drop_pp: float
    latency: Latency
    server: Latency | None = None
    eager: Latency | None = None
    """The baseline by its own framework, in the same interleaved run; None when others took the cores it needs."""
    reference: Latency | None = None
    """The baseline's FP32 engine on the same target, in the same interleaved run."""
    speedup_eager: Interval | None = None
    speedup_reference: Interval | None = None
    size_bytes: int
    size_gzip_bytes: int | None = None
    """What a download of the engine takes, compressed."""
    peak_memory_mib: float | None = None
    """The most that loading the engine and its first requests add to the resident memory of a process of their own."""
    arena_bytes: int | None = None
    """LiteRT's working memory beside the weights; None for engines that do not tell."""
    noise: Noise
    hardware: str


class Row(Document):
    """One line of the engine table."""

    cell: str
    evidence: EngineEvidence | None
    """None when the cell produced none: it failed, is missing, or its engine cannot be loaded where it was judged."""
    verdicts: tuple[Verdict, ...]
    status: str
    """`reference`, `passed`, `rejected`, `inconclusive` or `missing`."""
    comparison: bool = False
    """Whether the engine is measured for comparison only, so that it is never released."""
    release: bool = False


def evidence_of(output: StepOutput) -> EngineEvidence:
    """The evidence in a validate output."""
    return EngineEvidence.model_validate(output.details["evidence"])


def row_of(cell: str, output: StepOutput | None) -> Row:
    """The table's line for an expected cell; a cell without output is `missing`, and missing never passes."""
    if output is None:
        missing = Verdict(gate="present", answer="inconclusive", reason="the cell produced no evidence: a step failed")
        return Row(cell=cell, evidence=None, verdicts=(missing,), status="missing")
    if output.cell is not None and output.cell.recipe == BASELINE:
        status = "reference"
    else:
        status = {"pass": "passed", "fail": "rejected", "inconclusive": "inconclusive"}[combine(output.verdicts)]
    evidence = evidence_of(output) if "evidence" in output.details else None
    return Row(cell=cell, evidence=evidence, verdicts=output.verdicts, status=status)
