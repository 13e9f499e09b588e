"""OpenVINO: the candidate's ONNX becomes OpenVINO IR (xml and bin), compiled for the device at load time.

The precision is always pinned. Without INFERENCE_PRECISION_HINT OpenVINO runs FP32 models in BF16 on CPUs that
have it, and a comparison against "FP32" would be one against BF16.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino._offline_transformations import apply_moc_transformations

from slipstream import digests, hardware
from slipstream.engines.base import Runner, require_batch
from slipstream.errors import EngineError
from slipstream.frameworks.base import ONNX
from slipstream.spec import Target

IR = "model.xml"
BF16_FEATURES = {"avx512_bf16", "amx_bf16"}
FAILURES = (
    RuntimeError,
    ov.frontend.GeneralFailure,
    ov.frontend.InitializationFailure,
    ov.frontend.NotImplementedFailure,
    ov.frontend.OpConversionFailure,
    ov.frontend.OpValidationFailure,
)
"""What OpenVINO raises for a model that it cannot read; its front-end failures derive from Exception alone."""


class OpenVINORunner:
    """One compiled model with a dynamic batch, and beside it one whose batch is 1.

    A dynamic shape costs shape inference in every call: 0.41 ms against 0.31 ms for a ResNet-14 on two AVX2 cores.
    """

    def __init__(self, model: ov.Model, target: Target) -> None:
        self._model = model
        self._target = target
        port = model.input(0)
        self._shape = tuple(int(d.get_length()) for d in list(port.partial_shape)[1:])
        self._dtype = port.element_type.to_dtype()
        self.compiled = self._compile(1)
        self._single = self.compiled.create_infer_request()
        self._one = np.zeros((1, *self._shape), self._dtype)
        self._single.set_input_tensor(ov.Tensor(self._one, shared_memory=True))
        self._many: ov.InferRequest | None = None

    def _compile(self, batch: int) -> ov.CompiledModel:
        """The model for a batch size; -1 takes any."""
        model = self._model.clone()
        model.reshape({model.input(0): ov.PartialShape([batch, *self._shape])})
        return ov.Core().compile_model(model, self._target.device, _options(self._target))

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(N, …) inputs to (N, …) float32 outputs."""
        require_batch(batch, self._shape, self._dtype)
        if len(batch) == 1:
            np.copyto(self._one, batch)
            request = self._single
        else:
            if self._many is None:
                self._many = self._compile(-1).create_infer_request()
            request = self._many
            # The name keeps the array alive: the tensor only borrows its memory.
            contiguous = np.ascontiguousarray(batch)
            request.set_input_tensor(ov.Tensor(contiguous, shared_memory=True))
        request.infer()
        # A copy: the request writes its next answer into the same memory.
        return np.array(request.get_output_tensor(0).data, dtype=np.float32)


class OpenVINO:
    """The engine `openvino`."""

    distributions = ("openvino",)

    def check(self, target: Target) -> None:
        """Raise EngineError when the device is not here, or cannot compute in the target's precision."""
        devices = ov.Core().available_devices
        if target.device not in devices:
            raise EngineError(
                f"openvino: no device {target.device!r} on this machine; it has {', '.join(devices)}. "
                "Change the target's `device`, or run where that device is"
            )
        if target.precision == "bf16" and target.device == "CPU" and not BF16_FEATURES & _cpu_features():
            raise EngineError(
                f"openvino: this CPU ({hardware.describe()['cpu']}) has neither avx512_bf16 nor amx_bf16; "
                "set the target's `precision` to f32"
            )

    def fingerprint(self, target: Target) -> dict[str, str]:
        """Version, device, and the instruction sets that decide which kernels and which rounding are used."""
        return {
            "openvino": digests.versions("openvino")["openvino"],
            "device": target.device,
            "device_name": str(ov.Core().get_property(target.device, "FULL_DEVICE_NAME")).strip(),
            "cpu_features": hardware.describe()["cpu_features"],
            "precision": target.precision,
        }

    def build(self, candidate: Path, target: Target, folder: Path) -> None:
        """Convert to IR. Weights stay in FP32 (or INT8): compressing them to FP16 is a change nobody asked for."""
        try:
            model = ov.Core().read_model(candidate / ONNX)
            # What ov.convert_model does, which also reports its use to its makers. It folds Q/DQ pairs: a small INT8
            # ResNet's IR shrinks from 191 kB to 94 kB.
            apply_moc_transformations(model, cf=False)
            ov.save_model(model, folder / IR, compress_to_fp16=False)
        except FAILURES as error:
            raise EngineError(f"openvino: cannot convert {candidate.name}/{ONNX}: {error}") from error

    def load(self, folder: Path, target: Target) -> Runner:
        """Read the IR and compile it."""
        try:
            return OpenVINORunner(ov.Core().read_model(folder / IR), target)
        except FAILURES as error:
            raise EngineError(f"openvino: cannot load {folder / IR} on {target.device}: {error}") from error


def _options(target: Target) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": target.precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": target.threads,
        "NUM_STREAMS": 1,
    }


def _cpu_features() -> set[str]:
    return set(hardware.describe()["cpu_features"].split())


ENGINE = OpenVINO()
