"""ONNX graphs from any exporter: read, checked, and converted to the one form that everything here works on.

That form: only operators of ONNX itself, of opset 13 or later (the first that supports one scale for each channel), no
local functions, no NaN weight, one input `input` and one output `output`, whose first dimension is the batch and
dynamic.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from slipstream.data.splits import INPUT_DTYPES
from slipstream.errors import ModelError
from slipstream.frameworks.base import INPUT, OUTPUT

log = logging.getLogger(__name__)

OPSET = 13
"""Minimum opset: DequantizeLinear has an axis from here on. A model is not converted further than necessary."""
STANDARD = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators with weights, which INT8 makes faster."""
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
QUANTIZED = {QUANTIZE, DEQUANTIZE, "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
             "ConvInteger", "MatMulInteger"}  # fmt: skip
"""Operators that only a quantized model has."""
DTYPES = {helper.np_dtype_to_tensor_dtype(np.dtype(name)): name for name in INPUT_DTYPES}
"""Types that an input may have."""
BATCH = "batch"
NAMED = 5
"""Maximum number of names that an error lists."""


def read(path: Path) -> onnx.ModelProto:
    """Return a checked model with its weights, including those in external files. Raise ModelError."""
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf and the file system share no root but Exception
        raise ModelError(f"{path}: not a valid ONNX model: {error}{_external(path)}") from error
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # onnx.checker's errors neither
        raise ModelError(f"{path}: not a valid ONNX model: {error}") from error
    require_sound_weights(model, str(path))
    return model


def external_files(path: Path) -> list[str]:
    """Return names of the external files with a model's weights; empty if it is not a model."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf and the file system share no root but Exception; `read` says what is wrong
        return []
    return sorted({e.value for t in tensors(model) for e in t.external_data if e.key == "location"})


def prepare(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Return the model in the form that this module's docstring describes, except for a fixed batch dimension.

    Raise ModelError, which begins with `where`.
    """
    try:
        model = inline_local_functions(model, convert_version=True)
        require_standard(model)
        model = at_least(model, OPSET)
        _drop_weights_from_inputs(model.graph)
        _require_one_of_each(model.graph)
        rename(model.graph, {model.graph.input[0].name: INPUT, model.graph.output[0].name: OUTPUT})
        _require_types(model.graph)
        del model.graph.value_info[:]  # stale once anything changes, and inferred again when needed
        infer_shapes(model)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    return model


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every shape that strict inference can determine. Raise ModelError if shapes conflict."""
    try:
        onnx.checker.check_model(model)
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # InferenceError and ValidationError share no root but Exception
        raise ModelError(f"shapes do not fit together: {str(error).strip()}") from error


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def at_least(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return the model in this opset or a later one. Raise ModelError if an operator cannot be converted."""
    version = opset_of(model)
    if version < opset:
        try:
            model = onnx.version_converter.convert_version(model, opset)
        except Exception as error:  # the converter's errors share no root but Exception
            raise ModelError(
                f"opset {version} cannot be converted to {opset}: {str(error).strip()}; export the model again with "
                f"opset {opset} or later"
            ) from error
        log.info("converted from opset %d to %d", version, opset)
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True))
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators that the model uses."""
    return max((int(o.version) for o in model.opset_import if o.domain in STANDARD), default=1)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the graphs in it: branches and loop bodies."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for subgraph in inner:
                yield from graphs(subgraph)


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield all nodes, including those of branches and loop bodies."""
    for graph in graphs(model.graph):
        yield from graph.node


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield all tensors whose values the file holds: initializers and constants."""
    for graph in graphs(model.graph):
        yield from graph.initializer
        for node in graph.node:
            yield from (a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return initializers and the values of Constant nodes, by name."""
    values = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            values[node.output[0]] = value
    return values


def replace(field: Any, values: Iterable[Any]) -> None:
    """Set a repeated field, such as `graph.node`, to copies of these, which may be its own elements."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]  # emptying invalidates the old
    del field[:]
    field.extend(copies)


def attribute(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    """Return an integer attribute of a node."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def parameters(model: onnx.ModelProto) -> int:
    """Return the number of weights: values of quantized tensors and of floating-point ones with at least one
    dimension."""
    counted = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT8,
               TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)  # fmt: skip
    return sum(int(np.prod(t.dims)) for t in tensors(model) if t.dims and t.data_type in counted)


def is_quantized(model: onnx.ModelProto) -> bool:
    """Return whether anything in it is already quantized."""
    return any(node.op_type in QUANTIZED for node in nodes(model))


def require_sound_weights(model: onnx.ModelProto, where: str) -> None:
    """Raise ModelError for NaN in any tensor, and for infinity in a layer's weights: elsewhere it may be a mask."""
    weights = {name for node in nodes(model) if node.op_type in LAYERS for name in node.input[1:]}
    for tensor in tensors(model):
        if tensor.data_type == TensorProto.STRING:
            continue
        values = numpy_helper.to_array(tensor)
        if not np.issubdtype(values.dtype, np.floating):
            continue
        if np.isnan(values).any() or (tensor.name in weights and not np.isfinite(values).all()):
            name = tensor.name or "of a constant"
            raise ModelError(
                f"{where}: weight {name} holds NaN or infinity: its training diverged, or the file is damaged"
            )


