"""Paths of the installation and settings from the environment, in one place, so that no path is built twice."""

import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from slipstream.errors import InputError, Unavailable

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
DAG = "optimize.py"
"""A file that exists in slipstream's DAG folder and in no other."""
INSTALL = "`slipstream setup SPEC` installs it, and `make setup` in a checkout"
"""What to do if an environment lacks something."""
PRIVATE = 0o700
"""Mode of the home: it holds addresses, published specs and logs, which are private to its owner."""


@dataclass(frozen=True)
class Home:
    """Folders of one installation. Everything that a run leaves on this machine is under `root`."""

    root: Path
    envs: Path
    code: Path
    shared_specs: str | None = None
    """Location of published specs, if not in `root`."""
    shared_runs: str | None = None
    """Location of the documents of runs, if not in `root`."""

    @classmethod
    def from_environment(cls) -> "Home":
        """Read SLIPSTREAM_HOME, SLIPSTREAM_ENVS, SLIPSTREAM_CODE, SLIPSTREAM_SPECS and SLIPSTREAM_RUNS.

        The first three are folders, by default in the current folder; otherwise, the environments are those of the
        checkout that slipstream runs from. The last two are folders or s3:// prefixes, by default in SLIPSTREAM_HOME:
        if steps do not share a file system, they are in S3.
        """
        here = Path.cwd()
        envs = next((f / ".envs" for f in (here, checkout()) if f and (f / ".envs").is_dir()), here / ".envs")
        return cls(
            root=Path(os.environ.get("SLIPSTREAM_HOME", here / ".slipstream")).resolve(),
            envs=Path(os.environ.get("SLIPSTREAM_ENVS", envs)).resolve(),
            code=Path(os.environ.get("SLIPSTREAM_CODE", here)).resolve(),
            shared_specs=_absolute(os.environ.get("SLIPSTREAM_SPECS")),
            shared_runs=_absolute(os.environ.get("SLIPSTREAM_RUNS")),
        )

    @property
    def specs(self) -> str:
        """Folder or s3:// prefix of the published specs; each YAML file directly in it is a DAG."""
        return self.shared_specs or str(self.root / "specs")

    @property
    def runs(self) -> str:
        """Folder or s3:// prefix with one folder for each pipeline run: the spec's snapshot, and the IN and OUT
        documents of its steps."""
        return self.shared_runs or str(self.root / "runs")

    @property
    def work(self) -> Path:
        """Checkpoints of running steps, one folder for each identity."""
        return self.root / "work"

    @property
    def cache(self) -> Path:
        """Downloads, one folder for each sha256 (storage/cache.py), and results that are cheap to recompute."""
        return self.root / "cache"

    @property
    def releases(self) -> Path:
        """Deployed engines and their servers' answer logs, one folder for each release."""
        return self.root / "releases"

    @property
    def envoy(self) -> Path:
        """Envoy's dynamic configuration (routes, clusters)."""
        return self.root / "envoy"

    def python(self, environment: str) -> Path:
        """Return the interpreter of an environment."""
        return self.envs / environment / "bin" / "python"

    def require_python(self, environment: str, purpose: str) -> Path:
        """Return the interpreter of an environment. Raise InputError, naming the purpose, if it is not installed."""
        python = self.python(environment)
        if not python.exists():
            raise InputError(
                f"{purpose} needs the environment {environment}, but {python} does not exist; {INSTALL}, "
                "and SLIPSTREAM_ENVS names the folder"
            )
        return python

    def prepare(self) -> None:
        """Create the folder, private to its owner. An existing one is made private if it is a home or empty.

        Raise InputError if it cannot be created or written to, or holds other files that other users can read now.
        """
        try:
            self.root.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            if stat.S_IMODE(self.root.stat().st_mode) & 0o077:
                if not self._is_home():
                    raise InputError(
                        f"SLIPSTREAM_HOME={self.root} holds other files, and others may read it; name an empty or new "
                        f"folder, or close this one with `chmod 700 {self.root}`"
                    )
                self.root.chmod(PRIVATE)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise InputError(
                f"SLIPSTREAM_HOME={self.root} cannot be used: {error.strerror or error}; name a folder that you own "
                "and may write to"
            ) from error

    def _is_home(self) -> bool:
        """Return whether the folder is empty or holds slipstream's files: never make a folder such as /tmp private."""
        names = {entry.name for entry in self.root.iterdir()}
        return not names or bool(names & {"platform.json", "platform.lock", "specs", "settings.yaml"})

    def addresses_file(self) -> Path:
        """Ports and addresses of the embedded platform, written by `slipstream up`."""
        return self.root / "platform.json"


def checkout() -> Path | None:
    """Return the checkout that this package runs from; None if it was installed from a wheel."""
    root = PACKAGE.parent.parent
    return root if (root / "dags" / DAG).is_file() and (root / "pyproject.toml").is_file() else None


def dags_folder() -> Path:
    """Return the folder of slipstream's DAGs: the checkout's, or else the wheel's. Raise Unavailable.

    It is never a folder of the user: SLIPSTREAM_CODE holds the functions that specs name, and nothing for Airflow.
    """
    root = checkout()
    return root / "dags" if root is not None else shared("dags", DAG).parent


def shared(*parts: str) -> Path:
    """Return a file that the wheel installed in addition to the package. Raise Unavailable.

    pyproject.toml lists them under data-files; installers put those in different places, recorded in its metadata.
    """
    for file in metadata.files("slipstream") or []:
        if file.parts[-2 - len(parts) :] == ("share", "slipstream", *parts):
            return Path(str(file.locate())).resolve()
    raise Unavailable(f"this installation of slipstream has no {'/'.join(parts)}; install its wheel")


@contextmanager
def file_lock(path: Path, why: str | None = None, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock `path`, one process of this machine at a time; it ends with the process. `why` names the waiting
    task.

    Raise Unavailable if another process holds it and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise Unavailable(why or f"{path} is held by another process") from None
            if why is not None:
                log.info("%s on this machine; waiting for it", why)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _absolute(place: str | None) -> str | None:
    """Return a folder with its full path, an s3:// prefix unchanged; None if none is given."""
    if not place:
        return None
    return place if "://" in place else str(Path(place).resolve())


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a file to write aside; at the end flush it to disk and rename it to `path`.

    A reader sees the old content or the new, never a mixture. `mode` is the file's mode at creation, before the umask;
    0o600 for secrets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a whole file as `replacing` does."""
    with replacing(path, mode) as file:
        file.write(content if isinstance(content, bytes) else content.encode())
