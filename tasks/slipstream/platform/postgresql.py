"""The embedded PostgreSQL: Debian's programs, a data folder in the home, one role with a password, three databases.

The password is in no URI, argument or log: clients read it through PGPASSFILE, as libpq and asyncpg do.
"""

import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from slipstream.errors import Unavailable
from slipstream.home import Home, write_atomically
from slipstream.platform import processes, programs, supervisor
from slipstream.platform.addresses import Secrets, port_of
from slipstream.platform.programs import Program

NAME = "postgresql"
PACKAGE = "postgresql"
"""Debian's package with the newest version."""
ROLE = "slipstream"
AIRFLOW, MLFLOW = "airflow", "mlflow"
READY_WITHIN_S = 120
"""After a power cut PostgreSQL first replays its log."""

_SYSTEM_USER = "postgres"
_HANDED_OVER = "/proc/self/fd/7"
"""The data folder, as seen by a server started by root. PostgreSQL refuses to run as root; it then runs as `postgres`,
which cannot enter a private home, but may use its folder if root has opened it first."""


def programs_folder(home: Home) -> Path:
    """Return the folder of PostgreSQL's programs: the version of this home's data, or the newest. Raise Unavailable."""
    folders = dict(_installed())
    stamp = _folder(home) / "version"
    version = int(stamp.read_text()) if stamp.exists() else max(folders, default=0)
    if version not in folders:
        package = f"{PACKAGE}-{version}" if version else PACKAGE
        whose = f" {version}, which made the data in {_folder(home)}," if version else ""
        raise Unavailable(f"PostgreSQL{whose} is not installed; `apt-get install {package}` does so")
    return folders[version]


def prepare(home: Home, secrets: Secrets) -> None:
    """Create the data folder at the first call, and the file with the password. Raise Unavailable."""
    binaries, data = programs_folder(home), _data(home)
    _folder(home).mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(_password_file(home), f"127.0.0.1:*:*:{ROLE}:{secrets.postgresql_password}\n", 0o600)
    if (_folder(home) / "version").exists():
        return
    shutil.rmtree(data, ignore_errors=True)  # from a first `up` that was killed
    data.mkdir(mode=0o700)
    _give_away(data)
    _initdb(binaries, data, secrets.postgresql_password)
    write_atomically(_folder(home) / "version", str(_version(binaries)))


def program(home: Home, url: str) -> Program:
    """Return the server. SIGINT is its fast shutdown: open transactions are rolled back, all data is on the disk."""
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port_of(url)),
        "unix_socket_directories": "",
    }
    command = (
        *_as_its_user(_data(home)),
        *(str(programs_folder(home) / "postgres"), "-D", _named(_data(home))),
        *(word for key, value in settings.items() for word in ("-c", f"{key}={value}")),
    )
    return Program(NAME, command, directory=Path("/"), stop_wait_s=60, stop_signal="INT")


def await_ready(home: Home, url: str) -> None:
    """Return when the server accepts connections. Raise Unavailable."""
    deadline = time.monotonic() + READY_WITHIN_S
    while not healthy(home, url):
        if time.monotonic() > deadline or supervisor.state(home, NAME).state == "FATAL":
            raise Unavailable(f"PostgreSQL does not answer at {url}; see {programs.log_file(home, NAME)}")
        time.sleep(0.1)


def ensure_databases(home: Home, url: str, names: Sequence[str]) -> None:
    """Create missing databases. Raise Unavailable."""
    there = _client(home, url, "psql", "-d", "postgres", "-tAc", "SELECT datname FROM pg_database").split()
    for name in names:
        if name not in there:
            _client(home, url, "createdb", name)


def healthy(home: Home, url: str) -> bool:
    """Return whether the server accepts connections."""
    command = [str(programs_folder(home) / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port_of(url)), "-t", "5"]
    return subprocess.run(command, check=False).returncode == 0


def uri(url: str, database: str) -> str:
    """Return the URI that SQLAlchemy needs to connect, in addition to `environment`."""
    return f"postgresql+psycopg2://{ROLE}@127.0.0.1:{port_of(url)}/{database}"


