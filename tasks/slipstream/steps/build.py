"""build: a recipe's candidate becomes the engine of a target, and is checked against ONNX Runtime on real samples.

Metrics: `size_bytes`, `build_s`, `agreement` (share of samples with the same label), `max_abs_diff`.
Details: `fingerprint`.
"""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipstream import digests
from slipstream.contract import StepInput, StepOutput
from slipstream.engines.base import EngineManifest, build_engine, engine_for, load_engine, read_manifest
from slipstream.errors import EngineError, ModelError
from slipstream.frameworks.base import INPUT, ONNX, OUTPUT
from slipstream.signature import signature
from slipstream.spec import Spec, Target
from slipstream.steps.base import Context

log = logging.getLogger(__name__)

SAMPLES = 64
"""Samples of the training split on which the engine is compared; the test split is for the gates alone."""
TOLERANCE = 1e-3
"""Largest difference of an FP32 engine's output, relative to the largest output; kernels only sum in another order."""
MIN_AGREEMENT = 0.5
"""Below this share of equal labels a reduced-precision engine is broken, which is not for a gate to weigh."""


def settings(spec: Spec, inputs: StepInput) -> dict[str, Any]:
    """The target, and what its engine's bytes depend on: versions and hardware. Raises EngineError."""
    target = _target(spec, inputs)
    engine = engine_for(target.engine)
    engine.check(target)  # a device that is not here has no fingerprint
    return {
        "target": target.model_dump(mode="json"),
        "versions": digests.versions(*engine.distributions),
        "fingerprint": engine.fingerprint(target),
    }


def run(context: Context) -> StepOutput:
    """Build, load, compare, log."""
    techniques = context.spec.techniques(context.cell.recipe)
    source = context.upstream(techniques[-1] if techniques else "retrain")
    candidate = context.fetch(source)
    folder = context.workdir / "engine"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    manifest = build_engine(candidate, _target(context.spec, context.inputs), folder)
    build_s = time.monotonic() - started
    metrics = check(candidate, folder, context.data.train.inputs[:SAMPLES])
    metrics |= {"size_bytes": float(digests.folder_size(folder)), "build_s": build_s}
    log.info(
        "%s: %.0f kB, largest difference %.2g", context.cell.key, metrics["size_bytes"] / 1e3, metrics["max_abs_diff"]
    )
    artifact = context.run.log_model(
        folder,
        context.cell.key,
        signature(manifest.input_shape, manifest.input_dtype, manifest.output_shape),
        parents=[source.artifact.model_id] if source.artifact and source.artifact.model_id else [],
        metadata={"fingerprint": manifest.fingerprint, "candidate_sha256": manifest.candidate_sha256},
    )
    return context.output(artifact=artifact, metrics=metrics, details={"fingerprint": manifest.fingerprint})


def check(candidate: Path, folder: Path, samples: npt.NDArray[Any]) -> dict[str, float]:
    """Load the engine as the server will, and compare its answers to samples (N, …) with ONNX Runtime's.

    Raises EngineError when they are further apart than the engine's precision explains (a quantized ONNX can be
    fine and the engine built from it broken: NVIDIA/Model-Optimizer#126).
    """
    expected = reference(candidate / ONNX, samples)
    got = load_engine(folder).run(np.ascontiguousarray(samples))
    if got.shape != expected.shape or not np.isfinite(got).all():
        raise EngineError(f"the built engine answers {got.shape}, or NaN, where ONNX answers {expected.shape}")
    agreement = float((got.argmax(-1) == expected.argmax(-1)).mean())
    difference = float(np.abs(got - expected).max())
    if _exact(read_manifest(folder)) and difference > TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise EngineError(f"the FP32 engine's outputs differ from ONNX Runtime's by up to {difference:.3g}")
    if agreement < MIN_AGREEMENT:
        raise EngineError(
            f"the engine gives the label of its own candidate for only {agreement:.0%} of {len(samples)} samples; "
            "it is broken, not imprecise"
        )
    return {"agreement": agreement, "max_abs_diff": difference}


def reference(path: Path, samples: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """(N, …) outputs of the candidate's ONNX as written: ONNX Runtime without any graph optimisation.

    Raises ModelError.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run([OUTPUT], {INPUT: samples})[0], np.float32)
    except Exception as error:  # ONNX Runtime's errors share no root but Exception
        raise ModelError(f"{path}: ONNX Runtime cannot run it: {error}") from error


def _exact(manifest: EngineManifest) -> bool:
    return not manifest.quantized and manifest.target.precision == "f32"


def _target(spec: Spec, inputs: StepInput) -> Target:
    cell = inputs.cell
    assert cell is not None and cell.target is not None, "build needs a cell with a target"
    return spec.targets[cell.target]
