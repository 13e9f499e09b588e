"""The ONNX that TensorRT is given, run by ONNX Runtime: it must still compute what the candidate does."""

import copy
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT for RTX: the extra tensorrt-rtx")

from onnx import TensorProto, helper, numpy_helper
from tests.engines.candidates import network, quantized
from tests.engines.images import samples

from slipstream.engines.tensorrt_onnx import DEQUANTIZE, QUANTIZE, normalise, prepare
from slipstream.errors import EngineError
from slipstream.frameworks.base import INPUT, OUTPUT


def answers(model: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([OUTPUT], {INPUT: inputs})[0])


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def replace(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(value, name))
            return
    raise AssertionError(f"no constant {name}")


def quantizers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type in (QUANTIZE, DEQUANTIZE)]


def zero_of(model: onnx.ModelProto, node: onnx.NodeProto) -> np.ndarray:
    return constants(model)[node.input[2]]


def steps(model: onnx.ModelProto, before: onnx.ModelProto) -> float:
    """Largest difference of answers, as a share of the largest answer."""
    x = samples(32)
    exact = answers(before, x)
    return float(np.abs(answers(model, x) - exact).max() / np.abs(exact).max())


def test_what_a_quantizer_for_cpus_makes_becomes_int8_without_losing_the_upper_half_of_its_range() -> None:
    """uint8 with zero point 0 is what activations after a ReLU have; TensorRT reads it as int8 and cuts it at 127."""
    before = quantized(network())
    assert any(zero_of(before, node).dtype == np.uint8 for node in quantizers(before)), "the test would show nothing"
    after = copy.deepcopy(before)
    changed = normalise(after)
    assert changed
    for node in quantizers(after):
        zero = zero_of(after, node)
        assert zero.dtype == np.int8 and not zero.any()
    onnx.checker.check_model(after)
    assert steps(after, before) < 0.03
    assert normalise(after) == [], "what is done needs no doing again"


def cut_at_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """As TensorRT would read it: uint8 taken for int8 with the same scale."""
    read = copy.deepcopy(model)
    for node in quantizers(read):
        if zero_of(read, node).dtype == np.uint8:
            replace(read, node.input[2], np.zeros((), np.int8).reshape(zero_of(read, node).shape))
    return read


def test_reading_uint8_as_int8_would_be_wrong() -> None:
    before = quantized(network())
    after = copy.deepcopy(before)
    normalise(after)
    assert steps(cut_at_half(before), before) > 3 * steps(after, before)


def test_zero_point_128_is_the_same_numbers_counted_from_another_end() -> None:
    model = activation(np.uint8(128))
    after = copy.deepcopy(model)
    assert normalise(after) == ["q", "dq"]
    np.testing.assert_array_equal(answers(after, samples(4)), answers(model, samples(4)))


@pytest.mark.parametrize("zero", [np.uint8(0), np.uint8(90), np.int8(-128), np.int8(37)])
def test_any_other_zero_point_keeps_its_range_and_loses_at_most_one_bit(zero: Any) -> None:
    model = activation(zero)
    after = copy.deepcopy(model)
    normalise(after)
    x = 4 * samples(16)  # beyond both ends of every range
    assert (answers(model, x).min(), answers(model, x).max()) == pytest.approx(ends_of(zero))
    # Half a step of either, where nothing is lost at an end of the range.
    assert np.abs(answers(after, x) - answers(model, x)).max() <= 0.5 * SCALE + 0.5 * 255 / 127 * SCALE + 1e-5


def test_a_relu_that_the_quantizer_took_into_its_range_is_kept() -> None:
    """ONNX Runtime's quantizer drops a ReLU whose output is quantized to what is not negative."""
    after = copy.deepcopy(activation(np.int8(-128)))
    normalise(after)
    assert answers(after, samples(4)).min() == 0
    with_relu = quantized(network())
    normalise(with_relu)
    assert "Clip" not in [n.op_type for n in with_relu.graph.node], "a ReLU that is there needs no other"


