"""quantize: post-training INT8 quantization with NNCF, calibrated on samples of the training split.

The result is ONNX with Q/DQ nodes, which OpenVINO, ONNX Runtime and TensorRT all run in INT8.
Details of the output: `calibration` (digest of the sample set, size, seed), `layers` and `quantized_layers`.
"""

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from slipstream import digests
from slipstream.contract import StepInput, StepOutput, digest
from slipstream.data import Data
from slipstream.errors import DataError, ModelError
from slipstream.frameworks import base as frameworks
from slipstream.frameworks.base import INPUT, ONNX, OUTPUT
from slipstream.signature import signature
from slipstream.spec import Spec
from slipstream.steps.base import Context

log = logging.getLogger(__name__)

LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators with weights, which INT8 makes faster."""
MOVES = {"Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that hand on values as they are; engines move the quantization across them."""
BATCH = 64


def settings(spec: Spec, inputs: StepInput) -> dict[str, Any]:
    """What decides the result, beyond the candidate and the data."""
    return {
        "quantize": spec.quantize.model_dump(mode="json"),
        "seed": spec.seed,
        "versions": digests.versions("nncf", "onnx", "onnxruntime"),
    }


def run(context: Context) -> StepOutput:
    """Quantize the recipe's latest candidate."""
    source = context.upstream(step_before(context))
    candidate = context.fetch(source)
    model = load_onnx(candidate / ONNX)
    samples, calibration = draw(context)

    def on_sample(done: int) -> None:
        context.run.progress(min(done, len(samples)), len(samples))

    quantized = quantize_onnx(model, samples, per_channel=context.spec.quantize.per_channel, on_sample=on_sample)
    folder = write(context.workdir, quantized, frameworks.read_manifest(candidate))
    metrics = compare(candidate / ONNX, folder / ONNX, samples) | coverage(quantized)
    log.info("quantized; %.2f %% of the calibration samples keep their label", 100 * metrics["calibration_agreement"])
    context.run.params({"calibration": calibration["sha256"], **context.spec.quantize.model_dump()})
    context.run.metrics(metrics)
    manifest = frameworks.read_manifest(folder)
    artifact = context.run.log_model(
        folder,
        f"{context.cell.recipe}-quantized",
        signature(manifest.input_shape, manifest.input_dtype, manifest.output_shape),
        parents=[source.artifact.model_id] if source.artifact and source.artifact.model_id else [],
        metadata={"calibration": calibration["sha256"], "scheme": context.spec.quantize.scheme},
    )
    return context.output(artifact=artifact, metrics=metrics, details={"calibration": calibration})


def step_before(context: Context) -> str:
    """The step whose candidate is quantized: the recipe's technique before `quantize`, or retrain."""
    before = [t for t in context.spec.techniques(context.cell.recipe) if t != "quantize"]
    return before[-1] if before else "retrain"


def draw(context: Context) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """The calibration samples (N, …), and their identity; the full list is logged as calibration.json."""
    data, spec = context.data, context.spec
    indices = data.calibration(spec.quantize.samples, spec.seed)
    chosen = data.train.take(indices)
    names = [d.hex() for d in chosen.sample_digests()]
    require_unseen(names, data)
    identity = digest({"indices": indices.tolist(), "samples": names})
    path = context.workdir / "calibration.json"
    path.write_text(json.dumps({"sha256": identity, "split": "train", "indices": indices.tolist(), "samples": names}))
    context.run.artifact(path)
    return chosen.inputs, {"sha256": identity, "samples": len(names), "seed": spec.seed, "split": "train"}


