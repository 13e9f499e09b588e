"""OpenVINO: the candidate's ONNX becomes OpenVINO IR (xml and bin), compiled for the device at load time.

The precision is always pinned. Without INFERENCE_PRECISION_HINT, OpenVINO runs FP32 models in BF16 on CPUs that support
it, and a comparison with "FP32" would be one with BF16.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import openvino as ov
from openvino._offline_transformations import apply_moc_transformations
from pydantic import Field

from slipstream import digests, hardware
from slipstream.contract.arrays import Array
from slipstream.engines import openvino_devices as devices
from slipstream.engines import openvino_strides as strides
from slipstream.engines.base import EngineManifest, Options, Runner, read_options, require_batch
from slipstream.engines.compatibility import Relation
from slipstream.errors import EngineError
from slipstream.frameworks.base import ONNX, read_manifest
from slipstream.spec import Target

IR, SAVED_MODEL = "model.xml", "saved_model"
BF16_FEATURES = {"avx512_bf16", "amx_bf16"}
CAPABILITIES = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}
"""Capability that a device must offer, by precision; a device without it silently computes in another precision."""
FAILURES = (
    RuntimeError,
    ov.frontend.GeneralFailure,
    ov.frontend.InitializationFailure,
    ov.frontend.NotImplementedFailure,
    ov.frontend.OpConversionFailure,
    ov.frontend.OpValidationFailure,
)
"""What OpenVINO raises for a model that it cannot read; its front-end failures derive from Exception alone."""


class OpenVINOOptions(Options):
    """What a target may set under `options`."""

    hint: Literal["latency", "throughput"] = "latency"
    """OpenVINO's tuning goal: `latency` of one request, or `throughput` of several at a time."""
    num_streams: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Requests computed in parallel, which share the threads. By default 1 for latency, and OpenVINO's own choice for
    throughput."""


class OpenVINORunner:
    """One compiled model with a dynamic batch, and another whose batch is 1.

    A dynamic shape costs shape inference in every call: 0.41 ms against 0.31 ms for a ResNet-14 on two AVX2 cores. If
    samples vary in length, there is only the dynamic one: a copy for each length would need memory for each.

    On one machine and version, every load answers the same batch with the same bits: one kernel in which two threads
    race is avoided (openvino_strides.py). Another batch size may select other kernels, and so round differently.
    """

    def __init__(self, model: ov.Model, target: Target) -> None:
        self._model = model
        self._target = target
        port = model.input(0)
        self._shape = tuple(int(d.get_length()) if d.is_static else -1 for d in list(port.partial_shape)[1:])
        self._dtype = port.element_type.to_dtype()
        self._many: ov.InferRequest | None = None
        self._single: ov.InferRequest | None = None
        if -1 in self._shape:
            self.compiled = self._compile(-1)
            self._many = self.compiled.create_infer_request()
            return
        self.compiled = self._compile(1)
        self._single = self.compiled.create_infer_request()
        self._one = np.zeros((1, *self._shape), self._dtype)
        self._single.set_input_tensor(ov.Tensor(self._one, shared_memory=True))

    def _compile(self, batch: int) -> ov.CompiledModel:
        """Return the model for a batch size; -1 takes any."""
        model = self._model.clone()
        model.reshape({model.input(0): ov.PartialShape([batch, *self._shape])})
        compiled = ov.Core().compile_model(model, self._target.device, _properties(self._target))
        if self._target.device == "CPU" and strides.racy(compiled) and strides.mend(model):
            compiled = ov.Core().compile_model(model, self._target.device, _properties(self._target))
        return compiled

    def run(self, batch: Array) -> Array:
        """Return (N, …) float32 outputs for inputs (N, …)."""
        require_batch(batch, self._shape, self._dtype)
        if self._single is not None and len(batch) == 1:
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
        """Raise EngineError if a device is missing or cannot compute in the precision, or an option is wrong."""
        read_options(target, OpenVINOOptions)
        core = ov.Core()
        here = core.available_devices
        if missing := devices.absent(target.device, here):
            raise EngineError(
                f"openvino: no device {', '.join(map(repr, missing))} on this machine; it has {', '.join(here)}. "
                "Change the target's `device`, or run where that device is"
            )
        if not (used := devices.candidates(target.device, here)):
            raise EngineError(f"openvino: {target.device!r} leaves no device of {', '.join(here)}")
        for device in used:
            if CAPABILITIES[target.precision] not in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
                raise EngineError(_cannot(device, target.precision))

    def fingerprint(self, target: Target) -> dict[str, str]:
        """Return version, devices, and the instruction sets that determine kernels and rounding."""
        core = ov.Core()
        used = devices.candidates(target.device, core.available_devices)
        names = [str(core.get_property(device, "FULL_DEVICE_NAME")).strip() for device in used]
        entries = {
            "openvino": digests.versions("openvino")["openvino"],
            "device": target.device,
            "device_name": ", ".join(names),
            "cpu_features": hardware.describe()["cpu_features"],
            "precision": target.precision,
        }
        entries |= {"int8_sums": hardware.int8_sums()} if "CPU" in used else {}
        return entries | ({"execution_devices": _chosen(target)} if devices.composed(target.device) else {})

    def relations(self, manifest: EngineManifest) -> Mapping[str, Relation]:
        """Return the relations: OpenVINO reads IR of earlier versions, and compiles it for the processor that loads it.

        An INT8 engine that was judged with exact sums needs them; devices other than a CPU must be the same model.
        """
        relations = {"openvino": Relation.NOT_OLDER, "cpu_features": Relation.ANY}
        if manifest.fingerprint.get("int8_sums") == "saturating" or not manifest.quantized:
            relations["int8_sums"] = Relation.ANY
        if manifest.target.device == "CPU":
            relations["device_name"] = Relation.ANY
        return relations

    def build(self, candidate: Path, target: Target, folder: Path) -> None:
        """Convert to IR. Weights stay in FP32 (or INT8): compressing them to FP16 would be an unrequested change."""
        try:
            model = ov.Core().read_model(_source(candidate))
            # What ov.convert_model does, which also sends usage data to its makers. It folds Q/DQ pairs: a small INT8
            # ResNet's IR shrinks from 191 kB to 94 kB.
            apply_moc_transformations(model, cf=False)
            ov.save_model(model, folder / IR, compress_to_fp16=False)
        except FAILURES as error:
            raise EngineError(f"openvino: cannot convert {candidate.name}/{ONNX}: {_said(error)}") from error

    def load(self, folder: Path, target: Target) -> Runner:
        """Read the IR and compile it."""
        try:
            return OpenVINORunner(ov.Core().read_model(folder / IR), target)
        except FAILURES as error:
            raise EngineError(f"openvino: cannot load {folder / IR} on {target.device}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """Return OpenVINO's message on one line, without source locations."""
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line and not line.startswith(("Exception from ", "Check '")))


