"""The ONNX that TensorRT receives: quantization in the form that TensorRT accepts, and the target's precision as types.

TensorRT's networks are strongly typed: it computes each layer in the types given by the ONNX. So FP16 and BF16 are
casts of the model here, and INT8 is its Q/DQ nodes. TensorRT accepts only int8 with zero point 0: it rejects other zero
points and dequantized int32 biases, and reads uint8 as int8 with only a warning, so that everything above half of the
range is cut off. Such nodes are rewritten, which costs at most one bit of an activation's range. A Clip keeps the ends
of the old range, such as zero, if the quantizer absorbed a ReLU into it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from slipstream.contract.arrays import Array, Float32Array
from slipstream.errors import EngineError
from slipstream.onnx import graph as onnx_graph
from slipstream.onnx.graph import DEQUANTIZE, QUANTIZE

log = logging.getLogger(__name__)

RANGES = {np.dtype(np.int8): (-128, 127), np.dtype(np.uint8): (0, 255)}
LARGEST = 127
LEFT = ("int4", "float8_e4m3fn", "float4_e2m1fn")
"""Types of quantized tensors that TensorRT accepts unchanged."""
SPARSE = {"Conv": 1, "Gemm": 1, "MatMul": 0}
"""Axis of an operator's weights along which TensorRT looks for the pattern 2:4 (input channels)."""


def read(path: Path) -> onnx.ModelProto:
    """Read the candidate's ONNX. Raise EngineError if it is not valid."""
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, onnx.checker and the file system share no root but Exception
        raise EngineError(f"tensorrt: cannot read {path.parent.name}/{path.name}: {error}") from error
    return model


