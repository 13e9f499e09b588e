"""Programs under supervisord: the one place that starts and stops long-lived processes.

One supervisord for each SLIPSTREAM_HOME. Each program is a file under `supervisor/programs/`, so it comes back
with the next `slipstream up`, also after a restart of the machine. Starting, changing or stopping one program
never touches another: supervisord's own comparison of files and running groups says what changed, and only the
named group is acted upon.
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
"""States in which supervisord itself keeps a program up, or is about to try again."""

ORPHANED = "ORPHANED"
"""State of a program that a killed supervisord left running: it goes on, and nothing would start it again."""
_FORGOTTEN_WAIT_S = 15
_BAD_NAME = 10  # supervisor.xmlrpc.Faults
_NOT_RUNNING = 70


@dataclass(frozen=True)
class ProcessState:
    """What supervisord says of a program."""

    state: str
    """`RUNNING`, `STARTING`, `STOPPED`, `BACKOFF`, `EXITED`, `FATAL`; `ORPHANED` or `ABSENT`."""
    pid: int | None
    """The program's own process, also where supervisord watches it through another (launch.py)."""


ABSENT = ProcessState("ABSENT", None)


def start(home: Home, program: Program) -> None:
    """Write the program's file and start it; nothing changes when it already runs as given.

    Returns once the process exists, not when it is ready. Starts supervisord where it does not run. Raises
    Unavailable.
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
    """Stop a program and remove its file; fine when it is not there."""
    with _locked(home):
        _forget(home, name)


def state(home: Home, name: str) -> ProcessState:
    """A program's state; `ABSENT` when it is unknown or supervisord is down."""
    return states(home).get(name, ABSENT)


def states(home: Home) -> dict[str, ProcessState]:
    """Every program that supervisord knows; when it is down, those that it left running."""
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
    """Start supervisord, and with it every program that has a file, unless it runs. Raises Unavailable.

    Programs that an earlier supervisord left running are taken over as they are.
    """
    with _locked(home):
        _ensure_running(home)


def shutdown(home: Home, first: tuple[str, ...] = (), last: tuple[str, ...] = (), wait_s: float = 60) -> None:
    """Stop the programs, those of `first` before the others, those of `last` after them, then supervisord.

    Their files stay. Raises Unavailable.
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
    """Process id of this home's supervisord, asked over its socket: a stale pid file or socket deceives nobody."""
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
    """Whether supervisord had to be started."""
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
    """Bring the running group in line with the program's file; touch no other."""
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
    """Stop several groups at once, and return when all have; supervisord kills those that take too long."""
    for name in names:
        with _ignored(_BAD_NAME, _NOT_RUNNING):
            call.stopProcessGroup(name, False)
    while any(p["name"] in names and p["statename"] == "STOPPING" for p in call.getAllProcessInfo()):
        time.sleep(0.05)


def _wait_for_process(home: Home, name: str, seconds: float = 10) -> None:
    """supervisord forks on its next tick; until then a fresh group reads as stopped."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = state(home, name)
        if now.pid is not None or now.state in ("BACKOFF", "FATAL"):
            return
        time.sleep(0.02)
    raise Unavailable(f"{name} did not start; see {programs.log_file(home, name)}")


def _require_start(home: Home, name: str, executable: Path, seconds: float = 10) -> None:
    """Raise Unavailable unless supervisord can run what is not here: a step in a container sees other files than it."""
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
    """The program's process, if it lives."""
    process = launch.recorded(str(programs.record_file(home, name)))
    return None if process is None else int(process["pid"])


def _locked(home: Home) -> AbstractContextManager[None]:
    """One change at a time: supervisord holds one list of read but not yet applied groups for everybody."""
    return file_lock(programs.supervisor_folder(home) / "lock")


@contextmanager
def _calls(home: Home) -> Iterator[Any]:
    """supervisord's XML-RPC interface. Raises Unavailable."""
    from supervisor.xmlrpc import SupervisorTransport  # loads asyncore; `slipstream --help` need not

    transport = SupervisorTransport(None, None, f"unix://{programs.socket_path(home)}")
    try:
        # The address is a dummy: the transport only looks at the socket.
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