def _source(candidate: Path) -> Path:
    """Return the source of the conversion: Keras's SavedModel if there is one, which avoids a translation; INT8 is only
    in ONNX."""
    saved_model = candidate / SAVED_MODEL
    return saved_model if saved_model.is_dir() and not read_manifest(candidate).quantized else candidate / ONNX


def _cannot(device: str, precision: str) -> str:
    if device == "CPU" and precision == "bf16":
        lacking = f"this CPU ({hardware.describe()['cpu']}) has neither {' nor '.join(sorted(BF16_FEATURES))}"
    else:
        lacking = f"{device} does not compute in {precision} here, and would do so in another precision"
    return f"openvino: {lacking}; set the target's `precision` to f32"


def _properties(target: Target) -> dict[str, object]:
    """Return the compilation settings, for the device or, if it is virtual, for each device that it may use."""
    if devices.composed(target.device) is None:
        return _of_device(target.device, target)
    used = devices.candidates(target.device, ov.Core().available_devices)
    properties: dict[str, object] = {"DEVICE_PROPERTIES": {device: _of_device(device, target) for device in used}}
    if devices.composed(target.device) == "AUTO":
        # Otherwise AUTO answers from the CPU until another device is ready, and the measured device changes midway.
        properties["ENABLE_STARTUP_FALLBACK"] = False
    return properties


def _of_device(device: str, target: Target) -> dict[str, object]:
    options = read_options(target, OpenVINOOptions)
    properties: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": target.precision,
        "PERFORMANCE_HINT": options.hint.upper(),
    }
    if device == "CPU":
        properties["INFERENCE_NUM_THREADS"] = target.threads
    if options.num_streams is not None or options.hint == "latency":
        properties["NUM_STREAMS"] = options.num_streams or 1
    return properties


def _chosen(target: Target) -> str:
    """Return the devices that a virtual one really uses, determined with a small model, since there is no other yet."""
    parameter = ov.opset13.parameter([1, 8], np.float32)
    small = ov.Model([ov.opset13.relu(parameter)], [parameter])
    compiled = ov.Core().compile_model(small, target.device, _properties(target))
    return ",".join(compiled.get_property("EXECUTION_DEVICES"))


ENGINE = OpenVINO()
