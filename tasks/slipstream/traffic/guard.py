"""The guardrails of one load, evaluated while it runs: attribution of errors, and immediate stops.

Champion and challenger are counted in the same windows. Unanswered requests are attributed to neither, and so are
errors of both: a malformed request, an outage, a crowd.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from slipstream.contract import Release, Verdict
from slipstream.measure import guardrails, sequential
from slipstream.measure.sequential import Windows
from slipstream.spec import Guardrails
from slipstream.traffic.base import Observation, Routes
from slipstream.traffic.load import Record

if TYPE_CHECKING:
    from slipstream.traffic.guarded import Stage

CAP = "p99_cap"
WINDOW = 20
"""Minimum requests to the champion in a window of the error counts: fewer could not show an outage."""
OUTAGE = 0.5
"""Share of the champion's requests in a window that fail in an outage; such windows carry no information."""
UNAVAILABLE = (0, 429, 503, 504)
"""Statuses of a server that is overloaded, gone or too late, but not of a model that cannot compute an answer."""
LOOKS_PER_LATENCY = 4
"""Latencies are evaluated in every fourth look, once a second: they carry little new information in between."""


@dataclass(frozen=True)
class Count:
    """Requests to a release, and how many of them failed: those of this load and, where seen, users' own."""

    errors: int = 0
    requests: int = 0
    unavailable: int = 0
    """Errors that a crowded machine or an outage can cause as well as the release: 429, 503, 504, no answer."""

    def hits(self, certain: bool) -> int:
        """Errors, at most as many as requests; with `certain`, without the unavailable ones."""
        return min(max(self.errors - (self.unavailable if certain else 0), 0), self.requests)

    def __sub__(self, other: "Count") -> "Count":
        return Count(self.errors - other.errors, self.requests - other.requests, self.unavailable - other.unavailable)


@dataclass
class Tally:
    """Errors of champion and challenger in the same windows, over all phases of a stage."""

    rows: list[tuple[Count, Count]] = field(default_factory=list)
    outage: int = 0
    """Requests in windows that were dropped, since the champion failed in them."""
    _seen: tuple[Count, Count] = (Count(), Count())

    def begin(self) -> None:
        """Start a phase, with counts at zero."""
        self._seen = (Count(), Count())

    def add(self, champion: Count, challenger: Count, *, last: bool = False) -> None:
        """Add the counts of the phase so far. A window ends when both have answered enough, and with the phase."""
        a, b = champion - self._seen[0], challenger - self._seen[1]
        if b.requests < 1 or a.requests < (1 if last else WINDOW):
            return
        self._seen = (champion, challenger)
        if a.requests >= WINDOW and a.errors >= OUTAGE * a.requests:
            self.outage += a.requests + b.requests
        else:
            self.rows.append((a, b))

    def add_missing(self, answers: int) -> None:
        """Add mirrored requests that the champion answered and the challenger did not, and that no counter shows."""
        if answers > 0:
            self.rows.append((Count(0, answers), Count(answers, answers, answers)))

    @property
    def challenger_errors(self) -> int:
        """Errors of the challenger, of any kind."""
        return sum(b.errors for _, b in self.rows)

    def windows(self, *, certain: bool = False) -> Windows:
        """Return all windows; with `certain`, only errors that neither an outage nor a crowd explains."""
        return Windows.of([[v for count in row for v in (count.hits(certain), count.requests)] for row in self.rows])


@dataclass
class Seen:
    """Observations of a stage over all its phases, which a retest discards."""

    tally: Tally = field(default_factory=Tally)
    champion_ms: list[float] = field(default_factory=list)
    """Latencies of the champion's answers measured by the client, in order."""
    challenger_ms: list[float] = field(default_factory=list)
    peaks: list[list[float]] = field(default_factory=list)
    """Rows of `sequential.Peaks`."""
    answered: list[tuple[bool, float]] = field(default_factory=list)
    """For each answer under a split: whether the challenger gave it, and the share it should give."""
    requests: int = 0
    unanswered: int = 0
    """Number of requests that no server answered."""
    crowds: list[str] = field(default_factory=list)
    """Why phases were measured on an overloaded machine, a sentence each."""
    memory_mib: tuple[float, float] = (0.0, 0.0)
    """Peak memory of the champion's and the challenger's server."""


