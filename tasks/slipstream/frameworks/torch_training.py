"""Training with PyTorch: one loop that resumes after a kill, for train functions, distillation and pruning."""

import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from slipstream.data import Data, Split
from slipstream.errors import DataError, ModelError, SpecError
from slipstream.frameworks import torch_distributed
from slipstream.frameworks.base import ALONE, Group, Job, Schedule, SoftTargets

log = logging.getLogger(__name__)

Loss = Callable[..., Any]
"""(logits, labels) → mean loss; with soft targets (logits, labels, teacher's logits) → mean loss."""

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
HELD_OUT = 0.05
"""Share of the training split that is only ever evaluated on, so that the test split stays unseen."""


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
        loss: Loss = functional.cross_entropy,
    ) -> None:
        """Train in place with SGD (Nesterov) and a one-cycle learning rate; resumes at the last whole epoch.

        May be called several times, such as for a warm-up and the rest; each call has its own checkpoint.
        """
        self._fits += 1
        fit(network, self._job, Schedule(epochs, learning_rate, batch_size), f"fit-{self._fits}", loss=loss)

    def log(self, epoch: int, **figures: float) -> None:
        """Record figures of an epoch in MLflow."""
        self._job.progress.metrics(figures, step=epoch)

    def checkpoint(self, name: str = "own") -> Checkpoint:
        """A checkpoint for a loop of your own."""
        return Checkpoint(self._job.folder / f"{name}.pt", self._job.group)


def distillation_loss(temperature: float, weight: float) -> Loss:
    """Hinton et al. 2015: weight · T² · KL(teacher ‖ student at temperature T) + (1 − weight) · cross entropy.

    T² keeps the gradient of the soft part in proportion when T changes (their section 2).
    """

    def loss(logits: Any, labels: Any, teacher: Any) -> Any:
        soft = functional.kl_div(
            functional.log_softmax(logits / temperature, dim=1),
            functional.log_softmax(teacher / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return weight * temperature**2 * soft + (1 - weight) * functional.cross_entropy(logits, labels)

    return loss


def seed_everything(seed: int) -> None:
    """Seed PyTorch's and NumPy's global generators, and choose deterministic kernels where there are any."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    torch.use_deterministic_algorithms(True, warn_only=True)


def hold_out(samples: int, seed: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices to train on and indices to validate on. Raises DataError below two samples."""
    if samples < 2:
        raise DataError(f"data: the training split has {samples} samples; training needs at least 2")
    order = np.random.default_rng(seed).permutation(samples)
    held = max(int(samples * HELD_OUT), 1)
    return order[held:], order[:held]


def fit(
    network: Any,
    job: Job,
    schedule: Schedule,
    name: str,
    *,
    loss: Loss = functional.cross_entropy,
    soft: SoftTargets | None = None,
) -> None:
    """Train in place. Killed at any moment and called again, it ends with the same weights.

    After each epoch come the metrics `train_loss`, `top1` (held-out part of the training split, percent) and `lr`,
    then the checkpoint: a kill between the two repeats a metric and loses nothing.
    Raises ModelError when the loss is no longer a number.
    """
    loop = _Loop(network, job, schedule, loss, soft)
    checkpoint = Checkpoint(job.folder / f"{name}.pt", job.group)
    first = loop.restore(checkpoint)
    before = schedule.epochs_before
    for epoch in range(first, schedule.epochs):
        figures = {"train_loss": loop.epoch(epoch), "top1": loop.validate(), "lr": loop.learning_rate()}
        if job.group.leads:
            said = "epoch %d: train_loss %.4f, top1 %.2f %%"
            log.info(said, before + epoch + 1, figures["train_loss"], figures["top1"])
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
        self.tensors = [torch.from_numpy(split.inputs), torch.from_numpy(split.labels)]
        if soft is not None:
            self.tensors.append(torch.from_numpy(soft.logits))
            self.loss = distillation_loss(soft.temperature, soft.weight)
        training, held_out = hold_out(len(split), job.seed)
        self.indices, self.held_out = torch.from_numpy(training), torch.from_numpy(held_out)
        self.batch_size = min(schedule.batch_size, len(training))
        self.batches = len(training) // self.batch_size  # batch norm cannot take a last batch of one: drop it
        _require_shares(self.batch_size, self.group)
        if self.tensors[0].ndim == 4:
            # Twice as fast as NCHW in PyTorch's CPU convolutions; BF16 autocast is 5 to 20 times slower in training.
            network.to(memory_format=torch.channels_last)
        network.to(self.device)
        self.trained = self.group.wrap(network)
        self.optimizer = torch.optim.SGD(
            network.parameters(), schedule.learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, schedule.learning_rate, total_steps=self.batches * schedule.epochs
        )

    def epoch(self, epoch: int) -> float:
        """One pass; the mean loss."""
        self.network.train()
        self._seed(epoch)
        # The order depends on seed and epoch alone, so that a resumed training sees the same one.
        order = np.random.default_rng((self.job.seed, self.schedule.epochs_before + epoch))
        shuffled = self.indices[torch.from_numpy(order.permutation(len(self.indices)))]
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
        """Top-1 on the held-out part of the training split, in percent."""
        mine, right = self.group.part(self.held_out), 0
        if len(mine):
            answers = logits(self.network, self.tensors[0][mine].numpy())
            right = int((answers.argmax(1) == self.tensors[1][mine].numpy()).sum())
        return self.group.add(right) / len(self.held_out) * 100

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


def logits(network: Any, inputs: npt.NDArray[Any], batch_size: int = 512) -> npt.NDArray[np.float32]:
    """(N, …) inputs to (N, classes) float32 outputs in evaluation mode."""
    network.eval()
    place = next((p.device for p in network.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        batches = (torch.tensor(inputs[i : i + batch_size]) for i in range(0, len(inputs), batch_size))
        outputs: npt.NDArray[np.float32] = torch.cat([network(b.to(place)).float().cpu() for b in batches]).numpy()
    return outputs


def _require_shares(batch_size: int, group: Group) -> None:
    """Raise SpecError unless every process gets two samples of each batch: batch norm cannot take one."""
    if group.size > 1 and batch_size < 2 * group.size:
        raise SpecError(
            f"training.workers: a batch of {batch_size} is too small for {group.size} processes; train with larger "
            "batches or fewer workers"
        )
