"""`slipstream setup`: the virtual environments that specs need, in `.envs`, with the version that installs them."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from slipstream.errors import InputError, Unavailable
from slipstream.home import Home, checkout, shared
from slipstream.plugins import BUILD, STEPS, VALIDATE
from slipstream.spec import Spec

log = logging.getLogger(__name__)

EXTRAS = {"airflow": "airflow,server"}
"""Extras of the wheel by environment, if they differ from its name."""
PLATFORM = ("airflow", "serve")
"""Environments of every project: the scheduler with MLflow, and the model servers with Envoy."""
INDEXES = {"tensorrt": "https://pypi.nvidia.com"}
"""Additional package index by environment."""
MARK = ".made-from"
"""File in a finished environment: digest of its requirements."""


def environments(specs: Iterable[Spec]) -> list[str]:
    """Return the environments that specs need, with the platform's own."""
    names = set(PLATFORM)
    for spec in specs:
        names |= {spec.environment_of(step, None) for step in STEPS}
        names |= {spec.environment_of(step, target) for step in (BUILD, VALIDATE) for target in spec.targets}
    return sorted(names)


def make(home: Home, names: Iterable[str]) -> None:
    """Install the environments that are not up to date. Raise InputError in a checkout, Unavailable if one fails."""
    if checkout() is not None:
        raise InputError("this slipstream runs from its checkout, whose environments `make setup` installs")
    for name in names:
        _make(home.envs / name, name)


def _make(folder: Path, name: str) -> None:
    pins, requirement = shared("constraints", name, "constraints.txt"), _requirement(EXTRAS.get(name, name))
    key = hashlib.sha256(f"{requirement}\n{sys.version}\n{pins.read_text()}".encode()).hexdigest()
    if (folder / MARK).exists() and (folder / MARK).read_text() == key:
        log.info("%s is up to date", folder)
        return
    log.info("installing %s", folder)
    began = time.monotonic()
    (folder / MARK).unlink(missing_ok=True)
    python, index = folder / "bin" / "python", INDEXES.get(name)
    more = ["--extra-index-url", index] if index else []
    if uv := shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"):
        if not python.exists():
            _run([uv, "venv", "-q", "--python", sys.executable, str(folder)])
        _run([uv, "pip", "install", "-q", "--python", str(python), requirement, "-c", str(pins), *more], _of_pip())
    else:
        if not python.exists():
            _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "-q", requirement, "-c", str(pins), *more])
    (folder / MARK).write_text(key)
    log.info("%s took %.0f s", folder, time.monotonic() - began)


def _requirement(extras: str) -> str:
    """Return this slipstream as a requirement: the wheel that it was installed from, or its version in an index."""
    distribution = metadata.distribution("slipstream")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url")
    return f"slipstream[{extras}] @ {origin}" if origin else f"slipstream[{extras}]=={distribution.version}"


def _of_pip() -> dict[str, str]:
    """Return pip's settings as uv's variables: uv does not read them."""
    variables = {}
    for setting, variable in (("find-links", "UV_FIND_LINKS"), ("index-url", "UV_DEFAULT_INDEX")):
        command = [sys.executable, "-m", "pip", "config", "get", f"global.{setting}"]
        value = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        if value and variable not in os.environ:
            variables[variable] = ",".join(value)
    return variables


def _run(command: list[str], variables: dict[str, str] | None = None) -> None:
    completed = subprocess.run(command, env=os.environ | (variables or {}), check=False)
    if completed.returncode != 0:
        raise Unavailable(
            f"{command[0]} ended with exit code {completed.returncode}; what it said is above. `slipstream setup` "
            "begins where it stopped"
        )
