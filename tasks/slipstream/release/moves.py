"""Moves: who may change a model's traffic and aliases now, by token and lease.

A small-scale test, a rollout and a rollback are moves. Each is a tag of the registered model, `slipstream.move.TOKEN`,
that only its owner writes. Tokens grow, and the newest move owns the traffic. An older one whose process still runs is
superseded: it checks for a newer token before and after each write, restores what that write overwrote, and stops (M.
Kleppmann, "How to do distributed locking", 2016: a fencing token). MLflow has no compare-and-swap; a tag per move needs
none, since no owner overwrites another's entry.

An open move has a lease that its process renews from a thread. When the lease has expired, the process is dead or
hangs, and `settle` (the next step, or the watchdog) supersedes the move and completes it or restores the traffic.
Leases compare clocks of machines: keep them within a few seconds of each other (NTP).
"""

import datetime
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from slipstream.contract import Release, Verdict
from slipstream.errors import SlipstreamError, Superseded, Unavailable
from slipstream.release import records
from slipstream.release.records import Record
from slipstream.store.registry import CHAMPION, PREVIOUS, Registry
from slipstream.traffic.base import Endpoint, Observation, Routes, TrafficController

log = logging.getLogger(__name__)

PREFIX = "slipstream.move."
LEASE_S, RENEW_S = 15.0, 5.0
"""How long a lease is valid, and how often it is renewed: two renewals may fail."""
STUCK_S = 60.0
"""A process that splits the traffic and has not checked it for this long hangs; its lease is not renewed."""
KEEP = 6
"""Number of newest moves that stay on record, in addition to the last one that changed the champion."""

Kind = Literal["trial", "rollout", "rollback", "rebuild", "serve"]
State = Literal["started", "promoting", "refused", "done", "reverted", "put back", "given up"]
OPEN = ("started", "promoting", "refused")


class Entry(Record):
    """The record of a move."""

    token: str
    """Number and a random suffix; a greater one is newer."""
    kind: Kind
    by: str
    """Run key, or the person who requested it."""
    at: str
    """When it began, ISO 8601 in UTC."""
    state: State = "started"
    lease_until: float = 0.0
    """Seconds since the epoch."""
    champion: str | None
    """Version of the alias when the move began; None before the first release."""
    previous: str | None
    """Version of `previous` at that time."""
    back: str
    """Release that has all the traffic unless the move succeeds."""
    to: str | None = None
    """Version that is tested, rolled out or restored."""
    then_previous: str | None = None
    """Version of `previous` after success."""
    run_id: str = ""
    """MLflow run with the evidence."""
    verdicts: tuple[Verdict, ...] = ()
    """Reasons of its rejection."""
    reason: str = ""
    """A person's reason for the rollback."""

    @property
    def open(self) -> bool:
        """Whether something may remain to be completed or reverted."""
        return self.state in OPEN

    @property
    def decided(self) -> tuple[str | None, str | None]:
        """Champion and previous after a closed move."""
        if self.changed_champion:
            return self.to, self.then_previous
        return self.champion, self.previous

    @property
    def changed_champion(self) -> bool:
        """Whether it is a finished rollout, rollback or rebuild."""
        return self.state == "done" and self.kind in ("rollout", "rollback", "rebuild")

    def live(self, now: float) -> bool:
        """Return whether its process still renews the lease."""
        return self.open and self.lease_until > now


def entries(registry: Registry) -> list[Entry]:
    """Return all moves on record, oldest first."""
    return sorted(records.read(registry, PREFIX, Entry), key=lambda e: e.token)


def newest(registry: Registry) -> Entry | None:
    """Return the move that owns the traffic, open or closed."""
    return next(reversed(entries(registry)), None)


def last_change(registry: Registry) -> Entry | None:
    """Return the last finished rollout, rollback or rebuild."""
    return next((e for e in reversed(entries(registry)) if e.changed_champion), None)


