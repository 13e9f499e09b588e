"""The daemon and the images, once for all tests."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.conftest import ROOT
from tests.containers.docker import FOLDER, Docker, make_base


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """The daemon that DOCKER_HOST names, or one of the tests' own, which is stopped again if it was started here."""
    if host := os.environ.get("DOCKER_HOST"):
        yield Docker(host)
        return
    script = ROOT / "scripts/test-docker"
    ran = (FOLDER / "docker.sock").exists() and Docker(f"unix://{FOLDER}/docker.sock").answers()
    yield Docker(
        subprocess.run([script, "start", FOLDER], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    )
    if not ran:
        subprocess.run([script, "stop", FOLDER], check=True)


@pytest.fixture(scope="session")
def images(docker: Docker) -> dict[str, str]:
    """Environment → its image, all built from this checkout; prints their sizes."""
    make_base(docker)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/images.py"],
        env=os.environ | {"DOCKER_HOST": docker.host},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("slipstream-") and line.endswith(" s")]
    print("\n" + "\n".join(lines))
    return {line.split(":")[0].removeprefix("slipstream-"): line.split()[0] for line in lines}
