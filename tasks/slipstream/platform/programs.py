"""The programs that supervisord keeps running: their files, their logs, and the environment that they inherit.

A program is a pair of files under `supervisor/programs/`. It exists once its `.ini` is written.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from slipstream.errors import Unavailable
from slipstream.home import Home, write_atomically
from slipstream.platform.launch import DESCRIPTION, MARK, PROGRAM

PRIVATE = 0o600
LOG_BYTES, LOG_BACKUPS = 10_000_000, 3
"""Size at which a log is rotated, and how many earlier ones are kept."""

_SOCKET_PATH_LIMIT = 90
"""Longest socket path in the home: Linux allows 107 bytes, and supervisord first binds PATH.PID in the same folder."""


@dataclass(frozen=True)
class Program:
    """A process that supervisord keeps running, also after a restart of the machine (`slipstream up`)."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None
    stop_wait_s: int = 15
    stop_signal: str = "TERM"


def write(home: Home, program: Program) -> None:
    """Write the files of a program. Raise Unavailable for a name that supervisord does not accept."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", program.name):
        raise Unavailable(f"{program.name!r} cannot name a program; use letters, digits, '.', '_' and '-'")
    below = folder(home)
    for place in (log_file(home, program.name), record_file(home, program.name)):
        place.parent.mkdir(parents=True, exist_ok=True)
    description = json.dumps(asdict(program), default=str, indent=2)
    write_atomically(below / f"{program.name}.json", description, PRIVATE)
    # The ini comes last: with it the program exists.
    write_atomically(below / f"{program.name}.ini", _render_program(home, program, description), PRIVATE)


def log_file(home: Home, name: str) -> Path:
    """Return the path of a program's log."""
    return home.root / "logs" / f"{name}.log"


def rotate_logs(home: Home) -> None:
    """Limit the logs: copy one that is too long aside and truncate it. Lines written in between are lost.

    Programs hold their logs open for appending, so a renamed file would continue to grow.
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


def names(home: Home) -> list[str]:
    """Return programs that have a file, and so run whenever supervisord does."""
    return sorted(path.stem for path in folder(home).glob("*.ini"))


def socket_path(home: Home) -> Path:
    """Return supervisord's socket: in the home, or under /tmp if the home's path is too long for a socket.

    It is derived only from the home, so that a shell, a cron job and a step agree on it without stored state.
    """
    inside = supervisor_folder(home) / "supervisor.sock"
    if len(os.fsencode(inside)) <= _SOCKET_PATH_LIMIT:
        return inside
    key = hashlib.sha256(os.fsencode(home.root)).hexdigest()[:16]
    return Path("/tmp") / f"slipstream-{os.getuid()}-{key}" / "supervisor.sock"  # noqa: S108 (checked in private_folder)


def base_environment(home: Home) -> dict[str, str]:
    """Return the inherited environment: the caller's (credentials, proxies), without another Airflow's settings.

    Bytecode is written whatever the caller's shell says: without it Airflow and MLflow take 8 s of a core to start
    instead of 4, each time, and so does every step that imports torch.
    """
    unwanted = ("AIRFLOW", "PYTHONDONTWRITEBYTECODE", "SUPERVISOR_", PROGRAM, DESCRIPTION)
    added = _added_environment(home)
    inherited = {k: v for k, v in os.environ.items() if k not in added and not k.startswith(unwanted)}
    return inherited | {
        MARK: str(home.root),
        "SLIPSTREAM_HOME": str(home.root),
        "SLIPSTREAM_ENVS": str(home.envs),
        "SLIPSTREAM_CODE": str(home.code),
    }


def _added_environment(home: Home) -> dict[str, str]:
    """Return variables that the caller has only as a program of this home; the watch over supervisord is one."""
    own = folder(home) / f"{os.environ.get(PROGRAM)}.json"
    return dict(json.loads(own.read_text())["environment"]) if own.exists() else {}


def private_folder(path: Path) -> None:
    """Create a folder that only this user can enter. Raise Unavailable if one of another user exists."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise Unavailable(f"{path} must be a folder of this user, and is not; remove it")
    path.chmod(0o700)


def record_file(home: Home, name: str) -> Path:
    """Return the file in which launch.py records the program's process."""
    return supervisor_folder(home) / "running" / f"{name}.json"


def supervisor_folder(home: Home) -> Path:
    """Return the folder for supervisord's own files and records of its programs."""
    return home.root / "supervisor"


def folder(home: Home) -> Path:
    """Return the folder of the programs' files."""
    return supervisor_folder(home) / "programs"


def forget_launcher(home: Home) -> None:
    """Make the next program use the current interpreter."""
    _launcher_file(home).unlink(missing_ok=True)


def _launcher_file(home: Home) -> Path:
    return supervisor_folder(home) / "launcher.json"


def _launcher(home: Home) -> list[str]:
    """Return what runs launch.py where supervisord is: a step in a container has another interpreter and path.

    The interpreter below every environment: a release stays the same whichever environment deployed it.
    """
    recorded = _launcher_file(home)
    if not recorded.exists():
        own = [str(Path(sys.executable).resolve()), "-IS", str(Path(__file__).with_name("launch.py"))]
        write_atomically(recorded, json.dumps(own), PRIVATE)
    return list(json.loads(recorded.read_text()))


def _render_program(home: Home, program: Program, description: str) -> str:
    log = str(log_file(home, program.name))
    files = (folder(home) / f"{program.name}.json", record_file(home, program.name), log)
    command = shlex.join([*_launcher(home), *map(str, files)])
    # The digest makes a changed description a changed group for supervisord.
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


def render_daemon(home: Home) -> str:
    """Return the configuration of supervisord itself."""
    below = _literal(str(supervisor_folder(home)))
    return f"""\
[supervisord]
identifier = slipstream
directory = {below}
logfile = {_literal(str(log_file(home, "supervisord")))}
logfile_maxbytes = 10MB
logfile_backups = 3
pidfile = {below}/supervisord.pid
childlogdir = {below}
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
    """Escape a value: supervisord expands %(name)s in every value."""
    return value.replace("%", "%%")
