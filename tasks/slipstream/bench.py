"""All engines of a spec's last run against the framework's eager baseline, in one interleaved run.

`validate` measures one engine at a time, hours apart perhaps; here all share the same rounds, so that they can be
compared with each other. It uses what is logged and changes nothing. Short LoadGen blocks: not an MLPerf result.
"""

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from slipstream import data, digests, hardware
from slipstream import spec as specs
from slipstream.contract import StepOutput
from slipstream.engines.base import engine_for, load_engine
from slipstream.errors import InputError, SlipstreamError
from slipstream.evidence import EngineEvidence, Latency, Row, row_of
from slipstream.flow import cell_of, cells
from slipstream.frameworks import FRAMEWORKS
from slipstream.frameworks.base import load_eager
from slipstream.home import write_atomically
from slipstream.measure import latency, stats
from slipstream.measure.latency import Comparison, Plan
from slipstream.measure.stats import Bounds
from slipstream.spec import BASELINE, Spec
from slipstream.steps.validate import single
from slipstream.tracking import STEP, Tracking, fetch

log = logging.getLogger(__name__)

PLAN = Plan(rounds=12, max_rounds=24, clean_rounds=8)
HEAD = (
    "engine",
    "quality",
    "drop (upper bound)",
    "p50 ms",
    "p99 ms",
    "requests/s",
    "size",
    "× eager",
    "× FP32 engine",
    "stage 1",
)


@dataclass(frozen=True)
class Bench:
    """What was measured: stage 1's rows, and one comparison of all their engines."""

    spec: Spec
    run_key: str
    rows: tuple[Row, ...]
    comparison: Comparison
    eager: str
    """Name of the eager baseline among the subjects."""
    toolchain: Mapping[str, str]

    @property
    def eager_counts(self) -> bool:
        """Whether the eager baseline had the cores that it needs."""
        return not self.comparison.crowded(max(target.threads for target in self.spec.targets.values()))

    def ratio(self, subject: str, reference: str) -> Bounds:
        if reference == self.eager and not self.eager_counts:
            return stats.unknown(len(self.comparison.judged))
        return self.comparison.speedup(subject, reference, self.spec.objective.confidence)

    def latency(self, subject: str) -> Latency:
        return latency.summary("SingleStream", self.comparison.pooled_ms(subject))


def last_run(tracking: Tracking, run_key: str | None = None) -> tuple[str, list[StepOutput]]:
    """Key and step outputs of the spec's newest run that got to stage 1, or of the run named. Raises InputError."""
    for pipeline in tracking.search({STEP: "pipeline"}):
        key = str(pipeline.info.run_name)
        if run_key is not None and key != run_key:
            continue
        children = tracking.search({"mlflow.parentRunId": pipeline.info.run_id})
        steps = [r for r in children if r.info.status == "FINISHED"]
        outputs = [
            tracking.output(r.info.run_id) for r in steps if r.data.tags[STEP] in ("retrain", "build", "validate")
        ]
        if any(o.step == "validate" for o in outputs):
            return key, outputs
    which = f"run {run_key}" if run_key else "finished run"
    raise InputError(f"spec {tracking.spec.name}: no {which} with validated engines; start one with `slipstream run`")


def measure(spec: Spec, run_key: str, outputs: Iterable[StepOutput], plan: Plan = PLAN) -> Bench:
    """Load every validated engine and the eager baseline, and time them all in the same rounds."""
    found = {(o.step, o.cell.key if o.cell else None): o for o in outputs}
    keys = [key for key in cells(spec) if ("validate", key) in found and ("build", key) in found]
    test = data.load(spec).test
    threads = max(target.threads for target in spec.targets.values())
    eager = f"{spec.model.framework} eager FP32"
    models = {key: load_engine(_folder(found["build", key])) for key in keys}
    subjects = {key: single(model, test) for key, model in models.items()}
    subjects[eager] = single(load_eager(_folder(found["retrain", None]), threads=threads), test)
    comparison = latency.compare(
        subjects,
        len(test),
        plan.at(spec.objective.confidence),
        spec.seed,
        tails=tuple(subjects),
        progress=lambda d, t, _: log.info("round %d/%d", d, t),
    )
    rows = tuple(row_of(key, found["validate", key]) for key in keys)
    names = {*FRAMEWORKS[spec.model.framework].distributions, "mlcommons-loadgen", "slipstream"}
    for target in spec.targets.values():
        names |= set(engine_for(target.engine).distributions)
    return Bench(spec, run_key, rows, comparison, eager, digests.versions(*sorted(names)))


def _folder(output: StepOutput) -> Path:
    if output.artifact is None:
        raise InputError(f"step {output.step}: run {output.run_id} logged no artefact; run the spec again")
    return fetch(output.artifact)


