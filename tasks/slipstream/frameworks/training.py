"""The common parts of training in every framework: a train function's input, the held-out split, the epochs.

A framework supplies a `Loop`, its network with optimizer and data, and a checkpoint that it can write.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from slipstream.data.splits import Data
from slipstream.errors import DataError
from slipstream.frameworks.base import Job, Network, Schedule
from slipstream.measure.metrics.base import Metric
from slipstream.spec import Optimizer

log = logging.getLogger(__name__)

HELD_OUT = 0.05
"""Share of the training split that is only evaluated on, so that the test split stays unseen."""
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
DECOUPLED_WEIGHT_DECAY = 0.01
"""AdamW's own default; in SGD the decay is part of the gradient, and therefore has another size."""

Loss = Callable[..., Any]
State: TypeAlias = Any
"""State of a training under way; only the loop that wrote it reads it."""


def hold_out(samples: int, seed: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return indices to train on and indices to validate on. Raise DataError for fewer than two samples."""
    if samples < 2:
        raise DataError(f"data: the training split has {samples} samples; training needs at least 2")
    order = np.random.default_rng(seed).permutation(samples)
    held = max(int(samples * HELD_OUT), 1)
    return order[held:], order[:held]


class Training:
    """Input of a train function. A framework subclasses it to define how it trains and keeps its state."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._fits = 0

    @property
    def data(self) -> Data:
        """The data set. The test split is for the gates: do not train on it."""
        return self._job.data

    @property
    def seed(self) -> int:
        """The spec's seed."""
        return self._job.seed

    def fit(
        self,
        network: Network,
        *,
        epochs: int,
        learning_rate: float = 0.1,
        batch_size: int = 128,
        optimizer: Optimizer = "sgd",
        loss: Loss | None = None,
    ) -> None:
        """Train in place with a one-cycle learning rate; resume at the last completed epoch.

        `optimizer` is `sgd` (Nesterov) or `adamw`, which transformers need and which requires rates of about 1e-4.
        `loss` takes outputs and labels and returns the mean over the batch; the default is the spec's `model.loss`, or
        else cross entropy. It may be called several times, for example for a warm-up and the rest; each call has its
        own checkpoint.
        """
        self._fits += 1
        schedule = Schedule(epochs, learning_rate, batch_size, optimizer=optimizer)
        self._fit(network, schedule, f"fit-{self._fits}", loss)

    def log(self, epoch: int, **figures: float) -> None:
        """Record figures of an epoch in MLflow."""
        self._job.progress.metrics(figures, step=epoch)

    def _fit(self, network: Network, schedule: Schedule, name: str, loss: Loss | None) -> None:
        raise NotImplementedError


class Checkpoint(Protocol):
    """State of a training in progress, in one file that is always complete."""

    path: Path

    def load(self) -> State | None:
        """Return the last saved state, or None at the first attempt."""
        ...

    def save(self, state: State) -> None:
        """Replace the state."""
        ...


class Loop(Protocol):
    """Network, optimizer and data of one training."""

    job: Job
    schedule: Schedule
    metric: Metric
    batches: int
    """Steps per epoch."""

    def epoch(self, epoch: int) -> float:
        """Do one pass; return the mean loss."""
        ...

    def validate(self) -> float:
        """Return the metric on the held-out part of the training split, in percent."""
        ...

    def learning_rate(self) -> float:
        """Return the rate after the last batch."""
        ...

    def state(self, epochs_done: int) -> State:
        """Return everything that determines how training continues."""
        ...

    def restore(self, state: State) -> int:
        """Continue from a state; return the number of completed epochs."""
        ...


def run(loop: Loop, checkpoint: Checkpoint) -> None:
    """Run all remaining epochs. If killed at any moment and called again, the result has the same weights.

    After each epoch come the metrics `train_loss`, the spec's (held-out part of the training split, percent) and `lr`,
    then the checkpoint: a kill between the two repeats a metric and loses nothing.
    """
    job, schedule, metric = loop.job, loop.schedule, loop.metric.name
    before = schedule.epochs_before
    for epoch in range(_resumed(loop, checkpoint), schedule.epochs):
        figures = {"train_loss": loop.epoch(epoch), metric: loop.validate(), "lr": loop.learning_rate()}
        if job.group.leads:
            template = "epoch %d: train_loss %.4f, %s %.2f %%"
            log.info(template, before + epoch + 1, figures["train_loss"], metric, figures[metric])
        job.progress.metrics(figures, step=before + epoch)
        checkpoint.save(loop.state(epoch + 1))


def report(loop: Loop, epoch: int, number: int, loss: float) -> None:
    """Report progress: `number` batches of an epoch, with their mean loss."""
    plan = loop.schedule
    batches_done = (plan.epochs_before + epoch) * loop.batches + number
    total = (plan.epochs_in_step or plan.epochs) * loop.batches
    loop.job.progress.progress(batches_done, total, "batches", epoch=plan.epochs_before + epoch + 1, loss=loss)


def _resumed(loop: Loop, checkpoint: Checkpoint) -> int:
    state = checkpoint.load()
    if state is None:
        return 0
    epochs_done = loop.restore(state)
    if loop.job.group.leads:
        log.info("resuming %s after %d of %d epochs", checkpoint.path.stem, epochs_done, loop.schedule.epochs)
    return epochs_done
