"""The graph changes, and the answers stay what they were."""

import platform
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tests.engines.candidates import projections, quantized, write
from tests.engines.images import samples

from slipstream.engines.base import build_engine, load_engine
from slipstream.engines.onnxruntime import OPTIMISED
from slipstream.engines.onnxruntime_graph import activations_to_uint8, gather_before_dequantize
from slipstream.frameworks.base import ONNX
from slipstream.hardware import X86
from slipstream.spec import Target
from slipstream.steps.build import reference


def pairs(dtype: type = np.int8, zero: int = 3, reader: str = "Identity", stored: bool = False) -> onnx.ModelProto:
    """x → QuantizeLinear → DequantizeLinear twice → y; the quantized tensor is also read by `reader`, if any."""
    nodes = [
        helper.make_node("QuantizeLinear", ["w" if stored else "x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["b"]),
        helper.make_node("Sum", ["a", "b", "x"], ["y"]),
    ]
    nodes += [helper.make_node(reader, ["q"], ["other"])] if reader else []
    weights = {"s": np.float32(0.1), "z": np.array(zero, dtype), "w": np.linspace(-9, 9, 4, dtype=np.float32)}
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])]
    graph = helper.make_graph(
        nodes,
        "pairs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def answer(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    found: np.ndarray = ReferenceEvaluator(model).run(["y"], {"x": x})[0]
    return found


@pytest.mark.parametrize("place", ["initializer", "Constant"])
def test_the_zero_point_moves_with_the_type_and_the_answers_stay(place: str) -> None:
    x = np.array([-99, -1.23, 4.56, 99], np.float32)  # the ends are cut off, at the same numbers
    model = pairs(reader="")
    if place == "Constant":
        [zero] = [t for t in model.graph.initializer if t.name == "z"]
        model.graph.initializer.remove(zero)
        zero.name = ""
        model.graph.node.insert(0, helper.make_node("Constant", [], ["z"], value=zero))
    before = answer(model, x)
    assert activations_to_uint8(model) == 1
    onnx.checker.check_model(model, full_check=True)
    zeros = {n.input[2] for n in model.graph.node if len(n.input) > 2 and n.op_type != "Sum"}
    [moved] = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name in zeros]
    assert (moved.dtype, int(moved)) == (np.uint8, 131)
    np.testing.assert_array_equal(answer(model, x), before)


LEFT = {
    "uint8 already": pairs(np.uint8, reader=""),
    "read by another operator": pairs(reader="Identity"),
    "weights": pairs(stored=True, reader=""),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_alone(case: str) -> None:
    model = onnx.ModelProto.FromString(LEFT[case].SerializeToString())
    assert activations_to_uint8(model) == 0
    assert model == LEFT[case]


def table(axis: int = 0, zero: int = 0, per_row: bool = True) -> onnx.ModelProto:
    """x, ids, → rows of a table of 6 × 4 int8 numbers."""
    rng = np.random.default_rng(0)
    length = (6, 4)[axis] if per_row else 1
    weights = {
        "w": rng.integers(-128, 128, (6, 4)).astype(np.int8),
        "s": rng.uniform(0.01, 0.02, length).astype(np.float32).reshape(length if per_row else ()),
        "z": np.full(length, zero, np.int8).reshape(length if per_row else ()),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=axis),
        helper.make_node("Gather", ["d", "x"], ["y"], "words"),
    ]
    graph = helper.make_graph(
        nodes,
        "table",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_rows_are_taken_before_they_are_dequantized() -> None:
    ids = np.array([[0, 5, 5], [3, 2, -1]])
    model = table()
    before = answer(model, ids)
    assert gather_before_dequantize(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert not [n for n in model.graph.node if n.op_type == "DequantizeLinear"], "else it is computed for nobody"
    [taken] = [n for n in model.graph.node if n.op_type == "Gather" and n.input[0] == "w"]
    assert taken.input[1] == "x"
    np.testing.assert_array_equal(answer(model, ids), before)
    assert gather_before_dequantize(model) == 0, "nothing is left to do"


@pytest.mark.parametrize("case", [{"axis": 1}, {"zero": 3}, {"per_row": False}])
def test_other_tables_are_left_alone(case: dict[str, int]) -> None:
    model = table(**case)
    assert gather_before_dequantize(model) == 0
    assert model == table(**case)


@pytest.mark.skipif(platform.machine() not in X86, reason="other CPUs compute with int8 activations")
def test_an_activation_that_several_layers_read_is_computed_in_integers(tmp_path: Path) -> None:
    candidate = write(tmp_path / "candidate", quantized(projections()), is_quantized=True)
    build_engine(candidate, Target(engine="onnxruntime", threads=1), tmp_path / "engine")
    operators = Counter(n.op_type for n in onnx.load(tmp_path / "engine" / OPTIMISED).graph.node)
    assert operators["QLinearMatMul"] == 3
    assert not operators["MatMul"]
    x = samples(8)
    expected = reference(candidate / ONNX, x)
    np.testing.assert_allclose(load_engine(tmp_path / "engine").run(x), expected, atol=1e-4)