def markdown(bench: Bench) -> str:
    """The table with the machine, the versions and the noise beside it."""
    noise = bench.comparison.noise
    quiet = f"{noise.clean_rounds} of {noise.rounds} judged rounds were quiet"
    if noise.noisy:
        quiet += "; the others shared the machine with other work, so ratios compare undisturbed queries"
    if not bench.eager_counts:
        quiet += f"; others took cores that {bench.eager} needs, so nothing is compared with it: run it again in quiet"
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in (HEAD, ("---",) * len(HEAD), *_lines(bench)))
    return (
        f"# {bench.spec.name}: engines against {bench.eager}\n\n{body}\n\n"
        f"Batch 1, one request after the other, all subjects in the same rounds; ratios with their "
        f"{100 * bench.spec.objective.confidence:g} % one-sided bounds. Issued and timed by LoadGen in short blocks; "
        f"this is not an MLPerf result. {quiet}.\n\n"
        f"Machine: {hardware.sentence()}. Run `{bench.run_key}`, {datetime.now(UTC):%Y-%m-%d}. "
        f"Versions: {', '.join(f'{k} {v}' for k, v in bench.toolchain.items())}.\n"
    )


def _lines(bench: Bench) -> list[tuple[str, ...]]:
    return [_line(bench, bench.eager, None), *(_line(bench, row.cell, row) for row in bench.rows)]


def _line(bench: Bench, subject: str, row: Row | None) -> tuple[str, ...]:
    timing, evidence = bench.latency(subject), row.evidence if row else None
    reference = _reference(bench, subject)
    return (
        subject,
        *_quality(evidence, next((r.evidence for r in bench.rows if r.evidence), None)),
        f"{timing.p50_ms:.3f}",
        "–" if timing.p99_ms is None else f"{timing.p99_ms:.3f}",
        f"{timing.rate_per_s:,.0f}",
        f"{evidence.size_bytes / 1e3:,.0f} kB" if evidence else "–",
        "1" if row is None else _times(bench.ratio(subject, bench.eager)),
        _times(bench.ratio(subject, reference)) if reference else "–",
        row.status if row else "–",
    )


def _quality(evidence: EngineEvidence | None, any_engine: EngineEvidence | None) -> tuple[str, str]:
    if evidence is not None:
        return f"{evidence.engine_quality:.2f} %", f"{evidence.drop_pp.estimate:.2f} ({evidence.drop_pp.high:.2f}) pp"
    return (f"{any_engine.baseline_quality:.2f} %" if any_engine else "–"), "–"


def _reference(bench: Bench, subject: str) -> str | None:
    """The baseline's FP32 engine on the same target, where it was measured and is not the subject itself."""
    target = cell_of(subject).target if subject != bench.eager else None
    reference = f"{BASELINE}@{target}"
    return reference if subject != reference and any(r.cell == reference for r in bench.rows) and target else None


def _times(ratio: Bounds) -> str:
    return f"{ratio.estimate:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio.known else "unknown"


def document(bench: Bench) -> str:
    """The same as JSON: every latency summary, every ratio, the machine, the versions."""
    subjects = [bench.eager, *(r.cell for r in bench.rows)]
    figures = {
        name: {
            "latency": bench.latency(name).model_dump(mode="json"),
            "speedup_eager": _bounds(bench.ratio(name, bench.eager)),
            "speedup_reference": _bounds(bench.ratio(name, reference))
            if (reference := _reference(bench, name))
            else None,
        }
        for name in subjects
    }
    whole = {
        "spec": bench.spec.name,
        "run": bench.run_key,
        "hardware": hardware.describe(),
        "versions": dict(bench.toolchain),
        "noise": bench.comparison.noise.model_dump(mode="json"),
        "confidence": bench.spec.objective.confidence,
        "subjects": figures,
        "stage_1": [row.model_dump(mode="json") for row in bench.rows],
    }
    return json.dumps(whole, indent=1) + "\n"


def _bounds(ratio: Bounds) -> dict[str, float] | None:
    return {"estimate": ratio.estimate, "low": ratio.low, "high": ratio.high} if ratio.known else None


def main(
    spec: Annotated[Path, typer.Argument(help="Spec file.")],
    out: Annotated[Path | None, typer.Option(help="Write the table here, and a .json beside it.")] = None,
    run: Annotated[str, typer.Option(help="Run key; `latest` is the newest with validated engines.")] = "latest",
) -> None:
    """Measure all engines of a run and the eager baseline in one interleaved run; print the table."""
    loaded = specs.load(spec)
    key, outputs = last_run(Tracking(loaded), None if run == "latest" else run)
    bench = measure(loaded, key, outputs)
    table = markdown(bench)
    if out is not None:
        write_atomically(out, table)
        write_atomically(out.with_suffix(".json"), document(bench))
    typer.echo(table)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        typer.run(main)
    except SlipstreamError as error:
        typer.echo(f"{error.headline}: {error}", err=True)
        raise SystemExit(error.exit_code) from error
