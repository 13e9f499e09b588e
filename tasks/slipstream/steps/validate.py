"""Stage 1: one built engine against the baseline, on the held-out samples and in interleaved timing.

Cell: recipe@target. Upstream: `check`, `retrain` (the baseline), `build` of this cell and `build` of the baseline's
FP32 engine on the same target. Details: `evidence` (an `EngineEvidence`). It records verdicts and never raises for
them: a rejected engine is a normal result, and `select` decides. The engine's answers are measured once (scores.py); a
run with an undecided latency measures only the latency again.
"""

import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from slipstream import digests, hardware
from slipstream.contract import Artifact, Cell, Json, StepInput, StepOutput, Verdict
from slipstream.contract.evidence import EngineEvidence, Interval, Latency, Validated
from slipstream.data.splits import Data, Split
from slipstream.engines.base import Runner, engine_for, gpu_of, load_engine, size_bytes, why_not_loadable
from slipstream.engines.peak import peak_memory_mib
from slipstream.errors import DataError
from slipstream.frameworks.base import load_eager
from slipstream.home import file_lock
from slipstream.measure import gates, gpu, latency, profiles
from slipstream.measure.latency import Comparison, Plan
from slipstream.measure.loadgen import Issue
from slipstream.measure.metrics import base as metrics
from slipstream.measure.metrics.base import Metric, Records, Runs, metric_for
from slipstream.measure.stats import Bounds
from slipstream.plugins import BUILD, ENGINES, FRAMEWORKS, RETRAIN
from slipstream.runner.context import Context
from slipstream.spec import BASELINE, Objective, Spec, Target
from slipstream.steps import scores as scoring
from slipstream.store.tracking import StepRun

log = logging.getLogger(__name__)

PLAN = Plan()
UNIT = "batches and rounds"
ENGINE, REFERENCE, EAGER = "engine", "reference", "eager"
"""Subjects of the interleaved run; the baseline's own cell has no reference."""


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return objective, target, seed, machine and versions; the preference among passing engines does not matter
    here."""
    assert inputs.cell is not None and inputs.cell.target is not None
    target = spec.targets[inputs.cell.target]
    distributions = {*FRAMEWORKS[spec.model.framework].distributions, *engine_for(target.engine).distributions}
    distributions |= set(metric_for(spec.objective.metric).distributions)
    return {
        "objective": spec.objective.model_dump(mode="json", exclude={"prefer"}),
        "metric": metrics.identity(spec.objective.metric),
        "target": target.model_dump(mode="json"),
        "seed": spec.seed,
        "competing": spec.competing,
        "hardware": hardware.describe(),
        "versions": digests.versions(*sorted(distributions | {"mlcommons-loadgen"})),
    } | digests.plugin(ENGINES[target.engine].module)


def run(context: Context) -> StepOutput:
    """Score the engine and the baseline, time them in the same rounds, and judge."""
    data, target = context.data, _target(context)
    if (reason := why_not_loadable(target)) is not None:
        return _unmeasured(context, reason)
    folder = context.fetch(_built(context, context.cell))
    with file_lock(context.home.root / "measure.lock", "another engine is being measured"):
        memory_mib = peak_memory_mib(folder, data.test.inputs)
        with gpu.watch(gpu_of(target)) as usage:
            _profile(context, data.test)
            progress = _Progress(context.run, 2 * metrics.batches(len(data.test)) + _plan(context).rounds)
            engine = load_engine(folder)
            scores = _scores(context, engine, progress)
            timing, server = _timing(context, engine, progress)
    judgement = _Judgement(context.spec, context.cell, scores, timing)
    sizes = _Sizes.of(context, memory_mib)
    evidence = judgement.evidence(data, server=server, sizes=sizes)
    output = context.output(
        metrics=_metrics(evidence) | usage.metrics(),
        verdicts=judgement.verdicts(),
        details=Validated(evidence=evidence),
    )
    context.run.judges(output, _artifact(_built(context, context.cell)), data, context.spec.name)
    return output


def _unmeasured(context: Context, reason: str) -> StepOutput:
    """Return the output for an engine that was built for hardware in other machines: no evidence, so never a pass."""
    log.warning("%s: not measured: %s", context.cell.key, reason)
    verdict = Verdict(gate="present", answer="inconclusive", reason=f"not measured: {reason}")
    return context.output(verdicts=(verdict,), details=Validated(not_loadable=reason))


def _profile(context: Context, test: Split) -> None:
    """Record a profile, if the target requests one, before anything is measured, since it may fail."""
    tool = profiles.wanted(_target(context))
    if tool is not None:
        engine = context.fetch(_built(context, context.cell))
        context.run.artifact(profiles.record(tool, engine, test.inputs, context.workdir / "profile"), "profiles")


def _target(context: Context) -> Target:
    assert context.cell.target is not None, "validate needs a cell with a target"
    return context.spec.targets[context.cell.target]


@dataclass(frozen=True)
class _Scores:
    """Records of the baseline's and the engine's answers to the same samples, and the confidence of the comparison."""

    metric: Metric
    baseline: Records
    engine: Records
    run_id: str
    """MLflow run that holds the engine's."""
    competing: int
    confidence: float
    """Confidence of each bound: the objective's, corrected for the competing engines."""

    @cached_property
    def drop(self) -> Bounds:
        """Drop of the metric, as a fraction. A bootstrap uses the same seed for all, so no seed can be
        tried."""
        return metrics.drop(self.metric, self.baseline, self.engine, self.confidence, np.random.default_rng(0))

    @property
    def discordance(self) -> float:
        """Share of samples whose records differ."""
        return float(np.mean(self.baseline != self.engine))


