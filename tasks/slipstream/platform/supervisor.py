"""Programs under supervisord: the one place that starts and stops long-lived processes.

One supervisord for each SLIPSTREAM_HOME. Each program is a file under `supervisor/programs/`, so it comes back
with the next `slipstream up`, also after a restart of the machine. Starting, changing or stopping one program
never touches another: supervisord's own comparison of files and running groups says what changed, and only the
named group is acted upon.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slipstream.errors import Unavailable
from slipstream.home import Home, alone, write_atomically
from slipstream.platform import launch
from slipstream.platform.launch import DESCRIPTION, MARK, PROGRAM

PRIVATE = 0o600
ALIVE = frozenset({"STARTING", "RUNNING", "BACKOFF"})
"""States in which supervisord itself keeps a program up, or is about to try again."""

ORPHANED = "ORPHANED"
"""State of a program that a killed supervisord left running: it goes on, and nothing would start it again."""
LOG_BYTES, LOG_BACKUPS = 10_000_000, 3
"""Size at which a log is rotated, and how many earlier ones are kept."""

_SOCKET_PATH_LIMIT = 90
"""Longest socket path in the home: Linux allows 107 bytes, and supervisord first binds PATH.PID beside it."""
_FORGOTTEN_WAIT_S = 15
_BAD_NAME = 10  # supervisor.xmlrpc.Faults
_NOT_RUNNING = 70


@dataclass(frozen=True)
class Program:
    """A process that supervisord keeps running, also after a restart of the machine (`slipstream up`)."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None
    stop_wait_s: int = 15
    stop_signal: str = "TERM"


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
            (_folder(home) / "launcher.json").unlink(missing_ok=True)  # the environments may have moved since
        _write(home, program)
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
        left = {name: _recorded_pid(home, name) for name in program_names(home)}
        return {name: ProcessState(ORPHANED, pid) for name, pid in left.items() if pid is not None}
    try:
        with _calls(home) as call:
            found = {p["name"]: ProcessState(p["statename"], p["pid"] or None) for p in call.getAllProcessInfo()}
    except Unavailable:
        return {}
    return {n: ProcessState(s.state, s.pid and (_recorded_pid(home, n) or s.pid)) for n, s in found.items()}


def log_file(home: Home, name: str) -> Path:
    """Where a program's output goes."""
    return home.root / "logs" / f"{name}.log"


def ensure_running(home: Home) -> None:
    """Start supervisord, and with it every program that has a file, unless it runs. Raises Unavailable.

    Programs that an earlier supervisord left running are taken over as they are.
    """
    with _locked(home):
        _ensure_running(home)


def rotate_logs(home: Home) -> None:
    """Bound the logs: copy one that is too long aside and empty it. Lines written in between are lost.

    Programs hold their logs open for appending, so that a renamed file would still grow.
    """
    for path in sorted((home.root / "logs").glob("*.log")):
        if path.name == log_file(home, "supervisord").name or path.stat().st_size < LOG_BYTES:
            continue  # supervisord rotates its own
        backups = [path.with_name(f"{path.name}.{number}") for number in range(1, LOG_BACKUPS + 1)]
        for older, newer in zip(reversed(backups), reversed(backups[:-1]), strict=False):
            if newer.exists():
                newer.replace(older)
        shutil.copy(path, backups[0])
        os.truncate(path, 0)


def program_names(home: Home) -> list[str]:
    """Programs that have a file, and so run whenever supervisord does."""
    return sorted(path.stem for path in _programs(home).glob("*.ini"))


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
    path = str(socket_path(home))
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


def socket_path(home: Home) -> Path:
    """Where supervisord listens: in the home, or under /tmp when the home's path is too long for a socket.

    Derived from the home alone, so that a shell, a cron job and a step agree on it with nothing to remember.
    """
    inside = _folder(home) / "supervisor.sock"
    if len(os.fsencode(inside)) <= _SOCKET_PATH_LIMIT:
        return inside
    key = hashlib.sha256(os.fsencode(home.root)).hexdigest()[:16]
    return Path("/tmp") / f"slipstream-{os.getuid()}-{key}" / "supervisor.sock"  # noqa: S108 (checked in _private_folder)


def base_environment(home: Home) -> dict[str, str]:
    """What every program inherits: the caller's environment (credentials, proxies), less another Airflow's settings.

    Bytecode is written whatever the caller's shell says: without it Airflow and MLflow take 8 s of a core to start
    instead of 4, each time, and every step that imports torch likewise.
    """
    unwanted = ("AIRFLOW", "PYTHONDONTWRITEBYTECODE", "SUPERVISOR_", PROGRAM, DESCRIPTION)
    added = _added_environment(home)
    kept = {k: v for k, v in os.environ.items() if k not in added and not k.startswith(unwanted)}
    return kept | {
        MARK: str(home.root),
        "SLIPSTREAM_HOME": str(home.root),
        "SLIPSTREAM_ENVS": str(home.envs),
        "SLIPSTREAM_CODE": str(home.code),
    }


def _added_environment(home: Home) -> dict[str, str]:
    """What the caller has in its environment as a program of this home; the watch over supervisord is one."""
    own = _programs(home) / f"{os.environ.get(PROGRAM)}.json"
    return dict(json.loads(own.read_text())["environment"]) if own.exists() else {}


