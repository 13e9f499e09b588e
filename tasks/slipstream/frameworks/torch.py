"""PyTorch: networks from the user's functions, weights as safetensors, ONNX for the engines.

A candidate folder holds `candidate.json`, `weights.safetensors`, `model.onnx` and, if channels were removed,
`pruning.json`: the history that is replayed on the architecture before the weights are loaded into it.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch

from slipstream.contract.arrays import Array, Float32Array
from slipstream.data import tokens
from slipstream.data.splits import Split
from slipstream.data.user_code import user_function
from slipstream.errors import ModelError
from slipstream.frameworks import torch_agreement, torch_distributed, torch_pruner, torch_training
from slipstream.frameworks.base import (
    INPUT,
    MANIFEST,
    ONNX,
    OUTPUT,
    WEIGHTS,
    CandidateManifest,
    Group,
    Job,
    Schedule,
    SoftTargets,
    read_manifest,
)
from slipstream.frameworks.launched import Place
from slipstream.spec import Call, Prune

log = logging.getLogger(__name__)

T = TypeVar("T")

OPSET = 20
NAMED = 5
"""Maximum number of misfitting weights that an error lists."""
RUNNING = ("running_mean", "running_var")
"""Buffers of norms that change during training."""


class TorchEager:
    """A candidate run by PyTorch in FP32."""

    def __init__(self, network: torch.nn.Module, threads: int | None) -> None:
        self._network = network.eval()
        if threads is not None:
            torch.set_num_threads(threads)

    def run(self, batch: Array) -> Array:
        """Return (N, …) float32 outputs for inputs (N, …)."""
        if not batch.flags.writeable:  # PyTorch shares memory and warns that it could write
            batch = batch.copy()
        with torch.inference_mode():
            outputs: Array = self._network(torch.from_numpy(batch)).float().numpy()
        return outputs


class TorchFramework:
    """See frameworks.base.Framework."""

    def load_eager(self, candidate: Path, threads: int | None = None) -> TorchEager:
        """Return the candidate in FP32. `threads` applies to the whole process: PyTorch has no other way."""
        return TorchEager(self.load(candidate), threads)

    def build(self, architecture: Call | None, seed: int) -> torch.nn.Module:
        """Return the untrained network. Raise ModelError if the function does not return a torch.nn.Module."""
        assert architecture is not None, "the spec refuses a torch model without an architecture"
        torch_training.seed_everything(seed)
        network = user_function(architecture)(**architecture.params)
        return _require_module(network, architecture)

    def load(self, candidate: Path) -> torch.nn.Module:
        """Return the trained network. Raise ModelError if the weights do not fit the architecture."""
        manifest = read_manifest(candidate)
        if manifest.architecture is None or manifest.quantized:
            raise ModelError(f"{candidate}: holds only an ONNX form; PyTorch needs the candidate before quantization")
        network = self.build(manifest.architecture, seed=0)
        torch_pruner.replay(network, candidate, torch_pruner.sample_of(manifest.input_shape, manifest.input_dtype))
        load_state(network, candidate / WEIGHTS, manifest.architecture)
        return network.eval()

    def find_model(self, path: Path) -> Path:
        """Return the one file of weights in a folder, or the file. Raise ModelError: pickled models are never
        loaded."""
        files = [path] if path.is_file() else sorted(path.rglob(WEIGHTS))
        if len(files) == 1:
            return files[0]
        raise ModelError(
            f"holds {len(files)} files {WEIGHTS} instead of one; pickled models are never loaded, so log the weights "
            f"with safetensors.torch.save_file(model.state_dict(), '{WEIGHTS}') and that file as the model"
        )

    def load_weights(self, weights: Path, architecture: Call | None) -> torch.nn.Module:
        """Return a network with weights from a safetensors file. Raise ModelError if they do not fit."""
        assert architecture is not None, "the spec refuses a torch model without an architecture"
        network = self.build(architecture, seed=0)
        load_state(network, weights, architecture)
        return network.eval()

    def save(
        self, network: torch.nn.Module, architecture: Call | None, samples: Split, folder: Path
    ) -> CandidateManifest:
        """Write a candidate folder. Raise ModelError for NaN weights, or if ONNX Runtime and PyTorch disagree."""
        return save(network, architecture, samples, folder)

    def logits(self, network: torch.nn.Module, inputs: Array) -> Float32Array:
        """Return (N, classes) outputs for inputs (N, …)."""
        return torch_training.logits(network, inputs)

    def train(self, function: Call, job: Job) -> torch.nn.Module:
        """Return the network that the user's train function returns. Raise ModelError if it returns something else."""
        torch_training.seed_everything(job.seed)
        network = user_function(function)(torch_training.Training(job), **function.params)
        return _require_module(network, function)

    def fit(
        self, network: torch.nn.Module, job: Job, schedule: Schedule, name: str, soft: SoftTargets | None = None
    ) -> None:
        """Train in place, resuming from the checkpoint `name`."""
        torch_training.seed_everything(job.seed)
        torch_training.fit(network, job, schedule, name, soft=soft)

    def pruner(self, candidate: Path) -> "CandidatePruner":
        """Return a pruner for a candidate's network."""
        return CandidatePruner(self, candidate)

    def require_prunable(self, network: torch.nn.Module, samples: Split, prune: Prune) -> None:
        """See Trainer."""
        sample = torch_pruner.sample_of(tokens.sample_shape(samples.inputs), str(samples.inputs.dtype))
        torch_pruner.require_prunable(network, sample, prune.sparsity[1], prune.round_to)

    def join(self, place: Place) -> Group:
        """Join the group that a launcher started this process for."""
        return torch_distributed.join(place)

    def launch(self, workers: int, function: Callable[..., T], *arguments: object) -> T:
        """Call `function(group, *arguments)` in that many processes; return process 0's result."""
        return torch_distributed.launch(workers, function, *arguments)


