"""All engines of a spec's last run against the framework's eager baseline, in one interleaved run.

`validate` measures one engine at a time, perhaps hours apart; here all share the same rounds, so that they can be
compared with each other. It uses logged results and changes nothing. Short LoadGen blocks: not an MLPerf result.
"""

import logging
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from slipstream import digests, hardware
from slipstream import spec as specs
from slipstream.contract import StepOutput
from slipstream.contract.evidence import Interval, row_of
from slipstream.data import splits
from slipstream.engines.base import engine_for, load_engine
from slipstream.engines.peak import peak_memory_mib
from slipstream.errors import InputError, SlipstreamError
from slipstream.frameworks.base import load_eager, require_own_architecture
from slipstream.home import write_atomically
from slipstream.measure import latency
from slipstream.measure.latency import Plan
from slipstream.plan.flow import cell_of, cells
from slipstream.plugins import BUILD, FRAMEWORKS, RETRAIN, VALIDATE
from slipstream.spec import BASELINE, Spec
from slipstream.steps.validate import interval, single
from slipstream.store.tracking import STEP, Tracking, fetch
from slipstream.tools.bench import Bench, Subject

log = logging.getLogger(__name__)

PLAN = Plan(rounds=12, max_rounds=24, clean_rounds=8)


def last_run(tracking: Tracking, run_key: str | None = None) -> tuple[str, list[StepOutput]]:
    """Return key and step outputs of the named run, or the spec's newest run that reached stage 1. Raise InputError."""
    for pipeline in tracking.search({STEP: "pipeline"}):
        key = str(pipeline.info.run_name)
        if run_key is not None and key != run_key:
            continue
        children = tracking.search({"mlflow.parentRunId": pipeline.info.run_id})
        steps = [r for r in children if r.info.status == "FINISHED"]
        outputs = [tracking.output(r.info.run_id) for r in steps if r.data.tags[STEP] in (RETRAIN, BUILD, VALIDATE)]
        if any(o.step == VALIDATE for o in outputs):
            return key, outputs
    which = f"run {run_key}" if run_key else "finished run"
    raise InputError(f"spec {tracking.spec.name}: no {which} with validated engines; start one with `slipstream run`")


def measure(spec: Spec, run_key: str, outputs: Iterable[StepOutput], plan: Plan = PLAN) -> Bench:
    """Load every validated engine and the eager baseline, and time them all in the same rounds."""
    by_step = {(o.step, o.cell.key if o.cell else None): o for o in outputs}
    keys = [key for key in cells(spec) if (VALIDATE, key) in by_step and (BUILD, key) in by_step]
    test = splits.load(spec).test
    threads = max(target.threads for target in spec.targets.values())
    eager = f"{spec.model.framework} eager FP32"
    folders = {key: _folder(by_step[BUILD, key], spec) for key in keys}
    memory = {key: peak_memory_mib(folder, test.inputs) for key, folder in folders.items()}
    models = {key: load_engine(folder) for key, folder in folders.items()}
    subjects = {key: single(model, test) for key, model in models.items()}
    subjects[eager] = single(load_eager(_folder(by_step[RETRAIN, None], spec), threads=threads), test)
    comparison = latency.compare(
        subjects,
        len(test),
        plan.at(spec.objective.confidence),
        spec.seed,
        tails=tuple(subjects),
        progress=lambda d, t, _: log.info("round %d/%d", d, t),
    )
    rows = {key: row_of(key, by_step[VALIDATE, key]) for key in keys}
    crowded = comparison.crowded(threads)

    def ratio(subject: str, reference: str | None) -> Interval | None:
        if reference not in subjects or subject == reference or crowded:
            return None
        return interval(comparison.speedup(subject, reference, spec.objective.confidence))

    def subject(name: str) -> Subject:
        row = rows.get(name)
        evidence = row.evidence if row else next((r.evidence for r in rows.values() if r.evidence), None)
        timing = latency.summary("SingleStream", comparison.pooled_ms(name)).model_copy(update={"quantiles_ms": ()})
        if row is None:
            return Subject(name=name, latency=timing, quality=evidence.baseline_quality if evidence else None)
        return Subject(
            name=name,
            latency=timing,
            quality=evidence.engine_quality if evidence else None,
            drop_pp=evidence.drop_pp if evidence else None,
            size_bytes=evidence.size_bytes if evidence else None,
            peak_memory_mib=memory[name],
            speedup_eager=ratio(name, eager),
            speedup_reference=ratio(name, f"{BASELINE}@{cell_of(name).target}"),
            status=row.status,
        )

    distributions = {*FRAMEWORKS[spec.model.framework].distributions, "mlcommons-loadgen", "slipstream"}
    for target in spec.targets.values():
        distributions |= set(engine_for(target.engine).distributions)
    return Bench(
        spec=spec.name,
        run=run_key,
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        framework=spec.model.framework,
        metric=spec.objective.metric,
        confidence=spec.objective.confidence,
        engines={name: target.engine for name, target in spec.targets.items()},
        machine=hardware.describe(),
        hardware=hardware.sentence(),
        versions=digests.versions(*sorted(distributions)),
        noise=comparison.noise,
        crowded=crowded,
        subjects=tuple(subject(name) for name in (eager, *keys)),
    )


def _folder(output: StepOutput, spec: Spec) -> Path:
    if output.artifact is None:
        raise InputError(f"step {output.step}: run {output.run_id} logged no artifact; run the spec again")
    folder = fetch(output.artifact)
    require_own_architecture(folder, spec)
    return folder


def main(
    spec: Annotated[Path, typer.Argument(help="Spec file.")],
    out: Annotated[Path, typer.Option(help="Where the document is written, as JSON.")],
    run: Annotated[str, typer.Option(help="Run key; `latest` is the newest with validated engines.")] = "latest",
) -> None:
    """Measure all engines of a run and the eager baseline in one interleaved run."""
    loaded = specs.load(spec)
    key, outputs = last_run(Tracking(loaded), None if run == "latest" else run)
    write_atomically(out, measure(loaded, key, outputs).model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        typer.run(main)
    except SlipstreamError as error:
        typer.echo(f"{error.headline}: {error}", err=True)
        raise SystemExit(error.exit_code) from error
