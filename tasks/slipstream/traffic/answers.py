"""What two servers said to the same requests: from their answer logs, or from what the sender itself mirrored."""

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slipstream.data import Split
from slipstream.measure.accuracy import TOP
from slipstream.traffic.base import Release, TrafficController
from slipstream.traffic.load import REQUEST_TIMEOUT_S, Record


@dataclass(frozen=True)
class Answered:
    """One line of a server's log."""

    latency_ms: float
    """Inside the server, from request to answer; as the sender saw it where the server does not say."""
    output: npt.NDArray[np.float32]
    """Flat outputs of the sample."""


@dataclass(frozen=True)
class Mark:
    """A place in a log."""

    path: Path
    offset: int
    inode: int | None
    """Which file it was; None when there was none yet."""


@dataclass(frozen=True)
class Pair:
    """Champion's and challenger's answer to the same request."""

    sample: int
    champion: Answered
    challenger: Answered


class Pairing(Protocol):
    """Pairs the answers of one phase."""

    def pairs(self, records: Sequence[Record]) -> tuple[list[Pair], int]:
        """Pairs of all requests that the champion answered, and how many of those the challenger left unanswered."""
        ...


def pairing(controller: TrafficController, champion: Release, challenger: Release) -> Pairing:
    """How answers are paired in the phase that begins now."""
    logs = [controller.answers(release) for release in (champion, challenger)]
    marks = [mark(path) for path in logs if path is not None]
    return FromLogs(*marks) if len(marks) == len(logs) else FromRecords()


@dataclass(frozen=True)
class FromLogs:
    """The splitter mirrors, and throws the mirrored answers away: the servers' own logs have them."""

    champion: Mark
    challenger: Mark

    def pairs(self, records: Sequence[Record]) -> tuple[list[Pair], int]:
        """See the protocol. Waits for answers that are under way."""
        ids = [r.id for r in records if not r.failed]
        return pair(records, *(wait_for(since, ids, REQUEST_TIMEOUT_S) for since in (self.champion, self.challenger)))


class FromRecords:
    """The sender mirrored, and has both answers."""

    def pairs(self, records: Sequence[Record]) -> tuple[list[Pair], int]:
        """See the protocol."""
        return pair(
            records,
            {r.id: found for r in records if (found := _answered(r, r.mirrored)) is not None},
            {r.id: found for r in records if (found := _answered(r.mirrored, r)) is not None},
        )


def mark(path: Path) -> Mark:
    """The end of a log as it is now."""
    if not path.exists():
        return Mark(path, 0, None)
    found = path.stat()
    return Mark(path, found.st_size, found.st_ino)


def read(since: Mark) -> dict[str, Answered]:
    """Request id → answer for all whole lines since a mark, also when the server has rotated its log meanwhile."""
    rotated = since.path.with_name(f"{since.path.name}.1")  # as serving/answers.py names it
    found: dict[str, Answered] = {}
    for path in (rotated, since.path):
        if not path.exists():
            continue
        with path.open("rb") as log:
            marked = os.fstat(log.fileno()).st_ino == since.inode
            if path == rotated and not marked:
                continue
            log.seek(since.offset if marked else 0)
            lines = log.read().split(b"\n")[:-1]
        found |= dict(_parse(line) for line in lines if line)
    return found


def wait_for(since: Mark, ids: Iterable[str], seconds: float) -> dict[str, Answered]:
    """Answers since a mark, once all `ids` are among them or the time is up: mirrored requests may lag behind."""
    wanted, deadline = set(ids), time.monotonic() + seconds
    while True:
        found = read(since)
        if wanted <= found.keys() or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def pair(
    records: Iterable[Record], champion: dict[str, Answered], challenger: dict[str, Answered]
) -> tuple[list[Pair], int]:
    """Pairs of all requests that the champion answered, and how many of those the challenger left unanswered."""
    answered = [r for r in records if r.id in champion]
    pairs = [Pair(r.sample, champion[r.id], challenger[r.id]) for r in answered if r.id in challenger]
    return pairs, len(answered) - len(pairs)


def different(pairs: Iterable[Pair]) -> int:
    """Pairs whose largest outputs (argmax) are at different places. A NaN answer differs from every other."""
    return sum(_differ(p.champion.output, p.challenger.output) for p in pairs)


def scores(pairs: Iterable[Pair], split: Split, metric: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(N,) scores, 0 or 1, of champion and challenger against the labels, by the spec's metric."""
    pairs, top = list(pairs), TOP[metric]
    labels = [int(split.labels[p.sample]) for p in pairs]
    champion = [_hit(p.champion.output, y, top) for p, y in zip(pairs, labels, strict=True)]
    challenger = [_hit(p.challenger.output, y, top) for p, y in zip(pairs, labels, strict=True)]
    return np.array(champion, np.float64), np.array(challenger, np.float64)


def _answered(record: Record | None, other: Record | None) -> Answered | None:
    """The answer; its latency is the server's own where both servers say theirs, so that like is compared with like."""
    if record is None or record.output is None:
        return None
    if record.server_ms is None or other is None or other.server_ms is None:
        return Answered(record.served_ms, record.output.ravel())
    return Answered(record.server_ms, record.output.ravel())


def _hit(output: npt.NDArray[np.float32], label: int, top: int) -> bool:
    """Whether the label is among the highest outputs; a NaN answer is wrong, whatever its label."""
    return bool(np.isfinite(output).all()) and label in np.argsort(-output, kind="stable")[:top]


def _differ(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return True
    return int(a.argmax()) != int(b.argmax())


def _parse(line: bytes) -> tuple[str, Answered]:
    entry: dict[str, Any] = json.loads(line)
    output = np.asarray(entry["output"], dtype=np.float32).ravel()
    return str(entry["id"]), Answered(float(entry["latency_ms"]), output)