class CandidatePruner(torch_pruner.ChannelPruner):
    """A channel pruner that records which candidate its network came from."""

    def __init__(self, framework: TorchFramework, candidate: Path) -> None:
        manifest = read_manifest(candidate)
        network = framework.load(candidate)  # rejects a candidate without an architecture
        assert manifest.architecture is not None
        self._architecture = manifest.architecture
        sample = torch_pruner.sample_of(manifest.input_shape, manifest.input_dtype)
        whole = torch_pruner.widths(framework.build(self._architecture, seed=0), sample)
        super().__init__(network, sample, whole, torch_pruner.read_history(candidate))

    def save(self, folder: Path, samples: Split) -> CandidateManifest:
        """Write the network, with the record of its removed channels, as a candidate folder."""
        sparsity = self.figures()["sparsity"]
        manifest = save(self.network, self._architecture, samples, folder, sparsity=sparsity)
        torch_pruner.write_history(folder, self.history)
        return manifest


def save(
    network: torch.nn.Module, architecture: Call | None, samples: Split, folder: Path, *, sparsity: float = 0.0
) -> CandidateManifest:
    """Write weights, ONNX form and manifest into `folder`, which is created. Raise ModelError."""
    network = network.eval().to(memory_format=torch.contiguous_format)
    folder.mkdir(parents=True)
    state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in network.state_dict().items()}
    _require_sound(network, state, "the trained network")
    safetensors.torch.save_file(state, folder / WEIGHTS)
    inputs = samples.inputs[:8]
    outputs = torch_training.logits(network, inputs)
    _export(network, inputs, folder / ONNX)
    torch_agreement.require(network, folder / ONNX, inputs)
    manifest = CandidateManifest(
        framework="torch",
        architecture=architecture,
        input_shape=tokens.sample_shape(inputs),
        input_dtype=str(inputs.dtype),
        output_shape=outputs.shape[1:],
        parameters=sum(p.numel() for p in network.parameters()),
        sparsity=sparsity,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
    return manifest


def load_state(network: torch.nn.Module, path: Path, architecture: Call) -> None:
    """Load a safetensors file strictly. Raise ModelError that names missing, unexpected or misshapen weights."""
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error
    expected = network.state_dict()
    shapes = [
        f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": shapes,
    }
    mismatches = [f"{len(names)} {what} ({_list(names)})" for what, names in problems.items() if names]
    if mismatches:
        raise ModelError(
            f"{path}: the weights do not fit {architecture.function}: {'; '.join(mismatches)}; name the architecture "
            "that they were trained in, with its parameters, under model.architecture"
        )
    _require_sound(network, state, str(path))
    network.load_state_dict(state)


def _list(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def _require_sound(network: torch.nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise ModelError for NaN, and for infinity in trained values: elsewhere it may be a mask."""
    trained = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    trained |= {name for name in state if name.endswith(RUNNING)}
    floating = {name: values for name, values in state.items() if values.is_floating_point()}
    bad = [k for k, v in floating.items() if v.isnan().any() or (k in trained and v.isinf().any())]
    if bad:
        raise ModelError(f"{where}: NaN or infinity in {_list(bad)}; the training diverged, so nothing is built on it")


def _require_module(network: object, call: Call) -> torch.nn.Module:
    if not isinstance(network, torch.nn.Module):
        raise ModelError(f"{call.function} returned {type(network).__name__}, not a torch.nn.Module")
    return network


def _export(network: torch.nn.Module, inputs: Array, path: Path) -> None:
    """Write FP32 ONNX with a dynamic batch, and a dynamic length if inputs are token ids.

    This uses the TorchScript exporter: 0.6 s, compared with 10 for dynamo=True (and the same bytes for the same
    weights, without this machine's source paths); it is deprecated but part of the torch versions that pyproject.toml
    allows.
    """
    axes = {0: "batch", 1: "length"} if tokens.is_token_ids(inputs) else {0: "batch"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.tensor(inputs),),
            str(path),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: axes, OUTPUT: {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )


FRAMEWORK = TorchFramework()
