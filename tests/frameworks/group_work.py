"""What the processes of a group do in tests: functions that `launch` can name to a new process."""

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from tests.frameworks.contract import Recorder, Stopped, Stopping, squares
from torch.nn import functional

from slipstream.data.splits import Data
from slipstream.errors import ModelError
from slipstream.frameworks.base import Group, Job, Schedule, SoftTargets
from slipstream.frameworks.torch import FRAMEWORK
from slipstream.frameworks.torch_training import Training
from slipstream.spec import Call

EPOCHS = 3
Trained = tuple[dict[str, np.ndarray], dict[int, dict[str, float]]]
"""Weights, and the figures of each epoch that this process saw."""


def call(name: str) -> Call:
    return Call(function=f"tests.frameworks.networks:{name}")


def job(folder: Path, group: Group, progress: Recorder) -> Job:
    return Job(Data(squares(410, 1), squares(100, 2)), seed=5, folder=folder, progress=progress, group=group)


def train(group: Group, folder: Path, network: str, name: str, progress: Recorder | None = None) -> Trained:
    """One training, with soft targets when its name says so. The batch is odd, so that its parts are unequal."""
    torch.set_num_threads(1)
    progress = progress or Recorder()
    given = job(folder, group, progress)
    built = FRAMEWORK.build(call(network), given.seed)
    soft = SoftTargets(np.random.default_rng(0).normal(0, 2, (410, 4)).astype(np.float32), 4.0, 0.5)
    FRAMEWORK.fit(built, given, Schedule(EPOCHS, 0.05, 33), name, soft if name == "soft" else None)
    return {k: v.numpy().copy() for k, v in built.state_dict().items()}, progress.epochs


def own_loop(group: Group, folder: Path) -> Trained:
    """A train function with a loop of its own, as docs/extending.md shows it: plain gradient descent."""
    training, network = Training(job(folder, group, Recorder())), FRAMEWORK.build(call("idle"), 5)
    inputs, labels = (torch.from_numpy(a) for a in (training.data.train.inputs, training.data.train.labels))
    model, figures = group.wrap(network), {}
    for epoch in range(2):
        total = 0.0
        for batch in torch.arange(len(inputs)).split(33):
            mine = group.part(batch)
            loss = functional.cross_entropy(model(inputs[mine]), labels[mine]) * len(mine) * group.size / len(batch)
            network.zero_grad()
            loss.backward()
            with torch.no_grad():
                for weight in network.used.parameters():
                    weight.sub_(0.1 * weight.grad)
            total += float(loss.detach()) / group.size
        group.average_buffers(network)
        figures[epoch] = {"train_loss": group.add(total)}
    return {k: v.numpy().copy() for k, v in network.state_dict().items()}, figures


def stop(group: Group, folder: Path, network: str, name: str) -> None:
    """A training that stops in its second epoch: its checkpoint holds the first."""
    try:
        train(group, folder, network, name, Stopping(after=1))
    except Stopped:
        return
    raise AssertionError("did not stop")


def session(group: Group, folder: Path) -> dict[str, Trained]:
    """Several trainings one after another, to start the processes only once."""
    told(group, folder)
    stop(group, folder, "idle", "begun-by-two")
    names = ["idle", "soft", "squares", "squares-again", "begun-by-one"]
    made = {name: train(group, folder, "squares" if "squares" in name else "idle", name) for name in names}
    return {**made, "own": own_loop(group, folder)}


def failing(group: Group, folder: Path) -> Trained:
    """Process 1 fails in its training; process 0 then waits for it in vain."""
    if group.rank == 1:
        raise ModelError("the second half of the data is bad")
    return train(group, folder, "idle", "failing")


def told(group: Group, folder: Path) -> None:
    """Uses all that a group offers; what this process then has is in its own folder, as without a common disk."""
    own = folder / str(group.rank)
    own.mkdir()
    if group.leads:
        (own / "file.bin").write_bytes(bytes(range(256)) * 1000)
        (own / "tree" / "deep").mkdir(parents=True)
        (own / "tree" / "deep" / "empty").touch()
        (own / "tree" / "one").write_text("1")
    group.broadcast_file(own / "file.bin")
    group.broadcast_file(own / "tree")
    training = Training(job(own, group, Recorder()))
    training.checkpoint().save({"of": group.rank})
    state = training.checkpoint().load()
    assert state is not None
    answer = [state["of"], list(training.group.part(range(5))), group.add(group.rank + 1), group.share(group.rank)]
    (own / "answer").write_text(json.dumps(answer))


def wait(group: Group, folder: Path) -> None:
    """Says that it is there, and waits: process 0 in Python, the others in gloo."""
    (folder / str(os.getpid())).touch()
    while group.leads:
        time.sleep(0.1)
    group.share(None)
