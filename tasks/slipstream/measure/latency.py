"""Interleaved latency: every subject is measured in every round, in rotated order, and compared round by round.

Anything that slows the machine for a while (heat, other load) then slows all subjects equally, and cancels in the
ratio. Rounds in which other processes were busy are dropped. If too few clean ones are found, the measurement is
extended, then judged on all rounds: the interval becomes wider, and `Comparison.noise` records it.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from slipstream.contract.evidence import Latency, Noise
from slipstream.measure import loadgen, noise, stats
from slipstream.measure.loadgen import Issue
from slipstream.measure.stats import Bounds

log = logging.getLogger(__name__)

QUIETEST = 3
"""Under noise, percentiles are read from at least this many rounds, so that no single round decides them."""


@dataclass(frozen=True)
class Plan:
    """Duration of the measurement. The defaults take 7 to 14 s for three subjects of up to 1 ms."""

    rounds: int = 8
    """Rounds to start with."""
    clean_rounds: int = 6
    """Sufficient number of clean rounds; with fewer, more rounds follow."""
    max_rounds: int = 12
    """Maximum number of rounds, clean or not."""
    block_ms: int = 250
    """Length of one subject's block in a round; /proc/stat counts in steps of 10 ms, so blocks cannot be much
    shorter."""
    warmup_ms: int = 300
    """Warm-up of each subject before the first round: lazy initialization, caches, clock speed."""
    block_warmup_ms: int = 20
    """Warm-up before each block, since the previous subject has filled caches and thread pools."""
    others_cores: float = 0.25
    """A round is clean if other processes used less than this. The embedded platform itself idles at about 0.1, and at
    up to 0.2 while a run is followed."""
    min_queries: int = stats.min_queries(0.99)
    """Minimum queries over all clean rounds, for subjects whose p99 is judged, however slow they are."""
    server_ms: int = 1000
    """Length of the Server scenario."""

    def at(self, confidence: float) -> "Plan":
        """Return this plan with enough rounds to give a bound at this confidence."""
        needed = stats.min_rounds(confidence)
        return replace(
            self,
            rounds=max(self.rounds, needed),
            clean_rounds=max(self.clean_rounds, needed),
            max_rounds=max(self.max_rounds, needed),
        )


@dataclass(frozen=True)
class Round:
    """One round: (N,) latencies in milliseconds for each subject, and the cores that other processes used meanwhile."""

    latencies_ms: Mapping[str, npt.NDArray[np.float64]]
    others_cores: float | None


@dataclass(frozen=True)
class Comparison:
    """All rounds of one interleaved run."""

    rounds: tuple[Round, ...]
    plan: Plan

    @property
    def clean(self) -> tuple[Round, ...]:
        """Rounds in which other processes are known to have been quiet."""
        limit = self.plan.others_cores
        return tuple(r for r in self.rounds if r.others_cores is not None and r.others_cores < limit)

    @property
    def judged(self) -> tuple[Round, ...]:
        """Rounds that count: the clean ones if they suffice, else all."""
        return self.clean if len(self.clean) >= self.plan.clean_rounds else self.rounds

    @property
    def noise(self) -> Noise:
        """The machine's noise during the rounds that count."""
        others = [r.others_cores for r in self.judged if r.others_cores is not None]
        return Noise(
            clean_rounds=len(set(map(id, self.judged)) & set(map(id, self.clean))),
            rounds=len(self.judged),
            others_cores=float(np.median(others)) if others else None,
        )

    def crowded(self, threads: int) -> bool:
        """Return whether other processes left too few cores for this many threads to run at once.

        Threads wait for each other at every layer, so even the fastest query of a framework is then far too slow: a
        ratio to it would overstate the engine (52× instead of 6×, under a load of 15), and none is given. A ratio of
        two engines of one kind gets a wider interval: see `speedup`.
        """
        others = self.noise.others_cores if self.noise.noisy else None
        return others is not None and others > len(os.sched_getaffinity(0)) - threads + 0.5

    def speedup(self, subject: str, reference: str, confidence: float, *, crowded: bool = False) -> Bounds:
        """Return how many times faster the subject is than the reference, from one figure of each for every round.

        The figure is the median; under noise it is the 10th percentile. Other load affects subjects unequally: two
        threads that wait for each other lose far more than one, so under a load of 15 medians made eager PyTorch 575
        times slower than an engine. The fast queries are the uninterrupted ones.

        `crowded`: possibly only one of the two was interrupted (an engine and a copy of itself once differed by a
        factor of 4.9). The interval is therefore extended to where one side has its figure, and the other the fastest
        thousandth of its queries: an engine is faster only if its figure beats the best of the reference. For copies of
        a ResNet running with two and four busy processes on two cores, the lower ends were 0.86 to 0.95.
        """
        level = 0.1 if self.noise.noisy else 0.5
        slow, fast = ([float(np.quantile(r.latencies_ms[s], level)) for r in self.judged] for s in (reference, subject))
        ratio = stats.ratio_of_rounds(slow, fast, confidence)
        if not crowded:
            return ratio
        low = self._best_ms(reference) / float(np.median(fast))
        high = float(np.median(slow)) / self._best_ms(subject)
        return replace(ratio, low=min(ratio.low, low), high=max(ratio.high, high))

    def _best_ms(self, subject: str) -> float:
        """Return the time of its fastest thousandth of queries, over all rounds that count."""
        return float(np.quantile(np.concatenate([r.latencies_ms[subject] for r in self.judged]), 0.001))

    def pooled_ms(self, subject: str) -> npt.NDArray[np.float64]:
        """Return (N,) latencies of a subject: of the judged rounds, or under noise of the quietest ones that give a
        p99.

        Rounds are chosen by other processes' activity, never by the latency itself, so the choice is not biased.
        """
        if not self.noise.noisy:
            return np.concatenate([r.latencies_ms[subject] for r in self.judged])
        quietest = sorted(self.rounds, key=lambda r: np.inf if r.others_cores is None else r.others_cores)
        pooled: list[npt.NDArray[np.float64]] = []
        for candidate in quietest:
            if len(pooled) >= QUIETEST and sum(map(len, pooled)) >= self.plan.min_queries:
                break
            pooled.append(candidate.latencies_ms[subject])
        return np.concatenate(pooled)


