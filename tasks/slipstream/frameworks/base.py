"""The framework seam: candidates, and what a module under frameworks/ implements for them.

A candidate folder holds `candidate.json` (a `CandidateManifest`), `model.onnx`, and the framework's own files
(weights as safetensors, never a pickle). A quantized candidate has `model.onnx` with Q/DQ nodes and nothing else.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

from slipstream.contract import Document
from slipstream.contract.arrays import Array, Float32Array
from slipstream.data.splits import Data, Split
from slipstream.digests import versions
from slipstream.errors import ModelError, SpecError
from slipstream.frameworks import launched
from slipstream.plugins import FRAMEWORKS
from slipstream.spec import Call, Cluster, Optimizer, Prune, Quantize, Spec

T = TypeVar("T")

Network: TypeAlias = object
"""A framework's own network, opaque outside that framework's modules: a `torch.nn.Module`, a `keras_files.Network`
or an `onnx.Network`."""

MANIFEST = "candidate.json"
ONNX = "model.onnx"
WEIGHTS = "weights.safetensors"
INPUT, OUTPUT = "input", "output"
"""Tensor names in every ONNX file and in the Open Inference Protocol."""


class CandidateManifest(Document):
    """Contents of `candidate.json`."""

    framework: str
    architecture: Call | None
    """Builds the network that the weights fit into; None once only the ONNX form exists."""
    input_shape: tuple[int, ...]
    """Shape of one sample, without the batch dimension; -1 where it varies between batches."""
    input_dtype: str
    output_shape: tuple[int, ...]
    """Shape of one answer, without the batch dimension; -1 where it varies."""
    parameters: int
    """Number of weights."""
    quantized: bool = False
    quantization: Quantize | None = None
    """Settings that it was quantized with, also used by engines that do their own quantization (LiteRT)."""
    sparsity: float = 0.0
    """Share of the baseline's channels that were removed, or of the weights that are zero, depending on
    `prune.method`."""
    unique_weights: int = 0
    """Largest number of distinct values in a layer's clustered weights; 0 if they are not clustered."""


class Eager(Protocol):
    """A candidate run by its own framework."""

    def run(self, batch: Array) -> Array:
        """Return (N, …) float32 outputs for inputs (N, …)."""
        ...


class Progress(Protocol):
    """Receiver of training progress; `tracking.StepRun` is one."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record figures of an epoch."""
        ...

    def progress(self, done: int, total: int, unit: str = "", **figures: float) -> None:
        """Report the progress of the step."""
        ...


