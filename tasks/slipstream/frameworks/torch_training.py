"""Training with PyTorch: one loop that resumes after a kill, for train functions, distillation and pruning."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slipstream.contract.arrays import Array, Float32Array
from slipstream.data import tokens
from slipstream.data.splits import Split
from slipstream.errors import ModelError, SpecError
from slipstream.frameworks import torch_distributed, training
from slipstream.frameworks.base import ALONE, Group, Job, Schedule, SoftTargets
from slipstream.frameworks.torch_losses import Loss, loss_of
from slipstream.frameworks.training import DECOUPLED_WEIGHT_DECAY, MOMENTUM, WEIGHT_DECAY, hold_out
from slipstream.home import replacing
from slipstream.measure.metrics.base import metric_for, value

log = logging.getLogger(__name__)


class Checkpoint:
    """State of a training in progress, in one file that is always complete: written aside, flushed, renamed.

    In a group, process 0 has the file and shares its content; it is the same file with one process and with many.
    """

    def __init__(self, path: Path, group: Group = ALONE) -> None:
        self.path, self._group = path, group

    def load(self) -> dict[str, Any] | None:
        """Return the last saved state, or None at the first attempt. Only tensors and numbers are unpickled."""
        state: dict[str, Any] | None = None
        if self._group.leads and self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        return self._group.share(state)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state: tensors, numbers, strings, and lists and dicts of them."""
        if not self._group.leads:
            return
        with replacing(self.path) as file:
            torch.save(dict(state), file)


class Training(training.Training):
    """Input of a train function: `def train(training, **params) -> torch.nn.Module`.

    Most call `fit` once and return the network:

        network = resnet()
        training.fit(network, epochs=4, learning_rate=0.1)
        return network

    A function with a custom loop keeps its state in a checkpoint, and so survives a kill as well:

        checkpoint = training.checkpoint()
        state = checkpoint.load() or {"epoch": 0, "network": network.state_dict()}
        network.load_state_dict(state["network"])
        for epoch in range(state["epoch"], epochs):
            ...
            training.log(epoch, train_loss=loss)
            checkpoint.save({"epoch": epoch + 1, "network": network.state_dict()})

    With `training.workers` above 1 every process calls the function. `fit` then trains together; a custom loop
    does the same work in each process, unless it splits it through `group`. The network of process 0 is used.
    Parameters that do not require gradients stay as they are.

    Random numbers are seeded before the function is called.
    """

    @property
    def group(self) -> Group:
        """The processes that train together: `rank`, `size`, `part` of a batch, `wrap` of a network, and more."""
        return self._job.group

    def checkpoint(self, name: str = "own") -> Checkpoint:
        """Return a checkpoint for a custom loop."""
        return Checkpoint(self._job.folder / f"{name}.pt", self._job.group)

    def _fit(self, network: torch.nn.Module, schedule: Schedule, name: str, loss: Loss | None) -> None:
        fit(network, self._job, schedule, name, loss=loss)


