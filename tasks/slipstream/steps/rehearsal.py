"""The builds, rehearsed with a network as it is before training: what an engine does not take is found in seconds.

Otherwise an operator that an engine lacks would be found after training, pruning and distilling. Quantized forms are
not rehearsed. An engine with an environment of its own builds there: `python -m slipstream.steps.rehearsal CANDIDATE
TARGET FOLDER`, TARGET as JSON.
"""

import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from slipstream.engines.base import build_engine
from slipstream.engines.inquiry import own_python
from slipstream.errors import EngineError, ModelError, SlipstreamError
from slipstream.home import Home
from slipstream.spec import Target

log = logging.getLogger(__name__)

WITHIN_S = 600
"""An engine that takes longer in its own environment is left to the build."""


def rehearse(
    home: Home, what: str, save: Callable[[Path], object], targets: Mapping[str, Target], workdir: Path
) -> list[SlipstreamError]:
    """What keeps a network from being exported, or built for the targets. Nothing of it stays in `workdir`.

    `save` writes it as a candidate into a folder; `what` is how the problems call it.
    """
    with tempfile.TemporaryDirectory(dir=workdir) as aside:
        candidate = Path(aside) / "candidate"
        try:
            save(candidate)
        except ModelError as error:
            return [ModelError(f"{what}: {error}")]
        except Exception as error:  # an exporter's own, of many kinds
            return [ModelError(f"{what} cannot be exported to ONNX: {type(error).__name__}: {error}")]
        problems: list[SlipstreamError] = []
        for name, target in targets.items():
            python = own_python(home, target.engine)
            if python is None:
                problem = _problem(candidate, target, Path(aside) / name)
            else:
                problem = _problem_elsewhere(python, candidate, target, Path(aside) / name)
            if problem is not None:
                problems.append(EngineError(f"targets.{name}: {what} cannot be built: {problem}"))
        return problems


def _problem(candidate: Path, target: Target, folder: Path) -> str | None:
    try:
        build_engine(candidate, target, folder)
    except (EngineError, ModelError) as error:
        return str(error)
    return None


def _problem_elsewhere(python: Path, candidate: Path, target: Target, folder: Path) -> str | None:
    command = [str(python), "-m", "slipstream.steps.rehearsal", str(candidate), target.model_dump_json(), str(folder)]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        log.warning("%s: its build was not rehearsed to the end within %d s", target.engine, WITHIN_S)
        return None
    if completed.returncode == 0:
        return None
    return completed.stdout.strip() or f"{python} ended with {completed.returncode}: {completed.stderr.strip()[-500:]}"


if __name__ == "__main__":
    problem = _problem(Path(sys.argv[1]), Target.model_validate_json(sys.argv[2]), Path(sys.argv[3]))
    print(problem or "")
    raise SystemExit(0 if problem is None else 1)
