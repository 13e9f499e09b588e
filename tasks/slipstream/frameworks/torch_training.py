"""Training with PyTorch: one loop that resumes after a kill, for train functions, distillation and pruning."""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slipstream import tokens
from slipstream.data import Data, Split
from slipstream.errors import ModelError, SpecError
from slipstream.frameworks import torch_distributed
from slipstream.frameworks.base import ALONE, Group, Job, Schedule, SoftTargets
from slipstream.frameworks.held_out import hold_out
from slipstream.frameworks.torch_losses import Loss, loss_of
from slipstream.measure.metrics.base import metric_for, value
from slipstream.spec import Optimizer

log = logging.getLogger(__name__)

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
DECOUPLED_WEIGHT_DECAY = 0.01
"""AdamW's own default; in SGD the decay is part of the gradient, and so of another size."""


class Checkpoint:
    """State of a training under way, in one file that is always whole: written aside, flushed, renamed.

    In a group process 0 has the file and the others are told; it is the same file with one process and with many.
    """

    def __init__(self, path: Path, group: Group = ALONE) -> None:
        self.path, self._group = path, group

    def load(self) -> dict[str, Any] | None:
        """The last state that was saved; None at the first attempt. Nothing is unpickled but tensors and numbers."""
        state: dict[str, Any] | None = None
        if self._group.leads and self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        return self._group.share(state)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state: tensors, numbers, strings, and lists and dicts of them."""
        if not self._group.leads:
            return
        aside = self.path.with_suffix(".aside")
        with aside.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)


class Training:
    """What a train function is given: `def train(training, **params) -> torch.nn.Module`.

    Most call `fit` once and return the network:

        network = resnet()
        training.fit(network, epochs=4, learning_rate=0.1)
        return network

    A function with a loop of its own keeps its state in a checkpoint, and so survives a kill as well:

        checkpoint = training.checkpoint()
        state = checkpoint.load() or {"epoch": 0, "network": network.state_dict()}
        network.load_state_dict(state["network"])
        for epoch in range(state["epoch"], epochs):
            ...
            training.log(epoch, train_loss=loss)
            checkpoint.save({"epoch": epoch + 1, "network": network.state_dict()})

    With `training.workers` above 1 every process calls the function. `fit` then trains together; a loop of its own
    does the same work in each process, unless it shares it out by `group`. The network of process 0 is taken.

    Random numbers are seeded before the function is called.
    """

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

    @property
    def group(self) -> Group:
        """The processes that train together: `rank`, `size`, `part` of a batch, `wrap` of a network, and more."""
        return self._job.group

    def fit(
        self,
        network: Any,
        *,
        epochs: int,
        learning_rate: float = 0.1,
        batch_size: int = 128,
        optimizer: Optimizer = "sgd",
        loss: Loss | None = None,
    ) -> None:
        """Train in place with a one-cycle learning rate; resumes at the last whole epoch.

        `optimizer` is `sgd` (Nesterov) or `adamw`, which transformers need and which wants rates of about 1e-4.
        Parameters that do not require gradients stay as they are.
        `loss` takes outputs and labels and returns the mean over the batch; without it that is the spec's `model.loss`,
        or else cross entropy. May be called several times, such as for a warm-up and the rest; each call has its own
        checkpoint.
        """
        self._fits += 1
        schedule = Schedule(epochs, learning_rate, batch_size, optimizer=optimizer)
        fit(network, self._job, schedule, f"fit-{self._fits}", loss=loss)

    def log(self, epoch: int, **figures: float) -> None:
        """Record figures of an epoch in MLflow."""
        self._job.progress.metrics(figures, step=epoch)

    def checkpoint(self, name: str = "own") -> Checkpoint:
        """A checkpoint for a loop of your own."""
        return Checkpoint(self._job.folder / f"{name}.pt", self._job.group)


def seed_everything(seed: int) -> None:
    """Seed PyTorch's and NumPy's global generators, and choose deterministic kernels where there are any."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    torch.use_deterministic_algorithms(True, warn_only=True)


