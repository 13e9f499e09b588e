"""Training steps in two processes, by the one command: started by itself, by Kubeflow Trainer's variables, by torchrun.

Pods have no disk in common: where a launcher's variables are given, each process here has a home of its own.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from tests.conftest import free_port
from tests.steps.training import RUN_KEY, document, spec_of, step

from slipstream.contract import Cell, StepInput, StepOutput
from slipstream.frameworks.base import read_manifest
from slipstream.spec import Spec
from slipstream.steps import retrain
from slipstream.store import signing
from slipstream.store.tracking import fetch
from slipstream.techniques import distill, prune

pytestmark = pytest.mark.usefixtures("mlflow_server", "home")
torch.set_num_threads(1)
BIN = Path(sys.executable).parent
NOWHERE = "http://127.0.0.1:9"
"""No MLflow answers here (port 9 is `discard`)."""


def written(model: str, workers: int = 2, **changes: Any) -> dict[str, Any]:
    return {**document(model, **changes), "training": {"workers": workers}}


def test_the_number_of_processes_is_in_the_identity_when_it_is_not_one(mlflow_server: str) -> None:
    given = StepInput(run_key=RUN_KEY, cell=Cell(recipe="small"))
    for module in (retrain, distill, prune):
        plain, one, two = (
            module.settings(spec_of(d), given)
            for d in (document("counted"), written("counted", 1), written("counted", 2))
        )
        assert plain == one and two == {**one, "workers": 2}
    loaded = given.model_copy(update={"params": {"source_version": "1"}})
    assert "workers" not in retrain.settings(spec_of(written("counted")), loaded)  # nothing is trained


@pytest.mark.slow
def test_whole_steps_in_two_processes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed and resumed, distilled and pruned, each step with another launcher."""
    monkeypatch.setenv(signing.VARIABLE, "k" * 64)  # pods have homes of their own, and one key from a Secret
    given = Documents(tmp_path, written("together", limit=400, epochs=3))
    baseline = killed_and_resumed(given, home)
    assert MlflowClient().get_model_version_by_alias("together", "source").version == baseline.details["version"]
    student = in_pods(given, baseline)
    pruned = by_torchrun(given, baseline, student)
    assert pruned.artifact is not None and student.artifact is not None
    assert read_manifest(fetch(pruned.artifact)).sparsity == pytest.approx(0.5, abs=0.02)
    assert 0 <= pruned.metrics["test_top1"] <= 100
    assert step("distill", given.spec, baseline, recipe="small").reused  # found again, and no process started
    assert list((home / "work").iterdir()) == []  # nothing is left of finished steps


class Documents:
    """Spec, IN and OUT in a folder."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.folder, self.spec = folder, spec_of(spec)
        (folder / "spec.yaml").write_text(yaml.safe_dump(spec))

    def arguments(self, name: str, *upstream: StepOutput, out: str = "out.json") -> list[str]:
        """Arguments of `slipstream`, with the IN document written."""
        cell = None if name == "retrain" else Cell(recipe="small")
        given = StepInput(run_key=RUN_KEY, cell=cell, upstream=upstream)
        (self.folder / "in.json").write_text(given.model_dump_json())
        (self.folder / out).unlink(missing_ok=True)
        files = {"spec": "spec.yaml", "inputs": "in.json", "outputs": out}
        return ["step", name, *(f"--{option}={self.folder / file}" for option, file in files.items())]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def output(self) -> StepOutput:
        return StepOutput.model_validate_json((self.folder / "out.json").read_text())

    @contextmanager
    def running(self, command: list[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process that does not outlive the test; what it says goes to the log."""
        with (self.folder / "log").open("ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def killed_and_resumed(given: Documents, home: Path) -> StepOutput:
    """retrain; one of its processes is killed after the first epoch."""
    command = [str(BIN / "slipstream"), *given.arguments("retrain")]
    with given.running(command) as process:
        until(lambda: any((home / "work").glob("*/*.pt")), process)
        os.kill(youngest_child(process.pid), signal.SIGKILL)
        assert process.wait(timeout=60) == 1, given.log
    assert "Failed: process 1 of 2 was ended by SIGKILL" in given.log
    with given.running(command) as process:
        assert process.wait(timeout=120) == 0, given.log
    assert "resuming fit-1 after " in given.log
    return given.output()


def in_pods(given: Documents, baseline: StepOutput) -> StepOutput:
    """distill as Kubeflow Trainer's two pods run it: only the first has an address of MLflow, and writes OUT."""
    port = str(free_port())
    pod = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    other = {"SLIPSTREAM_HOME": str(given.folder / "other-home"), "MLFLOW_TRACKING_URI": NOWHERE}
    program = str(BIN / "slipstream")
    first, second = given.arguments("distill", baseline), given.arguments("distill", baseline, out="second.json")
    with (
        given.running([program, *first], **pod, PET_NODE_RANK="0") as leader,
        given.running([program, *second], **pod, **other, PET_NODE_RANK="1") as follower,
    ):
        assert leader.wait(timeout=120) == 0, given.log
        assert follower.wait(timeout=30) == 0, given.log
    assert not (given.folder / "second.json").exists()
    return given.output()


def by_torchrun(given: Documents, *upstream: StepOutput) -> StepOutput:
    """prune under torchrun."""
    arguments = given.arguments("prune", *upstream)
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m", "slipstream", *arguments]
    with given.running(command) as process:
        assert process.wait(timeout=120) == 0, given.log
    return given.output()


def until(happened: Any, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


def youngest_child(pid: int) -> int:
    """The last process that a process started; multiprocessing starts a resource tracker before the two."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])


def test_a_launcher_of_another_number_is_refused(tmp_path: Path) -> None:
    """Needs no group: it is refused before the processes wait for one another."""
    from slipstream.errors import SpecError
    from slipstream.frameworks.base import Group
    from slipstream.home import Home
    from slipstream.runner.context import Context
    from slipstream.runner.processes import NullStepRun
    from slipstream.store.tracking import Tracking

    spec: Spec = spec_of(written("counted", 3))
    tracking = Tracking(spec)
    run = NullStepRun(tracking.client, "", "")
    given = StepInput(run_key=RUN_KEY)
    context = Context(spec, given, "retrain", "0" * 64, tracking, run, Home.from_environment(), Group(0, 2))
    with pytest.raises(SpecError, match="workers is 3, but the launcher started 2"):
        context.train_on_all(retrain.train)
