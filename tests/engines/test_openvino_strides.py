"""The kernel whose threads race, in a process that has OpenVINO choose AVX2 kernels; and what the mend changes."""

import os
import subprocess
import sys

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from slipstream.engines import openvino_strides as strides

LOADS = """
import sys
import numpy as np
from tests.engines.test_openvino_strides import network, samples
from slipstream.engines.openvino import OpenVINORunner
from slipstream.spec import Target

x, model = samples(24), network(24)
alone = OpenVINORunner(model, Target(engine="openvino", threads=1)).run(x)
for load in range(4):
    runner = OpenVINORunner(model, Target(engine="openvino", threads=2))
    for call in range(40):
        if runner.run(x).tobytes() != alone.tobytes():
            sys.exit(f"load {load}, call {call}: other bits than with one thread")
"""


def samples(channels: int) -> np.ndarray:
    return np.random.default_rng(0).random((64, channels, 14, 14), dtype=np.float32) * 2.5


def network(channels: int, kernel: int = 1, stride: int = 2) -> ov.Model:
    """One INT8 convolution."""

    def number(value: float) -> np.float32:
        return np.float32(value)

    weights = np.random.default_rng(channels).integers(-127, 128, (16, channels, kernel, kernel)).astype(np.float32)
    given = ops.parameter([-1, channels, 14, 14], np.float32)
    rounded = ops.fake_quantize(given, number(0), number(2.55), number(0), number(2.55), 256)
    integers = ops.fake_quantize(ops.constant(weights / 127), number(-1), number(1), number(-1), number(1), 255)
    answer = ops.convolution(rounded, integers, [stride, stride], [0, 0], [0, 0], [1, 1])
    return ov.Model([ops.result(answer)], [given])


def test_every_load_with_two_threads_answers_with_the_same_bits() -> None:
    """Without the mend 18 and 16 of 40 calls differed (AVX2 and AVX2 with VNNI, two threads)."""
    for features in ("AVX2", "AVX2_VNNI"):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": features}
        command = [sys.executable, "-c", LOADS]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "replaced"),
    [(24, 1, 2, 1), (8, 1, 2, 1), (16, 1, 2, 0), (24, 1, 1, 0), (24, 3, 2, 0)],
)
def test_only_what_may_race_is_replaced_and_the_answers_stay(
    channels: int, kernel: int, stride: int, replaced: int
) -> None:
    model, x = network(channels, kernel, stride), samples(channels)
    alone = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    before = ov.Core().compile_model(model, "CPU", alone)(x)[0]
    assert strides.mend(model) == replaced
    np.testing.assert_array_equal(ov.Core().compile_model(model, "CPU", alone)(x)[0], before)