def now_iso() -> str:
    """Return the time for the record."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Move:
    """The move that this process owns. Changes of traffic and aliases go through it."""

    def __init__(self, registry: Registry, controller: TrafficController, entry: Entry) -> None:
        self.registry, self.entry = registry, entry
        self.controller = FencedController(self, controller)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._superseded_by: Entry | None = None
        self._looked = time.monotonic()
        self.splits = False

    def check(self) -> None:
        """Raise Superseded if a newer move owns the traffic."""
        if (later := self._later()) is not None:
            raise _superseded(self.entry, later)

    def note_look(self) -> None:
        """Record that the owner checked the traffic. Raise Superseded if the renewing thread has found a newer move."""
        self._looked = time.monotonic()
        if self._superseded_by is not None:
            raise _superseded(self.entry, self._superseded_by)

    def guarded(self, write: Callable[[], object], *, way_back: bool = False) -> None:
        """Write as the owner of the traffic.

        A write that a newer move overtook is undone: traffic and aliases again follow that move's decision. When
        reverting, the traffic comes first: the check follows the write, and an unavailable MLflow does not delay it.
        """
        self.note_look()
        if not way_back:
            self.check()
        write()
        try:
            later = self._later()
        except Unavailable as error:
            if not way_back:
                raise
            log.warning("traffic: %s is put back while the registry does not answer: %s", self.registry.model, error)
            return
        if later is not None:
            if not later.open:  # else its owner compares aliases and traffic when it is done
                _restore(self, later)
            raise _superseded(self.entry, later)

    def set_alias(self, alias: str, version: str | None) -> None:
        """Point an alias at a version, or remove it (None)."""
        self.guarded(lambda: self.registry.set_alias(alias, version))

    def tag(self, version: str, tags: dict[str, str]) -> None:
        """Set tags of a version."""
        self.guarded(lambda: self.registry.tag(version, tags))

    def update(self, **changes: object) -> None:
        """Record facts, and renew the lease."""
        with self._lock:
            self.entry = self.entry.model_copy(update={"lease_until": time.time() + LEASE_S, **changes})
            records.write(self.registry, PREFIX + self.entry.token, self.entry)

    def close(self, state: State) -> None:
        """Record that nothing remains to be completed or reverted."""
        self._ended.set()
        self.update(state=state, lease_until=0.0)

    def _later(self) -> Entry | None:
        latest = newest(self.registry)
        if latest is None or latest.token <= self.entry.token:
            return None
        self._superseded_by = latest
        return latest

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            if self.splits and time.monotonic() - self._looked > STUCK_S:
                continue
            try:
                self.check()
                self.update()
            except Superseded:
                return
            except SlipstreamError as error:
                log.warning("%s: the lease could not be renewed: %s", self.registry.model, error)

    @contextmanager
    def _held(self) -> Iterator["Move"]:
        self.update()
        self.check()
        self._forget_old()
        renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        renewing.start()
        try:
            yield self
        finally:
            self._ended.set()
            renewing.join(RENEW_S)
            if self.entry.open and self._superseded_by is None:
                with suppress(SlipstreamError):  # the next one need not wait for the lease to expire
                    self.update(lease_until=0.0)

    def _forget_old(self) -> None:
        recorded = entries(self.registry)
        change = next((e for e in reversed(recorded) if e.changed_champion), None)
        for old in recorded[:-KEEP]:
            if old is not change:
                self.registry.untag_model(PREFIX + old.token)


@contextmanager
def begin(
    registry: Registry, controller: TrafficController, kind: Kind, by: str, back: str, **facts: object
) -> Iterator[Move]:
    """Own the traffic of a model for the duration of a `with`. Raise Superseded if another move began at the same time.

    `back` is the release that gets the traffic unless the move succeeds, `facts` are fields of `Entry`. The champion is
    read first, and the caller must compare it with the version that the move relies on.
    """
    champion, previous = registry.champion(), registry.alias(PREVIOUS)
    document = {"token": _token(registry), "kind": kind, "by": by, "at": now_iso(), "back": back}
    entry = Entry.model_validate({**document, "champion": champion, "previous": previous, **facts})
    with Move(registry, controller, entry)._held() as move:
        if (moved := registry.champion()) != champion:  # by one that began and ended while this one took its token
            move.update(champion=moved, previous=registry.alias(PREVIOUS))
            move.close("given up")
            raise Superseded(f"{registry.model}@champion moved to version {moved} while this {kind} began; try again")
        yield move


@contextmanager
def take_over(registry: Registry, controller: TrafficController, entry: Entry) -> Iterator[Move]:
    """Supersede an open move, with its record, to complete it or to restore the traffic."""
    with Move(registry, controller, entry.model_copy(update={"token": _token(registry)}))._held() as move:
        for latest in entries(registry):  # its owner may have continued until it was superseded
            if latest.token == entry.token:
                move.update(state=latest.state, verdicts=latest.verdicts)
        yield move


def _token(registry: Registry) -> str:
    last = newest(registry)
    number = int(last.token.partition("-")[0]) + 1 if last else 1
    return f"{number:09d}-{uuid.uuid4().hex[:8]}"


def _superseded(mine: Entry, later: Entry) -> Superseded:
    return Superseded(
        f"this {mine.kind} (token {mine.token}) was superseded: a {later.kind} by {later.by} (token {later.token}, "
        f"{later.state}) owns the traffic now; nothing more was changed"
    )


def _restore(mine: Move, later: Entry) -> None:
    """Undo a write that came after `later` was closed, as a separate move; nothing if they agree."""
    registry, controller = mine.registry, mine.controller.unfenced
    champion, previous = later.decided
    name = later.back if champion is None else registry.release(champion).name
    routes = Routes(weights={name: 100})
    overwritten = {
        alias: version
        for alias, version, ours in ((CHAMPION, champion, mine.entry.to), (PREVIOUS, previous, mine.entry.champion))
        if version != ours and registry.alias(alias) == ours
    }
    if not overwritten and controller.routes(registry.model) == routes:
        return
    with begin(registry, controller, "serve", mine.entry.by, name) as move:
        for alias, version in overwritten.items():
            move.set_alias(alias, version)
        if registry.champion() == champion and controller.routes(registry.model) != routes:
            move.controller.set_routes(registry.model, routes)
        move.update(champion=registry.champion(), previous=registry.alias(PREVIOUS))
        move.close("done")
    log.warning("traffic: %s: restored what the %s decided: %s serves", registry.model, later.kind, name)


class FencedController:
    """A `TrafficController` whose changes are those of a move; it also raises Superseded."""

    def __init__(self, move: Move, controller: TrafficController) -> None:
        self._move, self.unfenced = move, controller

    def deploy(self, release: Release, engine: Path, sha256: str | None = None) -> None:
        """See the protocol."""
        self._move.guarded(lambda: self.unfenced.deploy(release, engine, sha256))

    def retire(self, release: Release) -> None:
        """See the protocol."""
        self._move.guarded(lambda: self.unfenced.retire(release))

    def set_routes(self, model: str, routes: Routes) -> None:
        """See the protocol."""
        way_back = routes == Routes(weights={self._move.entry.back: 100})
        self._move.splits = self._move.splits or not way_back
        self._move.guarded(lambda: self.unfenced.set_routes(model, routes), way_back=way_back)
        self._move.splits = not way_back

    def observe(self, release: Release) -> Observation:
        """See the protocol."""
        self._move.note_look()
        return self.unfenced.observe(release)

    def deployed(self, model: str) -> set[str]:
        """See the protocol."""
        return self.unfenced.deployed(model)

    def releases(self, model: str) -> set[str]:
        """See the protocol."""
        return self.unfenced.releases(model)

    def routes(self, model: str) -> Routes:
        """See the protocol."""
        return self.unfenced.routes(model)

    def endpoint(self, model: str) -> Endpoint:
        """See the protocol."""
        return self.unfenced.endpoint(model)

    def mirror(self, model: str) -> Endpoint | None:
        """See the protocol."""
        return self.unfenced.mirror(model)

    def answers(self, release: Release) -> Path | None:
        """See the protocol."""
        return self.unfenced.answers(release)
