"""A pipeline run's outputs, made up but shaped as the steps write them, for the tests of the report."""

from typing import Any

import numpy as np

from slipstream.contract import Artifact, Cell, StepOutput, Verdict
from slipstream.contract.evidence import EngineEvidence, Interval, Latency, Noise, Standing, row_of

BASELINE_QUALITY = 92.99
MADE_UP = {
    # cell: (quality, drop low, drop high, p50 ms, size in bytes, failing gate)
    "baseline@server": (92.99, 0.0, 0.0, 0.28, 720_000, None),
    "int8@server": (92.90, -0.08, 0.27, 0.12, 190_000, None),
    "distilled-int8@server": (90.73, 1.90, 2.62, 0.06, 62_000, "accuracy"),
    "pruned-int8@server": (92.55, 0.19, 0.71, 0.085, 98_000, None),
    "baseline@portable": (92.99, 0.0, 0.0, 0.34, 712_000, None),
    "int8@portable": (92.88, -0.06, 0.29, 0.36, 200_000, "speed"),
    "distilled-int8@portable": (90.70, 1.92, 2.66, 0.071, 66_000, "accuracy"),
    "pruned-int8@portable": (92.51, 0.22, 0.76, 0.15, 104_000, None),
}


def latency(p50: float, seed: int, queries: int = 4000) -> Latency:
    """A log-normal latency distribution around `p50`."""
    sample = np.sort(p50 * np.random.default_rng(seed).lognormal(0, 0.16, queries))
    quantiles = np.quantile(sample, np.linspace(0, 1, 101))
    return Latency(
        scenario="SingleStream",
        n=queries,
        p50_ms=float(quantiles[50]),
        p90_ms=float(quantiles[90]),
        p99_ms=float(quantiles[99]) if queries >= 662 else None,
        rate_per_s=1000 / p50,
        quantiles_ms=tuple(float(q) for q in quantiles),
    )


def evidence(cell: str, seed: int) -> EngineEvidence:
    quality, low, high, p50, size, _ = MADE_UP[cell]
    reference = 0.28 if cell.endswith("server") else 0.34
    baseline = cell.startswith("baseline")
    return EngineEvidence(
        metric="top1",
        samples=10_000,
        baseline_quality=BASELINE_QUALITY,
        engine_quality=quality,
        drop_pp=Interval(estimate=BASELINE_QUALITY - quality, low=low, high=high),
        confidence=1 - 0.05 / 6,
        competing=6,
        worst_class="Shirt",
        worst_class_drop_pp=0.9,
        latency=latency(p50, seed),
        eager=latency(0.65, 99),
        reference=latency(reference, 98),
        speedup_eager=Interval(estimate=0.65 / p50, low=0.63 / p50, high=0.67 / p50),
        speedup_reference=None
        if baseline
        else Interval(estimate=reference / p50, low=0.97 * reference / p50, high=1.03 * reference / p50),
        size_bytes=size,
        size_gzip_bytes=size // 2,
        peak_memory_mib=160,
        arena_bytes=120_000,
        noise=Noise(clean_rounds=9, rounds=10, others_cores=0.08),
        hardware="A made-up CPU, 2 cores",
    )


def verdicts(cell: str) -> tuple[Verdict, ...]:
    quality, low, high, _, _, failing = MADE_UP[cell]
    drop = BASELINE_QUALITY - quality
    told = "drop {:.2f} points, at most {:.2f}; {} is allowed".format
    accuracy = Verdict(
        gate="accuracy",
        answer="fail" if failing == "accuracy" else "pass",
        reason=told(drop, high, 1),
        estimate=drop,
        low=low,
        high=high,
        limit=1.0,
        unit="pp",
        n=10_000,
    )
    speed = Verdict(
        gate="speed",
        answer="fail" if failing == "speed" else "pass",
        reason="0.94× [0.91, 0.98] the speed of the baseline's FP32 engine: not faster"
        if failing == "speed"
        else "faster than the baseline's FP32 engine",
        unit="×",
        n=4000,
    )
    return accuracy, speed


