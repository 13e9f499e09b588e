"""Engines head to head: all take turns in one interleaved run, and ratios within it show which is faster.

When each engine runs separately, its ratio to the eager baseline includes the machine's variation: on two quiet cores a
pick by such ratios took an engine of 0.202 ms over one of 0.127 ms. Here every engine runs in the same rounds.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from slipstream.contract.evidence import Interval, Race, Standing
from slipstream.measure import latency, stats
from slipstream.measure.latency import Comparison, Plan
from slipstream.measure.loadgen import Issue
from slipstream.measure.stats import Bounds

PLAN = Plan(rounds=10, max_rounds=16, clean_rounds=8, block_ms=100)
"""Many engines share a round, which is therefore long enough for /proc/stat with shorter blocks."""


def run(
    subjects: Mapping[str, Issue],
    samples: int,
    plan: Plan,
    *,
    seed: int,
    threads: int,
    mean: bool,
    progress: Callable[[int, int, float | None], None] = lambda done, total, others: None,
) -> Race:
    """Measure all subjects, interleaved. `threads` is the most that any needs; `mean` is for throughput."""
    return of(latency.compare(subjects, samples, plan, seed, progress=progress), threads=threads, mean=mean)


def of(comparison: Comparison, *, threads: int, mean: bool) -> Race:
    """Return a race from its rounds: one figure of each subject for every round that counts.

    The figure is the median (or mean) of the queries; under noise it is their 10th percentile, as in
    `Comparison.speedup`.
    """
    quick, judged = comparison.noise.noisy, comparison.judged

    def figure(latencies: np.ndarray) -> float:
        return float(np.quantile(latencies, 0.1) if quick else latencies.mean() if mean else np.median(latencies))

    names = tuple(judged[0].latencies_ms)
    return Race(
        rounds_ms={name: tuple(figure(r.latencies_ms[name]) for r in judged) for name in names},
        best_ms={
            name: float(np.quantile(np.concatenate([r.latencies_ms[name] for r in judged]), 0.001)) for name in names
        },
        noise=comparison.noise,
        crowded=comparison.crowded(threads),
        cores=len(os.sched_getaffinity(0)),
    )


def time_ratio(race: Race, subject: str, reference: str, confidence: float) -> Bounds:
    """Return the subject's time for a request over the reference's, from paired rounds; below 1 it is faster.

    In a crowd the interval also covers the value for the fastest thousandth of the queries (`Comparison.speedup`).
    """
    slow, fast = race.rounds_ms[subject], race.rounds_ms[reference]
    ratio = stats.ratio_of_rounds(slow, fast, confidence)
    if not race.crowded or not ratio.known:
        return ratio
    low = race.best_ms[subject] / float(np.median(fast))
    high = float(np.median(slow)) / race.best_ms[reference]
    return replace(ratio, low=min(ratio.low, low), high=max(ratio.high, high))


def time_ms(race: Race) -> dict[str, float]:
    """Return milliseconds per request for each subject, in the order of their ratios.

    The geometric mean of all subjects, which is the round's own speed, is removed from each round; the Hodges-Lehmann
    center of the remainder is the subject's, and is rescaled by the mean of all rounds.
    """
    logs = np.log(np.array(list(race.rounds_ms.values())))
    pace = logs.mean(axis=0)
    centers = [stats.center(row - pace) for row in logs]
    return {name: math.exp(center + float(pace.mean())) for name, center in zip(race.rounds_ms, centers, strict=True)}


def standings(race: Race, entrants: Iterable[str], confidence: float) -> dict[str, Standing]:
    """Return every subject's time, and its ratio to the fastest of the entrants, which can win."""
    times = time_ms(race)
    fastest = min(entrants, key=lambda name: (times[name], name))
    by_name = {}
    for name, ms in times.items():
        bounds = time_ratio(race, name, fastest, confidence) if name != fastest else Bounds(1.0, 1.0, 1.0, 0)
        relative = Interval(estimate=bounds.estimate, low=bounds.low, high=bounds.high) if bounds.known else None
        by_name[name] = Standing(ms=ms, relative=relative)
    return by_name


def tied(standing: Standing) -> bool:
    """Return whether an engine may be as fast as the fastest: its interval reaches 1, or there is none."""
    return standing.relative is None or standing.relative.low <= 1.0
