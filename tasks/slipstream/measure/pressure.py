"""How long processes of this machine waited for a processor, from Linux's pressure stall information.

A load average counts both running and waiting processes, and on a cluster it is the node's; pressure counts only
waiting (Documentation/accounting/psi.rst in the Linux kernel).
"""

import time
from pathlib import Path

OVERLOADED = 0.5
"""Share of time in which something waited for a processor, above which the machine counts as overloaded."""


class Meter:
    """Measures from its creation on."""

    def __init__(self, file: Path = Path("/proc/pressure/cpu")) -> None:
        self._file = file
        self._waited_s, self._begun = _waited_s(file), time.monotonic()

    def share(self) -> float | None:
        """Return the share of the time since then in which some process waited for a processor; None if unknown."""
        now, elapsed = _waited_s(self._file), time.monotonic() - self._begun
        if now is None or self._waited_s is None or elapsed <= 0:
            return None
        return min((now - self._waited_s) / elapsed, 1.0)


def _waited_s(file: Path) -> float | None:
    try:
        some = next(line for line in file.read_text().splitlines() if line.startswith("some"))
        return int(some.rpartition("total=")[2]) / 1e6
    except (OSError, StopIteration, ValueError):
        return None
