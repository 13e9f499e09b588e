"""What `validate` measured of one engine: the `evidence` in the details of its output.

Select, report and the terminal table all read this; every figure states its unit, and a figure that was not measured is
None, never zero.
"""

from slipstream.contract import Document, StepOutput, Verdict, combine
from slipstream.contract.details import Details
from slipstream.plugins import BASELINE


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
    """None if there were too few queries for LoadGen's early-stopping rule at 99 % confidence."""
    rate_per_s: float
    """Completed queries per second (SingleStream), or the offered Poisson rate (Server)."""
    quantiles_ms: tuple[float, ...] = ()
    """101 evenly spaced quantiles, for drawing the distribution."""


class Noise(Document):
    """How quiet the machine was."""

    clean_rounds: int
    rounds: int
    others_cores: float | None
    """Median number of cores that other processes used during the rounds; None if /proc does not say."""

    @property
    def noisy(self) -> bool:
        """Whether the judgment had to use rounds in which other processes were busy."""
        return self.clean_rounds < self.rounds


class EngineEvidence(Document):
    """Everything that stage 1 knows of an engine."""

    metric: str
    samples: int
    baseline_quality: float
    """Metric of the baseline run by its own framework in FP32, in percent."""
    engine_quality: float
    """Metric of the built engine on the same samples, in percent."""
    drop_pp: Interval
    """Drop from the baseline in percentage points; `high` is the one-sided bound that the gate uses."""
    discordance_percent: float | None = None
    """Share of samples that the two scored differently, which determines how many samples the bound needs."""
    confidence: float = 0.95
    """Confidence of the drop's bounds: that of the objective, corrected for the competing engines."""
    competing: int = 1
    """Number of engines of which the best is released: as in the spec when the scores were measured, or now if more."""
    scores_run: str | None = None
    """MLflow run with the engine's score of each sample, measured once (steps/scores.py)."""
    worst_class: str
    worst_class_drop_pp: float
    latency: Latency
    server: Latency | None = None
    eager: Latency | None = None
    """The baseline by its own framework, in the same interleaved run; None if other processes took the cores it
    needs."""
    reference: Latency | None = None
    """The baseline's FP32 engine on the same target, in the same interleaved run."""
    speedup_eager: Interval | None = None
    speedup_reference: Interval | None = None
    size_bytes: int
    size_gzip_bytes: int | None = None
    """Download size of the engine, compressed."""
    peak_memory_mib: float | None = None
    """Maximum that loading the engine and its first requests add to the resident memory of a separate process."""
    arena_bytes: int | None = None
    """LiteRT's working memory in addition to the weights; None for engines that do not report it."""
    noise: Noise
    hardware: str


class Race(Document):
    """One interleaved run of all engines: the time of each in each round that counts."""

    rounds_ms: dict[str, tuple[float, ...]]
    """Milliseconds per request for each round, by subject."""
    best_ms: dict[str, float]
    """Time of the fastest thousandth of queries, by subject."""
    noise: Noise
    crowded: bool
    """Whether other processes took cores that the engines need: intervals are wider then."""
    cores: int


class Standing(Document):
    """An engine's rank in that run."""

    ms: float
    """Milliseconds per request, at batch 1."""
    relative: Interval | None = None
    """Its time over that of the fastest releasable engine, in the same rounds; None if unknown."""


class Row(Document):
    """One line of the engine table."""

    cell: str
    evidence: EngineEvidence | None
    """None if the cell produced none: it failed, is missing, or its engine cannot be loaded on the judging machine."""
    verdicts: tuple[Verdict, ...]
    status: str
    """`reference`, `passed`, `rejected`, `inconclusive` or `missing`."""
    standing: Standing | None = None
    """Its rank in the run of all engines, by which the release is picked; None if it took no part."""
    comparison: bool = False
    """Whether the engine is measured only for comparison, and therefore never released."""
    release: bool = False


class Validated(Details):
    """What `validate` measured."""

    evidence: EngineEvidence | None = None
    not_loadable: str | None = None
    """Why there is no evidence."""


STATUS = {"pass": "passed", "fail": "rejected", "inconclusive": "inconclusive"}


def judged(row: Row, *verdicts: Verdict) -> Row:
    """Return the row with more verdicts, and the status that follows from all of them."""
    return settled(row, (*row.verdicts, *verdicts))


def settled(row: Row, verdicts: tuple[Verdict, ...]) -> Row:
    """Return the row with these verdicts instead; a baseline stays the reference, and a missing cell stays missing."""
    status = row.status if row.status in ("reference", "missing") else STATUS[combine(verdicts)]
    return row.model_copy(update={"verdicts": verdicts, "status": status})


def row_of(cell: str, output: StepOutput | None) -> Row:
    """Return the table's line for an expected cell; a cell without output is `missing`, which never passes."""
    if output is None:
        missing = Verdict(gate="present", answer="inconclusive", reason="the cell produced no evidence: a step failed")
        return Row(cell=cell, evidence=None, verdicts=(missing,), status="missing")
    baseline = output.cell is not None and output.cell.recipe == BASELINE
    status = "reference" if baseline else STATUS[combine(output.verdicts)]
    evidence = Validated.of(output).evidence
    return Row(cell=cell, evidence=evidence, verdicts=output.verdicts, status=status)