def prepare(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return the model with int8 Q/DQ and the types of `precision`; inputs and outputs stay float32. Raise
    EngineError."""
    changed = normalise(model)
    if changed:
        log.info("tensorrt: %d Q/DQ nodes become int8 with zero point 0, such as %s", len(changed), changed[0])
    return model if precision == "f32" else typed(model, precision)


# Quantization


def normalise(model: onnx.ModelProto) -> list[str]:
    """Rewrite, in place, the Q/DQ nodes that TensorRT does not accept; return their names. Raise EngineError for
    others."""
    constants, kinds = onnx_graph.constants(model.graph), dict[str, Array]()
    changed, added, nodes = [], list[onnx.TensorProto](), list[onnx.NodeProto]()
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        stored = constants.get(node.input[0]) if node.op_type in (QUANTIZE, DEQUANTIZE) else None
        if stored is not None and stored.data_type == TensorProto.INT32:
            added.append(_unquantized(node, constants))
            changed.append(node.name or node.output[0])
            continue
        scheme = _Scheme.of(node, constants, kinds) if node.op_type in (QUANTIZE, DEQUANTIZE) else None
        if scheme is not None and not scheme.symmetric:
            added += scheme.rewrite(node, constants)
            changed.append(node.name or node.output[0])
            if node.op_type == QUANTIZE and (ends := scheme.ends(makers.get(node.input[0]))) is not None:
                nodes.append(_clip(node, ends, added))
        nodes.append(node)
    if changed:
        onnx_graph.replace(model.graph.node, nodes)
        model.graph.initializer.extend(added)
    return changed


def _clip(node: onnx.NodeProto, ends: tuple[float, float], added: list[onnx.TensorProto]) -> onnx.NodeProto:
    """Insert a Clip to `ends` before a QuantizeLinear node; its constants are added to `added`."""
    name = f"{node.output[0]}_clip"
    names = [f"{name}_least", f"{name}_most"]
    added += [numpy_helper.from_array(np.float32(end), key) for key, end in zip(names, ends, strict=True)]
    clip = helper.make_node("Clip", [node.input[0], *names], [name], name)
    node.input[0] = name
    return clip


@dataclass(frozen=True)
class _Scheme:
    """Scale and zero point of a Q/DQ node; `scale` is a scalar, or one for each channel."""

    scale: Float32Array
    zero: Array

    @classmethod
    def of(
        cls, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], kinds: dict[str, Array]
    ) -> "_Scheme | None":
        """Return None for a node whose type TensorRT accepts unchanged. `kinds` are the zero points of tensors so far.

        Raise EngineError, which names the node.
        """
        name = f"{node.op_type} {node.name or node.output[0]}"
        scale, zero = constants.get(node.input[1]), _zero(node, constants, kinds)
        if scale is None or zero is None:
            raise EngineError(
                f"tensorrt: {name}: its scale and zero point must be constants; dynamic quantization is for CPU "
                "engines, so use `quantize.scheme: int8`"
            )
        kinds[node.output[0]] = zero
        if zero.dtype.name in LEFT:
            return None
        if zero.dtype not in RANGES:
            raise EngineError(f"tensorrt: {name}: quantizes to {zero.dtype}, which TensorRT lacks; it has int8")
        return cls(numpy_helper.to_array(scale).astype(np.float32), zero)

    @property
    def symmetric(self) -> bool:
        """Whether TensorRT accepts it."""
        return self.zero.dtype == np.int8 and not self.zero.any()

    @property
    def wider(self) -> Float32Array:
        """Scale of int8 with zero point 0 that covers the same range."""
        least, most = RANGES[self.zero.dtype]
        zero = self.zero.astype(np.int32)
        if self.zero.dtype == np.uint8 and (zero == 128).all():
            return self.scale  # the same numbers, with another offset
        return (self.scale * np.maximum(zero - least, most - zero) / LARGEST).astype(np.float32)

    def ends(self, maker: str | None) -> tuple[float, float] | None:
        """Return the range of the represented numbers, if int8 with zero point 0 reaches beyond one end.

        Return None if it does not, or if the operator that produces the tensor ends at zero anyway.
        """
        low, high = (end - self.zero.astype(np.int32) for end in RANGES[self.zero.dtype])
        if (low == -LARGEST - 1).all() or (maker == "Relu" and (low == 0).all()):
            return None
        return float((low * self.scale).min()), float((high * self.scale).max())

    def rewrite(self, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> list[onnx.TensorProto]:
        """Point the node at new constants, which are returned; a quantized constant is quantized again."""
        name = node.output[0]
        scale, zero = self.wider, np.zeros(self.zero.shape, np.int8)
        new_constants = [(f"{name}_scale_int8", scale), (f"{name}_zero_int8", zero)]
        quantized = node.input[0]
        del node.input[:]
        node.input.extend([quantized, new_constants[0][0], new_constants[1][0]])
        if node.op_type == DEQUANTIZE and node.input[0] in constants:
            stored = numpy_helper.to_array(constants[node.input[0]]).astype(np.int32)
            axis = onnx_graph.attribute(node, "axis", 1)
            values = (stored - _along(self.zero.astype(np.int32), axis, stored.ndim)) * _along(
                self.scale, axis, stored.ndim
            )
            again = np.clip(np.rint(values / _along(scale, axis, stored.ndim)), -128, LARGEST).astype(np.int8)
            new_constants.append((f"{name}_int8", again))
            node.input[0] = new_constants[-1][0]
        return [numpy_helper.from_array(np.asarray(value), key) for key, value in new_constants]


def _zero(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], kinds: dict[str, Array]) -> Array | None:
    """Return the zero point of a Q/DQ node, also if ONNX's default applies; None if it is not a constant."""
    if len(node.input) > 2 and node.input[2]:
        tensor = constants.get(node.input[2])
        return None if tensor is None else numpy_helper.to_array(tensor)
    if node.op_type == QUANTIZE:
        dtype = helper.tensor_dtype_to_np_dtype(onnx_graph.attribute(node, "output_dtype") or TensorProto.UINT8)
        return np.zeros((), dtype)
    stored = constants.get(node.input[0])
    if stored is not None:
        return np.zeros((), numpy_helper.to_array(stored).dtype)
    return kinds.get(node.input[0])


def _along(values: Array, axis: int, dimensions: int) -> Array:
    """Return (C,) values shaped to broadcast along an axis; scalars are unchanged."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * dimensions
    shape[axis] = -1
    return values.reshape(shape)


def _unquantized(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> onnx.TensorProto:
    """Return the float32 constant that a DequantizeLinear of an int32 constant represents, under the node's output
    name."""
    parts = [numpy_helper.to_array(constants[name]) for name in node.input if name in constants]
    if len(parts) != len(node.input):
        raise EngineError(f"tensorrt: {node.op_type} {node.name}: its scale and zero point must be constants")
    stored, scale = parts[0].astype(np.float64), parts[1].astype(np.float64)
    axis = onnx_graph.attribute(node, "axis", 1) if stored.ndim > 1 else 0
    zero = parts[2].astype(np.float64) if len(parts) > 2 else np.zeros(())
    values = (stored - _along(zero, axis, stored.ndim)) * _along(scale, axis, stored.ndim)
    return numpy_helper.from_array(values.astype(np.float32), node.output[0])


# Precision


def typed(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return the model in f16 or bf16; Q/DQ scales stay float32, since FP16 cannot hold small ones.

    ONNX Runtime's converter, which keeps float32 where ONNX demands it, produces FP16; BF16 is the same graph with
    constants rounded from the original ones, since FP16's are cut at 65504.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    _hoist(model.graph)
    original = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    values = {name: numpy_helper.to_array(tensor) for name, tensor in original.items()}
    del model.graph.value_info[:]  # the converter would mistake a quantizer's leftovers for tensors to be cast
    try:
        converted: onnx.ModelProto = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, QUANTIZE, DEQUANTIZE]
        )
    except Exception as error:  # the converter, protobuf and shape inference share no root but Exception
        raise EngineError(f"tensorrt: cannot cast the model to {precision}: {error}") from error
    if precision == "bf16":
        _to_bfloat16(converted.graph, values)
    return converted


def _hoist(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes into initializers, whose names survive the conversion."""
    for node in [n for n in graph.node if n.op_type == "Constant"]:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if value is not None:
            tensor = graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
            graph.node.remove(node)


def _to_bfloat16(graph: onnx.GraphProto, originals: dict[str, Array]) -> None:
    """Change FLOAT16 to BFLOAT16, in place; `originals` are the float32 values of the initializers that have one."""
    for tensor in graph.initializer:
        _round(tensor, originals.get(tensor.name))
    for info in (*graph.value_info, *graph.input, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT16:
            info.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
            if attribute.HasField("t"):
                _round(attribute.t, None)
            for inner in (attribute.g, *attribute.graphs):
                _to_bfloat16(inner, originals)


def _round(tensor: onnx.TensorProto, original: Array | None) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        values = numpy_helper.to_array(tensor) if original is None else original
        tensor.CopyFrom(numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), tensor.name))


