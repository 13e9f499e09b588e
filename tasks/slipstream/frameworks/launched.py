"""This process's place in a group that a launcher started, read from the environment, without a framework.

`torchrun` sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as other launchers do. Kubeflow Trainer sets PET_NNODES,
PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT instead, from which torchrun would start the
processes of a pod (pkg/runtime/framework/plugins/torch/torch.go). With one process in each pod there is nothing to
start: the pod's own process joins, and its exit code is preserved (torchrun always exits with 1).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from slipstream.errors import SpecError

ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"


@dataclass(frozen=True)
class Place:
    """A process's place in its group."""

    rank: int
    size: int
    address: str
    """Address on process 0's node of the store through which the processes find one another."""
    port: int


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return this process's place, or None for a single process. Raise SpecError for an unsupported launch."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        position = _read(environment, "RANK", "WORLD_SIZE", "")
    elif "PET_NODE_RANK" in environment and "PET_NNODES" in environment:
        each = environment.get("PET_NPROC_PER_NODE", "1")
        if each != "1":
            raise SpecError(
                f"PET_NPROC_PER_NODE is {each!r}: a pod runs one process; set the TrainJob's trainer.numProcPerNode "
                "to 1 and numNodes to training.workers, or run the step under torchrun"
            )
        position = _read(environment, "PET_NODE_RANK", "PET_NNODES", "PET_")
    else:
        return None
    return position if position.size > 1 else None


def _read(environment: Mapping[str, str], rank: str, size: str, prefix: str) -> Place:
    names = (rank, size, prefix + ADDRESS, prefix + PORT)
    try:
        values = [environment[name] for name in names]
        position = Place(int(values[0]), int(values[1]), values[2], int(values[3]))
    except (KeyError, ValueError) as error:
        variables = {name: environment.get(name) for name in names}
        raise SpecError(
            f"a launcher started this process, but its variables say no place in a group: {variables}"
        ) from error
    if not 0 <= position.rank < position.size:
        raise SpecError(f"{rank} is {position.rank}, but {size} is {position.size}; ranks count from 0")
    return position
