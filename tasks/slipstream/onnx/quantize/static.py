"""INT8 for weights and activations with ranges from calibration samples, by NNCF.

The result has Q/DQ nodes in the symmetric form that OpenVINO and ONNX Runtime run in INT8: all zero points are 0,
weights are int8 with a scale for each output channel, biases stay in FP32. Activations that are never negative are
uint8, which uses the whole range on a CPU; the engine `tensorrt`, which has no uint8, converts them to int8.
"""

import contextlib
import io
import logging
import os
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from slipstream.contract.arrays import Array
from slipstream.errors import ModelError
from slipstream.frameworks.base import INPUT
from slipstream.onnx import graph as onnx_graph
from slipstream.onnx.quantize import Request

LARGEST = 1e9
"""Largest absolute value of a layer that is measured rather than a stand-in for infinity."""


def quantize(model: onnx.ModelProto, request: Request) -> onnx.ModelProto:
    """Return the model with Q/DQ nodes. Raise ModelError."""
    nncf = _nncf()
    count = 0

    def feed(sample: Array) -> dict[str, Array]:
        nonlocal count
        count += 1
        request.on_sample(count)
        return {INPUT: sample[None]}

    try:
        # NNCF draws its own bars on stdout, and warns of the overflow that `require_ranges` reports.
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            quantized: onnx.ModelProto = nncf.quantize(
                onnx_graph.copy_of(model),
                nncf.Dataset(request.samples, feed),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(request.samples),
                model_type=nncf.ModelType.TRANSFORMER if request.section.model_type == "transformer" else None,
                advanced_parameters=_parameters(request.section.per_channel),
            )
    except Exception as error:  # NNCF's and ONNX Runtime's errors share no root but Exception
        raise ModelError(f"the model cannot be quantized: {type(error).__name__}: {error}") from error
    require_ranges(quantized)
    return quantized


def _nncf() -> Any:
    # Imported here, since it takes seconds, and a step whose result is reused needs only `settings`.
    os.environ.setdefault("NNCF_CI", "1")  # otherwise NNCF sends usage data to its makers
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf


def _parameters(per_channel: bool) -> Any:
    """Return the parameters: ranges are the minimum and maximum seen; no bias correction; half a range for the first
    layer.

    A small ResNet on Fashion-MNIST, 89.09 % in FP32, measured with OpenVINO: NNCF's defaults (clipped ranges, fast bias
    correction) 88.14 %, without bias correction 88.99 %, with plain ranges too 89.07 %; ONNX Runtime's own quantizer
    89.16 %, but 88.94 % when run by ONNX Runtime. CPUs without VNNI saturate where weights use the full range, first of
    all in the first layer.
    """
    from nncf.quantization import advanced_parameters as advanced
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    return advanced.AdvancedQuantizationParameters(
        overflow_fix=advanced.OverflowFix.FIRST_LAYER,
        disable_bias_correction=True,
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        weights_quantization_params=advanced.QuantizationParameters(per_channel=per_channel),
    )


def require_ranges(model: onnx.ModelProto) -> None:
    """Raise ModelError that names a layer whose range is infinite, or practically so.

    An attention mask of -3.4e38 gives a scale of infinity, and a network with arbitrary answers, without a warning
    (Olive 0.13 made such a MiniLM: 53 % accuracy).
    """
    values = {t.name: t for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        scale = numpy_helper.to_array(values[node.input[1]])
        if not (np.isfinite(scale).all() and np.abs(scale).max() * 127 <= LARGEST):
            maker = makers.get(node.input[0])
            layer = f"{maker.op_type} {maker.name or maker.output[0]}" if maker is not None else node.input[0]
            raise ModelError(
                f"the values of layer {layer} reach beyond {LARGEST:.0e}, as those of an attention mask do, so INT8 "
                "has no scale for them; set quantize.model_type to transformer, which leaves attention masks in FP32, "
                "or export the model with a smaller number in its mask"
            )
