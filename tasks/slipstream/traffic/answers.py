"""Answers of two servers to the same requests: from their answer logs, or from the sender's own mirroring."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from slipstream.contract import Json, Release
from slipstream.contract.arrays import Float32Array
from slipstream.data.splits import Split
from slipstream.errors import DataError
from slipstream.measure.metrics.base import Metric, Records, finite
from slipstream.serving.answers import LIMIT_BYTES, read_output
from slipstream.traffic.base import TrafficController
from slipstream.traffic.load import REQUEST_TIMEOUT_S, Record

HEAD_BYTES = 300
"""First bytes that distinguish a log from every other: they include an id and a time."""


@dataclass(frozen=True)
class Answered:
    """One line of a server's log."""

    latency_ms: float
    """Inside the server, from request to answer; the sender's value if the server does not report it."""
    output: Float32Array
    """(…) outputs of the sample, the request's only one."""


@dataclass(frozen=True)
class Mark:
    """A position in a log."""

    path: Path
    offset: int
    head: bytes
    """The file's first bytes, which identify it (inodes are reused); empty if there was nothing yet."""


@dataclass(frozen=True)
class Pair:
    """Champion's and challenger's answer to the same request."""

    sample: int
    champion: Answered
    challenger: Answered


class Pairing(Protocol):
    """Pairs the answers of one phase."""

    def pairs(self, records: Sequence[Record]) -> tuple[list[Pair], int]:
        """Return pairs of all requests that the champion answered, and how many of those the challenger left
        unanswered."""
        ...


def pairing(controller: TrafficController, champion: Release, challenger: Release) -> Pairing:
    """Return how answers are paired in the phase that starts now."""
    logs = [controller.answers(release) for release in (champion, challenger)]
    marks = [mark(path) for path in logs if path is not None]
    return FromLogs(*marks) if len(marks) == len(logs) else FromRecords()


@dataclass(frozen=True)
class FromLogs:
    """Pairs from the servers' own logs, since the splitter discards the answers to mirrored requests."""

    champion: Mark
    challenger: Mark

    def pairs(self, records: Sequence[Record]) -> tuple[list[Pair], int]:
        """See the protocol. Wait for pending answers."""
        ids = [r.id for r in records if not r.failed]
        return pair(records, *(wait_for(since, ids, REQUEST_TIMEOUT_S) for since in (self.champion, self.challenger)))


class FromRecords:
    """Pairs from the sender, which mirrored and has both answers."""

    def pairs(self, records: Sequence[Record]) -> tuple[list[Pair], int]:
        """See the protocol."""
        return pair(
            records,
            {r.id: answer for r in records if (answer := _answered(r, r.mirrored)) is not None},
            {r.id: answer for r in records if (answer := _answered(r.mirrored, r)) is not None},
        )


def room(controller: TrafficController, releases: Iterable[Release]) -> int | None:
    """Return how many answers the servers' logs hold, by the sizes of the last ones; None if no log shows it.

    Only half of a log counts, since users' own requests are in it too.
    """
    logs = [path for release in releases if (path := controller.answers(release)) is not None and path.exists()]
    sizes = [size for path in logs if (size := _last_line_bytes(path))]
    return max(1, LIMIT_BYTES // 2 // max(sizes)) if sizes else None


def _last_line_bytes(path: Path) -> int:
    """Return the length of a log's last whole line; 0 without one. A longer line than the examined part counts as that
    long."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - LIMIT_BYTES // 8))
        lines = log.read().split(b"\n")[:-1]
    return len(lines[-1]) + 1 if lines else 0


def mark(path: Path) -> Mark:
    """Return the current end of a log."""
    if not path.exists():
        return Mark(path, 0, b"")
    with path.open("rb") as log:
        return Mark(path, path.stat().st_size, log.read(HEAD_BYTES))


def read(since: Mark) -> dict[str, Answered]:
    """Return answers by request id in all whole lines since a mark, even if the server has rotated its log meanwhile.

    Raise DataError if it was rotated so often that answers since then are lost.
    """
    rotated = since.path.with_name(f"{since.path.name}.1")  # as named by serving/answers.py
    logs = [path for path in (rotated, since.path) if path.exists()]
    marked = next((i for i, path in enumerate(logs) if _head(path, len(since.head)) == since.head), None)
    if marked is None and since.head:
        raise DataError(
            f"{since.path}: the answers of this phase take more room than the log has, so that they cannot be "
            "compared; let the model answer with fewer numbers, or lower small_scale_test.shadow"
        )
    answers: dict[str, Answered] = {}
    for i, path in enumerate(logs[marked or 0 :]):
        with path.open("rb") as log:
            log.seek(since.offset if i == 0 else 0)
            lines = log.read().split(b"\n")[:-1]
        answers |= dict(parsed for line in lines if (parsed := _parse(line)) is not None)
    return answers


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as log:
        return log.read(size)


def wait_for(since: Mark, ids: Iterable[str], seconds: float) -> dict[str, Answered]:
    """Return answers since a mark, once they include all `ids` or the time is up: mirrored requests may lag behind."""
    expected, deadline = set(ids), time.monotonic() + seconds
    while True:
        answers = read(since)
        if expected <= answers.keys() or time.monotonic() > deadline:
            return answers
        time.sleep(0.1)


def pair(
    records: Iterable[Record], champion: dict[str, Answered], challenger: dict[str, Answered]
) -> tuple[list[Pair], int]:
    """Return pairs of all requests that the champion answered, in order, and the challenger's number of missing
    answers."""
    answered = sorted((r for r in records if r.id in champion), key=lambda r: r.index)
    pairs = [Pair(r.sample, champion[r.id], challenger[r.id]) for r in answered if r.id in challenger]
    return pairs, len(answered) - len(pairs)


def different(pairs: Iterable[Pair], metric: Metric) -> int:
    """Return pairs whose answers differ, according to the metric. A NaN answer differs from every other."""
    return sum(metric.differ(p.champion.output, p.challenger.output) for p in pairs)


def records(pairs: Sequence[Pair], split: Split, metric: Metric) -> tuple[Records, Records]:
    """Return (N,) records of champion's and challenger's answers; a NaN answer, or one of another shape, is wrong.

    Raise EngineError if the answers do not fit the split's labels.
    """
    if not pairs:
        return np.empty(0), np.empty(0)
    labels = split.labels[[p.sample for p in pairs]]
    shape = pairs[0].champion.output.shape
    by_side = []
    for side in ("champion", "challenger"):
        answers = np.stack([_of_shape(getattr(p, side).output, shape) for p in pairs])
        whole = finite(answers)
        metric.check(answers[whole], labels[whole], f"the {side}")
        by_side.append(metric.evaluate(answers, labels))
    return by_side[0], by_side[1]


def _of_shape(output: Float32Array, shape: tuple[int, ...]) -> Float32Array:
    return output if output.shape == shape else np.full(shape, np.nan, np.float32)


def _answered(record: Record | None, other: Record | None) -> Answered | None:
    """Return the answer; its latency is the server's own only if both servers report theirs, for a fair comparison."""
    if record is None or record.output is None:
        return None
    if record.server_ms is None or other is None or other.server_ms is None:
        return Answered(record.served_ms, record.output[0])
    return Answered(record.server_ms, record.output[0])


def _parse(line: bytes) -> tuple[str, Answered] | None:
    """Return None for an incomplete line: a full disk may have truncated one."""
    try:
        entry: Json = json.loads(line)
    except ValueError:
        return None
    return str(entry["id"]), Answered(float(entry["latency_ms"]), read_output(entry["output"])[0])