def seed_everything(seed: int) -> None:
    """Seed PyTorch's and NumPy's global generators, and choose deterministic kernels where available."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    torch.use_deterministic_algorithms(True, warn_only=True)


def fit(
    network: torch.nn.Module,
    job: Job,
    schedule: Schedule,
    name: str,
    *,
    loss: Loss | None = None,
    soft: SoftTargets | None = None,
) -> None:
    """Train in place as training.run describes. Raise ModelError if the loss becomes NaN or infinite."""
    loop = _Loop(network, job, schedule, loss_of(job, loss, soft), soft)
    training.run(loop, Checkpoint(job.folder / f"{name}.pt", job.group))
    network.eval().to("cpu")


class _Loop:
    """Network, optimizer and data of one `fit`.

    In a group, each process takes its part of every batch. Sums over the processes are weighted by the number of
    samples, so that loss and gradients are the means over the whole batch, as with one process. Two things differ from
    one process: batch norm normalizes each part by the part's own statistics (PyTorch's synchronized one exists only
    for GPUs), and its running statistics are the mean over the processes; and dropout draws different numbers in each
    process.
    """

    def __init__(
        self, network: torch.nn.Module, job: Job, schedule: Schedule, loss: Loss, soft: SoftTargets | None
    ) -> None:
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
        own, held_out = hold_out(len(split), job.seed)
        self.indices, self.held_out = torch.from_numpy(own), torch.from_numpy(held_out)
        self.batch_size = min(schedule.batch_size, len(own))
        self.batches = len(own) // self.batch_size  # batch norm cannot take a last batch of one: drop it
        self.lengths = tokens.lengths(split.inputs[own]) if tokens.is_token_ids(split.inputs) else None
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
        """Do one pass; return the mean loss."""
        self.network.train()
        self._seed(epoch)
        # The order depends only on seed and epoch, so that a resumed training sees the same one.
        random = np.random.default_rng((self.job.seed, self.schedule.epochs_before + epoch))
        order = random.permutation(len(self.indices))
        if self.lengths is not None:
            order = tokens.alike(order, self.lengths, self.batch_size, random)
        shuffled = self.indices[torch.from_numpy(order)]
        total = 0.0
        for number in range(self.batches):
            total += self._batch(shuffled[number * self.batch_size :][: self.batch_size], epoch)
            training.report(self, epoch, number + 1, total * self.group.size / (number + 1))
        self.group.average_buffers(self.network)
        return self.group.add(total) / self.batches

    def _seed(self, epoch: int) -> None:
        """Seed processes other than the first, and GPUs, from seed, epoch and rank only.

        Process 0's random numbers on processors continue from its checkpoint, as in a single process.
        """
        sequence = np.random.SeedSequence((self.job.seed, self.schedule.epochs_before + epoch, self.group.rank))
        seed = int(sequence.generate_state(1)[0])
        if not self.group.leads:
            torch.manual_seed(seed)
        elif self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _batch(self, indices: torch.Tensor, epoch: int) -> float:
        """Do one step on this process's part of a batch; return its loss, weighted by its share."""
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

    def validate(self) -> float:
        """Return the metric on the held-out part of the training split, in percent.

        Scores of samples are added up over the processes; a metric of all samples is left to process 0.
        """
        if not self.metric.mean:
            return self.group.add(100 * self._score(self.held_out) if self.group.leads else 0.0)
        mine = self.group.part(self.held_out)
        total = self._score(mine) * len(mine) if len(mine) else 0.0
        return self.group.add(total) / len(self.held_out) * 100

    def _score(self, indices: torch.Tensor) -> float:
        answers, labels = logits(self.network, self.tensors[0][indices].numpy()), self.labels[indices.numpy()]
        self.metric.check(answers, labels, "the network in training", ModelError)
        return value(self.metric, self.metric.evaluate(answers, labels))

    def learning_rate(self) -> float:
        """Return the rate after the last batch."""
        return float(self.scheduler.get_last_lr()[0])

    def state(self, epochs_done: int) -> dict[str, Any]:
        """Return everything that determines how training continues."""
        return {
            "epochs_done": epochs_done,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> int:
        """Continue from a state; return the number of completed epochs."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        return int(state["epochs_done"])


def _optimizer(network: torch.nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters that are trained."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(parameters, schedule.learning_rate, weight_decay=DECOUPLED_WEIGHT_DECAY)
    return torch.optim.SGD(parameters, schedule.learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def _answer(answer: object) -> torch.Tensor:
    """Return a network's answer in float32. Raise ModelError if it is not a single tensor."""
    if not isinstance(answer, torch.Tensor):
        raise ModelError(
            f"the network answers a {type(answer).__name__}, but must answer one tensor; wrap it in a module whose "
            "forward returns the part to optimize"
        )
    return answer.float().cpu()


def logits(network: torch.nn.Module, inputs: Array) -> Float32Array:
    """Return (N, classes) float32 outputs for inputs (N, …), in evaluation mode.

    Images are processed in channels_last, which the network's weights keep afterwards.
    """
    network.eval()
    place = next((p.device for p in network.parameters()), torch.device("cpu"))
    layout = torch.channels_last if inputs.ndim == 4 else torch.contiguous_format
    if inputs.ndim == 4:
        network.to(memory_format=layout)
    size = _evaluation_batch(inputs)
    with torch.inference_mode():
        parts = (inputs[i : i + size] for i in range(0, len(inputs), size))
        batches = (torch.tensor(tokens.trim(part)).to(place, memory_format=layout) for part in parts)
        outputs: Float32Array = torch.cat([_answer(network(b)) for b in batches]).numpy()
    return outputs


EVALUATION_BYTES, EVALUATION_BATCH = 4 * 2**20, 128
"""Batches whose activations leave the processor's cache are slower. The demo's ResNet-14 answered 1.8 times as many
images a second with batches of 128 in channels_last as with 512 in NCHW (2 cores, AVX-512, busy machine)."""


def _evaluation_batch(inputs: Array) -> int:
    """Return the samples of a batch: 128, or fewer if a sample is large."""
    sample_bytes = max(inputs[:1].nbytes, 1)
    return int(np.clip(EVALUATION_BYTES // sample_bytes, 1, EVALUATION_BATCH))


def _trim(inputs: torch.Tensor) -> torch.Tensor:
    """Return a batch without columns that are all padding, if it is token ids (N, T)."""
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
