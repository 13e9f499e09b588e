"""Peak memory of one engine, measured in a separate process, as a model server would be."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from slipstream.contract import Document
from slipstream.contract.arrays import Array
from slipstream.contract.ask import Unanswered, answer, ask
from slipstream.engines.base import load_engine
from slipstream.errors import EngineError, SlipstreamError
from slipstream.measure.memory import peak_added

REQUESTS = 32
"""Number of requests that count, of one sample each: samples may differ in size."""


class Work(Document):
    """What the process does."""

    engine: Path
    """Engine folder."""
    samples: Path
    """File with (N, …) samples (.npy)."""


class Peak(Document):
    """What that took."""

    mib: float | None = None
    """None where the kernel does not tell."""
    problem: str | None = None
    """Why the engine cannot be loaded, or does not answer."""


def peak_memory_mib(folder: Path, inputs: Array) -> float | None:
    """Return the most memory that loading the engine and its first requests add to an otherwise idle process.

    `inputs` are (N, ...) samples. The runtime's libraries count. Return None if the kernel does not report it. Raise
    EngineError if the engine cannot be loaded, or does not answer.
    """
    with TemporaryDirectory() as aside:
        samples = Path(aside) / "inputs.npy"
        np.save(samples, inputs[:REQUESTS], allow_pickle=False)
        try:
            peak = ask("slipstream.engines.peak", Work(engine=folder, samples=samples), Peak)
        except Unanswered as error:
            raise EngineError(f"{folder}: cannot be run: {error}") from error
    if peak.problem is not None:
        raise EngineError(f"{folder}: cannot be run: {peak.problem}")
    return peak.mib


def measure(work: Work) -> Peak:
    """Load the engine and answer each sample separately."""
    inputs = np.load(work.samples, allow_pickle=False)

    def load_and_answer() -> None:
        engine = load_engine(work.engine)
        for index in range(len(inputs)):
            engine.run(inputs[index : index + 1])

    try:
        return Peak(mib=peak_added(load_and_answer))
    except SlipstreamError as error:
        return Peak(problem=str(error))


if __name__ == "__main__":
    answer(Work, measure)
