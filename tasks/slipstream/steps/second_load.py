"""Whether later steps can load the same data set: each loads it in another process, some without a framework."""

import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from slipstream import errors
from slipstream.contract import Document
from slipstream.contract.arrays import Array
from slipstream.contract.ask import Unanswered, answer, ask
from slipstream.data.splits import Data, load
from slipstream.errors import CodeError, DataError, SlipstreamError, Unavailable
from slipstream.home import Home
from slipstream.plugins import METRICS
from slipstream.spec import Call, Spec, parse

log = logging.getLogger(__name__)

SERVING = "serve"
"""The environment of stages 2 and 3, which load the data set and the metric and have no framework."""
WITHIN_S = 3600
"""A second load that takes longer is abandoned with a warning."""
ANSWERS = "answers.npz"


class Load(Document):
    """Input of the other process."""

    spec: str
    """JSON of the spec whose data set it loads."""
    folder: Path
    """With a network's answers, for a metric of the user's."""


class Reply(Document):
    """Result of a second load."""

    digests: dict[str, str] = Field(default={})
    kind: str = ""
    """Class of the error that ended it; empty without one."""
    said: str = ""


def problems(home: Home, spec: Spec, loaded: Data, answers: Array | None, workdir: Path) -> Iterator[SlipstreamError]:
    """Yield problems of a later step's load of data set and metric: in another process, and without a framework.

    `answers` are a network's (N, …) to the first N training samples, for a metric of the user's. Raise Unavailable.
    """
    if not isinstance(spec.data, Call) and ":" not in spec.objective.metric:
        return  # files, and a metric of slipstream's
    python = home.python(SERVING)
    elsewhere = home.envs.is_dir() and python.exists()  # an image contains only one environment
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        if answers is not None:
            np.savez(Path(folder) / ANSWERS, answers)
        try:
            reply = ask(
                "slipstream.steps.second_load",
                Load(spec=spec.model_dump_json(), folder=Path(folder)),
                Reply,
                python=python if elsewhere else sys.executable,
                timeout_s=WITHIN_S,
            )
        except subprocess.TimeoutExpired:
            log.warning("data: a second load was given up after %d s", WITHIN_S)
            return
        except Unanswered as ended:
            yield CodeError(f"data: a second load, in another process: {ended}")
            return
    if reply.kind:
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


def load_again(what: Load) -> Reply:
    """Load as stages 2 and 3 do; the user's metric judges the answers in the folder."""
    spec, folder = parse(what.spec, "the spec"), what.folder
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
    answer(Load, load_again)
