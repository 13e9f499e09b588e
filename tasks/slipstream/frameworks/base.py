"""The framework seam: candidates, and what a module under frameworks/ implements for them.

A candidate folder holds `candidate.json` (a `CandidateManifest`), `model.onnx`, and the framework's own files
(weights as safetensors, never a pickle). A quantized candidate has `model.onnx` with Q/DQ nodes and nothing else.
"""

import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from slipstream.contract import Document
from slipstream.errors import ModelError
from slipstream.spec import Call

MANIFEST = "candidate.json"
ONNX = "model.onnx"
INPUT, OUTPUT = "input", "output"
"""Tensor names in every ONNX file and in the Open Inference Protocol."""

FRAMEWORKS: dict[str, str] = {"torch": "slipstream.frameworks.torch"}
"""Spec name → module."""


class CandidateManifest(Document):
    """What `candidate.json` says."""

    framework: str
    architecture: Call | None
    """Builds the network that the weights fit into; None once only the ONNX form is left."""
    input_shape: tuple[int, ...]
    """Shape of one sample, without the batch dimension."""
    input_dtype: str
    output_shape: tuple[int, ...]
    parameters: int
    """Number of weights."""
    quantized: bool = False
    sparsity: float = 0.0
    """Share of the baseline's channels that was removed."""


class Eager(Protocol):
    """A candidate run by its own framework."""

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(N, …) inputs to (N, …) float32 outputs."""
        ...


class Framework(Protocol):
    """What differs between PyTorch, Keras and the others."""

    distributions: tuple[str, ...]
    """PyPI distributions whose versions belong to the identity of what it makes."""

    def load_eager(self, candidate: Path, threads: int | None = None) -> Eager:
        """The candidate, run by the framework itself in FP32: the baseline that people know."""
        ...


def framework_for(name: str) -> Framework:
    """The framework that a spec names. Raises ModelError when its libraries are not in this environment."""
    try:
        module = importlib.import_module(FRAMEWORKS[name])
    except ImportError as error:
        raise ModelError(f"framework {name}: {error}; this environment lacks its libraries") from error
    framework: Framework = module.FRAMEWORK
    return framework


def read_manifest(folder: Path) -> CandidateManifest:
    """Read `candidate.json`. Raises ModelError."""
    try:
        return CandidateManifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a candidate folder: {error}") from error


def load_eager(folder: Path, threads: int | None = None) -> Eager:
    """Load a candidate into its own framework."""
    return framework_for(read_manifest(folder).framework).load_eager(folder, threads)