def test_weights_with_a_zero_point_are_quantized_anew() -> None:
    model = quantized(network())
    name = next(n for n in quantizers(model) if n.name.startswith("DequantizeLinear_w2")).input
    stored, scale = constants(model)[name[0]], constants(model)[name[1]]
    replace(model, name[2], np.full(scale.shape, 11, np.int8))
    replace(model, name[0], np.clip(stored.astype(np.int32) + 11, -128, 127).astype(np.int8))
    after = copy.deepcopy(model)
    normalise(after)
    onnx.checker.check_model(after)
    assert steps(after, model) < 0.03


def test_a_dequantized_int32_bias_becomes_the_float_that_it_stands_for() -> None:
    model = network()
    bias = constants(model)["b1"]
    scale = np.float32(0.001)
    stored = np.rint(bias / scale).astype(np.int32)
    for name, value in (("bq", stored), ("bs", np.full(8, scale)), ("bz", np.zeros(8, np.int32))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    model.graph.node.insert(0, helper.make_node(DEQUANTIZE, ["bq", "bs", "bz"], ["b"], "bias", axis=0))
    next(n for n in model.graph.node if n.name == "conv1").input[2] = "b"
    after = copy.deepcopy(model)
    assert normalise(after) == ["bias"]
    assert DEQUANTIZE not in [n.op_type for n in after.graph.node]
    np.testing.assert_allclose(answers(after, samples(4)), answers(model, samples(4)), rtol=1e-6, atol=1e-6)


def test_a_zero_point_that_is_left_out_is_the_uint8_that_onnx_says() -> None:
    model = activation(None)
    after = copy.deepcopy(model)
    assert normalise(after) == ["q", "dq"]
    assert {zero_of(after, n).dtype for n in quantizers(after)} == {np.dtype(np.int8)}
    assert np.abs(answers(after, samples(8)) - answers(model, samples(8))).max() <= 2 * SCALE


def test_a_type_that_tensorrt_lacks_is_refused_with_its_node() -> None:
    with pytest.raises(EngineError, match="QuantizeLinear q: quantizes to int16"):
        normalise(activation(np.int16(0)))


def test_fp16_is_close_and_its_inputs_and_outputs_stay_float32() -> None:
    after = prepare(network(), "f16")
    assert {p.type.tensor_type.elem_type for p in (*after.graph.input, *after.graph.output)} == {TensorProto.FLOAT}
    assert {v.dtype for v in constants(after).values()} == {np.dtype(np.float16)}
    assert steps(after, network()) < 0.01


def test_bf16_holds_the_rounded_constants_of_the_original_and_not_those_of_fp16() -> None:
    model = network()
    large = constants(model)["b3"].copy()
    large[0] = 3e38  # which FP16 cuts at 65504
    replace(model, "b3", large)
    after = constants(prepare(copy.deepcopy(model), "bf16"))
    for name, value in constants(model).items():
        np.testing.assert_array_equal(after[name], value.astype(ml_dtypes.bfloat16), err_msg=name)


def test_quantized_models_keep_the_scales_in_float32_whatever_the_rest_computes_in() -> None:
    model = quantized(network())
    for precision in ("f16", "bf16"):
        after = prepare(copy.deepcopy(model), precision)
        assert {constants(after)[n.input[1]].dtype for n in quantizers(after)} == {np.dtype(np.float32)}
    assert steps(prepare(copy.deepcopy(model), "f16"), model) < 0.03


SCALE = np.float32(0.02)


def ends_of(zero: Any) -> tuple[float, float]:
    least, most = (-128, 127) if zero.dtype == np.int8 else (0, 255)
    return (least - int(zero)) * SCALE, (most - int(zero)) * SCALE


def activation(zero: Any) -> onnx.ModelProto:
    """The input, quantized and dequantized with a zero point (None: left out), and flattened."""
    ports = ["scale"] if zero is None else ["scale", "zero"]
    nodes = [
        helper.make_node(QUANTIZE, [INPUT, *ports], ["quantized"], "q"),
        helper.make_node(DEQUANTIZE, ["quantized", *ports], ["dequantized"], "dq"),
        helper.make_node("Flatten", ["dequantized"], [OUTPUT], "flatten"),
    ]
    stored = [numpy_helper.from_array(np.asarray(SCALE), "scale")]
    stored += [] if zero is None else [numpy_helper.from_array(np.asarray(zero), "zero")]
    output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", 256])
    graph = helper.make_graph(nodes, "activation", list(network().graph.input), [output], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model
