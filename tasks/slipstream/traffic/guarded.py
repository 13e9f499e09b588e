"""Send and watch: one guarded load through given routes, used by the small-scale test and by the rollout alike.

The guardrails look at what has come so far as if everything still to come went well. A breach is thus certain, not
a guess from the first odd request, and stops the load at once.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slipstream.contract import Verdict
from slipstream.data import Split
from slipstream.errors import Unavailable
from slipstream.measure import gates, stats
from slipstream.spec import Guardrails, Spec
from slipstream.traffic.base import Observation, Release, Routes, TrafficController
from slipstream.traffic.load import Load, Record, Sent, Watch, send

log = logging.getLogger(__name__)

WINDOW = 500
"""Requests in a point of the timeline, at least: enough for a p99."""
PROBE = 200
"""Requests that find out what this machine can carry now."""
SLOWEST = 8
"""The rate is lowered to an eighth at most; slower still, and a test would never end."""
NOISY = 0.02
"""Share of requests during which the sender itself was stalled, from which on the machine counts as noisy."""
CAP = "p99_cap"
"""The guardrail that a neighbour can break."""
PUT_BACK_TRIES, PUT_BACK_PAUSE_S = 3, 2.0
POINTS = 10
"""Points for a phase, at most."""


@dataclass(frozen=True)
class Count:
    """Requests to the challenger, and how many of them failed: those of this load and, where seen, users' own."""

    errors: int = 0
    requests: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.errors + other.errors, self.requests + other.requests)


@dataclass
class Phase:
    """What a guarded load found."""

    name: str
    records: list[Record]
    count: Count
    breach: Verdict | None
    """The guardrail that stopped it."""

    def of(self, release: Release) -> list[Record]:
        """Records that a release answered; those without any answer are nobody's."""
        return [r for r in self.records if r.release == release.name]