@dataclass
class _Progress:
    """Counts scored batches and measured rounds, which `slipstream run --watch` shows as one bar."""

    run: StepRun
    total: int
    done: int = 0

    def batch(self) -> None:
        self.done += 1
        self.run.progress(self.done, self.total, UNIT)

    def skip(self, batches: int) -> None:
        self.done += batches

    def round(self, done: int, rounds: int, others_cores: float | None) -> None:
        figures = {} if others_cores is None else {"cores used by others": others_cores}
        ahead = rounds - done
        self.done += 1
        self.total = max(self.total, self.done + ahead)
        self.run.progress(self.done, self.total, UNIT, **figures)


def _scores(context: Context, engine: Runner, progress: _Progress) -> _Scores:
    """Return scores of the baseline, by its own framework in FP32, and of the engine; an earlier run's if it has
    any."""
    metric, batches = metric_for(context.spec.objective.metric), metrics.batches(len(context.data.test))
    assert context.cell.target is not None
    subjects = (
        scoring.baseline(context, _artifact(_baseline(context)), context.spec.targets[context.cell.target].threads),
        scoring.engine(
            context, _artifact(_built(context, context.cell)), f"engine {context.cell.key}", lambda folder: engine
        ),
    )
    scored = []
    for subject in subjects:
        scored.append(scoring.scores(context, subject, metric, progress.batch))
        progress.skip(0 if scored[-1].measured else batches)
    competing = max(scored[-1].competing, context.spec.competing)
    confidence = gates.per_engine(context.spec.objective.confidence, competing)
    return _Scores(metric, scored[0].records, scored[1].records, scored[1].run_id, competing, confidence)


def _timing(context: Context, engine: Runner, progress: _Progress) -> tuple[Comparison, Latency]:
    """Time engine, reference engine and eager baseline in one interleaved run; then the engine under a Poisson load."""
    assert context.cell.target is not None
    test, plan, seed = context.data.test, _plan(context), context.spec.seed
    models: dict[str, Runs] = {ENGINE: engine}
    if context.cell.recipe != BASELINE:
        reference = Cell(recipe=BASELINE, target=context.cell.target)
        models[REFERENCE] = load_engine(context.fetch(_built(context, reference)))
    threads = context.spec.targets[context.cell.target].threads
    models[EAGER] = load_eager(context.fetch(_baseline(context)), threads=threads)
    issues = {name: single(model, test) for name, model in models.items()}
    timing = latency.compare(issues, len(test), plan, seed, tails=(ENGINE,), progress=progress.round)
    single_stream = latency.summary("SingleStream", timing.pooled_ms(ENGINE))
    return timing, latency.under_load(issues[ENGINE], len(test), plan, seed, single_stream.rate_per_s)


def _plan(context: Context) -> Plan:
    return PLAN.at(context.spec.objective.confidence)


def single(model: Runs, split: Split) -> Issue:
    """Return a function that answers a request for one sample of the split, at batch 1."""
    return lambda index: model.run(split.inputs[index : index + 1])