def compare(
    subjects: Mapping[str, Issue],
    samples: int,
    plan: Plan,
    seed: int,
    *,
    tails: tuple[str, ...] = (),
    progress: Callable[[int, int, float | None], None] = lambda done, total, others: None,
) -> Comparison:
    """Measure all subjects, interleaved; `samples` is the number of inputs that LoadGen may choose from.

    `tails` names the subjects whose p99 is needed: their blocks last until there are enough queries for one. `progress`
    receives the rounds done, the rounds planned so far, and the cores that other processes used in the last one.
    """
    expected = {name: warm_up(issue, samples, plan.warmup_ms) for name, issue in subjects.items()}
    rounds: list[Round] = []
    total = plan.rounds
    while len(rounds) < total:
        order = _rotated(tuple(subjects), len(rounds))
        turn = {name: subjects[name] for name in order}
        rounds.append(_round(turn, samples, plan, seed=seed + len(rounds), expected_ms=expected, tails=tails))
        comparison = Comparison(tuple(rounds), plan)
        if len(rounds) == total and len(comparison.clean) < plan.clean_rounds and total < plan.max_rounds:
            total += 1
            log.info("%d clean rounds of %d; others are busy, one more", len(comparison.clean), len(rounds))
        progress(len(rounds), total, rounds[-1].others_cores)
    return comparison


def _rotated(names: tuple[str, ...], turn: int) -> tuple[str, ...]:
    """Return the order of a turn: each subject goes first equally often, and each order is followed by its reverse.

    With the reverse, no subject always runs after the same predecessor, whose threads may still spin and whose data
    fill the caches (carry-over; E. J. Williams, Australian Journal of Chemistry 2:149–168, 1949).
    """
    shift = (turn // 2) % len(names)
    order = names[shift:] + names[:shift]
    return order[::-1] if turn % 2 else order


def _round(
    subjects: Mapping[str, Issue],
    samples: int,
    plan: Plan,
    *,
    seed: int,
    expected_ms: Mapping[str, float],
    tails: tuple[str, ...],
) -> Round:
    latencies = {}
    with noise.watch() as usage:
        for name, issue in subjects.items():
            warm_up(issue, samples, plan.block_warmup_ms)
            latencies[name] = loadgen.single_stream(
                issue,
                samples,
                duration_ms=plan.block_ms,
                min_queries=-(-plan.min_queries // plan.clean_rounds) if name in tails else 8,
                expected_ms=expected_ms[name] / 2,
                seed=seed,
            ).latencies_ms
    return Round(latencies, usage.others_cores)


def warm_up(issue: Issue, samples: int, duration_ms: float) -> float:
    """Run a subject for a while, at least three times; return its fastest run in milliseconds."""
    fastest, runs, end = np.inf, 0, time.perf_counter() + duration_ms / 1e3
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        issue(runs % samples)
        fastest = min(fastest, time.perf_counter() - start)
        runs += 1
    return float(fastest * 1e3)


def summary(scenario: str, latencies_ms: npt.NDArray[np.float64], rate_per_s: float | None = None) -> Latency:
    """Return the evidence of one subject. A percentile is given only if LoadGen's rule allows one.

    latencies_ms: (N,), N > 0. `rate_per_s` is the offered rate (Server); without it, requests are sequential.
    """
    n = len(latencies_ms)

    def percentile(p: float) -> float | None:
        return float(np.quantile(latencies_ms, p, method="higher")) if n >= stats.min_queries(p) else None

    return Latency(
        scenario=scenario,
        n=n,
        p50_ms=float(np.median(latencies_ms)),
        p90_ms=percentile(0.90),
        p99_ms=percentile(0.99),
        rate_per_s=rate_per_s if rate_per_s is not None else 1e3 / float(latencies_ms.mean()),
        quantiles_ms=tuple(round(float(q), 5) for q in np.quantile(latencies_ms, np.linspace(0, 1, 101))),
    )


def under_load(issue: Issue, samples: int, plan: Plan, seed: int, capacity_per_s: float) -> Latency:
    """Run the Server scenario: a Poisson load at half the rate of the subject's sequential answers."""
    rate = capacity_per_s / 2
    warm_up(issue, samples, plan.block_warmup_ms)
    block = loadgen.server(issue, samples, duration_ms=plan.server_ms, min_queries=8, rate_per_s=rate, seed=seed)
    return summary("Server", block.latencies_ms, rate)
