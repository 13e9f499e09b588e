"""INT8 whose activation ranges are computed for each input, by ONNX Runtime: no calibration, for transformers.

ONNX has operators for it (DynamicQuantizeLinear, MatMulInteger), but only ONNX Runtime computes them in INT8: OpenVINO
converts them back to FP32 with full-size weights.
"""

import tempfile
from pathlib import Path

import onnx

from slipstream.errors import ModelError
from slipstream.onnx import graph as onnx_graph
from slipstream.onnx.quantize import Request

PREPROCESSED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Metadata that marks shapes as inferred for ONNX Runtime's quantizer, which otherwise warns on the root logger."""


def quantize(model: onnx.ModelProto, request: Request) -> onnx.ModelProto:
    """Return the model with integer matrix products and convolutions. Raise ModelError."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    preprocessed = onnx_graph.infer_shapes(onnx_graph.copy_of(model))
    preprocessed.metadata_props.add(key=PREPROCESSED[0], value=PREPROCESSED[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            quantize_dynamic(
                preprocessed,
                path,
                per_channel=request.section.per_channel,
                weight_type=QuantType.QInt8,
                # Seven bits: CPUs without VNNI add two products in 16 bits, which eight overflow. On such a CPU a small
                # attention network's answers were off by 17 % of the largest with eight bits, by 2 % with seven.
                reduce_range=True,
                extra_options={"WeightSymmetric": True},
            )
        except Exception as error:  # ONNX Runtime's errors share no root but Exception
            raise ModelError(f"the model cannot be quantized: {type(error).__name__}: {error}") from error
        quantized = onnx.load(path)
    del quantized.metadata_props[:], quantized.graph.value_info[:]
    quantized.metadata_props.extend(model.metadata_props)
    return quantized
