"""INT8 or INT4 for weights only: they are stored small and computed with in FP32.

Weights become DequantizeLinear nodes with symmetric scales: one for each output channel in INT8, one for each block of
consecutive values in INT4. Convolutions, embedding tables, and matrices whose inner dimension is not a multiple of the
block stay in INT8 also in `int4-weights`.

This does not use NNCF 3.4, which writes models that neither ONNX Runtime nor OpenVINO loads: scales of rank four for
convolutions, and blocks along the wrong axis for a transposed Gemm; ONNX Runtime's MatMulNBitsQuantizer supports only
MatMul and Gather.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from slipstream.contract.arrays import Float32Array
from slipstream.onnx import graph as onnx_graph
from slipstream.onnx.quantize import Request
from slipstream.plugins import SCHEMES

OPSET = 21
"""First opset with blocks and INT4 in DequantizeLinear."""
INT8_MAX, INT4_MAX = 127, 7
TINY = 1e-12
"""Smallest scale: a channel may be all zeros."""


@dataclass(frozen=True)
class _Weight:
    """A weight, and the axis of its channels."""

    name: str
    values: Float32Array
    channels: int
    """Axis of the output channels; of the rows, for a table."""
    inner: int | None
    """Axis that products sum over; None for convolutions and tables, which are not cut into blocks."""


def quantize(model: onnx.ModelProto, request: Request) -> onnx.ModelProto:
    """Return the model with compressed weights. Raise ModelError if it cannot be converted to opset 21."""
    model = onnx_graph.at_least(onnx_graph.copy_of(model), OPSET)
    block = request.section.block_size if SCHEMES[request.section.scheme].bits == 4 else None
    for weight in {w.name: w for w in _weights(model.graph)}.values():
        _replace(model.graph, weight.name, *_compressed(weight, block, request.section.per_channel))
    return model


def _weights(graph: onnx.GraphProto) -> Iterator[_Weight]:
    """Return the FP32 weights of the graph's layers, and its embedding tables."""
    tensors = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    for node in graph.node:
        place = 0 if node.op_type == "Gather" else 1
        if node.op_type not in (*onnx_graph.LAYERS, "Gather") or node.input[place] not in tensors:
            continue
        values = numpy_helper.to_array(tensors[node.input[place]])
        if values.ndim < 2:
            continue
        name, last = node.input[place], values.ndim - 1
        attributes = {a.name: a.i for a in node.attribute}
        if node.op_type == "MatMul":
            yield _Weight(name, values, last, last - 1)
        elif node.op_type == "Gemm":
            yield _Weight(name, values, 0, 1) if attributes.get("transB") else _Weight(name, values, 1, 0)
        elif node.op_type == "ConvTranspose":
            yield _Weight(name, values, 1, None)
        else:
            yield _Weight(name, values, 0, None)


def _compressed(
    weight: _Weight, block: int | None, per_channel: bool
) -> tuple[onnx.TensorProto, onnx.TensorProto, dict[str, int]]:
    """Return the compressed weight, its scales, and the attributes of the node that dequantizes it."""
    name, inner = weight.name, weight.inner
    if block is not None and inner is not None and weight.values.shape[inner] % block == 0:
        numbers, scales = _in_blocks(weight.values, inner, block)
        packed = helper.make_tensor(f"{name}_int4", TensorProto.INT4, numbers.shape, _packed(numbers), raw=True)
        return packed, numpy_helper.from_array(scales, f"{name}_scale"), {"axis": inner, "block_size": block}
    if per_channel:
        others = tuple(axis for axis in range(weight.values.ndim) if axis != weight.channels)
        scales = _scale(np.abs(weight.values).max(others, keepdims=True), INT8_MAX)
        attributes = {"axis": weight.channels}
    else:
        scales, attributes = _scale(np.abs(weight.values).max(), INT8_MAX), {}
    small = numpy_helper.from_array(_rounded(weight.values, scales, INT8_MAX), f"{name}_int8")
    flat = scales.reshape(-1) if per_channel else scales.reshape(())
    return small, numpy_helper.from_array(flat, f"{name}_scale"), attributes


def _in_blocks(values: Float32Array, axis: int, block: int) -> tuple[npt.NDArray[np.int8], Float32Array]:
    """Return numbers from -7 to 7 of the weight's shape, and scales with 1/block of its size along the axis."""
    shape = values.shape
    cut = values.reshape(*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :])
    scales = _scale(np.abs(cut).max(axis + 1, keepdims=True), INT4_MAX)
    return _rounded(cut, scales, INT4_MAX).reshape(shape), scales.squeeze(axis + 1)


def _scale(largest: npt.NDArray[np.floating] | np.floating, steps: int) -> Float32Array:
    scales: Float32Array = np.maximum(np.asarray(largest, np.float32) / np.float32(steps), np.float32(TINY))
    return scales


def _rounded(values: Float32Array, scales: Float32Array, limit: int) -> npt.NDArray[np.int8]:
    numbers: npt.NDArray[np.int8] = np.clip(np.rint(values / scales), -limit, limit).astype(np.int8)
    return numbers


def _packed(numbers: npt.NDArray[np.int8]) -> bytes:
    """Return two numbers per byte, the first in the lower half: ONNX's layout of INT4."""
    flat = numbers.reshape(-1) & 0xF
    flat = np.append(flat, np.zeros(flat.size % 2, np.int8)).astype(np.uint8)
    return (flat[0::2] | (flat[1::2] << 4)).tobytes()


def _replace(
    graph: onnx.GraphProto, name: str, small: onnx.TensorProto, scales: onnx.TensorProto, attributes: dict[str, int]
) -> None:
    """Replace a weight by a DequantizeLinear, wherever it is used."""
    (old,) = (t for t in graph.initializer if t.name == name)
    graph.initializer.remove(old)
    graph.initializer.extend([small, scales])
    node = helper.make_node("DequantizeLinear", [small.name, scales.name], [name], f"{name}_dequantize", **attributes)
    graph.node.insert(0, node)
