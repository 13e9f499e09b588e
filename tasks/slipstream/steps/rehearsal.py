"""The builds, rehearsed with a network as it is before training: what an engine does not take is found in seconds.

Otherwise an operator that an engine lacks would be found after training, pruning and distilling. Quantized forms are
not rehearsed. An engine with an environment of its own builds there: `python -m slipstream.steps.rehearsal CANDIDATE
TARGET FOLDER`, TARGET as JSON.
"""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
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
    home: Home, what: str, save: Callable[[Path], object], targets: Mapping[str, Target], folder: Path
) -> Iterator[SlipstreamError]:
    """What keeps a network from being exported, or built for the targets.

    `save` writes it as a candidate into a folder; `what` is how the problems call it.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what a killed attempt left
    folder.mkdir(parents=True)
    candidate = folder / "candidate"
    try:
        save(candidate)
    except ModelError as error:
        yield ModelError(f"{what}: {error}")
        return
    except Exception as error:  # an exporter's own, of many kinds
        yield ModelError(f"{what} cannot be exported to ONNX: {type(error).__name__}: {error}")
        return
    for name, target in targets.items():
        python = own_python(home, target.engine)
        if python is None:
            problem = _problem(candidate, target, folder / name)
        else:
            problem = _problem_elsewhere(python, candidate, target, folder / name)
        if problem is not None:
            yield EngineError(f"targets.{name}: {what} cannot be built: {problem}")


def _problem(candidate: Path, target: Target, folder: Path) -> str | None:
    try:
        build_engine(candidate, target, folder)
    except (EngineError, ModelError) as error:
        return str(error)
    return None


def _problem_elsewhere(python: Path, candidate: Path, target: Target, folder: Path) -> str | None:
    command = [str(python), "-m", "slipstream.steps.rehearsal", str(candidate), target.model_dump_json(), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        log.warning("%s: its build was not rehearsed to the end within %d s", target.engine, WITHIN_S)
        return None
    if done.returncode == 0:
        return None
    return done.stdout.strip() or f"{python} ended with {done.returncode}: {done.stderr.strip()[-500:]}"


if __name__ == "__main__":
    found = _problem(Path(sys.argv[1]), Target.model_validate_json(sys.argv[2]), Path(sys.argv[3]))
    print(found or "")
    raise SystemExit(0 if found is None else 1)