def _ensure_running(home: Home) -> bool:
    """Whether supervisord had to be started."""
    if running_pid(home) is not None:
        return False
    _private_folder(socket_path(home).parent)
    _programs(home).mkdir(parents=True, exist_ok=True)
    log_file(home, "supervisord").parent.mkdir(parents=True, exist_ok=True)
    config = _folder(home) / "supervisord.ini"
    write_atomically(config, _render_daemon(home), PRIVATE)
    done = subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)],
        env=base_environment(home),
        cwd=home.root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode != 0 or running_pid(home) is None:
        detail = (done.stderr.strip() or done.stdout.strip() or f"see {log_file(home, 'supervisord')}")[-2000:]
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
    raise Unavailable(f"{name} did not start; see {log_file(home, name)}")


def _require_start(home: Home, name: str, executable: Path, seconds: float = 10) -> None:
    """Raise Unavailable unless supervisord can run what is not here: a step in a container sees other files than it."""
    deadline = time.monotonic() + seconds
    while (now := state(home, name).state) != "RUNNING":
        if now in ("BACKOFF", "FATAL") or time.monotonic() > deadline:
            _forget(home, name)
            raise Unavailable(f"{name}: {executable} is not there; `make setup` installs the environments")
        time.sleep(0.05)


def _forget(home: Home, name: str) -> None:
    for suffix in (".ini", ".json"):
        (_programs(home) / f"{name}{suffix}").unlink(missing_ok=True)
    if running_pid(home) is not None:
        with _calls(home) as call:
            _remove(call, name)
    left = launch.of_program(str(home.root), name)
    if (pid := _recorded_pid(home, name)) is not None:
        left.add(pid)
    launch.stop(left, _FORGOTTEN_WAIT_S)
    _record_file(home, name).unlink(missing_ok=True)


def _record_file(home: Home, name: str) -> Path:
    """Where launch.py writes down which process the program is."""
    return _folder(home) / "running" / f"{name}.json"


def _recorded_pid(home: Home, name: str) -> int | None:
    """The program's process, if it lives."""
    known = launch.recorded(str(_record_file(home, name)))
    return None if known is None else int(known["pid"])


def _write(home: Home, program: Program) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", program.name):
        raise Unavailable(f"{program.name!r} cannot name a program; use letters, digits, '.', '_' and '-'")
    folder = _programs(home)
    for place in (log_file(home, program.name), _record_file(home, program.name)):
        place.parent.mkdir(parents=True, exist_ok=True)
    description = json.dumps(asdict(program), default=str, indent=2)
    write_atomically(folder / f"{program.name}.json", description, PRIVATE)
    # The ini comes last: with it the program exists.
    write_atomically(folder / f"{program.name}.ini", _render_program(home, program, description), PRIVATE)


def _launcher(home: Home) -> list[str]:
    """What runs launch.py where supervisord is: a step in a container has another interpreter, at another path.

    The interpreter below every environment: a release stays the same whichever environment deployed it.
    """
    recorded = _folder(home) / "launcher.json"
    if not recorded.exists():
        own = [str(Path(sys.executable).resolve()), "-IS", str(Path(__file__).with_name("launch.py"))]
        write_atomically(recorded, json.dumps(own), PRIVATE)
    return list(json.loads(recorded.read_text()))


def _render_program(home: Home, program: Program, description: str) -> str:
    log = str(log_file(home, program.name))
    files = (_programs(home) / f"{program.name}.json", _record_file(home, program.name), log)
    command = shlex.join([*_launcher(home), *map(str, files)])
    # The digest makes a changed description a changed group in supervisord's eyes.
    digest = hashlib.sha256(description.encode()).hexdigest()
    return f"""\
[program:{program.name}]
command = {_literal(command)}
environment = {PROGRAM}="{program.name}",{DESCRIPTION}="{digest}"
autostart = true
autorestart = true
startsecs = 2
startretries = 10
stopsignal = {program.stop_signal}
stopwaitsecs = {program.stop_wait_s}
stopasgroup = true
killasgroup = true
redirect_stderr = true
stdout_logfile = {_literal(log)}
stdout_logfile_maxbytes = 0
"""


def _render_daemon(home: Home) -> str:
    folder = _literal(str(_folder(home)))
    return f"""\
[supervisord]
identifier = slipstream
directory = {folder}
logfile = {_literal(str(log_file(home, "supervisord")))}
logfile_maxbytes = 10MB
logfile_backups = 3
pidfile = {folder}/supervisord.pid
childlogdir = {folder}
umask = 077

[unix_http_server]
file = {_literal(str(socket_path(home)))}
chmod = 0600

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[include]
files = programs/*.ini
"""


def _literal(value: str) -> str:
    """supervisord expands %(name)s in every value."""
    return value.replace("%", "%%")


def _folder(home: Home) -> Path:
    return home.root / "supervisor"


def _programs(home: Home) -> Path:
    return _folder(home) / "programs"


def _private_folder(path: Path) -> None:
    """Make a folder that only this user can enter. Raises Unavailable when somebody else's lies there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise Unavailable(f"{path} must be a folder of this user, and is not; remove it")
    path.chmod(0o700)


def _locked(home: Home) -> AbstractContextManager[None]:
    """One change at a time: supervisord holds one list of read but not yet applied groups for everybody."""
    return alone(_folder(home) / "lock")


@contextmanager
def _calls(home: Home) -> Iterator[Any]:
    """supervisord's XML-RPC interface. Raises Unavailable."""
    from supervisor.xmlrpc import SupervisorTransport  # loads asyncore; `slipstream --help` need not

    transport = SupervisorTransport(None, None, f"unix://{socket_path(home)}")
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
