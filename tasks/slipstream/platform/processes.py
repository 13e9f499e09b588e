"""Processes of a home on this machine, read from /proc."""

import logging
import os
import signal
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from slipstream.home import Home
from slipstream.platform import launch

log = logging.getLogger(__name__)

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process as /proc shows it."""

    pid: int
    parent: int
    command: str


def supervised(home: Home) -> list[Process]:
    """Return everything that this home's supervisord, or an earlier one, started, directly or indirectly."""
    marked = launch.marked(str(home.root))
    return [p for p in _all() if p.pid in marked]


def stop_orphans(home: Home, wait_s: float = 15, *, keep: Collection[str] = ()) -> list[Process]:
    """Stop what an ended supervisord left running: first asked, then killed. Return what was stopped.

    Call it only while no supervisord runs. The caller's own process and its ancestors are spared, and the programs
    `keep`, which the next supervisord takes over.
    """
    stopped: list[Process] = []
    asked_until = time.monotonic() + wait_s
    while orphans := _orphans(home, keep):
        asking = time.monotonic() < asked_until
        for process in orphans:
            if not asking or process not in stopped:
                log.debug("stopping left-over process %d: %s", process.pid, process.command[:80])
                _signal(process.pid, signal.SIGTERM if asking else signal.SIGKILL)
        stopped += [p for p in orphans if p not in stopped]
        time.sleep(0.1)
    return stopped


def _orphans(home: Home, keep: Collection[str]) -> list[Process]:
    spared, marked = _lineage(os.getpid()), launch.marked(str(home.root))
    return [p for p in _all() if marked.get(p.pid) not in (None, *keep) and p.pid not in spared]


def stop(pid: int, command: str, wait_s: float) -> None:
    """Stop a process, if its command line contains `command`, with SIGINT, and after `wait_s` with SIGKILL."""
    deadline = time.monotonic() + wait_s
    signaled = False
    while command in next((p.command for p in _all() if p.pid == pid), ""):
        if not signaled or time.monotonic() > deadline:
            _signal(pid, signal.SIGKILL if signaled else signal.SIGINT)
            signaled = True
        time.sleep(0.1)


def listener(port: int) -> Process | None:
    """Return the process that listens on a TCP port; None if there is none or it belongs to another user."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not inodes:
        return None
    return next((p for p in _all() if inodes & _open_files(p.pid)), None)


def holds_port(pid: int, port: int) -> bool:
    """Return whether a process or a descendant of it listens on a TCP port."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    return any(inodes & _open_files(p) for p in (pid, *_descendants(pid)))


def memory_mib(pid: int) -> float:
    """Return the memory of a process and its descendants in MiB; pages that they share count once (PSS)."""
    return sum(_pss_kib(p) for p in (pid, *_descendants(pid))) / 1024


def started_at(pid: int) -> float:
    """Return the start of a process in seconds since the epoch; 0.0 if it has ended."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    if not fields:
        return 0.0
    # Field 22 of proc(5)'s stat, the 20th after the command, counts clock ticks since boot.
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _all() -> Iterable[Process]:
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            pid = int(entry.name)
            command = _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
            if command:  # neither a kernel thread nor a zombie
                yield Process(pid, _parent(pid), command)


def _read(pid: int, name: str) -> bytes:
    """Return a file under /proc/PID; empty if the process ended meanwhile or belongs to another user."""
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    # The command name, in parentheses, may contain spaces and parentheses.
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def _lineage(pid: int) -> set[int]:
    pids: set[int] = set()
    while pid and pid not in pids:
        pids.add(pid)
        pid = _parent(pid)
    return pids


def _descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for process in _all():
        children.setdefault(process.parent, []).append(process.pid)
    pids: set[int] = set()
    queue = [pid]
    while queue:
        new = [c for c in children.get(queue.pop(), []) if c not in pids]
        pids.update(new)
        queue += new
    return pids


def _pss_kib(pid: int) -> int:
    lines = _read(pid, "smaps_rollup").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(b"Pss:")), 0)


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            # local_address is HEXIP:HEXPORT, state 0A is LISTEN.
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes


def _open_files(pid: int) -> set[str]:
    try:
        return {_target(fd) for fd in (PROC / str(pid) / "fd").iterdir()}
    except OSError:
        return set()


def _target(link: Path) -> str:
    """Return a link's target; empty if it is gone, like the one through which the folder itself was read."""
    try:
        return str(link.readlink())
    except OSError:
        return ""


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        log.debug("process %d ended by itself", pid)