def require_unseen(samples: list[str], data: Data) -> None:
    """Raise DataError when a calibration sample, by digest, is in the test split: gates would be flattered."""
    shared = set(samples) & {d.hex() for d in data.test.sample_digests()}
    if shared:
        raise DataError(f"calibration: {len(shared)} samples are also in the test split, such as {min(shared)}")


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read a model and check its weights. Raises ModelError."""
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, onnx.checker and the file system share no root but Exception
        raise ModelError(f"{path}: not a valid ONNX model: {error}") from error
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise ModelError(f"{path}: weight {tensor.name} holds NaN or infinity; the training diverged")
    return model


def quantize_onnx(
    model: onnx.ModelProto, samples: npt.NDArray[Any], *, per_channel: bool, on_sample: Callable[[int], None]
) -> onnx.ModelProto:
    """The model with Q/DQ nodes; `on_sample` is told how many of the samples (N, …) have been seen.

    Raises ModelError.
    """
    nncf = _nncf()
    seen = 0

    def feed(sample: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        nonlocal seen
        seen += 1
        on_sample(seen)
        return {INPUT: sample[None]}

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # NNCF draws its own bars there
            quantized: onnx.ModelProto = nncf.quantize(
                model,
                nncf.Dataset(samples, feed),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(samples),
                advanced_parameters=_parameters(per_channel),
            )
    except Exception as error:  # NNCF's and ONNX Runtime's errors share no root but Exception
        raise ModelError(f"the model cannot be quantized: {type(error).__name__}: {error}") from error
    if coverage(quantized)["quantized_layers"] == 0:
        raise ModelError(f"nothing to quantize: the model has none of {', '.join(sorted(LAYERS))} that NNCF supports")
    return quantized


def _nncf() -> Any:
    # Imported here, since it takes seconds, and a step that is found unchanged needs only `settings`.
    os.environ.setdefault("NNCF_CI", "1")  # otherwise NNCF reports its use to its makers
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf


def _parameters(per_channel: bool) -> Any:
    """Ranges are the least and the greatest value seen; no bias correction; half a range for the first layer.

    A small ResNet on Fashion-MNIST, 89.09 % in FP32, measured with OpenVINO: NNCF's defaults (clipped ranges, fast
    bias correction) 88.14 %, without bias correction 88.99 %, with plain ranges too 89.07 %; ONNX Runtime's own
    quantizer 89.16 %, but 88.94 % when run by ONNX Runtime. CPUs without VNNI saturate where weights use the full
    range, first of all in the first layer.
    """
    from nncf.quantization import advanced_parameters as advanced
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    return advanced.AdvancedQuantizationParameters(
        overflow_fix=advanced.OverflowFix.FIRST_LAYER,
        disable_bias_correction=True,
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        weights_quantization_params=advanced.QuantizationParameters(per_channel=per_channel),
    )


def coverage(model: onnx.ModelProto) -> dict[str, float]:
    """How many of the layers with weights compute in INT8: those whose two factors were dequantized just before."""
    makers = {name: node for node in model.graph.node for name in node.output}

    def dequantized(name: str) -> bool:
        node = makers.get(name)
        while node is not None and node.op_type in MOVES:
            node = makers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    layers = [n for n in model.graph.node if n.op_type in LAYERS]
    quantized = sum(all(dequantized(name) for name in n.input[:2]) for n in layers)
    return {"layers": len(layers), "quantized_layers": quantized, "quantized_share": quantized / max(len(layers), 1)}


def compare(original: Path, quantized: Path, samples: npt.NDArray[Any]) -> dict[str, float]:
    """How far the two models' answers to the samples are apart."""
    before, after = _answers(original, samples), _answers(quantized, samples)
    return {
        "calibration_agreement": float((before.argmax(-1) == after.argmax(-1)).mean()),
        "calibration_mean_abs_diff": float(np.abs(before - after).mean()),
    }


def _answers(path: Path, samples: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    batches = (samples[i : i + BATCH] for i in range(0, len(samples), BATCH))
    return np.concatenate([session.run([OUTPUT], {INPUT: b})[0] for b in batches])


def write(workdir: Path, model: onnx.ModelProto, source: frameworks.CandidateManifest) -> Path:
    """The candidate folder; what a killed attempt left behind is replaced."""
    folder = workdir / "candidate"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    onnx.save(model, folder / ONNX)
    manifest = source.model_copy(update={"architecture": None, "quantized": True})
    (folder / frameworks.MANIFEST).write_text(manifest.model_dump_json(indent=2))
    return folder
