"""INT8 with calibrated ranges: its form, its ranges, and what is refused."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tests.engines.candidates import network
from tests.engines.images import samples
from tests.onnx.quantize.models import attention, ids

from slipstream.errors import ModelError
from slipstream.onnx.agreement.bounds import measure
from slipstream.onnx.quantize import Request, static
from slipstream.onnx.quantize.coverage import coverage, require_quantized
from slipstream.onnx.session import Session
from slipstream.spec import Quantize


def quantized(model: onnx.ModelProto, given: np.ndarray | None = None, **section: object) -> onnx.ModelProto:
    inputs = samples(32) if given is None else given
    return static.quantize(model, Request(Quantize(**section), inputs, on_sample=lambda done: None))


def test_it_is_deterministic_and_leaves_the_model_as_it_was() -> None:
    model = network()
    assert quantized(model).SerializeToString() == quantized(model).SerializeToString()
    assert model == network()


def test_progress_counts_every_sample_once() -> None:
    seen: list[int] = []
    static.quantize(network(), Request(Quantize(), samples(32), on_sample=seen.append))
    assert seen == list(range(1, 33))


@pytest.mark.parametrize("per_channel", [True, False])
def test_per_channel_decides_the_number_of_weight_scales(per_channel: bool) -> None:
    model = quantized(network(), per_channel=per_channel)
    sizes = {numpy_helper.to_array(t).size for t in model.graph.initializer if "scale" in t.name.lower()}
    assert (8 in sizes) == per_channel


@pytest.mark.parametrize("case", ["images", "text"])
def test_ranges_are_symmetric_and_biases_are_float(case: str) -> None:
    images = case == "images"
    model = quantized(network()) if images else quantized(attention(), ids(32), model_type="transformer")
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs and not any(values[n.input[2]].any() for n in pairs)
    stored = {values[n.input[0]].dtype for n in pairs if n.input[0] in values}
    assert stored == {np.dtype(np.int8)}


def test_text_of_varying_length_is_quantized_with_smoothquant() -> None:
    model = attention()
    made = quantized(model, ids(128), model_type="transformer")
    assert any("smooth_quant" in n.name for n in made.graph.node)
    assert require_quantized(made, "int8")["quantized_layers"] >= 5
    for length in (5, 9, 13):
        unseen = ids(16, seed=1, length=length)
        expected, got = Session(model).answers(unseen), Session(made).answers(unseen)
        assert 0 < measure(expected, got).relative_error < 0.1


def test_a_mask_that_leaves_no_range_is_refused_with_its_layer_and_the_mend() -> None:
    least = float(np.finfo(np.float32).min)
    said = r"layer Where /Where reach beyond .*attention mask.*model_type to transformer"
    with pytest.raises(ModelError, match=said):
        quantized(attention(least), ids(32))
    quantized(attention(least), ids(32), model_type="transformer")


def test_a_model_without_layers_to_quantize_is_refused() -> None:
    model = network()
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.append(helper.make_node("Relu", ["input"], ["output"], "relu"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("output", 1, ["batch", 1, 16, 16]))
    with pytest.raises(ModelError, match="nothing to quantize: the model has none of Conv"):
        require_quantized(quantized(model), "int8")


def test_an_operator_that_nobody_knows_is_refused() -> None:
    model = network()
    model.graph.node[1].op_type = "Sorcery"
    model.graph.node[1].domain = "example"
    model.opset_import.append(helper.make_opsetid("example", 1))
    with pytest.raises(ModelError, match="Sorcery"):
        quantized(model)


def test_coverage_counts_layers_whose_two_factors_are_dequantized() -> None:
    assert coverage(network())["quantized_layers"] == 0
    whole = quantized(network())
    assert coverage(whole)["quantized_share"] == 1 and coverage(whole)["compressed_share"] == 1
    part = quantized(network())
    dense = next(n for n in part.graph.node if n.op_type == "Gemm")
    dense.input[0] = "r2"  # straight from the activation, past its rounding
    assert (coverage(part)["layers"], coverage(part)["quantized_layers"]) == (3, 2)