class Group:
    """The processes that train together. This class represents a single process; frameworks subclass it for more.

    Every process must call the collective methods in the same order: they wait for one another.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this is process 0, the only one that records, saves and answers."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Return process 0's value in every process."""
        return value

    def add(self, value: float) -> float:
        """Return the sum of all processes' values, in every process."""
        return value

    def part(self, samples: Any) -> Any:
        """Return this process's share of a sequence, a slice; shares are disjoint and differ by one sample at most."""
        bounds = [len(samples) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return samples[bounds[0] : bounds[1]]

    def wrap(self, network: T) -> T:
        """Return the network, whose backward pass leaves the mean of all processes' gradients in each of them."""
        return network

    def average_buffers(self, network: Network) -> None:
        """Set floating-point buffers, such as batch norm's running statistics, to the mean over all processes."""

    def broadcast_file(self, path: Path) -> None:
        """Copy a file or folder of process 0 to the same path of every process that lacks it.

        Its name must identify its content: an existing copy is taken to be the same.
        """

    @contextmanager
    def first_error_wins(self) -> Iterator[None]:
        """Wrap the work so that, if several processes fail, each raises the error of the one that failed first."""
        yield

    def leave(self) -> None:
        """Leave the group when the work is done."""


ALONE = Group()
"""One process."""


@dataclass(frozen=True)
class Job:
    """Everything that training in a step works with."""

    data: Data
    seed: int
    folder: Path
    """Folder for checkpoints; the same again when a killed step is retried."""
    progress: Progress
    group: Group = ALONE
    loss: Call | None = None
    """The user's loss of outputs and labels; None means cross entropy."""
    metric: str = "top1"
    """Metric of the held-out part of the training split, for information."""


@dataclass(frozen=True)
class Schedule:
    """One training with a one-cycle learning rate (Smith and Topin 2018)."""

    epochs: int
    learning_rate: float
    """Peak of the cycle."""
    batch_size: int = 128
    epochs_before: int = 0
    """Epochs of the step done in earlier rounds; metrics and progress continue from there."""
    epochs_in_step: int | None = None
    """Epochs of the whole step; None if this training is all of it."""
    optimizer: Optimizer = "sgd"


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's answers for the training split, and their part in the loss (Hinton et al. 2015)."""

    logits: Float32Array
    """(N, …), in the order of the training split."""
    temperature: float
    weight: float
    """Share of the soft loss."""


class Pruner(Protocol):
    """A network that loses channels, round by round."""

    network: Network

    def prune(self, sparsity: float, round_to: int) -> None:
        """Remove channels until the share `sparsity` of the original ones is gone; widths stay multiples."""
        ...

    def figures(self) -> dict[str, float]:
        """Return `sparsity` (share of the architecture's channels removed), `macs` of one sample, `parameters`."""
        ...

    def save(self, folder: Path, samples: Split) -> "CandidateManifest":
        """Write the network, with the record of its removed channels, as a candidate folder."""
        ...


class Framework(Protocol):
    """Differences between PyTorch, Keras and ONNX. A network is the framework's own object."""

    def load_eager(self, candidate: Path, threads: int | None = None) -> Eager:
        """Return the candidate, run by the framework itself in FP32: the familiar baseline."""
        ...

    def load(self, candidate: Path) -> Network:
        """Return the trained network of a candidate folder. Raise ModelError if the weights do not fit."""
        ...

    def find_model(self, path: Path) -> Path:
        """Return the path of the one trained model in a folder, such as a registered version's, or a complete model
        file.

        Raise ModelError, saying what to do.
        """
        ...

    def load_weights(self, weights: Path, architecture: Call | None) -> Network:
        """Return the network at `find_model`'s path. Raise ModelError if the weights do not fit the architecture."""
        ...

    def save(self, network: Network, architecture: Call | None, samples: Split, folder: Path) -> "CandidateManifest":
        """Write a candidate folder. `samples` are a few real ones on which its ONNX form must agree."""
        ...

    def logits(self, network: Network, inputs: Array) -> Float32Array:
        """Return (N, classes) outputs for inputs (N, …)."""
        ...


class Trainer(Framework, Protocol):
    """A framework whose models can be trained: all but ONNX."""

    def build(self, architecture: Call | None, seed: int) -> Network:
        """Return the untrained network. Raise ModelError if the function does not return one, or is missing."""
        ...

    def train(self, function: Call, job: Job) -> Network:
        """Return the network that the user's train function trains on the data."""
        ...

    def fit(self, network: Network, job: Job, schedule: Schedule, name: str, soft: SoftTargets | None = None) -> None:
        """Train in place on the training split, resuming from the checkpoint `name` if there is one."""
        ...


@runtime_checkable
class Prunes(Trainer, Protocol):
    """A framework that removes channels: `channels` is among its `prune_methods` in the table."""

    def pruner(self, candidate: Path) -> Pruner:
        """Return a pruner for a candidate's network."""
        ...

    def require_prunable(self, network: Network, samples: Split, prune: Prune) -> None:
        """Raise ModelError for a network that cannot be pruned as the section says; the network is unchanged."""
        ...


@runtime_checkable
class Distributes(Trainer, Protocol):
    """A framework that trains in several processes: `distributed` in the table."""

    def join(self, place: launched.Place) -> Group:
        """Join the group that a launcher started this process for."""
        ...

    def launch(self, workers: int, function: Callable[..., T], *arguments: object) -> T:
        """Call `function(group, *arguments)` in that many processes on this machine; return process 0's result.

        Raise the error of the process that failed first.
        """
        ...


class Constrained(Protocol):
    """A network whose weights are constrained to be sparse, clustered or rounded, during and after training."""

    network: Network

    def finish(self) -> dict[str, float]:
        """Remove what only training needed; return measured `sparsity`, `unique_weights`, `parameters` of the result.

        Raise ModelError if it does not meet the request, or has lost the effect of earlier techniques.
        """
        ...

    def save(self, folder: Path, samples: Split) -> "CandidateManifest":
        """Write the finished network as a candidate folder."""
        ...


@runtime_checkable
class Constrains(Trainer, Protocol):
    """A framework that trains under constraints."""

    def constrain(
        self, candidate: Path, section: Prune | Cluster | Quantize, job: Job, schedule: Schedule
    ) -> Constrained:
        """Return the candidate's network, constrained as the section says, to be trained by `fit` with this job and
        schedule.

        Raise ModelError if the network has nothing to constrain, SpecError if the schedule is too short for it.
        """
        ...


def framework_for(name: str) -> Framework:
    """Return the framework that a spec names. Raise ModelError if its libraries are not in this environment."""
    try:
        module = importlib.import_module(FRAMEWORKS[name].module)
    except ImportError as error:
        raise ModelError(f"framework {name}: {error}; this environment lacks its libraries") from error
    framework: Framework = module.FRAMEWORK
    return framework


def trainer_for(name: str) -> Trainer:
    """Return the framework that a spec names, for training. Raise ModelError if its models cannot be trained."""
    framework = framework_for(name)
    if not FRAMEWORKS[name].trains:
        raise ModelError(
            f"framework {name}: its models cannot be trained; name the framework that the model was made with, or "
            "leave out what trains it"
        )
    return cast(Trainer, framework)


def prunes(name: str) -> Prunes:
    """Return the framework that a spec names, to remove channels with. Raise SpecError for one that cannot."""
    framework = trainer_for(name)
    if not isinstance(framework, Prunes):
        raise SpecError(f"prune.method: channels cannot be removed from {name} networks; choose another method")
    return framework


def constrains(name: str) -> Constrains:
    """Return the framework that a spec names, to train under constraints with. Raise SpecError for one that cannot."""
    framework = trainer_for(name)
    if not isinstance(framework, Constrains):
        raise SpecError(f"model.framework: {name} networks are not trained with sparse, clustered or rounded weights")
    return framework


def distributes(name: str) -> Distributes:
    """Return the framework that a spec names, to train in several processes. Raise SpecError for one that cannot."""
    framework = trainer_for(name)
    if not isinstance(framework, Distributes):
        raise SpecError(f"training.workers: {name} networks are trained by one process; leave it 1")
    return framework


def toolchain(name: str) -> dict[str, str]:
    """Return the installed versions that determine a framework's results, without loading it."""
    return versions(*FRAMEWORKS[name].distributions)


def group_of(name: str) -> Group:
    """Return the group that this process belongs to: alone, unless a launcher started it with others."""
    place = launched.place()
    return ALONE if place is None else distributes(name).join(place)


def read_manifest(folder: Path) -> CandidateManifest:
    """Read `candidate.json`. Raise ModelError."""
    try:
        return CandidateManifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a candidate folder: {error}") from error


def require_own_architecture(folder: Path, spec: Spec) -> None:
    """Raise ModelError if the candidate in a folder names a function that the spec does not name.

    Loading calls that function with the manifest's arguments, and only the spec may determine what is called. Folders
    without a candidate pass.
    """
    if not (folder / MANIFEST).exists():
        return
    architecture = read_manifest(folder).architecture
    if architecture is not None and architecture not in spec.architectures:
        raise ModelError(
            f"{folder / MANIFEST}: architecture {architecture.function} with {architecture.params} is not the spec's "
            "model.architecture or distill.student, so it is not called; run the step that made this candidate again"
        )


def load_eager(folder: Path, threads: int | None = None) -> Eager:
    """Load a candidate into its own framework."""
    return framework_for(read_manifest(folder).framework).load_eager(folder, threads)