def fit(
    network: Any,
    job: Job,
    schedule: Schedule,
    name: str,
    *,
    loss: Loss | None = None,
    soft: SoftTargets | None = None,
) -> None:
    """Train in place. Killed at any moment and called again, it ends with the same weights.

    After each epoch come the metrics `train_loss`, the spec's (held-out part of the training split, percent) and `lr`,
    then the checkpoint: a kill between the two repeats a metric and loses nothing.
    Raises ModelError when the loss is no longer a number.
    """
    loop = _Loop(network, job, schedule, loss_of(job, loss, soft), soft)
    metric = loop.metric.name
    checkpoint = Checkpoint(job.folder / f"{name}.pt", job.group)
    first = loop.restore(checkpoint)
    before = schedule.epochs_before
    for epoch in range(first, schedule.epochs):
        figures = {"train_loss": loop.epoch(epoch), metric: loop.validate(), "lr": loop.learning_rate()}
        if job.group.leads:
            said = "epoch %d: train_loss %.4f, %s %.2f %%"
            log.info(said, before + epoch + 1, figures["train_loss"], metric, figures[metric])
        job.progress.metrics(figures, step=before + epoch)
        checkpoint.save(loop.state(epoch + 1))
    network.eval().to("cpu")


class _Loop:
    """Network, optimizer and data of one `fit`.

    In a group each process takes its part of every batch. What the processes add up is weighted by the samples in it,
    so that loss and gradients are the means over the whole batch, as with one process. Two things differ from one
    process: batch norm normalizes each part by the part's own statistics (PyTorch's synchronized one exists for GPUs
    only), and its running statistics are the mean over the processes; and dropout draws anew in each process.
    """

    def __init__(self, network: Any, job: Job, schedule: Schedule, loss: Loss, soft: SoftTargets | None) -> None:
        self.network, self.job, self.schedule, self.loss = network, job, schedule, loss
        self.group, self.device = job.group, torch_distributed.device()
        split: Split = job.data.train
        self.metric, self.labels = metric_for(job.metric), split.labels
        # PyTorch's losses take classes as int64 only.
        classes = np.issubdtype(split.labels.dtype, np.integer)
        labels = split.labels.astype(np.int64) if classes else split.labels
        self.tensors = [torch.from_numpy(split.inputs), torch.from_numpy(labels)]
        if soft is not None:
            self.tensors.append(torch.from_numpy(soft.logits))
        training, held_out = hold_out(len(split), job.seed)
        self.indices, self.held_out = torch.from_numpy(training), torch.from_numpy(held_out)
        self.batch_size = min(schedule.batch_size, len(training))
        self.batches = len(training) // self.batch_size  # batch norm cannot take a last batch of one: drop it
        self.lengths = tokens.lengths(split.inputs[training]) if tokens.holds(split.inputs) else None
        _require_shares(self.batch_size, self.group)
        if self.tensors[0].ndim == 4:
            # Twice as fast as NCHW in PyTorch's CPU convolutions; BF16 autocast is 5 to 20 times slower in training.
            network.to(memory_format=torch.channels_last)
        network.to(self.device)
        self.trained = self.group.wrap(network)
        self.optimizer = _optimizer(network, schedule)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, schedule.learning_rate, total_steps=self.batches * schedule.epochs
        )

    def epoch(self, epoch: int) -> float:
        """One pass; the mean loss."""
        self.network.train()
        self._seed(epoch)
        # The order depends on seed and epoch alone, so that a resumed training sees the same one.
        random = np.random.default_rng((self.job.seed, self.schedule.epochs_before + epoch))
        order = random.permutation(len(self.indices))
        if self.lengths is not None:
            order = tokens.alike(order, self.lengths, self.batch_size, random)
        shuffled = self.indices[torch.from_numpy(order)]
        total = 0.0
        for number in range(self.batches):
            total += self._batch(shuffled[number * self.batch_size :][: self.batch_size], epoch)
            self._report(epoch, number + 1, total * self.group.size / (number + 1))
        self.group.average_buffers(self.network)
        return self.group.add(total) / self.batches

    def _seed(self, epoch: int) -> None:
        """Random numbers of processes other than the first, and on GPUs: from seed, epoch and rank alone.

        Those of process 0 on processors go on from its checkpoint, as those of a process on its own.
        """
        given = np.random.SeedSequence((self.job.seed, self.schedule.epochs_before + epoch, self.group.rank))
        seed = int(given.generate_state(1)[0])
        if not self.group.leads:
            torch.manual_seed(seed)
        elif self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _batch(self, indices: Any, epoch: int) -> float:
        """One step on this process's part of a batch; its loss, weighted by its share."""
        mine = self.group.part(indices)
        share = len(mine) / len(indices)
        inputs, *targets = (t[mine].to(self.device) for t in self.tensors)
        inputs = _trim(inputs)
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        loss = self.loss(self.trained(inputs), *targets)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(f"training: the loss is {value} in epoch {epoch + 1}; lower the learning rate")
        self.optimizer.zero_grad()
        (loss if self.group.size == 1 else loss * (share * self.group.size)).backward()
        self.optimizer.step()
        self.scheduler.step()
        return value * share

    def _report(self, epoch: int, number: int, loss: float) -> None:
        plan, progress = self.schedule, self.job.progress
        done = (plan.epochs_before + epoch) * self.batches + number
        total = (plan.epochs_in_step or plan.epochs) * self.batches
        progress.progress(done, total, epoch=plan.epochs_before + epoch + 1, loss=loss)

    def validate(self) -> float:
        """The metric on the held-out part of the training split, in percent.

        Scores of samples are added up over the processes; what is computed from all samples is left to process 0.
        """
        if not self.metric.mean:
            return self.group.add(100 * self._score(self.held_out) if self.group.leads else 0.0)
        mine = self.group.part(self.held_out)
        total = self._score(mine) * len(mine) if len(mine) else 0.0
        return self.group.add(total) / len(self.held_out) * 100

    def _score(self, indices: Any) -> float:
        answers, labels = logits(self.network, self.tensors[0][indices].numpy()), self.labels[indices.numpy()]
        self.metric.check(answers, labels, "the network in training", ModelError)
        return value(self.metric, self.metric.evaluate(answers, labels))

    def learning_rate(self) -> float:
        """Rate after the last batch."""
        return float(self.scheduler.get_last_lr()[0])

    def state(self, epochs_done: int) -> dict[str, Any]:
        """All that decides how training goes on."""
        return {
            "epochs_done": epochs_done,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
        }

    def restore(self, checkpoint: Checkpoint) -> int:
        """Go on from a checkpoint; epochs that are already done."""
        state = checkpoint.load()
        if state is None:
            return 0
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        if self.group.leads:
            said = "resuming %s after %d of %d epochs"
            log.info(said, checkpoint.path.stem, state["epochs_done"], self.schedule.epochs)
        return int(state["epochs_done"])


