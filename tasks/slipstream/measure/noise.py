"""Number of cores that other processes used during a measurement, from /proc/stat.

Under a load of 6 an eager EfficientNet once read 71 ms instead of 11.8 ms, a false speed-up of 35×; a block in which
other processes were busy is therefore not evidence. Time stolen by the hypervisor counts as other processes' too.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq, steal in the `cpu` line; guest time is already in user (proc(5))."""


@dataclass
class Usage:
    """Result for a block: cores that other processes used on average, or None if /proc does not say."""

    others_cores: float | None = None

    def clean(self, limit_cores: float) -> bool:
        """Return whether other processes are known to have used less than the limit."""
        return self.others_cores is not None and self.others_cores < limit_cores


@contextmanager
def watch(proc: Path = Path("/proc")) -> Iterator[Usage]:
    """Measure the use by other processes while the block runs; the result is filled in when the block ends."""
    usage = Usage()
    before, start = _others_s(proc), time.monotonic()
    yield usage
    after, elapsed = _others_s(proc), time.monotonic() - start
    if before is not None and after is not None and elapsed > 0:
        usage.others_cores = max(after - before, 0.0) / elapsed


def _others_s(proc: Path) -> float | None:
    """Return CPU seconds since boot of everything except this process and its descendants."""
    try:
        first = (proc / "stat").read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    if first[0] != "cpu":
        return None
    busy = sum(int(first[1 + i]) for i in BUSY_FIELDS if 1 + i < len(first))
    return (busy - _own_ticks(proc, os.getpid())) / TICKS_PER_S


def _own_ticks(proc: Path, root: int) -> int:
    """Return CPU ticks of a process and all its descendants, including ended ones."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit() and (fields := _stat_fields(entry)):
            pid = int(entry.name)
            children.setdefault(int(fields[1]), []).append(pid)
            # utime, stime, cutime, cstime: fields 14 to 17 of proc(5), counted here from the state (field 3)
            ticks[pid] = sum(int(v) for v in fields[11:15])
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        total += ticks.get(pid, 0)
        waiting += children.get(pid, [])
    return total


def _stat_fields(process: Path) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; empty if the process has ended meanwhile."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
