"""The ONNX that ONNX Runtime receives: quantized in the form of its CPU kernels. The numbers stay the same.

ONNX Runtime 1.32 leaves two parts of a quantized transformer in FP32, so a MiniLM in INT8 took three times as
long as in FP32:

- On x86 its fast integer kernels take uint8 activations and int8 weights. It converts int8 to uint8 automatically, but
  only if a single node reads the activation (QDQS8ToU8Transformer in its source). The states that enter an attention
  are read by three projections, which then compute in FP32, with weights dequantized for each request.
- It dequantizes all rows of an INT8 embedding table for each request, and then takes the few requested ones.
"""

from collections import defaultdict

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from slipstream.onnx import graph as onnx_graph
from slipstream.onnx.graph import DEQUANTIZE, QUANTIZE

LAST = "last_axis"
"""Name of the constant that names the last axis."""
OFFSET = 128
"""q in int8 is q + 128 in uint8; the zero point moves equally, so both represent the same number."""


def activations_to_uint8(model: onnx.ModelProto) -> int:
    """Change int8 activations to uint8, in place, and return their number. Weights are unchanged.

    An activation that is read by a node other than DequantizeLinear, or is an output of the model, is unchanged too.
    """
    constants, readers = onnx_graph.constants(model.graph), defaultdict[str, list[onnx.NodeProto]](list)
    for node in onnx_graph.nodes(model):
        for name in node.input:
            readers[name].append(node)
    outputs = {output.name for output in model.graph.output}
    moved: dict[str, TensorProto] = {}
    changed = 0
    for node in model.graph.node:
        if node.op_type != QUANTIZE or node.input[0] in constants or node.output[0] in outputs:
            continue
        pair = [node, *readers[node.output[0]]]
        zeros = [constants.get(n.input[2]) if len(n.input) > 2 else None for n in pair]
        if any(n.op_type != DEQUANTIZE for n in pair[1:]) or any(z is None or z.data_type != z.INT8 for z in zeros):
            continue
        for each in pair:
            name = each.input[2]
            each.input[2] = f"{name}_uint8"
            moved.setdefault(name, _moved(constants[name], each.input[2]))
        changed += 1
    model.graph.initializer.extend(moved.values())
    return changed


def _moved(zero: TensorProto, name: str) -> TensorProto:
    """Return the zero point in uint8."""
    value = numpy_helper.to_array(zero).astype(np.int16) + OFFSET
    return numpy_helper.from_array(value.astype(np.uint8), name)


def gather_before_dequantize(model: onnx.ModelProto) -> int:
    """Take rows of a quantized table before they are dequantized, not after, in place; return the number of changes.

    Tables are constant, with one symmetric scale for each row.
    """
    graph = model.graph
    constants = onnx_graph.constants(graph)
    tables = {n.output[0]: n for n in graph.node if n.op_type == DEQUANTIZE and _by_rows(n, constants)}
    nodes: list[onnx.NodeProto] = []
    changed = 0
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in tables and onnx_graph.attribute(node, "axis") == 0:
            nodes += _taken(node, tables[node.input[0]])
            changed += 1
        else:
            nodes.append(node)
    if not changed:
        return 0
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), LAST))
    onnx_graph.replace(graph.node, nodes)
    read = {name for node in onnx_graph.nodes(model) for name in node.input} | {o.name for o in graph.output}
    for node in [n for n in graph.node if n.output[0] in tables and n.output[0] not in read]:
        graph.node.remove(node)  # unused, but ONNX Runtime would still compute it
    return changed


def _by_rows(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Return whether it dequantizes a stored int8 matrix with one float32 scale for each row and zero points of 0."""
    values = [constants[name] for name in node.input if name in constants]
    if len(values) < len(node.input) or [v.data_type for v in values[:2]] != [TensorProto.INT8, TensorProto.FLOAT]:
        return False
    if onnx_graph.attribute(node, "axis", 1) != 0 or onnx_graph.attribute(node, "block_size"):
        return False
    if len(values[0].dims) != 2 or list(values[1].dims) != [values[0].dims[0]]:
        return False
    return len(values) < 3 or not numpy_helper.to_array(values[2]).any()


def _taken(gather: onnx.NodeProto, table: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return rows, their scales, and the product of both."""
    out, places = gather.output[0], gather.input[1]
    return [
        helper.make_node("Gather", [table.input[0], places], [f"{out}_int8"], axis=0),
        helper.make_node("Gather", [table.input[1], places], [f"{out}_scales"], axis=0),
        helper.make_node("Cast", [f"{out}_int8"], [f"{out}_numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", [f"{out}_scales", LAST], [f"{out}_column"]),
        helper.make_node("Mul", [f"{out}_numbers", f"{out}_column"], [out], gather.name),
    ]
