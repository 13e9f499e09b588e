"""The reference: an ONNX file run as written, by ONNX Runtime without any optimization of the graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slipstream.contract.arrays import Array, Float32Array, FloatArray
from slipstream.errors import ModelError
from slipstream.frameworks.base import INPUT
from slipstream.onnx.session import Session

if TYPE_CHECKING:
    import onnx


def reference(path: Path, samples: Array) -> Float32Array:
    """Return (N, …) outputs. Raise ModelError if it cannot be run, or answers NaN or infinity."""
    with _naming(path):
        answers = Session(path).run(samples)
    if not np.isfinite(answers).all():
        raise ModelError(f"{path}: answers NaN or infinity on {len(samples)} real samples; it is broken already")
    return answers


def tensors(path: Path, samples: Array) -> dict[str, FloatArray]:
    """Return every floating-point tensor with a row for each of the samples (N, …), by name, in the graph's order.

    The order is topological, as ONNX demands. Raise ModelError.
    """
    import onnx

    model = onnx.load(path)
    names = list(_depending(model.graph, INPUT))
    outputs = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    with _naming(path):
        arrays = dict(zip(names, Session(model).tensors(names, samples), strict=True))
    return {
        name: array
        for name, array in arrays.items()
        if np.issubdtype(array.dtype, np.floating) and array.ndim and len(array) == len(samples)
    }


def _depending(graph: "onnx.GraphProto", source: str) -> dict[str, None]:
    """Return names of the tensors that depend on `source`, in order, without constants and what is folded from them."""
    dependents = {source: None}
    for node in graph.node:
        if any(name in dependents for name in node.input):
            dependents |= dict.fromkeys(name for name in node.output if name)
    del dependents[source]
    return dependents


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in ONNX Runtime's errors."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: the reference cannot run it: {error}") from error
