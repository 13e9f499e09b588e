"""Programs under supervisord: the one place that starts and stops long-lived processes.

One supervisord for each SLIPSTREAM_HOME. Each program is a file under `supervisor/programs/`, so it starts again with
the next `slipstream up`, also after a restart of the machine. Starting, changing or stopping one program never affects
another: supervisord's own comparison of files and running groups shows what changed, and only the named group is
changed.
"""

import os
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.errors import Unavailable
from slipstream.home import INSTALL, Home, file_lock, write_atomically
from slipstream.platform import launch, programs
from slipstream.platform.launch import MARK
from slipstream.platform.programs import Program

ALIVE = frozenset({"STARTING", "RUNNING", "BACKOFF"})
"""States in which supervisord itself keeps a program running, or is about to retry."""

ORPHANED = "ORPHANED"
"""State of a program that a killed supervisord left running: it continues, but nothing would restart it."""
_FORGOTTEN_WAIT_S = 15
_BAD_NAME = 10  # supervisor.xmlrpc.Faults
_NOT_RUNNING = 70


@dataclass(frozen=True)
class ProcessState:
    """State of a program as reported by supervisord."""

    state: str
    """`RUNNING`, `STARTING`, `STOPPED`, `BACKOFF`, `EXITED`, `FATAL`; `ORPHANED` or `ABSENT`."""
    pid: int | None
    """The program's own process, even if supervisord watches it through another (launch.py)."""


ABSENT = ProcessState("ABSENT", None)


def start(home: Home, program: Program) -> None:
    """Write the program's file and start it; nothing changes if it already runs as specified.

    Return once the process exists, not when it is ready. Start supervisord if it is not running. Raise Unavailable.
    """
    with _locked(home):
        if running_pid(home) is None:
            programs.forget_launcher(home)  # the environments may have moved since
        programs.write(home, program)
        if running_pid(home) is None and os.environ.get(MARK) == str(home.root):
            # A step's environment and interpreter are not supervisord's.
            raise Unavailable(f"supervisord of {home.root} is gone; `slipstream up` starts it again")
        if not _ensure_running(home):
            _apply(home, program.name)
        _wait_for_process(home, program.name)
        executable = Path(program.command[0])
        if executable.is_absolute() and not os.access(executable, os.X_OK):
            _require_start(home, program.name, executable)


def stop(home: Home, name: str) -> None:
    """Stop a program and remove its file, if it exists."""
    with _locked(home):
        _forget(home, name)


def state(home: Home, name: str) -> ProcessState:
    """Return a program's state; `ABSENT` if it is unknown or supervisord is down."""
    return states(home).get(name, ABSENT)


def states(home: Home) -> dict[str, ProcessState]:
    """Return every program that supervisord knows; if it is down, those that it left running."""
    if running_pid(home) is None:
        pids = {name: _recorded_pid(home, name) for name in programs.names(home)}
        return {name: ProcessState(ORPHANED, pid) for name, pid in pids.items() if pid is not None}
    try:
        with _calls(home) as call:
            reported = {p["name"]: ProcessState(p["statename"], p["pid"] or None) for p in call.getAllProcessInfo()}
    except Unavailable:
        return {}
    return {n: ProcessState(s.state, s.pid and (_recorded_pid(home, n) or s.pid)) for n, s in reported.items()}


def ensure_running(home: Home) -> None:
    """Start supervisord, and with it every program that has a file, unless it runs. Raise Unavailable.

    Programs that an earlier supervisord left running are taken over unchanged.
    """
    with _locked(home):
        _ensure_running(home)


def shutdown(home: Home, first: tuple[str, ...] = (), last: tuple[str, ...] = (), wait_s: float = 60) -> None:
    """Stop the programs, those of `first` before the others, those of `last` after them, then supervisord.

    Their files stay. Raise Unavailable.
    """
    with _locked(home):
        pid = running_pid(home)
        if pid is None:
            return
        with _calls(home) as call:
            for name in first:
                _stop_group(call, name)
            if last:
                _stop_together(call, [n for n in states(home) if n not in last])
            call.stopAllProcesses()
            call.shutdown()
        deadline = time.monotonic() + wait_s
        while Path(f"/proc/{pid}").exists():
            if time.monotonic() > deadline:
                raise Unavailable(f"supervisord (pid {pid}) of {home.root} did not stop within {wait_s:.0f} s")
            time.sleep(0.05)


def running_pid(home: Home) -> int | None:
    """Return the process id of this home's supervisord, asked over its socket: a stale pid file or socket is
    detected."""
    path = str(programs.socket_path(home))
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(path)
        except OSError:
            return None
    try:
        with _calls(home) as call:
            return int(call.getPID())
    except Unavailable:
        return None


