"""Which process of a group this one is, as launchers tell it."""

import pytest

from slipstream.errors import SpecError
from slipstream.frameworks.launched import Place, place

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
POD = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "1",
    "PET_NODE_RANK": "0",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
}


def test_without_a_launcher_a_process_is_on_its_own() -> None:
    assert place({}) is None
    assert place({"MASTER_ADDR": "10.0.0.1"}) is None


def test_torchrun_and_kubeflow_trainer_are_understood() -> None:
    assert place(TORCHRUN) == Place(1, 4, "10.0.0.1", 29500)
    assert place(POD) == Place(0, 2, "job-node-0-0.job", 29400)
    assert place({**POD, **TORCHRUN}) == Place(1, 4, "10.0.0.1", 29500)  # torchrun in such a pod


def test_a_group_of_one_is_none() -> None:
    assert place({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None
    assert place({**POD, "PET_NNODES": "1"}) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({**POD, "PET_NPROC_PER_NODE": "auto"}, "numProcPerNode to 1"),
        ({**TORCHRUN, "RANK": "4"}, "ranks count from 0"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "say no place"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "'MASTER_ADDR': None"),
    ],
)
def test_what_cannot_be_joined_is_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        place(given)
