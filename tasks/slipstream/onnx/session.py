"""ONNX Runtime, for the answers of an ONNX file; deployed engines are built by engines/."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

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

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return (N, …) float32 outputs for inputs (N, …). Raise ModelError."""
        return np.asarray(self.tensors([OUTPUT], batch)[0], np.float32)

    def tensors(self, names: Sequence[str], batch: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Return values of the graph's outputs `names` for inputs (N, …). Raise ModelError."""
        try:
            values: list[npt.NDArray[Any]] = self._session.run(names, {INPUT: batch})
        except Exception as error:  # as above
            raise ModelError(f"ONNX Runtime cannot run the model on {batch.shape} {batch.dtype}: {error}") from error
        return values

    def answers(self, inputs: npt.NDArray[Any], batch: int = BATCH) -> npt.NDArray[np.float32]:
        """Return (N, …) outputs for inputs (N, …), a batch at a time."""
        return np.concatenate([self.run(part) for part in _parts(inputs, batch)])


def require_same(before: npt.NDArray[Any], after: npt.NDArray[Any], what: str) -> None:
    """Raise ModelError unless two answers are the same except for the order of sums."""
    if (problem := explain_mismatch(before, after, EXACT)) is not None:
        raise ModelError(f"{what}: {problem}")


def _parts(inputs: npt.NDArray[Any], size: int) -> Iterator[npt.NDArray[Any]]:
    return (inputs[i : i + size] for i in range(0, len(inputs), size))
