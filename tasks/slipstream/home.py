"""Where things lie and which settings the environment carries. One place, so that no path is built twice."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slipstream.errors import Unavailable

log = logging.getLogger(__name__)

ENVIRONMENTS = ("airflow", "torch", "tensorflow", "tensorrt", "serve", "kubeflow")
"""Environments beside the core; each has a folder under containers/ and a virtual environment under .envs/."""


@dataclass(frozen=True)
class Home:
    """Folders of one installation. Everything that a run leaves on this machine lies under `root`."""

    root: Path
    envs: Path
    code: Path
    shared_specs: str | None = None
    """Where published specs lie when it is not in `root`."""
    shared_runs: str | None = None
    """Where the documents of runs lie when it is not in `root`."""

    @classmethod
    def from_environment(cls) -> "Home":
        """Read SLIPSTREAM_HOME, SLIPSTREAM_ENVS, SLIPSTREAM_CODE, SLIPSTREAM_SPECS and SLIPSTREAM_RUNS.

        The first three are folders, by default in the current folder. The last two are folders or s3:// prefixes, by
        default in SLIPSTREAM_HOME: where steps do not share a file system they are in S3.
        """
        here = Path.cwd()
        return cls(
            root=Path(os.environ.get("SLIPSTREAM_HOME", here / ".slipstream")).resolve(),
            envs=Path(os.environ.get("SLIPSTREAM_ENVS", here / ".envs")).resolve(),
            code=Path(os.environ.get("SLIPSTREAM_CODE", here)).resolve(),
            shared_specs=_absolute(os.environ.get("SLIPSTREAM_SPECS")),
            shared_runs=_absolute(os.environ.get("SLIPSTREAM_RUNS")),
        )

    @property
    def specs(self) -> str:
        """Folder or s3:// prefix of the published specs; each YAML file right in it is a DAG."""
        return self.shared_specs or str(self.root / "specs")

    @property
    def runs(self) -> str:
        """Folder or s3:// prefix with one folder for each pipeline run: the spec's snapshot, and the IN and OUT
        documents of its steps."""
        return self.shared_runs or str(self.root / "runs")

    @property
    def work(self) -> Path:
        """Checkpoints of steps under way, one folder for each identity."""
        return self.root / "work"

    @property
    def cache(self) -> Path:
        """What was downloaded, one folder for each sha256 (storage/cache.py), and results that are quick to lose."""
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
        """Interpreter of an environment."""
        return self.envs / environment / "bin" / "python"

    def addresses_file(self) -> Path:
        """Ports and addresses of the embedded platform, written by `slipstream up`."""
        return self.root / "platform.json"


@contextmanager
def alone(path: Path, why: str | None = None, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock `path`, one process of this machine at a time; it goes with the process. `why` tells who waits.

    Raises Unavailable where another one holds it and `wait` is false.
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
    """A folder with its full path, an s3:// prefix as it is; None when nothing is given."""
    if not place:
        return None
    return place if "://" in place else str(Path(place).resolve())


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write aside, flush to disk, rename: a reader sees the old content or the new, never half of either.

    `mode` is what the file is created with, before the umask; 0o600 for what holds secrets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
