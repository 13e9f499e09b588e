"""Works around a data race in OpenVINO's AVX2 kernel for INT8 convolutions of size 1×1 with a stride.

That kernel (`jit_avx2_1x1_I8`) first copies every second pixel into a buffer, of which each thread owns a part. With 8
input channels beyond a multiple of 16, a thread writes past its part, into the first pixels of the next thread's: with
two threads the answers change from call to call. For a ResNet-14 pruned to 8, 16 and 32 channels, loaded four times,
logits moved by up to 0.64 (OpenVINO 2026.4.1, ONEDNN_MAX_CPU_ISA=AVX2); with one thread, with a multiple of 16
channels, or with AVX-512 kernels they are the same bit for bit. The workaround selects the pixels with a pooling of
size 1×1, which is exact, and leaves a convolution without a stride. It costs 2 to 3 µs, so it is applied only where
needed.
"""

from collections.abc import Iterator

import openvino as ov
from openvino import opset13


def racy(compiled: ov.CompiledModel) -> bool:
    """Return whether OpenVINO chose the kernel for any layer."""
    kinds = (_kernel(node) for node in compiled.get_runtime_model().get_ops())
    return any(kind.startswith("jit_") and kind.endswith("_1x1_I8") for kind in kinds)


def _kernel(node: ov.Node) -> str:
    facts = node.get_rt_info()
    return str(facts["primitiveType"].astype(str)) if "primitiveType" in facts else ""


def mend(model: ov.Model) -> int:
    """Replace every convolution that may race, in place, and return their number."""
    convolutions = list(_affected(model))
    for convolution in convolutions:
        strides = list(convolution.get_attributes()["strides"])
        none, ones = [0] * len(strides), [1] * len(strides)
        data, weights = (convolution.input(i).get_source_output() for i in (0, 1))
        pixels = opset13.max_pool(data, strides, ones, none, none, ones)
        plain = opset13.convolution(pixels.output(0), weights, ones, none, none, ones)
        plain.set_friendly_name(convolution.get_friendly_name())
        for user in convolution.output(0).get_target_inputs():
            user.replace_source_output(plain.output(0))
    model.validate_nodes_and_infer_types()
    return len(convolutions)


def _affected(model: ov.Model) -> Iterator[ov.Node]:
    """Yield convolutions of quantized values with a 1×1 kernel, a stride, no padding, and channels not a multiple of
    16."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convolution":
            continue
        facts, shape = node.get_attributes(), list(node.input(1).get_partial_shape())
        single = all(size.is_static and size.get_length() == 1 for size in shape[2:])
        padded = any(facts["pads_begin"]) or any(facts["pads_end"])
        uneven = shape[1].is_dynamic or shape[1].get_length() % 16 != 0
        quantized = node.input(0).get_source_output().get_node().get_type_name() == "FakeQuantize"
        if single and max(facts["strides"]) > 1 and not padded and uneven and quantized:
            yield node
