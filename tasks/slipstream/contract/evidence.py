"""What `validate` measured of one engine: the `evidence` in the details of its output.

Select, report and the terminal table all read this; every figure says its unit, and a figure that was not
measured is None, never zero.
"""

from slipstream.contract import Document, StepOutput, Verdict, combine
from slipstream.contract.details import Details
from slipstream.errors import DataError
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
    discordance_percent: float | None = None
    """Share of samples that the two scored differently: what decides how many samples the bound needs."""
    confidence: float = 0.95
    """Of the bounds of the drop: what the objective asks for, corrected for the engines that compete."""
    competing: int = 1
    """Engines of which the best is released, as the spec had them when the scores were measured, or has now if more."""
    scores_run: str | None = None
    """MLflow run with the engine's score of each sample, measured once (steps/scores.py)."""
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


class Race(Document):
    """One interleaved run of all engines: what each took in each round that counts."""

    rounds_ms: dict[str, tuple[float, ...]]
    """Subject → milliseconds a request, for each round."""
    best_ms: dict[str, float]
    """Subject → what its fastest thousandth of queries took."""
    noise: Noise
    crowded: bool
    """Whether others took cores that the engines need: intervals are wider then."""
    cores: int


class Standing(Document):
    """An engine's place in that run."""

    ms: float
    """Milliseconds a request, at batch 1."""
    relative: Interval | None = None
    """Its time over that of the fastest engine that may be released, in the same rounds; None where unknown."""


class Row(Document):
    """One line of the engine table."""

    cell: str
    evidence: EngineEvidence | None
    """None when the cell produced none: it failed, is missing, or its engine cannot be loaded where it was judged."""
    verdicts: tuple[Verdict, ...]
    status: str
    """`reference`, `passed`, `rejected`, `inconclusive` or `missing`."""
    standing: Standing | None = None
    """Its place in the run of all engines, by which the release is picked; None where it took no part."""
    comparison: bool = False
    """Whether the engine is measured for comparison only, so that it is never released."""
    release: bool = False


class Validated(Details):
    """What `validate` measured."""

    evidence: EngineEvidence | None = None
    not_loadable: str | None = None
    """Why there is no evidence."""


def evidence_of(output: StepOutput) -> EngineEvidence:
    """Return the evidence in a validate output. Raise DataError when it has none."""
    evidence = Validated.of(output).evidence
    if evidence is None:
        raise DataError(f"output of step {output.step}: details.evidence: there is none")
    return evidence


STATUS = {"pass": "passed", "fail": "rejected", "inconclusive": "inconclusive"}


def judged(row: Row, *verdicts: Verdict) -> Row:
    """The row with more verdicts, and the status that follows from all of them."""
    return settled(row, (*row.verdicts, *verdicts))


def settled(row: Row, verdicts: tuple[Verdict, ...]) -> Row:
    """The row with these verdicts instead; a baseline stays the reference, and what is missing stays so."""
    status = row.status if row.status in ("reference", "missing") else STATUS[combine(verdicts)]
    return row.model_copy(update={"verdicts": verdicts, "status": status})


def row_of(cell: str, output: StepOutput | None) -> Row:
    """The table's line for an expected cell; a cell without output is `missing`, and missing never passes."""
    if output is None:
        missing = Verdict(gate="present", answer="inconclusive", reason="the cell produced no evidence: a step failed")
        return Row(cell=cell, evidence=None, verdicts=(missing,), status="missing")
    baseline = output.cell is not None and output.cell.recipe == BASELINE
    status = "reference" if baseline else STATUS[combine(output.verdicts)]
    evidence = Validated.of(output).evidence
    return Row(cell=cell, evidence=evidence, verdicts=output.verdicts, status=status)
