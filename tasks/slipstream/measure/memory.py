"""Peak memory of a piece of work."""

import ctypes
import gc
import logging
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

_PROC = Path("/proc/self")
_RESET_PEAK = "5"
"""Written to clear_refs, it resets VmHWM to the current resident memory (proc_pid_clear_refs(5))."""


def peak_added(work: Callable[[], object], proc: Path = _PROC) -> float | None:
    """Return the maximum increase in MiB of this process's resident memory while `work` ran.

    This includes memory that `work` frees before it ends. It excludes memory and peaks from before. Return None if the
    kernel does not report it: only Linux does.
    """
    _give_back()
    before = _resident_mib(proc, "VmRSS") if _reset_peak(proc) else None
    work()
    peak = _resident_mib(proc, "VmHWM")
    return None if before is None or peak is None else max(peak - before, 0.0)


def _give_back() -> None:
    """Give freed memory of this process back to the kernel: otherwise `work` would reuse it uncounted."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library's
    if trim is not None:
        trim(0)


def _reset_peak(proc: Path) -> bool:
    try:
        (proc / "clear_refs").write_text(_RESET_PEAK)
    except OSError as error:
        log.info("no peak of memory is measured: %s", error)
        return False
    return True


def _resident_mib(proc: Path, name: str) -> float | None:
    """Return one of the sizes (KiB) of /proc/self/status."""
    try:
        lines = (proc / "status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(sizes[0]) / 1024 if sizes else None
