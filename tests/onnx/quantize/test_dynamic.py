"""INT8 with ranges computed for each input."""

import numpy as np
import onnx
import pytest
from tests.engines.candidates import network
from tests.onnx.quantize.models import attention, ids

from slipstream.errors import ModelError
from slipstream.onnx.quantize import Request, dynamic
from slipstream.onnx.quantize.coverage import require_quantized
from slipstream.onnx.session import Session
from slipstream.spec import Quantize


def quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    return dynamic.quantize(model, Request(Quantize(scheme="int8-dynamic"), np.empty(0), on_sample=lambda done: None))


def test_text_is_answered_nearly_the_same_without_any_calibration(caplog: pytest.LogCaptureFixture) -> None:
    model = attention()
    made = quantized(model)
    assert require_quantized(made, "int8-dynamic")["quantized_layers"] >= 4
    for length in (5, 9):
        text = ids(16, length=length)
        expected, got = Session(model).answers(text), Session(made).answers(text)
        assert 0 < np.abs(got - expected).max() < 0.2 * np.abs(expected).max()
    assert made.ByteSize() < 0.7 * model.ByteSize()
    assert not made.metadata_props and not caplog.records


def test_convolutions_are_quantized_too() -> None:
    assert require_quantized(quantized(network()), "int8-dynamic")["quantized_share"] == 1


def test_what_has_no_weights_is_refused() -> None:
    model = network()
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.append(onnx.helper.make_node("Relu", ["input"], ["output"], "relu"))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("output", 1, ["batch", 1, 16, 16]))
    with pytest.raises(ModelError, match="nothing to quantize"):
        require_quantized(quantized(model), "int8-dynamic")
