"""The .tflite file: conversion from a SavedModel, opening it, and its memory requirement."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from slipstream.contract.arrays import Array
from slipstream.errors import EngineError
from slipstream.plugins import SCHEMES
from slipstream.spec import Quantize, Target

SAVED_MODEL = "saved_model"
CALIBRATION = "calibration.npz"
ALIGNMENT = 64
"""Alignment in bytes of the memory planner's tensors."""


def convert(candidate: Path, quantization: Quantize | None, target: Target) -> bytes:
    """Return the .tflite file of the candidate's SavedModel, in the target's precision or quantized."""
    from slipstream.frameworks.keras_runtime import tf  # not at the top: model servers have no TensorFlow

    converter = tf.lite.TFLiteConverter.from_saved_model(str(candidate / SAVED_MODEL))
    scheme = SCHEMES[quantization.scheme] if quantization else None
    half = scheme is None and target.precision == "f16"
    per_channel = quantization is None or quantization.per_channel
    converter._experimental_disable_per_channel = not per_channel  # it has no public name
    if half or (scheme is not None and scheme.activations):
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if half:
        converter.target_spec.supported_types = [tf.float16]
    if scheme is not None and scheme.calibrated and (candidate / CALIBRATION).is_file():
        converter.representative_dataset = lambda: _samples(candidate / CALIBRATION)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]  # else it falls back to float
    model = bytes(converter.convert())
    if scheme is not None and not scheme.activations:
        model = _quantize_weights(model, bits=scheme.bits, per_channel=per_channel)
    _require_sound(model, calibrated=scheme is not None and scheme.calibrated)
    return model


def _samples(path: Path) -> Iterator[list[Array]]:
    """Yield the representative data set: one sample with its batch dimension at a time."""
    with np.load(path, allow_pickle=False) as arrays:
        yield from ([sample[None]] for sample in arrays["inputs"])


def _quantize_weights(model: bytes, *, bits: int, per_channel: bool) -> bytes:
    """Quantize weights to that many bits, dequantized before each operator; TensorFlow's converter cannot do that."""
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer.qtyping import QuantGranularity, TFLOperationName

    work = quantizer.Quantizer(bytearray(model))
    granularity = QuantGranularity.CHANNELWISE if per_channel else QuantGranularity.TENSORWISE
    work.add_weight_only_config(".*", TFLOperationName.ALL_SUPPORTED, bits, granularity)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table of sizes there
        return bytes(work.quantize().quantized_model)


def _require_sound(model: bytes, *, calibrated: bool) -> None:
    """Raise EngineError unless the file has one input of any batch size and one output, and `int8` really is INT8."""
    interpreter = open_interpreter(model)
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    if (len(inputs), len(outputs)) != (1, 1):
        raise EngineError(f"it has {len(inputs)} inputs and {len(outputs)} outputs instead of one each")
    if inputs[0]["shape_signature"][0] != -1:
        raise EngineError(f"its batch size is fixed at {inputs[0]['shape'][0]}; save the model with None there")
    if calibrated and "QUANTIZE" not in {o["op_name"] for o in interpreter._get_ops_details()}:
        raise EngineError(f"it has no ranges of its own, and there is no {CALIBRATION}; quantize it again")


def arena_bytes(model: bytes, length: int | None = None) -> int | None:
    """Return the bytes of memory for tensors at batch 1: inputs, activations, outputs and the kernels' scratch tensors.

    This is the span of addresses that LiteRT's memory planner assigned to the tensors, with the built-in kernels;
    tensors that are not needed at the same time share memory. Constant weights stay in the file and are not included,
    but float16 weights are, as the float32 that they are unpacked to. `length` is that of variable dimensions. Return
    None if it is needed but not given, and for a network with control flow, whose branches do not report their
    addresses.
    """
    interpreter = open_interpreter(model)
    port = interpreter.get_input_details()[0]
    shape: list[Any] = [length if d < 0 else d for d in port["shape_signature"][1:]]
    if interpreter.num_subgraphs() > 1 or None in shape:
        return None
    zeros = np.zeros([1, *shape], port["dtype"])
    interpreter.resize_tensor_input(port["index"], zeros.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(port["index"], zeros)
    interpreter.invoke()  # some tensors get their memory only now
    weights = np.frombuffer(model, np.uint8).ctypes.data
    total = end = 0
    for low, high in sorted(_spans(interpreter)):
        if not weights <= low < weights + len(model):
            start = end if low - end < ALIGNMENT else low
            total, end = total + max(0, high - max(start, end)), max(end, high)
    return total


def _spans(interpreter: Interpreter) -> Iterator[tuple[int, int]]:
    """Yield the first address, and the one after the last, of each tensor with memory; scalars do not report
    theirs."""
    for tensor in interpreter.get_tensor_details():
        with contextlib.suppress(ValueError):  # it has none: it was fused away
            data = interpreter.tensor(tensor["index"])()
            if isinstance(data, np.ndarray):
                yield data.ctypes.data, data.ctypes.data + data.nbytes


def open_interpreter(model: bytes, *, xnnpack: bool = False, threads: int = 1) -> Interpreter:
    resolver = OpResolverType.BUILTIN if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return Interpreter(model_content=model, num_threads=threads, experimental_op_resolver_type=resolver)
