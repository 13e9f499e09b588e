"""How much of a model is quantized: shows first what the engines cannot speed up, or keep small."""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto

from slipstream.errors import ModelError
from slipstream.onnx.graph import LAYERS
from slipstream.plugins import SCHEMES

INTEGER = {"ConvInteger", "MatMulInteger", "DynamicQuantizeLSTM", "QLinearConv", "QLinearMatMul"}
"""Layers that compute with integers."""
MOVES = {"Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that pass on values unchanged; engines move the quantization across them."""
SMALL = {TensorProto.INT8: 8, TensorProto.UINT8: 8, TensorProto.INT4: 4, TensorProto.UINT4: 4}
"""Types of quantized weights, and their bits."""
LEAST_WEIGHT = 64
"""Tensors with fewer values are a bias, a scale or a shape rather than a layer's weight."""


def coverage(model: onnx.ModelProto) -> dict[str, float]:
    """Return `layers` and how many of them compute in INT8 (`quantized_layers`, `quantized_share`); the share of the
    weights' values that is stored in 8 bits or fewer (`compressed_share`), and in 4 (`int4_share`).

    A layer computes in INT8 if both of its factors were dequantized just before.
    """
    makers = {name: node for node in model.graph.node for name in node.output}

    def dequantized(name: str) -> bool:
        node = makers.get(name)
        while node is not None and node.op_type in MOVES:
            node = makers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    layers = [n for n in model.graph.node if n.op_type in LAYERS or n.op_type in INTEGER]
    quantized = sum(n.op_type in INTEGER or all(dequantized(name) for name in n.input[:2]) for n in layers)
    figures = {"layers": len(layers), "quantized_layers": quantized, "quantized_share": quantized / max(len(layers), 1)}
    return figures | _stored(model.graph.initializer)


def require_quantized(model: onnx.ModelProto, scheme: str) -> dict[str, float]:
    """Return the coverage. Raise ModelError if nothing was quantized that the scheme is for."""
    figures = coverage(model)
    if not SCHEMES[scheme].activations:
        if figures["compressed_share"] == 0:
            raise ModelError("nothing to quantize: the model has no weights of layers, nor embedding tables, in FP32")
        if SCHEMES[scheme].bits == 4 and figures["int4_share"] == 0:
            raise ModelError(
                "nothing to quantize in INT4: the model has no matrix whose inner dimension is a multiple of "
                "quantize.block_size; lower it, or use the scheme int8-weights"
            )
    elif figures["quantized_layers"] == 0:
        raise ModelError(f"nothing to quantize: the model has none of {', '.join(sorted(LAYERS))} that can be in INT8")
    return figures


def _stored(tensors: Iterable[onnx.TensorProto]) -> dict[str, float]:
    sizes = {"all": 0, "small": 0, "int4": 0}
    for tensor in tensors:
        values, bits = int(np.prod(tensor.dims)), SMALL.get(tensor.data_type)
        if values < LEAST_WEIGHT or (bits is None and tensor.data_type != TensorProto.FLOAT):
            continue
        sizes["all"] += values
        sizes["small"] += values if bits is not None else 0
        sizes["int4"] += values if bits == 4 else 0
    whole = max(sizes["all"], 1)
    return {"compressed_share": sizes["small"] / whole, "int4_share": sizes["int4"] / whole}