def _optimizer(network: Any, schedule: Schedule) -> Any:
    """The optimizer of all parameters that train."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(parameters, schedule.learning_rate, weight_decay=DECOUPLED_WEIGHT_DECAY)
    return torch.optim.SGD(parameters, schedule.learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def logits(network: Any, inputs: npt.NDArray[Any], batch_size: int = 512) -> npt.NDArray[np.float32]:
    """(N, …) inputs to (N, classes) float32 outputs in evaluation mode."""
    network.eval()
    place = next((p.device for p in network.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        parts = (inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size))
        batches = (torch.tensor(tokens.trim(part)) for part in parts)
        outputs: npt.NDArray[np.float32] = torch.cat([network(b.to(place)).float().cpu() for b in batches]).numpy()
    return outputs


def _trim(inputs: Any) -> Any:
    """A batch without the columns that are all padding, where it is token ids (N, T)."""
    if inputs.ndim != 2 or inputs.dtype != torch.int64:
        return inputs
    used = inputs.any(dim=0).nonzero()
    return inputs[:, : int(used[-1]) + 1 if len(used) else 1]


def _require_shares(batch_size: int, group: Group) -> None:
    """Raise SpecError unless every process gets two samples of each batch: batch norm cannot take one."""
    if group.size > 1 and batch_size < 2 * group.size:
        raise SpecError(
            f"training.workers: a batch of {batch_size} is too small for {group.size} processes; train with larger "
            "batches or fewer workers"
        )
