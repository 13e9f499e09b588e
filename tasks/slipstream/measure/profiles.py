"""Profiles of a working engine, by NVIDIA's Nsight Systems (`nsys`) or Linux's `perf`.

The profiler starts a separate process that loads the engine and answers real samples one by one: `python -m
slipstream.measure.profiles ENGINE SAMPLES.npy REQUESTS`.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slipstream.contract.arrays import Array
from slipstream.engines.base import load_engine
from slipstream.errors import EngineError
from slipstream.spec import Target

REQUESTS = 200
SAMPLES = 16
WITHIN_S = 600
TAIL = 800
"""Characters of a failed profiler's output that an error repeats."""

COMMANDS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "nsys": (
        "engine.nsys-rep",
        lambda out: ["nsys", "profile", "--trace=cuda,nvtx,osrt", "--force-overwrite=true", f"--output={out}"],
    ),
    # -g records call chains; 999 Hz does not coincide with timers at round frequencies.
    "perf": ("engine.perf", lambda out: ["perf", "record", "-q", "-g", "-F", "999", "-o", str(out), "--"]),
}
"""Output file and first arguments by profiler."""


def wanted(target: Target) -> str | None:
    """Return the profiler that a target requests (`options.profile`)."""
    profiler = target.options.get("profile")
    return profiler if isinstance(profiler, str) else None


def require_tool(target: Target) -> None:
    """Raise EngineError if the target requests a profiler that is not installed."""
    tool = wanted(target)
    if tool is not None and shutil.which(tool) is None:
        raise EngineError(
            f"{target.engine}: options.profile: the program {tool!r} is not installed where `validate` runs; install "
            "it in that environment's image, or leave the option out"
        )


def record(tool: str, engine: Path, samples: Array, folder: Path, requests: int = REQUESTS) -> Path:
    """Profile an engine folder on samples (N, …); the profile is written to `folder`. Raise EngineError."""
    folder.mkdir(parents=True, exist_ok=True)
    name, command = COMMANDS[tool]
    inputs, out = folder / "samples.npy", folder / name
    np.save(inputs, samples[:SAMPLES])
    own = [sys.executable, "-m", "slipstream.measure.profiles", str(engine), str(inputs), str(requests)]
    try:
        completed = subprocess.run(
            [*command(out), *own], capture_output=True, text=True, errors="replace", timeout=WITHIN_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"options.profile: {tool} did not do its work: {error}") from error
    if completed.returncode != 0 or not out.exists():
        output = (completed.stderr or completed.stdout).strip()[-TAIL:]
        raise EngineError(f"options.profile: {tool} ended with exit code {completed.returncode}: {output}")
    return out


def answer(engine: Path, samples: Path, requests: int) -> None:
    """Load an engine and answer single requests, under the profiler."""
    runner, inputs = load_engine(engine), np.load(samples, allow_pickle=False)
    for index in range(requests):
        at = index % len(inputs)
        runner.run(inputs[at : at + 1])


if __name__ == "__main__":
    answer(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
