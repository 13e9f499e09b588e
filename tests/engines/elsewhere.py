"""Builds and loads engines elsewhere: under another version of a library, or on a processor without VNNI.

`python -m tests.engines.elsewhere build CANDIDATE TARGET ENGINE` and `... answer ENGINE SAMPLES ANSWERS`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from slipstream import hardware
from slipstream.engines.base import build_engine, load_engine, record_answers
from slipstream.errors import SlipstreamError
from slipstream.spec import Target

ROOT = Path(__file__).parents[2]
FLAGS = "TEST_CPU_FLAGS"
"""Variable with the instruction sets of the emulated processor: its /proc/cpuinfo is the host's."""
EMULATOR = "qemu-x86_64"
"""Runs a program on an emulated processor, so that kernels are chosen, and compute, as they do there."""


def library(name: str, version: str) -> dict[str, str]:
    """Variables under which Python imports this version of a library. Skips where it cannot be installed."""
    folder = ROOT / "build" / "libraries" / f"{name}-{version}-py{sys.version_info.major}{sys.version_info.minor}"
    if not folder.exists():
        aside = folder.with_name(f"{folder.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--target"]
        done = subprocess.run([*command, str(aside), f"{name}=={version}"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(aside, ignore_errors=True)
            pytest.skip(f"{name} {version} cannot be installed: {done.stderr.strip()[-200:]}")
        try:
            aside.rename(folder)
        except OSError:  # another test process was faster
            shutil.rmtree(aside)
    return {"PYTHONPATH": str(folder)}


def emulated(processor: str) -> tuple[str, ...]:
    """The words before a command that run it on this processor. Skips where there is no emulator."""
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"no {EMULATOR} (Debian: qemu-user) to emulate a processor without VNNI")
    return (EMULATOR, "-cpu", processor)


def run(*words: object, variables: dict[str, str] | None = None, before: tuple[str, ...] = ()) -> str:
    """Run this module elsewhere. What it says: nothing, or an error's message."""
    path = os.pathsep.join([*((variables or {}).get("PYTHONPATH", "").split()), str(ROOT)])
    environment = {**os.environ, **(variables or {}), "PYTHONPATH": path}
    command = [*before, sys.executable, "-m", "tests.engines.elsewhere", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode in (0, 2), done.stderr
    return done.stdout


def build(candidate: Path, target: Target, engine: Path, samples: np.ndarray) -> None:
    """Build as the step does: with recorded answers."""
    build_engine(candidate, target, engine)
    record_answers(engine, load_engine(engine), samples)


def main(action: str, *words: str) -> None:
    """Do what the command line says; exit 2 with the message on stdout where an engine is refused."""
    if FLAGS in os.environ:
        with tempfile.NamedTemporaryFile("w", delete=False) as file:
            file.write(f"model name : emulated\nflags : {os.environ[FLAGS]}\n")
        hardware.CPUINFO = Path(file.name)
    try:
        if action == "build":
            candidate, target, engine, samples = words
            build(Path(candidate), Target.model_validate_json(target), Path(engine), np.load(samples))
        else:
            engine, samples, answers = words
            np.save(answers, load_engine(Path(engine)).run(np.load(samples)))
    except SlipstreamError as error:
        sys.stdout.write(str(error))
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(*sys.argv[1:])
