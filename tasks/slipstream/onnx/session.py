"""ONNX Runtime, for the answers of an ONNX file; deployed engines are built by engines/."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from slipstream.contract.arrays import Array, Float32Array
from slipstream.errors import ModelError
from slipstream.frameworks.base import INPUT, OUTPUT
from slipstream.onnx.agreement.bounds import EXACT, explain_mismatch

BATCH = 64
SILENT = 4
"""Only fatal messages: errors are raised."""


class Session:
    """A model as written, without any optimization of the graph."""

    def __init__(self, model: onnx.ModelProto | Path, threads: int | None = None) -> None:
        """Raise ModelError if ONNX Runtime does not accept the model."""
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = SILENT
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        source = model if isinstance(model, Path) else model.SerializeToString()
        try:
            self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no root but Exception
            raise ModelError(f"ONNX Runtime cannot load the model: {error}") from error

    def run(self, batch: Array) -> Array:
        """Return (N, …) float32 outputs for inputs (N, …). Raise ModelError."""
        return np.asarray(self.tensors([OUTPUT], batch)[0], np.float32)

    def tensors(self, names: Sequence[str], batch: Array) -> list[Array]:
        """Return values of the graph's outputs `names` for inputs (N, …). Raise ModelError."""
        try:
            values: list[Array] = self._session.run(names, {INPUT: batch})
        except Exception as error:  # as above
            raise ModelError(f"ONNX Runtime cannot run the model on {batch.shape} {batch.dtype}: {error}") from error
        return values

    def answers(self, inputs: Array, batch: int = BATCH) -> Float32Array:
        """Return (N, …) outputs for inputs (N, …), a batch at a time."""
        return np.concatenate([self.run(part) for part in _parts(inputs, batch)])


def require_same(before: Array, after: Array, what: str) -> None:
    """Raise ModelError unless two answers are the same except for the order of sums."""
    if (problem := explain_mismatch(before, after, EXACT)) is not None:
        raise ModelError(f"{what}: {problem}")


def _parts(inputs: Array, size: int) -> Iterator[Array]:
    return (inputs[i : i + size] for i in range(0, len(inputs), size))