# Sparsity


def sparse_layers(model: onnx.ModelProto) -> tuple[int, int]:
    """Return how many layers have weights with the pattern 2:4, and how many layers could.

    The pattern: of each four adjacent weights along the input channels, at least two are zero (Mishra et al. 2021).
    """
    patterned = [_is_two_of_four(weights) for weights in _weights(model)]
    return sum(patterned), len(patterned)


def _weights(model: onnx.ModelProto) -> Iterator[Array]:
    """Yield the constant weights of the layers in SPARSE, input channels last."""
    constants = onnx_graph.constants(model.graph)
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in SPARSE and len(node.input) > 1:
            name = node.input[1]
            while name not in constants and name in makers and makers[name].op_type in (DEQUANTIZE, "Cast"):
                name = makers[name].input[0]
            if name in constants and constants[name].data_type != TensorProto.INT4:
                weights = numpy_helper.to_array(constants[name])
                transposed = node.op_type == "Gemm" and not onnx_graph.attribute(node, "transB")
                axis = 0 if transposed else SPARSE[node.op_type]
                if weights.ndim > axis:
                    yield np.moveaxis(weights, axis, -1)


def _is_two_of_four(weights: Array) -> bool:
    channels = weights.shape[-1]
    if channels % 4:
        return False
    groups = weights.reshape(-1, channels // 4, 4)
    return bool((np.count_nonzero(groups, axis=-1) <= 2).all())


def fix_input(model: onnx.ModelProto, name: str, shape: tuple[int, ...]) -> None:
    """Write a shape into an input, in place; -1 leaves a dimension unchanged."""
    port = next(p for p in model.graph.input if p.name == name)
    dimensions = port.type.tensor_type.shape.dim
    for dimension, size in zip(dimensions, shape, strict=True):
        if size > 0:
            dimension.dim_value = size
