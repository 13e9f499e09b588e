"""Rehearses the builds with an untrained network, so that an unsupported operator is found in seconds.

Otherwise it would be found only after training, pruning and distilling. Quantized forms are not rehearsed. An engine
with its own environment builds there.
"""

import logging
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from slipstream.contract import Document
from slipstream.contract.ask import Unanswered, answer, ask
from slipstream.engines.base import build_engine
from slipstream.engines.inquiry import own_python
from slipstream.errors import EngineError, ModelError, SlipstreamError
from slipstream.home import Home
from slipstream.spec import Target

log = logging.getLogger(__name__)

WITHIN_S = 600
"""An engine that takes longer in its own environment is left to the build."""


class Build(Document):
    """A build to rehearse."""

    candidate: Path
    target: Target
    folder: Path
    """Where the engine is built."""


class Result(Document):
    """What came of it."""

    problem: str | None = None
    """Why it cannot be built; None when it can."""


def rehearse(
    home: Home, what: str, save: Callable[[Path], object], targets: Mapping[str, Target], workdir: Path
) -> list[SlipstreamError]:
    """Return what prevents a network from being exported, or built for the targets. `workdir` is left clean.

    `save` writes it as a candidate into a folder; `what` is its name in the problems.
    """
    with tempfile.TemporaryDirectory(dir=workdir) as aside:
        candidate = Path(aside) / "candidate"
        try:
            save(candidate)
        except ModelError as error:
            return [ModelError(f"{what}: {error}")]
        except Exception as error:  # an exporter's own errors, of many kinds
            return [ModelError(f"{what} cannot be exported to ONNX: {type(error).__name__}: {error}")]
        problems: list[SlipstreamError] = []
        for name, target in targets.items():
            python = own_python(home, target.engine)
            build = Build(candidate=candidate, target=target, folder=Path(aside) / name)
            problem = attempt(build).problem if python is None else _problem_elsewhere(python, build)
            if problem is not None:
                problems.append(EngineError(f"targets.{name}: {what} cannot be built: {problem}"))
        return problems


def attempt(build: Build) -> Result:
    """Build, and say what came of it."""
    try:
        build_engine(build.candidate, build.target, build.folder)
    except (EngineError, ModelError) as error:
        return Result(problem=str(error))
    return Result()


def _problem_elsewhere(python: Path, build: Build) -> str | None:
    try:
        return ask("slipstream.steps.rehearsal", build, Result, python=python, timeout_s=WITHIN_S).problem
    except subprocess.TimeoutExpired:
        log.warning("%s: its build was not rehearsed to the end within %d s", build.target.engine, WITHIN_S)
        return None
    except Unanswered as error:
        return str(error)


if __name__ == "__main__":
    answer(Build, attempt)