@dataclass
class Stage:
    """Champion and challenger of one model, and the load that is sent to them."""

    spec: Spec
    controller: TrafficController
    split: Split
    champion: Release
    challenger: Release
    run_key: str
    progress: Callable[..., None] = lambda done, total, unit, **figures: None
    timeline: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What `probe` had to adapt to the machine."""
    slowdown: int = 1
    """Rates are divided by this; see `probe`."""
    champion_phases: list[list[Record]] = field(default_factory=list)
    """What the champion answered in each phase of this stage, the probe included."""

    @property
    def model(self) -> str:
        """Registered model."""
        return self.champion.model

    def weights(self, share: int, *, mirror: bool = False) -> Routes:
        """Routes that give the challenger `share` percent, and perhaps a copy of everything."""
        weights = {self.champion.name: 100 - share, self.challenger.name: share}
        return Routes(weights={n: w for n, w in weights.items() if w}, mirror=self.challenger.name if mirror else None)

    def put_back(self) -> None:
        """All traffic to the champion, no mirror; unless somebody gave it to a third release, as a rollback does.

        It is also set where it seems to be so: what was written last may not be loaded yet. Raises Unavailable.
        """
        for left in reversed(range(PUT_BACK_TRIES)):
            try:
                serving = set(self.controller.routes(self.model).weights)
                if serving and not serving & {self.champion.name, self.challenger.name}:
                    log.warning("traffic: %s is left where it went meanwhile: %s", self.model, ", ".join(serving))
                    return
                self.controller.set_routes(self.model, self.weights(0))
            except Unavailable as error:
                if not left:
                    raise
                log.warning("traffic: %s cannot be put back yet: %s", self.model, error)
                time.sleep(PUT_BACK_PAUSE_S)
            else:
                log.info("traffic: %s is back at %s", self.model, self.champion.name)
                return

    def probe(self, rate_per_s: float) -> None:
        """Ask the champion, alone, what this machine carries now: halve the rate until it keeps up.

        That is, until nine in ten answers take less than a fifth of the cap. A queue that a busy neighbour fills
        says nothing about the challenger; and since only the champion is asked, a slow challenger gains nothing.
        """
        while True:
            sent = self._send(f"probe-{self.slowdown}", PROBE, rate_per_s, lambda records: None)
            seen = served_ms(sent.records)
            keeps_up = not seen or np.quantile(seen, 0.9) < self.spec.guardrails.max_p99_ms / 5
            if keeps_up or self.slowdown >= SLOWEST:
                break
            self.slowdown *= 2
        self.champion_phases.append(sent.records)
        if self.slowdown > 1:
            self.notes.append(f"this machine is busy: requests are sent at {rate_per_s / self.slowdown:g}/s")
            log.warning("traffic: %s", self.notes[-1])

    def noisy(self, records: Sequence[Record] = ()) -> bool:
        """Whether others kept the machine busy in this stage; `records` are of the phase under way."""
        return any(noisy(phase) for phase in (*self.champion_phases, records))

    def cap_ms(self, records: Sequence[Record] = ()) -> float:
        """The cap on the p99 that clients see: `guardrails.max_p99_ms`.

        On a noisy machine it is at least the champion's own p99 in any phase times the allowed ratio: a cap that
        the champion breaks beside it says nothing about the challenger. The price: a challenger that starves the
        champion of the processor, on a machine that is noisy, is caught by the ratio alone. `records` are of the
        phase under way.
        """
        limits = self.spec.guardrails
        if not self.noisy(records):
            return limits.max_p99_ms
        under_way = [r for r in records if r.release == self.champion.name]
        seen = [served_ms(phase) for phase in (*self.champion_phases, under_way)]
        worst_ms = max((float(np.quantile(ms, 0.99)) for ms in seen if ms), default=0.0)
        return max(limits.max_p99_ms, limits.max_p99_ratio * worst_ms)

    def adapted(self) -> list[str]:
        """What had to be adapted to the machine, the cap included, as sentences for the record."""
        cap, asked = self.cap_ms(), self.spec.guardrails.max_p99_ms
        if cap <= asked:
            return self.notes
        return [*self.notes, f"this machine is noisy: the cap on p99 was {cap:.0f} ms instead of {asked:g} ms"]

    def once_more(self, breach: Verdict, rate_per_s: float) -> None:
        """The cap was broken: put the traffic back, and find out anew what this machine carries.

        A neighbour's burst slows everybody down, and may be over before a load average shows it. So the cap alone is
        tested again, once; whoever is slow himself breaks it again.
        """
        self.put_back()
        self.notes.append(f"tested once more, since {breach.reason}")
        log.warning("traffic: %s", self.notes[-1])
        self.probe(rate_per_s)

    def phase(self, name: str, routes: Routes, requests: int, rate_per_s: float) -> Phase:
        """Set routes, send the load, and watch it. Leaves the routes as they are."""
        share = routes.weights.get(self.challenger.name, 0)
        planned = requests if routes.mirror else round(requests * share / 100)
        before = self.controller.observe(self.challenger)
        self.controller.set_routes(self.model, routes)
        log.info("traffic: %s: %d requests, %d %% of them to %s", name, requests, share, self.challenger.name)
        guard = Guard(self, before, planned, requests, shadow=routes.mirror is not None)
        sent = self._send(name, requests, rate_per_s, guard, **{"% on the challenger": float(share)})
        self.timeline += windows(name, share, sent)
        if guard.breach is not None:
            log.warning("traffic: %s stopped: %s: %s", name, guard.breach.gate, guard.breach.reason)
        phase = Phase(name, sent.records, guard.count, guard.breach)
        self.champion_phases.append(phase.of(self.champion))
        return phase

    def _send(self, name: str, requests: int, rate_per_s: float, watch: Watch, **figures: float) -> Sent:
        load = Load(
            endpoint=self.controller.endpoint(self.model),
            mirror=self.controller.mirror(self.model),
            model=self.model,
            run=self.run_key,
            phase=name,
            split=self.split,
            requests=requests,
            rate_per_s=rate_per_s / self.slowdown,
            seed=self.spec.seed + len(self.timeline),  # every phase its own order, every run the same ones
        )
        return send(load, watch, lambda done, total: self.progress(done, total, "requests", **figures))


def put_back_if_possible(stage: Stage) -> None:
    """Put the traffic back before anything else; where the splitter does not answer, what follows does it."""
    try:
        stage.put_back()
    except Unavailable as error:
        log.warning("traffic: %s is not back yet: %s", stage.model, error)


class Guard:
    """The guardrails of one phase; called with all records so far, answers why to stop, or None."""

    def __init__(self, stage: Stage, before: Observation, planned: int, requests: int, *, shadow: bool) -> None:
        self._stage, self._before = stage, before
        self._planned, self._requests, self._shadow = planned, requests, shadow
        self._limits: Guardrails = stage.spec.guardrails
        self._confidence = stage.spec.objective.confidence
        self.breach: Verdict | None = None
        self.count = Count()

    def __call__(self, records: Sequence[Record]) -> str | None:
        so_far = list(records)
        now = self._stage.controller.observe(self._stage.challenger)
        self.count = self._counted(so_far, now)
        for verdict in (self._errors(), self._slow(so_far), self._memory(now)):
            if verdict is not None and verdict.answer == "fail":
                self.breach = verdict
                return verdict.reason
        return None

    def _counted(self, records: list[Record], now: Observation) -> Count:
        """What the splitter counted, which includes users' requests, or what the sender saw where that is more.

        A request that reached no server is in the sender's count alone; an answer to a mirrored one that the splitter
        throws away, or to a user, in the splitter's.
        """
        if self._shadow:
            theirs = [r.mirrored for r in records if r.mirrored is not None]
        else:
            theirs = [r for r in records if r.release != self._stage.champion.name]
        errors = max(now.errors - self._before.errors, sum(r.failed for r in theirs), 0)
        return Count(errors, max(now.requests - self._before.requests, len(theirs), errors))

    def _errors(self) -> Verdict:
        n = max(self.count.requests, self._planned)
        return gates.error_rate(self.count.errors, n, self._limits.max_error_rate, self._confidence)

    def _slow(self, records: list[Record]) -> Verdict | None:
        """The hard cap on what clients see, with the requests still to come counted as instant."""
        seen = served_ms(records)
        if not seen:
            return None
        still = max(self._requests - len(seen), 0)
        return gates.p99_cap([*seen, *([0.0] * still)], self._stage.cap_ms(records), self._confidence)

    def _memory(self, now: Observation) -> Verdict | None:
        if now.memory_mib <= self._limits.max_memory_mib:
            return None
        reason = f"the server holds {now.memory_mib:.0f} MiB, limit {self._limits.max_memory_mib} MiB"
        return Verdict(
            gate="memory",
            answer="fail",
            reason=reason,
            estimate=now.memory_mib,
            limit=self._limits.max_memory_mib,
            unit="MiB",
            n=1,
        )


def noisy(records: Sequence[Record]) -> bool:
    """Whether others keep this machine busy: more wants to run than there are cores, or the sender itself stalled."""
    stalled = np.mean([r.stalled_ms > 0 for r in records]) if records else 0.0
    return os.getloadavg()[0] > len(os.sched_getaffinity(0)) or bool(stalled > NOISY)


def served_ms(records: Sequence[Record]) -> list[float]:
    """Latencies of the answered requests, as clients see them when their own machine does not stall."""
    return [r.served_ms for r in records if not r.failed]


def windows(phase: str, share: int, sent: Sent) -> list[dict[str, Any]]:
    """Points of the timeline; a percentile is None where there are too few requests to tell it."""
    ordered = sorted(sent.records, key=lambda r: r.at)
    size = max(WINDOW, -(-len(ordered) // POINTS))
    points = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        answered = [r.latency_ms for r in part if not r.failed]
        enough = len(answered) >= stats.min_queries(0.99, 0.95)
        points.append(
            {
                "at": part[0].at,
                "phase": phase,
                "champion_weight": 100 - share,
                "challenger_weight": share,
                "requests": len(part),
                "errors": sum(r.failed for r in part),
                "p50_ms": float(np.median(answered)) if answered else None,
                "p99_ms": float(np.quantile(answered, 0.99)) if enough else None,
            }
        )
    return points
