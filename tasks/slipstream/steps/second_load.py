"""Whether later steps will load the same data set, and can: each loads it in another process, some without framework.

`python -m slipstream.steps.second_load FOLDER` loads the data set of the spec on standard input as those steps do, and
writes what it found into FOLDER.
"""

import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from slipstream import errors
from slipstream.contract import Document
from slipstream.data.splits import Data, load
from slipstream.errors import CodeError, DataError, SlipstreamError, Unavailable
from slipstream.home import Home
from slipstream.plugins import METRICS
from slipstream.spec import Call, Spec

log = logging.getLogger(__name__)

SERVING = "serve"
"""The environment of stages 2 and 3, which load the data set and the metric and have no framework."""
WITHIN_S = 3600
"""A second load that takes longer is given up with a warning."""
ANSWERS, REPLY = "answers.npz", "reply.json"


class Reply(Document):
    """What a second load found."""

    digests: dict[str, str] = Field(default={})
    kind: str = ""
    """Class of the error that it ended with; empty without one."""
    said: str = ""


def problems(
    home: Home, spec: Spec, loaded: Data, answers: npt.NDArray[Any] | None, workdir: Path
) -> Iterator[SlipstreamError]:
    """What goes wrong when a later step loads the data set and the metric: in another process, and without framework.

    `answers` are a network's (N, …) to the first N training samples, for a metric of the user's. Raise Unavailable.
    """
    if not isinstance(spec.data, Call) and ":" not in spec.objective.metric:
        return  # files, and a metric of slipstream's
    python = home.python(SERVING)
    elsewhere = home.envs.is_dir() and python.exists()  # an image has no environments beside it
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        if answers is not None:
            np.savez(Path(folder) / ANSWERS, answers)
        command = [str(python) if elsewhere else sys.executable, "-m", "slipstream.steps.second_load", folder]
        try:
            completed = subprocess.run(
                command, input=spec.model_dump_json(), text=True, capture_output=True, timeout=WITHIN_S, check=False
            )
        except subprocess.TimeoutExpired:
            log.warning("data: a second load was given up after %d s", WITHIN_S)
            return
        reply = _read(Path(folder) / REPLY)
    if reply is None:
        output = (completed.stderr.strip() or completed.stdout.strip())[-500:]
        yield CodeError(
            f"data: a second load, in another process, ended with exit code {completed.returncode}: {output}"
        )
    elif reply.kind:
        error: type[SlipstreamError] = getattr(errors, reply.kind)
        if issubclass(error, Unavailable):
            raise Unavailable(reply.said)
        where = (
            f"environment {SERVING}, which stages 2 and 3 run in; import a framework only inside functions that need it"
        )
        yield error(f"{reply.said} ({f'in the {where}' if elsewhere else 'in a second process'})")
    elif differing := [name for name, digest in loaded.digests().items() if reply.digests.get(name) != digest]:
        yield DataError(
            f"data: the loader gave another split {' and '.join(differing)} in a second process; every step loads the "
            "data again, so draw and shuffle with a fixed seed, and do not depend on the order of a set"
        )


def _read(path: Path) -> Reply | None:
    try:
        return Reply.model_validate_json(path.read_text())
    except (OSError, ValidationError):
        return None


def _second_load(spec: Spec, folder: Path) -> Reply:
    """Load as stages 2 and 3 do; the user's metric judges the answers in the folder."""
    try:
        loaded = load(spec)
    except SlipstreamError as error:
        return Reply(kind=type(error).__name__, said=str(error))
    if spec.objective.metric in METRICS:
        return Reply(digests=loaded.digests())
    from slipstream.measure.metrics.base import metric_for  # SciPy takes a second

    try:
        metric = metric_for(spec.objective.metric)
        if (folder / ANSWERS).exists():
            with np.load(folder / ANSWERS) as arrays:
                metric.evaluate(arrays["arr_0"], loaded.train.labels[: len(arrays["arr_0"])])
    except SlipstreamError as error:
        message = str(error) if str(error).startswith("objective.metric") else f"objective.metric: {error}"
        return Reply(kind=type(error).__name__, said=message)
    return Reply(digests=loaded.digests())


if __name__ == "__main__":
    exchanged = Path(sys.argv[1])
    (exchanged / REPLY).write_text(
        _second_load(Spec.model_validate_json(sys.stdin.read()), exchanged).model_dump_json()
    )