def require_standard(model: onnx.ModelProto) -> None:
    """Raise ModelError that names the operators which are not ONNX's own; drop unused domains."""
    custom = Counter(f"{n.domain}.{n.op_type}" for n in nodes(model) if n.domain not in STANDARD)
    if custom:
        operators = _list(map(_times, custom.items()))
        raise ModelError(
            f"operators that are not of ONNX itself, which only some runtimes have: {operators}; export the model "
            "without them (a file that ONNX Runtime optimized has its own fused operators: give the one from before)"
        )
    version = opset_of(model)
    unknown = Counter(n.op_type for n in nodes(model) if not onnx.defs.has(n.op_type, version))
    if unknown:
        raise ModelError(f"opset {version} has no operators {_list(map(_times, unknown.items()))}; the file is damaged")
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", version))


def rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename tensors throughout; one that already has a new name gets another first."""
    existing = {n for g in graphs(graph) for node in g.node for n in (*node.input, *node.output)}
    existing |= {v.name for g in graphs(graph) for v in (*g.initializer, *g.input, *g.output)}
    aside = {new: f"{new}_of_the_graph" for new in names.values() if new in existing and new not in names}
    names = {old: new for old, new in (aside | names).items() if old != new}
    for part in graphs(graph):
        for node in part.node:
            node.input[:] = [names.get(n, n) for n in node.input]
            node.output[:] = [names.get(n, n) for n in node.output]
        for value in (*part.initializer, *part.input, *part.output, *part.value_info):
            value.name = names.get(value.name, value.name)


def dimensions(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Return the shape of an input or output, with -1 where it varies."""
    return tuple(int(d.dim_value) if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


def dtype(value: onnx.ValueInfoProto) -> str:
    """Return NumPy's name of an input's type."""
    return DTYPES[value.type.tensor_type.elem_type]


def free_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose batch is dynamic instead of a number, in the only places where exporters write that number:
    the input, the output, and the shapes of reshapes. Only samples can show whether that was all."""
    copy = copy_of(model)
    batch = dimensions(copy.graph.input[0])[0]
    for value in (copy.graph.input[0], copy.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del copy.graph.value_info[:]
    shapes = {t.name: t for t in copy.graph.initializer}
    shapes |= {
        n.output[0]: a.t for n in copy.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"
    }
    for node in copy.graph.node:
        if node.op_type == "Reshape" and (tensor := shapes.get(node.input[1])) is not None:
            _free_reshape(node, tensor, batch)
    return copy


def _free_reshape(node: onnx.NodeProto, tensor: onnx.TensorProto, batch: int) -> None:
    shape = numpy_helper.to_array(tensor).copy()
    zero_is_zero = any(a.name == "allowzero" and a.i for a in node.attribute)
    if shape.ndim == 1 and shape.size and shape[0] == batch:
        if -1 not in shape:
            shape[0] = -1
        elif not zero_is_zero:
            shape[0] = 0  # the input's own first dimension
        tensor.CopyFrom(numpy_helper.from_array(shape, tensor.name))


def _drop_weights_from_inputs(graph: onnx.GraphProto) -> None:
    """Drop weights from the inputs: before version 4 of the format every initializer was an input too."""
    weights = {t.name for t in graph.initializer}
    inputs = [v for v in graph.input if v.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)


def _require_one_of_each(graph: onnx.GraphProto) -> None:
    for what, values in (("input", graph.input), ("output", graph.output)):
        if len(values) != 1:
            raise ModelError(
                f"has {len(values)} {what}s ({_list(v.name for v in values)}) instead of one; cut it with "
                "onnx.utils.extract_model, or export it with one input tensor and one output tensor"
            )


def _require_types(graph: onnx.GraphProto) -> None:
    input_type, output_type = graph.input[0].type.tensor_type, graph.output[0].type.tensor_type
    if input_type.elem_type not in DTYPES:
        raise ModelError(f"its input is {_type(input_type.elem_type)}; it must be one of {', '.join(DTYPES.values())}")
    if output_type.elem_type != TensorProto.FLOAT:
        raise ModelError(
            f"its output is {_type(output_type.elem_type)}; it must be float: class scores or probabilities, not labels"
        )
    for what, tensor in (("input", input_type), ("output", output_type)):
        if not tensor.shape.dim:
            raise ModelError(f"its {what} has no batch dimension; the first dimension must be the batch")


def _type(number: int) -> str:
    return str(TensorProto.DataType.Name(number)).lower() if number else "of no known type"


def _times(item: tuple[str, int]) -> str:
    return f"{item[0]} ({item[1]}×)"


def _list(names: Iterable[str]) -> str:
    items = list(names)
    return ", ".join(items[:NAMED]) + (", …" if len(items) > NAMED else "")


def _external(path: Path) -> str:
    """Return what to do if external files with weights are missing."""
    missing = [name for name in external_files(path) if not (path.parent / name).is_file()]
    return f"; its weights lie in {_list(missing)}, which is not beside it" if missing else ""
