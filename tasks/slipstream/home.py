"""Where things lie and which settings the environment carries. One place, so that no path is built twice."""

import os
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENTS = ("airflow", "torch", "serve")
"""Environments beside the core; each has a folder under containers/ and a virtual environment under .envs/."""


@dataclass(frozen=True)
class Home:
    """Folders of one installation. Everything that a run leaves on this machine lies under `root`."""

    root: Path
    envs: Path
    code: Path

    @classmethod
    def from_environment(cls) -> "Home":
        """Read SLIPSTREAM_HOME, SLIPSTREAM_ENVS and SLIPSTREAM_CODE; defaults lie in the current folder."""
        here = Path.cwd()
        return cls(
            root=Path(os.environ.get("SLIPSTREAM_HOME", here / ".slipstream")).resolve(),
            envs=Path(os.environ.get("SLIPSTREAM_ENVS", here / ".envs")).resolve(),
            code=Path(os.environ.get("SLIPSTREAM_CODE", here)).resolve(),
        )

    @property
    def specs(self) -> Path:
        """Published specs; each YAML file here is a DAG."""
        return self.root / "specs"

    @property
    def runs(self) -> Path:
        """One folder for each pipeline run: the spec's snapshot, and the IN and OUT documents of its steps."""
        return self.root / "runs"

    @property
    def work(self) -> Path:
        """Checkpoints of steps under way, one folder for each identity."""
        return self.root / "work"

    @property
    def cache(self) -> Path:
        """Downloaded artefacts, one folder for each sha256."""
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


def write_atomically(path: Path, text: str, mode: int = 0o666) -> None:
    """Write aside, flush to disk, rename: a reader sees the old text or the new, never half of either.

    `mode` is what the file is created with, before the umask; 0o600 for what holds secrets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
