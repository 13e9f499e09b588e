"""The benchmark as Markdown: a line for each model and engine, then each model's engines. Figures are copied."""

from collections.abc import Iterable, Sequence

from slipstream.contract.evidence import Interval
from slipstream.plan.flow import cell_of
from slipstream.reports import wording
from slipstream.spec import BASELINE
from slipstream.tools.bench import Bench, Subject

FIGURES = ("quality %", "drop (upper bound)", "p50 ms", "× eager", "× its own FP32", "size", "peak MiB", "stage 1")
OVERVIEW = ("model", "metric", "engine", "recipe", *FIGURES)
ENGINES = ("engine", *FIGURES[:3], "p99 ms", "requests/s", *FIGURES[3:])


def render(benches: Iterable[Bench]) -> str:
    """The whole page; models by name."""
    ordered = sorted(benches, key=lambda b: b.spec)
    overview = [line for bench in ordered for line in _overview(bench)]
    sections = "\n".join(_section(bench) for bench in ordered)
    return (
        "# Engines and models, measured\n\n"
        "For each model and target the fastest recipe that passed stage 1, or the baseline's FP32 engine where none "
        "did. `× eager` is against the framework's own FP32 run of the baseline, `× its own FP32` against the baseline "
        "built for the same engine; the ratios of a model come from one interleaved run of all its engines.\n\n"
        f"{_table(OVERVIEW, overview)}\n\n"
        "Batch 1, one request after the other. Bounds of ratios are two, each one-sided at the spec's confidence. "
        "`peak MiB`: the most that loading the engine and its first requests add to the resident memory of a "
        "process of their own. Issued and timed by LoadGen in short blocks: these are not MLPerf results. Made by "
        f"`make bench`.\n\n{sections}"
    )


def _overview(bench: Bench) -> list[tuple[str, ...]]:
    lines = []
    for target, engine in bench.engines.items():
        here = [s for s in bench.subjects[1:] if cell_of(s.name).target == target]
        passed = [s for s in here if s.status == "passed"]
        best = min(passed, key=lambda s: s.latency.p50_ms, default=None)
        subject = best or next((s for s in here if cell_of(s.name).recipe == BASELINE), None)
        if subject is not None:
            recipe = cell_of(subject.name).recipe + ("" if best or len(here) == 1 else " (no recipe passed)")
            lines.append((bench.spec, wording.metric(bench.metric), f"{engine} ({target})", recipe, *_figures(subject)))
    return lines


def _section(bench: Bench) -> str:
    noise = bench.noise
    quiet = f"{noise.clean_rounds} of {noise.rounds} judged rounds were quiet"
    if bench.crowded:
        quiet += "; others took cores that the engines need, so no ratios are given: run it again in quiet"
    elif noise.noisy:
        quiet += "; in the others the machine was shared with other work, so ratios compare undisturbed queries"
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    return (
        f"## {bench.spec}\n\n{_table(ENGINES, [_engine(s) for s in bench.subjects])}\n\n"
        f"Metric {wording.metric(bench.metric)}; bounds at {100 * bench.confidence:g} %; {quiet}. "
        f"Machine: {bench.hardware}. Run `{bench.run}`, {bench.date}. Versions: {versions}.\n"
    )


def _engine(subject: Subject) -> tuple[str, ...]:
    figures = _figures(subject)
    timing = (wording.milliseconds(subject.latency.p99_ms), wording.rate(subject.latency.rate_per_s))
    return (subject.name, *figures[:3], *timing, *figures[3:])


def _figures(subject: Subject) -> tuple[str, ...]:
    drop = subject.drop_pp
    return (
        wording.percent(subject.quality),
        f"{wording.points(drop.estimate)} ({wording.points(drop.high)})" if drop else wording.DASH,
        wording.milliseconds(subject.latency.p50_ms),
        _times(subject.speedup_eager),
        _times(subject.speedup_reference),
        wording.size(subject.size_bytes),
        wording.DASH if subject.peak_memory_mib is None else f"{subject.peak_memory_mib:.0f}",
        subject.status or wording.DASH,
    )


def _times(ratio: Interval | None) -> str:
    return f"{ratio.estimate:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else wording.DASH


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *lines))
