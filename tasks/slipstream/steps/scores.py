"""A model's scores on the test samples: measured once, kept in MLflow, and found again by every later run.

Measuring the same bytes on the same samples again is no new evidence: an engine whose answers differ slightly at each
load would be retried until it passes. So the first records count, whatever the outcome of the run that made them: they
are finished and signed before anything else is measured. Only time is measured again.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slipstream import digests, hardware
from slipstream.contract import Artifact, Cell, StepOutput, digest
from slipstream.contract.handover import Scored
from slipstream.data.splits import Split
from slipstream.engines.base import engine_for, load_engine, read_manifest
from slipstream.errors import DataError, EngineError, InputError, ModelError
from slipstream.frameworks.base import load_eager, toolchain
from slipstream.home import file_lock
from slipstream.measure.metrics import base as metrics
from slipstream.measure.metrics.base import Metric, Records, Runs
from slipstream.runner.context import Context
from slipstream.store.tracking import fetch

log = logging.getLogger(__name__)

STEP = "scores"
"""Name of the MLflow runs that hold them; not a step of the flow."""
FILE = "records.npy"
SCORED = "slipstream.scored"
"""Tag for finding a model's scores, independent of versions and hardware: digest of model, samples and metric."""


@dataclass(frozen=True)
class Scores:
    """(N,) records of a model's answers to the test samples, and the MLflow run that holds them."""

    records: Records
    run_id: str
    competing: int
    """Number of engines that competed when they were measured, which also applies to a later run with fewer engines."""
    measured: bool
    """Whether they were measured now, and not in an earlier run."""


@dataclass(frozen=True)
class Subject:
    """A model whose answers are scored, and what may change them, in addition to the samples and the metric."""

    artifact: Artifact
    what: str
    """Its name in errors."""
    facts: Mapping[str, object]
    load: Callable[[], Runs]
    error: type[InputError] = EngineError


def engine(context: Context, artifact: Artifact, what: str, load: Callable[[Path], Runs] = load_engine) -> Subject:
    """Return a built engine, on this machine. The processor counts, since it determines the kernels."""
    folder = fetch(artifact)
    manifest = read_manifest(folder)
    here = hardware.describe()
    facts = {
        "target": manifest.target.model_dump(mode="json"),
        "versions": digests.versions(*sorted(engine_for(manifest.engine).distributions)),
        "hardware": {name: here[name] for name in ("cpu", "cpu_features", "system", "gpu") if name in here},
        "code": digests.source("engines"),
    }
    return Subject(artifact, what, facts, lambda: load(folder))


def baseline(context: Context, artifact: Artifact, threads: int) -> Subject:
    """Return the baseline, by its own framework in FP32. `threads` are the timing's: TensorFlow cannot change them."""
    facts = {"framework": toolchain(context.spec.model.framework)}
    return Subject(
        artifact, "the baseline", facts, lambda: load_eager(fetch(artifact), threads=threads), error=ModelError
    )


def scores(context: Context, subject: Subject, metric: Metric, progress: Callable[[], None] = lambda: None) -> Scores:
    """Return a subject's scores: those of the first measurement, or measured and recorded now."""
    test, tracking = context.data.test, context.tracking
    key = identity(subject, test, context.spec.objective.metric, metric)
    with file_lock(context.home.root / "scores.lock", "another step scores a model"):
        if earlier := tracking.find(key, oldest=True):
            log.info("%s: scored already, in MLflow run %s", subject.what, earlier.run_id)
            return _read(earlier, test, measured=False)
        records = metrics.record(
            subject.load(), test, metric, what=subject.what, progress=progress, error=subject.error
        )
        return _read(_record(context, key, subject, records), test, measured=True)


def identity(subject: Subject, test: Split, name: str, metric: Metric) -> str:
    """Return the digest of everything that determines the records."""
    return digest(
        {
            "step": STEP,
            "model": subject.artifact.sha256,
            "facts": dict(subject.facts),
            "test": test.digest,
            "metric": [name, metrics.identity(name), digests.versions(*metric.distributions)],
            "code": digests.source("measure/metrics"),
        }
    )


def _record(context: Context, key: str, subject: Subject, records: Records) -> StepOutput:
    """Log the records; the identity comes last, so that a step killed before leaves nothing that is trusted."""
    cell: Cell | None = context.inputs.cell
    run = context.tracking.start(context.inputs.run_key, STEP, cell, key)
    folder = context.workdir / f"{STEP}-{key[:16]}" / STEP
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / FILE, records, allow_pickle=False)
    context.tracking.client.log_artifacts(run.run_id, str(folder), STEP)
    output = StepOutput(
        step=STEP,
        cell=cell,
        identity=key,
        run_id=run.run_id,
        artifact=Artifact(
            uri=f"runs:/{run.run_id}",
            path=STEP,
            sha256=digests.folder(folder),
            size_bytes=digests.folder_size(folder),
        ),
        details=Scored(
            model=subject.artifact.sha256,
            what=subject.what,
            test=context.data.test.digest,
            metric=context.spec.objective.metric,
            competing=context.spec.competing,
        ).document(),
    )
    run.tags({SCORED: _scored(context, subject.artifact)})
    context.tracking.finish(run, output, cache=True)
    return output


def recorded(context: Context, artifact: Artifact) -> Scores | None:
    """Return the first scores of an engine on these samples, wherever they were measured; None without any."""
    for run in reversed(context.tracking.search_all({SCORED: _scored(context, artifact)})):
        if run.info.status == "FINISHED" and (earlier := _believed(context, run.info.run_id, artifact)):
            return earlier
    return None


def of_run(context: Context, run_id: str) -> Scores:
    """Return the scores of an MLflow run of this module. Raise DataError if the platform did not sign them."""
    return _read(context.tracking.output(run_id), context.data.test, measured=False)


def _scored(context: Context, artifact: Artifact) -> str:
    name = context.spec.objective.metric
    code = [digests.source("measure/metrics"), metrics.identity(name)]
    return digest([artifact.sha256, context.data.test.digest, name, code])


def _believed(context: Context, run_id: str, artifact: Artifact) -> Scores | None:
    """Return a run's scores if its signed output confirms them; a tag proves nothing."""
    try:
        output = context.tracking.output(run_id)
        scored = Scored.of(output)
    except DataError as error:
        log.warning("MLflow run %s claims to hold scores and is not used: %s", run_id, error)
        return None
    claims = (output.step, scored.model, scored.test, scored.metric)
    true = (STEP, artifact.sha256, context.data.test.digest, context.spec.objective.metric)
    return _read(output, context.data.test, measured=False) if claims == true else None


def _read(output: StepOutput, test: Split, *, measured: bool) -> Scores:
    assert output.artifact is not None, "scores are recorded with their file"
    records: Records = np.load(fetch(output.artifact) / FILE, allow_pickle=False)
    if len(records) != len(test):
        raise DataError(
            f"MLflow run {output.run_id}: {len(records)} scores of {len(test)} test samples; delete the run"
        )
    return Scores(records, output.run_id, Scored.of(output).competing, measured)
