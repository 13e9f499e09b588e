"""A Docker daemon and the images for the tests, and how a container is run as strictly as a cluster would."""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

BASE = "python:3.11-slim-bookworm"
FOLDER = Path(os.environ.get("SLIPSTREAM_TEST_DOCKER", Path(tempfile.gettempdir()) / "slipstream-docker"))
"""Data of the tests' own daemon. Kept, so that layers that have not changed are not built again."""

STRICT = (
    "--read-only",
    "--user=12345:0",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp",
)
"""What Kubernetes' restricted pod security asks for, with an id that no image knows."""


@dataclass(frozen=True)
class Docker:
    """A daemon's address."""

    host: str

    def call(
        self, *arguments: str | Path, check: bool = True, seconds: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a docker command; its output, and standard error when it fails, are in the failure's message."""
        done = subprocess.run(
            ["docker", *arguments],
            env=os.environ | {"DOCKER_HOST": self.host},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        assert not check or done.returncode == 0, f"docker {arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def run(self, image: str, *command: str | Path, options: tuple[str, ...] = (), check: bool = True) -> str:
        """Run a container to its end under STRICT; what it printed."""
        done = self.call("run", "--rm", *STRICT, *options, image, *command, check=check)
        return done.stdout + ("" if check else done.stderr)

    def python(self, image: str, code: str, options: tuple[str, ...] = ()) -> str:
        """Run Python code in a container."""
        return self.run(image, "-c", code, options=("--entrypoint=python", *options)).strip()

    def inspect(self, kind: str, name: str) -> dict[str, object]:
        """Docker's own description of an image or a container."""
        return dict(json.loads(self.call(kind, "inspect", name).stdout)[0])

    def answers(self) -> bool:
        """Whether there is a daemon."""
        return self.call("version", check=False).returncode == 0

    def has(self, image: str) -> bool:
        """Whether an image is here."""
        return self.call("image", "inspect", image, check=False).returncode == 0


def make_base(docker: Docker) -> None:
    """The Dockerfiles' base: pulled, or made from Debian packages where nothing can be pulled."""
    if docker.has(BASE) or docker.call("pull", "-q", BASE, check=False).returncode == 0:
        return
    subprocess.run([ROOT / "scripts/test-base", BASE], env=os.environ | {"DOCKER_HOST": docker.host}, check=True)
