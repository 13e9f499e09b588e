"""How much memory one engine needs at its peak, measured in a process of its own, as a model server would be.

`python -m slipstream.engines.peak ENGINE INPUTS.npy` prints it, in MiB as JSON.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.engines.base import load_engine
from slipstream.errors import EngineError, SlipstreamError
from slipstream.measure.memory import peak_added

REQUESTS = 32
"""Requests, of one sample each, that count: samples may differ in size."""


def peak_memory_mib(folder: Path, inputs: NDArray[Any]) -> float | None:
    """Most memory that loading the engine and its first requests add to a process that has nothing else to do.

    `inputs` are (N, ...) samples. The runtime's libraries count. None where the kernel does not tell. Raises
    EngineError when the engine cannot be loaded, or does not answer.
    """
    with TemporaryDirectory() as aside:
        samples = Path(aside) / "inputs.npy"
        np.save(samples, inputs[:REQUESTS], allow_pickle=False)
        command = [sys.executable, "-m", "slipstream.engines.peak", str(folder), str(samples)]
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode != 0:
        raise EngineError(
            f"{folder}: cannot be run: {completed.stderr.strip()[-1000:] or f'exit code {completed.returncode}'}"
        )
    peak: float | None = json.loads(completed.stdout.splitlines()[-1])
    return peak


def main(folder: Path, samples: Path) -> None:
    """Load, ask, and tell."""
    inputs = np.load(samples, allow_pickle=False)

    def work() -> None:
        engine = load_engine(folder)
        for index in range(len(inputs)):
            engine.run(inputs[index : index + 1])

    print(json.dumps(peak_added(work)))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except SlipstreamError as error:
        sys.exit(str(error))