@dataclass(frozen=True)
class _Judgement:
    """Conclusions from the measurements of the engine."""

    spec: Spec
    cell: Cell
    scores: _Scores
    timing: Comparison

    @property
    def objective(self) -> Objective:
        return self.spec.objective

    @property
    def crowded(self) -> bool:
        """Whether other processes took the cores that the target needs: then no ratio to the eager baseline, others in
        doubt."""
        assert self.cell.target is not None
        return self.timing.crowded(self.spec.targets[self.cell.target].threads)

    def verdicts(self) -> tuple[Verdict, ...]:
        """Return accuracy; latency if the objective has a limit; speedup unless this is the baseline itself."""
        objective, noise = self.objective, self.timing.noise
        scores = self.scores
        verdicts = [gates.accuracy_of(scores.drop, objective.max_drop, scores.confidence, scores.competing)]
        if objective.latency_p99_ms is not None:
            pooled = self.timing.pooled_ms(ENGINE)
            verdicts.append(gates.latency(pooled, objective.latency_p99_ms, objective.confidence, noise.noisy))
        if self.cell.recipe != BASELINE:
            ratio = self._ratio(REFERENCE)
            verdicts.append(gates.speedup(ratio, objective.confidence, crowded=self.crowded))
        return tuple(self._with_noise(v) if v.gate != "accuracy" else v for v in verdicts)

    def _with_noise(self, verdict: Verdict) -> Verdict:
        noise = self.timing.noise
        if not noise.noisy:
            return verdict
        others = "an unknown number of" if noise.others_cores is None else f"{noise.others_cores:.1f}"
        note = f"only {noise.clean_rounds} of {noise.rounds} rounds were quiet (others used {others} cores)"
        if verdict.gate == "speedup":
            note += ", so all count, by their undisturbed queries"
        return verdict.model_copy(update={"reason": f"{verdict.reason}; {note}"})

    def evidence(self, data: Data, *, server: Latency, sizes: "_Sizes") -> EngineEvidence:
        metric, baseline, engine = self.scores.metric, self.scores.baseline, self.scores.engine
        worst = metrics.worst_class(metric, baseline, engine, data.test.labels, data.classes)
        return EngineEvidence(
            metric=metric.name,
            samples=len(data.test),
            baseline_quality=100.0 * metrics.value(metric, baseline),
            engine_quality=100.0 * metrics.value(metric, engine),
            drop_pp=_required(self.scores.drop.scaled(100.0)),
            discordance_percent=100.0 * self.scores.discordance,
            confidence=self.scores.confidence,
            competing=self.scores.competing,
            scores_run=self.scores.run_id,
            worst_class=worst[0],
            worst_class_drop_pp=worst[1],
            latency=self._latency(ENGINE),
            server=server,
            eager=self._latency(EAGER) if not self.crowded else None,
            reference=self._latency(REFERENCE) if self.cell.recipe != BASELINE else None,
            speedup_eager=self._speedup(EAGER) if not self.crowded else None,
            speedup_reference=self._speedup(REFERENCE) if self.cell.recipe != BASELINE else None,
            size_bytes=sizes.engine,
            size_gzip_bytes=sizes.gzipped,
            peak_memory_mib=sizes.peak_memory_mib,
            arena_bytes=sizes.arena,
            noise=self.timing.noise,
            hardware=hardware.sentence(),
        )

    def _latency(self, subject: str) -> Latency:
        return latency.summary("SingleStream", self.timing.pooled_ms(subject))

    def _speedup(self, reference: str) -> Interval | None:
        return interval(self._ratio(reference))

    def _ratio(self, reference: str) -> Bounds:
        return self.timing.speedup(ENGINE, reference, self.objective.confidence, crowded=self.crowded)


def interval(bounds: Bounds) -> Interval | None:
    """Return bounds in the form of evidence; None if nothing is known."""
    return Interval(estimate=bounds.estimate, low=bounds.low, high=bounds.high) if bounds.known else None


def _required(bounds: Bounds) -> Interval:
    drop_interval = interval(bounds)
    if drop_interval is None:
        raise DataError(f"data: {bounds.n} test samples carry no bound for the drop; give more held-out data")
    return drop_interval


def _metrics(evidence: EngineEvidence) -> dict[str, float]:
    """Return flat figures for MLflow's charts; unmeasured ones are omitted."""
    figures: dict[str, float | None] = {
        evidence.metric: evidence.engine_quality,
        "drop_pp": evidence.drop_pp.estimate,
        "drop_pp_high": evidence.drop_pp.high,
        "discordance_percent": evidence.discordance_percent,
        "worst_class_drop_pp": evidence.worst_class_drop_pp,
        "p50_ms": evidence.latency.p50_ms,
        "p99_ms": evidence.latency.p99_ms,
        "rate_per_s": evidence.latency.rate_per_s,
        "server_p50_ms": evidence.server.p50_ms if evidence.server else None,
        "server_p99_ms": evidence.server.p99_ms if evidence.server else None,
        "speedup_eager": evidence.speedup_eager.estimate if evidence.speedup_eager else None,
        "speedup_reference": evidence.speedup_reference.estimate if evidence.speedup_reference else None,
        "size_bytes": float(evidence.size_bytes),
        "peak_memory_mib": evidence.peak_memory_mib,
        "clean_rounds": float(evidence.noise.clean_rounds),
    }
    return {name: value for name, value in figures.items() if value is not None}


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the engine's files, plain and compressed, and of LiteRT's arena; peak memory, in MiB."""

    engine: int
    gzipped: int | None
    arena: int | None
    peak_memory_mib: float | None

    @classmethod
    def of(cls, context: Context, peak_memory_mib: float | None) -> "_Sizes":
        built = _built(context, context.cell)
        gzipped, arena = (built.metrics.get(name) for name in ("size_gzip_bytes", "arena_bytes"))
        return cls(
            engine=size_bytes(context.fetch(built)),
            gzipped=None if gzipped is None else int(gzipped),
            arena=None if arena is None else int(arena),
            peak_memory_mib=peak_memory_mib,
        )


def _artifact(output: StepOutput) -> Artifact:
    assert output.artifact is not None, f"step {output.step} hands on its artifact"
    return output.artifact


def _baseline(context: Context) -> StepOutput:
    output = context.inputs.output_of(RETRAIN)
    if output is None:
        raise DataError(f"step validate: IN.json has no upstream output of retrain for {context.cell.key}")
    return output


def _built(context: Context, cell: Cell) -> StepOutput:
    output = context.inputs.output_of(BUILD, cell)
    if output is None:
        raise DataError(f"step validate: IN.json has no upstream output of build {cell.key}; that step failed")
    return output
