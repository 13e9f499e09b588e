"""What two servers said to the same requests: from their answer logs, or from what the sender itself mirrored."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slipstream.contract import Release
from slipstream.data.splits import Split
from slipstream.errors import DataError
from slipstream.measure.metrics.base import Metric, Records, finite
from slipstream.serving.answers import LIMIT_BYTES, read_output
from slipstream.traffic.base import TrafficController
from slipstream.traffic.load import REQUEST_TIMEOUT_S, Record

HEAD_BYTES = 300
"""As many of a log's first bytes tell it from every other: an id and a time are among them."""


@dataclass(frozen=True)
class Answered:
    """One line of a server's log."""

    latency_ms: float
    """Inside the server, from request to answer; as the sender saw it where the server does not say."""
    output: npt.NDArray[np.float32]
    """(…) outputs of the sample, the request's only one."""


@dataclass(frozen=True)
class Mark:
    """A place in a log."""

    path: Path
    offset: int
    head: bytes
    """The file's first bytes, by which it is known again (inodes are given anew); none when there was nothing yet."""


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
            {r.id: answer for r in records if (answer := _answered(r, r.mirrored)) is not None},
            {r.id: answer for r in records if (answer := _answered(r.mirrored, r)) is not None},
        )


def room(controller: TrafficController, releases: Iterable[Release]) -> int | None:
    """Requests whose answers the servers' logs hold at once, by the sizes of the last ones; None where no log tells.

    Half of what a log keeps, since users' own requests are in it too.
    """
    logs = [path for release in releases if (path := controller.answers(release)) is not None and path.exists()]
    sizes = [size for path in logs if (size := _last_line_bytes(path))]
    return max(1, LIMIT_BYTES // 2 // max(sizes)) if sizes else None


def _last_line_bytes(path: Path) -> int:
    """Length of a log's last whole line; 0 without one. A longer line than is looked at counts as that long."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - LIMIT_BYTES // 8))
        lines = log.read().split(b"\n")[:-1]
    return len(lines[-1]) + 1 if lines else 0


def mark(path: Path) -> Mark:
    """The end of a log as it is now."""
    if not path.exists():
        return Mark(path, 0, b"")
    with path.open("rb") as log:
        return Mark(path, path.stat().st_size, log.read(HEAD_BYTES))


def read(since: Mark) -> dict[str, Answered]:
    """Request id → answer for all whole lines since a mark, also when the server has rotated its log meanwhile.

    Raises DataError where it was rotated so often that answers since then are gone.
    """
    rotated = since.path.with_name(f"{since.path.name}.1")  # as serving/answers.py names it
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
    """Answers since a mark, once all `ids` are among them or the time is up: mirrored requests may lag behind."""
    expected, deadline = set(ids), time.monotonic() + seconds
    while True:
        answers = read(since)
        if expected <= answers.keys() or time.monotonic() > deadline:
            return answers
        time.sleep(0.1)


def pair(
    records: Iterable[Record], champion: dict[str, Answered], challenger: dict[str, Answered]
) -> tuple[list[Pair], int]:
    """Pairs of all requests that the champion answered, in their order, and how many the challenger left unanswered."""
    answered = sorted((r for r in records if r.id in champion), key=lambda r: r.index)
    pairs = [Pair(r.sample, champion[r.id], challenger[r.id]) for r in answered if r.id in challenger]
    return pairs, len(answered) - len(pairs)


def different(pairs: Iterable[Pair], metric: Metric) -> int:
    """Pairs whose answers differ, as the metric sees it. A NaN answer differs from every other."""
    return sum(metric.differ(p.champion.output, p.challenger.output) for p in pairs)


def records(pairs: Sequence[Pair], split: Split, metric: Metric) -> tuple[Records, Records]:
    """(N,) records of champion's and challenger's answers; a NaN answer, or one of another shape, is wrong.

    Raises EngineError when the answers are none to the split's labels.
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


def _of_shape(output: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return output if output.shape == shape else np.full(shape, np.nan, np.float32)


def _answered(record: Record | None, other: Record | None) -> Answered | None:
    """The answer; its latency is the server's own where both servers say theirs, so that like is compared with like."""
    if record is None or record.output is None:
        return None
    if record.server_ms is None or other is None or other.server_ms is None:
        return Answered(record.served_ms, record.output[0])
    return Answered(record.server_ms, record.output[0])


def _parse(line: bytes) -> tuple[str, Answered] | None:
    """None for what is no whole line: a full disk may have torn one."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return str(entry["id"]), Answered(float(entry["latency_ms"]), read_output(entry["output"])[0])
