"""Send and watch: one guarded load through given routes, used by the small-scale test and by the rollout alike.

The guardrails look at what has come so far as if everything still to come went well. A breach is thus certain, not
a guess from the first odd request, and stops the load at once.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slipstream.contract import Verdict
from slipstream.data import Split
from slipstream.measure import gates, stats
from slipstream.spec import Guardrails, Spec
from slipstream.traffic.base import Observation, Release, Routes, TrafficController
from slipstream.traffic.load import Load, Record, Sent, send

log = logging.getLogger(__name__)

WINDOW = 500
"""Requests in a point of the timeline, at least: enough for a p99."""
POINTS = 10
"""Points for a phase, at most."""


@dataclass
class Phase:
    """What a guarded load found."""

    name: str
    records: list[Record]
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
    progress: Callable[..., None] = lambda done, total, **figures: None
    timeline: list[dict[str, Any]] = field(default_factory=list)

    @property
    def model(self) -> str:
        """Registered model."""
        return self.champion.model

    def weights(self, share: int, *, mirror: bool = False) -> Routes:
        """Routes that give the challenger `share` percent, and perhaps a copy of everything."""
        weights = {self.champion.name: 100 - share, self.challenger.name: share}
        return Routes(weights={n: w for n, w in weights.items() if w}, mirror=self.challenger.name if mirror else None)

    def put_back(self) -> None:
        """All traffic to the champion, no mirror. Writes nothing when it is so already."""
        if self.controller.routes(self.model) != self.weights(0):
            self.controller.set_routes(self.model, self.weights(0))
            log.info("traffic: %s is back at %s", self.model, self.champion.name)

    def phase(self, name: str, routes: Routes, requests: int, rate_per_s: float) -> Phase:
        """Set routes, send the load, and watch it. Leaves the routes as they are."""
        share = routes.weights.get(self.challenger.name, 0)
        planned = requests if routes.mirror else round(requests * share / 100)
        before = self.controller.observe(self.challenger)
        self.controller.set_routes(self.model, routes)
        log.info(
            "traffic: %s: %d requests at %g/s, %d %% to %s", name, requests, rate_per_s, share, self.challenger.name
        )
        guard = Guard(self, before, planned, requests, shadow=routes.mirror is not None)
        load = Load(
            url=self.controller.endpoint(self.model),
            model=self.model,
            run=self.run_key,
            phase=name,
            split=self.split,
            requests=requests,
            rate_per_s=rate_per_s,
            seed=self.spec.seed + len(self.timeline),  # every phase its own order, every run the same ones
        )
        sent = send(load, guard, lambda done, total: self.progress(done, total, challenger_share=float(share)))
        self.timeline += windows(name, share, sent)
        if guard.breach is not None:
            log.warning("traffic: %s stopped: %s: %s", name, guard.breach.gate, guard.breach.reason)
        return Phase(name, sent.records, guard.breach)


class Guard:
    """The guardrails of one phase; called with all records so far, answers why to stop, or None."""

    def __init__(self, stage: Stage, before: Observation, planned: int, requests: int, *, shadow: bool) -> None:
        self._stage, self._before = stage, before
        self._planned, self._requests, self._shadow = planned, requests, shadow
        self._limits: Guardrails = stage.spec.guardrails
        self._confidence = stage.spec.objective.confidence
        self.breach: Verdict | None = None

    def __call__(self, records: Sequence[Record]) -> str | None:
        so_far = list(records)
        now = self._stage.controller.observe(self._stage.challenger)
        for verdict in (self._errors(so_far, now), self._slow(so_far), self._memory(now)):
            if verdict is not None and verdict.answer == "fail":
                self.breach = verdict
                return verdict.reason
        return None

    def _errors(self, records: list[Record], now: Observation) -> Verdict:
        if self._shadow:  # nobody is sent the mirror's answers; only the splitter sees them fail
            errors = max(now.errors - self._before.errors, 0)
            n = max(now.requests - self._before.requests, errors)
        else:
            theirs = [r for r in records if r.release != self._stage.champion.name]
            errors, n = sum(r.failed for r in theirs), len(theirs)
        return gates.error_rate(errors, max(n, self._planned), self._limits.max_error_rate, self._confidence)

    def _slow(self, records: list[Record]) -> Verdict | None:
        """The hard cap on what clients see, with the requests still to come counted as instant."""
        seen = served_ms(records)
        if not seen:
            return None
        still = max(self._requests - len(seen), 0)
        return gates.p99_cap([*seen, *([0.0] * still)], self._limits.max_p99_ms, self._confidence)

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