class Guard:
    """The guardrails of one phase; called with all records so far, returns why to stop, or None."""

    def __init__(self, stage: "Stage", routes: Routes) -> None:
        self._stage, self._routes = stage, routes
        self._limits: Guardrails = stage.spec.guardrails
        self._confidence = stage.spec.objective.confidence
        self._before = tuple(stage.controller.observe(r) for r in (stage.champion, stage.challenger))
        self._looks = 0
        self.breach: Verdict | None = None
        stage.seen.tally.begin()

    def __call__(self, records: Sequence[Record]) -> str | None:
        self.breach = self._look(list(records), last=False)
        return None if self.breach is None else self.breach.reason

    def end(self, records: Sequence[Record]) -> None:
        """Record the evidence of a finished phase."""
        totals, own = self._stage.seen, self._own(list(records))
        self._count(list(records), last=True)
        totals.champion_ms += own.champion_ms
        totals.challenger_ms += own.challenger_ms
        totals.peaks += own.peaks
        totals.answered += own.answered
        totals.requests += own.requests
        totals.unanswered += own.unanswered
        if (crowd := self._stage.crowd(records)) is not None:
            totals.crowds.append(crowd)

    def _look(self, records: list[Record], *, last: bool) -> Verdict | None:
        self._looks += 1
        memory = self._count(records, last=last)
        if memory.answer == "fail":
            return memory
        verdict = self._errors(records)
        if verdict is None and (last or self._looks % LOOKS_PER_LATENCY == 0):
            verdict = self._slow(records)
        return verdict

    def _count(self, records: list[Record], *, last: bool) -> Verdict:
        stage = self._stage
        now = [stage.controller.observe(r) for r in (stage.champion, stage.challenger)]
        counts = [
            self._counted(release, self._of(release, records), before, after)
            for release, before, after in zip((stage.champion, stage.challenger), self._before, now, strict=True)
        ]
        stage.seen.tally.add(counts[0], counts[1], last=last)
        mib = [max(peak, o.memory_mib) for peak, o in zip(stage.seen.memory_mib, now, strict=True)]
        stage.seen.memory_mib = (mib[0], mib[1])
        return stage.memory()

    def _counted(self, release: Release, records: list[Record], before: Observation, now: Observation) -> Count:
        """Return the splitter's counts, which include users' requests, or the sender's where those are higher.

        Answers to users, and to mirrored requests, whose answers the splitter discards, are only in the splitter's
        count; for a server that is gone, with its counters, only the sender has a count.
        """
        failed = [r for r in records if r.failed]
        errors = max(now.errors - before.errors, len(failed), 0)
        unavailable = max(now.unavailable - before.unavailable, sum(r.status in UNAVAILABLE for r in failed), 0)
        requests = max(now.requests - before.requests, len(records), errors)
        return Count(errors, requests, min(unavailable, errors))

    def _of(self, release: Release, records: list[Record]) -> list[Record]:
        """Return the records of requests that are known to have been sent to a release."""
        if self._routes.mirror == release.name:
            return [r.mirrored for r in records if r.mirrored is not None]
        return [r for r in records if r.release == release.name]

    def _errors(self, records: list[Record]) -> Verdict | None:
        """Return a verdict if errors are certainly too many; undecided if a crowd or an outage can explain them."""
        limit, tally = self._limits.max_error_rate, self._stage.seen.tally
        if guardrails.certainly_more(tally.windows(certain=True), limit / 100, self._confidence):
            return guardrails.errors(tally.windows(certain=True), limit, self._confidence)
        if guardrails.certainly_more(tally.windows(), limit / 100, self._confidence):
            verdict = guardrails.errors(tally.windows(), limit, self._confidence)
            return self._stage.unless_crowded(verdict, records)
        return self._swallowed(records)

    def _swallowed(self, records: list[Record]) -> Verdict | None:
        """Return a verdict if unanswered requests are the challenger's: it certainly answers less than its share."""
        totals = self._stage.seen
        lost, sent = totals.unanswered + sum(_unanswered(r) for r in records), totals.requests + len(records)
        answered = totals.answered + self._answered(records)
        if not answered or lost <= self._limits.max_error_rate / 100 * sent:
            return None
        theirs, shares = np.array(answered).T
        evidence = sequential.log_share(theirs > 0, shares, "below")
        if not sequential.reached(evidence, guardrails.certainty(self._confidence)):
            return None
        verdict = Verdict(
            gate="errors",
            answer="fail",
            reason=f"{lost:,} of {sent:,} requests got no answer, and the challenger gave {100 * theirs.mean():.1f} % "
            f"of the answers instead of {100 * shares.mean():.1f} %",
            n=sent,
        )
        return self._stage.unless_crowded(verdict, records)

    def _slow(self, records: list[Record]) -> Verdict | None:
        stage, own = self._stage, self._own(records)
        cap = self._limits.max_p99_ms
        champion_ms = stage.seen.champion_ms + own.champion_ms
        challenger_ms = stage.seen.challenger_ms + own.challenger_ms
        champion_slow = np.array(champion_ms) > cap
        if guardrails.certainly_slow(np.array(challenger_ms) > cap, self._confidence):
            verdict = guardrails.p99_limit(CAP, challenger_ms, cap, self._confidence)
            if champion_slow.size and champion_slow.mean() > 1 - guardrails.TAIL:
                why = f"the champion takes longer than {cap:g} ms in {100 * champion_slow.mean():.1f} % too"
                return guardrails.undecided(verdict, why)
            return stage.unless_crowded(verdict, records)
        if guardrails.certainly_slow(champion_slow, self._confidence):
            verdict = guardrails.p99_limit(CAP, champion_ms, cap, self._confidence)
            return guardrails.undecided(verdict, "these are the champion's answers")
        peaks = sequential.Peaks.of(stage.seen.peaks + own.peaks)
        limit, sure = self._limits.max_p99_ratio, guardrails.certainty(self._confidence)
        if not sequential.reached(peaks.log_slower(limit, "above"), sure):
            return None
        return stage.unless_crowded(guardrails.typical_ratio(peaks, limit, self._confidence), records)

    def _answered(self, records: list[Record]) -> list[tuple[bool, float]]:
        """Return for each answer of this phase under a split: whether the challenger gave it, and its share."""
        champion, challenger = self._stage.champion.name, self._stage.challenger.name
        share = self._routes.weights.get(challenger, 0) / 100
        if not 0 < share < 1:
            return []
        return [(r.release == challenger, share) for r in records if r.release in (champion, challenger)]

    def _own(self, records: list[Record]) -> Seen:
        """Return the evidence in this phase's records."""
        champion, challenger = self._stage.champion.name, self._stage.challenger.name
        ordered = sorted((r for r in records if not r.failed), key=lambda r: r.index)
        return Seen(
            champion_ms=[r.served_ms for r in ordered if r.release == champion],
            challenger_ms=[r.served_ms for r in ordered if r.release == challenger],
            peaks=block_peaks(records, champion, challenger),
            answered=self._answered(records),
            requests=len(records),
            unanswered=sum(_unanswered(r) for r in records),
        )


def _unanswered(record: Record) -> bool:
    """Return whether no server is known to have answered."""
    return record.failed and record.release is None


def block_peaks(records: Sequence[Record], champion: str, challenger: str) -> list[list[float]]:
    """Return rows of `sequential.Peaks`: blocks of consecutive completed requests with answers of both."""
    blocks: dict[int, list[Record]] = {}
    for record in records:
        blocks.setdefault(record.index // guardrails.BLOCK, []).append(record)
    rows = []
    for _, block in sorted(blocks.items()):
        sides = [[r.served_ms for r in block if r.release == name and not r.failed] for name in (champion, challenger)]
        if len(block) == guardrails.BLOCK and all(sides):
            rows.append([v for ms in sides for v in (max([*ms, 1e-3]), float(len(ms)))])
    return rows