def validate_outputs() -> list[StepOutput]:
    found = []
    for seed, cell in enumerate(MADE_UP):
        recipe, _, target = cell.partition("@")
        found.append(
            StepOutput(
                step="validate",
                cell=Cell(recipe=recipe, target=target),
                identity=f"{seed:064d}",
                run_id=f"{seed:032x}",
                reused=seed < 3,
                artifact=Artifact(
                    uri=f"mlflow-artifacts:/1/models/m-{seed:032x}/artifacts",
                    path="data/engine",
                    sha256=f"{seed + 7:064x}",
                    size_bytes=MADE_UP[cell][4],
                    model_id=f"m-{seed:032x}",
                ),
                verdicts=() if recipe == "baseline" else verdicts(cell),
                details={"evidence": evidence(cell, seed).model_dump(mode="json")},
            )
        )
    return found


def window(at: float, phase: str, weight: float, errors: int = 0) -> dict[str, Any]:
    return {
        "at": 1_700_000_000 + at,
        "phase": phase,
        "champion_weight": 100 - weight,
        "challenger_weight": weight,
        "requests": 500,
        "errors": errors,
        "p50_ms": 1.1 + 0.02 * (at % 7),
        "p99_ms": 2.6 + 0.11 * (at % 5),
    }


def trial_output(answer: str = "pass") -> StepOutput:
    entries = [window(t, "shadow", 0) for t in range(0, 10, 2)] + [window(t, "canary", 5) for t in range(10, 32, 2)]
    verdict = Verdict.model_validate(
        {"gate": "disagreement", "answer": answer, "reason": "1.2 % of 500 pairs differ, at most 2.4 %", "n": 500}
    )
    return StepOutput(
        step="trial", identity="t" * 64, run_id="e" * 32, verdicts=(verdict,), details={"timeline": entries}
    )


def rollout_output(released: bool = True) -> StepOutput:
    entries = [window(32 + 3 * i, f"{w} %", w, 0 if released or w < 50 else 41) for i, w in enumerate((25, 50, 100))]
    verdict = Verdict(
        gate="errors",
        answer="pass" if released else "fail",
        reason="0 of 1,500 requests failed" if released else "41 of 500 requests failed, 1 % is allowed",
        n=1500,
    )
    details = {"timeline": entries, "released": "v2" if released else None, "previous": "v1"}
    return StepOutput(step="rollout", identity="r" * 64, run_id="f" * 32, verdicts=(verdict,), details=details)


def check_output() -> StepOutput:
    digests = {"train": "a" * 64, "test": "b" * 64}
    return StepOutput(step="check", identity="c" * 64, run_id="d" * 32, details={"data": digests})


def rows(times_ms: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """select's table: every engine with its place in the race."""
    times = times_ms or {cell: facts[3] for cell, facts in MADE_UP.items()}
    fastest = min(ms for cell, ms in times.items() if MADE_UP[cell][5] is None)
    found = []
    for output in validate_outputs():
        assert output.cell is not None
        ratio = times[output.cell.key] / fastest
        relative = Interval(estimate=ratio, low=0.97 * ratio, high=1.03 * ratio)
        standing = Standing(ms=times[output.cell.key], relative=relative)
        row = row_of(output.cell.key, output).model_copy(update={"standing": standing})
        found.append(row.model_dump(mode="json"))
    return found


def select_output(winner: str = "pruned-int8@server", **more: Any) -> StepOutput:
    details: dict[str, Any] = {
        "rows": rows(),
        "competing": 6,
        "winner": winner,
        "version": "2",
        "best_per_target": {"server": winner, "portable": "pruned-int8@portable"},
        "champion": "1",
        "already_champion": False,
        "missing": [],
    }
    return StepOutput(step="select", identity="s" * 64, run_id="c" * 32, details=details | more)


def whole_run() -> tuple[StepOutput, ...]:
    """Outputs of a run that released an engine."""
    return (check_output(), *validate_outputs(), select_output(), trial_output(), rollout_output())