def environment(home: Home) -> dict[str, str]:
    """Return variables of a process that connects."""
    return {"PGPASSFILE": str(_password_file(home))}


def stop_left_over(home: Home, wait_s: float = 30) -> None:
    """Stop the server that a killed supervisord left running. Call it only while no supervisord runs.

    The general search for orphans (processes.py) reads environments, which root cannot always read for a process of
    another user; and its SIGTERM would wait for clients to disconnect.
    """
    try:
        # Its process id, folder, start and port, a line each.
        pid, _, _, port = (_data(home) / "postmaster.pid").read_text().splitlines()[:4]
        processes.stop(int(pid), f"-D {_named(_data(home))} -c listen_addresses=127.0.0.1 -c port={port} ", wait_s)
    except (OSError, ValueError):  # none, or one that was just starting and has not listened yet
        return


def _initdb(binaries: Path, data: Path, password: str) -> None:
    """Create the data folder's content. The password goes through a pipe: it is never on the disk or in an argument."""
    receive, send = os.pipe()
    try:
        os.write(send, f"{password}\n".encode())
        os.close(send)
        _give_away(receive)
        access = ["-U", ROLE, "-A", "scram-sha-256", "--pwfile", "/dev/stdin"]
        completed = subprocess.run(
            [
                *_as_its_user(data),
                *(str(binaries / "initdb"), "-D", _named(data), *access, "-E", "UTF8", "--locale=C"),
            ],
            stdin=receive,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    finally:
        os.close(receive)
    if completed.returncode != 0:
        raise Unavailable(f"{data}: PostgreSQL's data folder cannot be made: {completed.stderr[-2000:]}")


def _client(home: Home, url: str, name: str, *arguments: str) -> str:
    """Return the output of one of PostgreSQL's client programs. Raise Unavailable."""
    completed = subprocess.run(
        [str(programs_folder(home) / name), "-h", "127.0.0.1", "-p", str(port_of(url)), "-U", ROLE, "-w", *arguments],
        env=os.environ | environment(home),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if completed.returncode != 0:
        raise Unavailable(f"PostgreSQL at {url}: {name}: {completed.stderr.strip()[-2000:]}")
    return completed.stdout


def _installed() -> Iterator[tuple[int, Path]]:
    """Yield major versions and their programs' folders."""
    folders = {*Path("/usr/lib/postgresql").glob("*/bin")}
    folders |= {Path(path).resolve().parent for name in ("postgres", "initdb") if (path := shutil.which(name))}
    for folder in folders:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            yield _version(folder), folder


def _version(binaries: Path) -> int:
    output = subprocess.run([str(binaries / "postgres"), "-V"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"\) (\d+)", output)
    return int(match[1]) if match else 0


def _as_its_user(data: Path) -> tuple[str, ...]:
    """Return a command prefix for root to run as another user, with `data` open; empty for other users."""
    if os.geteuid() != 0:
        return ()
    _system_user()
    become = ("setpriv", f"--reuid={_SYSTEM_USER}", f"--regid={_SYSTEM_USER}", "--init-groups", "--no-new-privs")
    return ("sh", "-c", 'exec "$@" 7<"$0"', str(data), *become)


def _named(data: Path) -> str:
    """Return the data folder as the server sees it."""
    return _HANDED_OVER if os.geteuid() == 0 else str(data)


def _give_away(place: Path | int) -> None:
    if os.geteuid() == 0:
        user = _system_user()
        os.chown(place, user.pw_uid, user.pw_gid)


def _system_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(_SYSTEM_USER)
    except KeyError:
        raise Unavailable(
            f"PostgreSQL does not run as root, and there is no user {_SYSTEM_USER} for it; `apt-get install {PACKAGE}` "
            "makes one"
        ) from None


def _folder(home: Home) -> Path:
    return home.root / NAME


def _data(home: Home) -> Path:
    return _folder(home) / "data"


def _password_file(home: Home) -> Path:
    return _folder(home) / "password"
