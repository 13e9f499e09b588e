"""Send and watch: one guarded load through given routes, used by both the small-scale test and the rollout."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from slipstream.contract import Json, Release, Verdict
from slipstream.data.splits import Split
from slipstream.errors import Unavailable
from slipstream.measure import guardrails, pressure, stats
from slipstream.spec import Spec
from slipstream.traffic import answers
from slipstream.traffic.answers import Pair
from slipstream.traffic.base import Routes, TrafficController
from slipstream.traffic.guard import CAP, Guard, Seen
from slipstream.traffic.load import Load, Record, Sent, Watch, send

log = logging.getLogger(__name__)

WINDOW = 500
"""Minimum requests in a point of the timeline: enough for a p99."""
PROBE = 200
"""Requests that determine what this machine can carry now."""
QUEUE_MS = 500.0
"""Nine in ten answers of a server without a queue take less."""
SLOWEST = 8
"""The rate is lowered to an eighth at most; with a lower one, a test would never end."""
STALLED = 0.02
"""Share of requests during which the sender itself was stalled, above which the machine counts as overloaded."""
REFUSED = 0.01
"""The same for requests that overloaded servers refused."""
LOST = 0.005
"""Share of requests without any answer that counts as an outage."""
PUT_BACK_TRIES, PUT_BACK_PAUSE_S = 3, 2.0
POINTS = 10
"""Maximum points for a phase."""


@dataclass
class Phase:
    """Result of a guarded load."""

    name: str
    records: list[Record]
    breach: Verdict | None
    """The guardrail that stopped it: certainly violated, or violated with another possible explanation."""

    def of(self, release: Release) -> list[Record]:
        """Return records that a release answered; unanswered ones belong to neither."""
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
    timeline: list[Json] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Adaptations to the machine by `probe`."""
    slowdown: int = 1
    """Rates are divided by this; see `probe`."""
    seen: Seen = field(default_factory=Seen)
    """The evidence so far."""
    retested: bool = False
    meter: pressure.Meter = field(default_factory=pressure.Meter)
    """Of the current phase."""

    @property
    def model(self) -> str:
        """Registered model."""
        return self.champion.model

    def weights(self, share: int, *, mirror: Release | None = None) -> Routes:
        """Return routes that give the challenger `share` percent, and optionally a full copy of the traffic to one of
        the two."""
        weights = {self.champion.name: 100 - share, self.challenger.name: share}
        return Routes(weights={n: w for n, w in weights.items() if w}, mirror=mirror.name if mirror else None)

    def put_back(self) -> None:
        """Give all traffic to the champion, no mirror; unless a third release has it, as after a rollback.

        It is also set if it seems to be so already: the last write may not be loaded yet. Raise Unavailable.
        """
        for tries_left in reversed(range(PUT_BACK_TRIES)):
            try:
                serving = set(self.controller.routes(self.model).weights)
                if serving and not serving & {self.champion.name, self.challenger.name}:
                    log.warning("traffic: %s is left where it went meanwhile: %s", self.model, ", ".join(serving))
                    return
                self.controller.set_routes(self.model, self.weights(0))
            except Unavailable as error:
                if not tries_left:
                    raise
                log.warning("traffic: %s cannot be put back yet: %s", self.model, error)
                time.sleep(PUT_BACK_PAUSE_S)
            else:
                log.info("traffic: %s is back at %s", self.model, self.champion.name)
                return

    def probe(self, rate_per_s: float) -> None:
        """Ask only the champion what this machine can carry now: halve the rate until it keeps up.

        That is, until nine in ten answers take less than a fifth of the cap, and no queue builds up. A queue caused by
        other load says nothing about the challenger; and since only the champion is queried, a slow challenger gains
        nothing.
        """
        while True:
            sent = self._send(f"probe-{self.slowdown}", PROBE, rate_per_s, lambda records: None)
            latencies_ms = served_ms(sent.records)
            keeps_up = not latencies_ms or np.quantile(latencies_ms, 0.9) < min(
                self.spec.guardrails.max_p99_ms / 5, QUEUE_MS
            )
            if keeps_up or self.slowdown >= SLOWEST:
                break
            self.slowdown *= 2
        if self.slowdown > 1:
            self.notes.append(f"this machine is busy: requests are sent at {rate_per_s / self.slowdown:g}/s")
            log.warning("traffic: %s", self.notes[-1])

    def crowd(self, records: Sequence[Record]) -> str | None:
        """Return how an overloaded machine may explain this phase's evidence, as a clause; None if it does not."""
        waited = self.meter.share()
        if waited is not None and waited > pressure.OVERLOADED:
            return f"processes of this machine waited for a processor {100 * waited:.0f} % of the time"
        for share, least, what in (
            (_share(r.stalled_ms > 0 for r in records), STALLED, "the sender itself was stalled in"),
            (_share(r.refused for r in records), REFUSED, "servers were overloaded and refused"),
        ):
            if share > least:
                return f"{what} {100 * share:.0f} % of the requests"
        return None

    def unless_crowded(self, verdict: Verdict, records: Sequence[Record] = ()) -> Verdict:
        """Return a failure on an overloaded machine as undecided; `records` are of the current phase."""
        crowds = [*self.seen.crowds, *filter(None, [self.crowd(records)] if records else [])]
        return guardrails.undecided(verdict, crowds[-1]) if crowds else verdict

    def errors(self) -> Verdict:
        """Judge the errors of the challenger compared with the champion's, over all phases so far."""
        limit, sure, tally = self.spec.guardrails.max_error_rate, self.spec.objective.confidence, self.seen.tally
        certain = guardrails.errors(tally.windows(certain=True), limit, sure)
        if certain.answer == "fail":
            return certain
        verdict = self.unless_crowded(guardrails.errors(tally.windows(), limit, sure))
        if verdict.passed and (outage := self.outage()) is not None:
            return verdict.model_copy(update={"answer": "inconclusive", "reason": f"{outage}; {verdict.reason}"})
        return verdict

    def memory(self) -> Verdict:
        """Judge the peak memory of the challenger's server compared with the champion's."""
        limits, (champion, challenger) = self.spec.guardrails, self.seen.memory_mib
        return guardrails.memory(challenger, champion, limits.max_memory_mib, limits.max_memory_ratio)

    def outage(self) -> str | None:
        """Return that so many requests got no answer, or only failures of the champion, that nothing can be
        concluded."""
        totals, least = self.seen, max(LOST, self.spec.guardrails.max_error_rate / 100)
        if totals.requests and (totals.unanswered + totals.tally.outage) / totals.requests > least:
            return (
                f"an outage: {totals.unanswered + totals.tally.outage:,} of {totals.requests:,} requests got no answer"
            )
        return None

    def transient(self) -> str | None:
        """Return why the same test may later decide what it cannot decide now: an outage or an overloaded machine."""
        return self.outage() or (self.seen.crowds[-1] if self.seen.crowds else None)

    def retest(self, breach: Verdict, rate_per_s: float) -> bool:
        """Return whether to start over, once: a possible burst of other load, or a breached cap, is tested again.

        Restore the traffic, determine again what this machine can carry, and discard the evidence. A challenger that
        really is slow breaches it again.
        """
        if self.retested or (breach.answer == "fail" and breach.gate != CAP):
            return False
        self.retested = True
        self.put_back()
        self.notes.append(f"tested again, since {breach.reason}")
        log.warning("traffic: %s", self.notes[-1])
        self.seen = Seen()
        self.probe(rate_per_s)
        return True

    def phase(self, name: str, routes: Routes, requests: int, rate_per_s: float) -> Phase:
        """Set routes, send the load, and watch it. The routes are left unchanged."""
        share = routes.weights.get(self.challenger.name, 0)
        self.controller.set_routes(self.model, routes)
        log.info("traffic: %s: %d requests, %d %% of them to %s", name, requests, share, self.challenger.name)
        guard, self.meter = Guard(self, routes), pressure.Meter()
        sent = self._send(name, requests, rate_per_s, guard, **{"% on the challenger": float(share)})
        guard.end(sent.records)
        self.timeline += windows(name, share, sent)
        if guard.breach is not None:
            log.warning("traffic: %s stopped: %s: %s", name, guard.breach.gate, guard.breach.reason)
        return Phase(name, sent.records, guard.breach)

    def compared(
        self, name: str, routes: Routes, requests: int, rate_per_s: float
    ) -> Iterator[tuple[Phase, list[Pair], int]]:
        """Phases of so many requests in all, each with the pairs of both answers and how many the challenger owes.

        One phase, unless the answers, such as maps, are so large that the servers' logs hold only a part of them. Ends
        with the phase that a guardrail stopped. Raises DataError where users' own requests filled a log.
        """
        both = (self.champion, self.challenger)
        room = answers.room(self.controller, both) or requests
        parts = -(-requests // room)
        for part in range(parts):
            pairing = answers.pairing(self.controller, *both)
            size = requests // parts + (part < requests % parts)
            phase = self.phase(name if part == 0 else f"{name}.{part + 1}", routes, size, rate_per_s)
            pairs, unanswered = pairing.pairs(phase.records) if phase.breach is None else ([], 0)
            yield phase, pairs, unanswered
            if phase.breach is not None:
                return

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
            seed=self.spec.seed + len(self.timeline),  # every phase has its own order, every run the same ones
        )
        return send(load, watch, lambda done, total: self.progress(done, total, "requests", **figures))


def put_back_if_possible(stage: Stage) -> None:
    """Restore the traffic before anything else; if the splitter does not answer, later steps do it."""
    try:
        stage.put_back()
    except Unavailable as error:
        log.warning("traffic: %s is not back yet: %s", stage.model, error)


def _share(flags: Iterable[bool]) -> float:
    """Return the share of true ones; 0 without any."""
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def served_ms(records: Sequence[Record]) -> list[float]:
    """Return latencies of the answered requests, as seen by clients whose own machine does not stall."""
    return [r.served_ms for r in records if not r.failed]


def windows(phase: str, share: int, sent: Sent) -> list[Json]:
    """Return points of the timeline; a percentile is None if there are too few requests for it."""
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