def _ensure_running(home: Home) -> bool:
    """Start supervisord if necessary; return whether it was."""
    if running_pid(home) is not None:
        return False
    programs.private_folder(programs.socket_path(home).parent)
    programs.folder(home).mkdir(parents=True, exist_ok=True)
    programs.log_file(home, "supervisord").parent.mkdir(parents=True, exist_ok=True)
    config = programs.supervisor_folder(home) / "supervisord.ini"
    write_atomically(config, programs.render_daemon(home), programs.PRIVATE)
    completed = subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)],
        env=programs.base_environment(home),
        cwd=home.root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if completed.returncode != 0 or running_pid(home) is None:
        output = completed.stderr.strip() or completed.stdout.strip()
        detail = (output or f"see {programs.log_file(home, 'supervisord')}")[-2000:]
        raise Unavailable(f"supervisord does not start in {home.root}: {detail}")
    return True


def _apply(home: Home, name: str) -> None:
    """Update the running group to match the program's file, without affecting others."""
    with _calls(home) as call:
        [[added, changed, _]] = call.reloadConfig()
        if name in changed:
            _remove(call, name)
        if name in added or name in changed:
            call.addProcessGroup(name)
        elif state(home, name).state not in ALIVE:
            call.startProcess(name, False)


def _remove(call: Any, name: str) -> None:
    _stop_group(call, name)
    with _ignored(_BAD_NAME):
        call.removeProcessGroup(name)


def _stop_group(call: Any, name: str) -> None:
    with _ignored(_BAD_NAME, _NOT_RUNNING):
        call.stopProcessGroup(name)


def _stop_together(call: Any, names: Collection[str]) -> None:
    """Stop several groups at once, and return when all have stopped; supervisord kills those that take too long."""
    for name in names:
        with _ignored(_BAD_NAME, _NOT_RUNNING):
            call.stopProcessGroup(name, False)
    while any(p["name"] in names and p["statename"] == "STOPPING" for p in call.getAllProcessInfo()):
        time.sleep(0.05)


def _wait_for_process(home: Home, name: str, seconds: float = 10) -> None:
    """Wait for the process: supervisord forks on its next tick; until then a new group reads as stopped."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = state(home, name)
        if now.pid is not None or now.state in ("BACKOFF", "FATAL"):
            return
        time.sleep(0.02)
    raise Unavailable(f"{name} did not start; see {programs.log_file(home, name)}")


def _require_start(home: Home, name: str, executable: Path, seconds: float = 10) -> None:
    """Raise Unavailable unless supervisord can run files missing here: a step in a container sees other files than
    it."""
    deadline = time.monotonic() + seconds
    while (now := state(home, name).state) != "RUNNING":
        if now in ("BACKOFF", "FATAL") or time.monotonic() > deadline:
            _forget(home, name)
            raise Unavailable(f"{name}: {executable} is not there; {INSTALL}")
        time.sleep(0.05)


def _forget(home: Home, name: str) -> None:
    for suffix in (".ini", ".json"):
        (programs.folder(home) / f"{name}{suffix}").unlink(missing_ok=True)
    if running_pid(home) is not None:
        with _calls(home) as call:
            _remove(call, name)
    pids = launch.of_program(str(home.root), name)
    if (pid := _recorded_pid(home, name)) is not None:
        pids.add(pid)
    launch.stop(pids, _FORGOTTEN_WAIT_S)
    programs.record_file(home, name).unlink(missing_ok=True)


def _recorded_pid(home: Home, name: str) -> int | None:
    """Return the program's process, if it is alive."""
    process = launch.recorded(str(programs.record_file(home, name)))
    return None if process is None else int(process["pid"])


def _locked(home: Home) -> AbstractContextManager[None]:
    """Make one change at a time: supervisord has a single list of groups that are read but not yet applied."""
    return file_lock(programs.supervisor_folder(home) / "lock")


@contextmanager
def _calls(home: Home) -> Iterator[Any]:
    """Return supervisord's XML-RPC interface. Raise Unavailable."""
    from supervisor.xmlrpc import SupervisorTransport  # loads asyncore, which `slipstream --help` does not need

    transport = SupervisorTransport(None, None, f"unix://{programs.socket_path(home)}")
    try:
        # The address is a dummy: the transport uses only the socket.
        yield xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor
    except (OSError, xmlrpc.client.Error) as error:
        raise Unavailable(f"supervisord of {home.root}: {error}") from error
    finally:
        transport.close()


@contextmanager
def _ignored(*codes: int) -> Iterator[None]:
    try:
        yield
    except xmlrpc.client.Fault as fault:
        if fault.faultCode not in codes:
            raise
