"""quantize: post-training quantization of a candidate's ONNX, calibrated on samples of the training split.

The work is done by a module of onnx/quantize/, found by `quantize.scheme`; if the spec requests it, the candidate is
first trained for INT8. Details of the output: `calibration` (digest of the sample set, size, seed). Metrics: how much
is quantized (onnx/quantize/coverage.py), and how far the answers to the calibration samples are from those before.
"""

import json
import logging
from pathlib import Path
from typing import cast

import numpy as np
import onnx

from slipstream import digests
from slipstream.contract import Json, StepInput, StepOutput, digest
from slipstream.contract.arrays import Array
from slipstream.contract.handover import Calibration, Quantized
from slipstream.data.splits import Data
from slipstream.data.user_code import user_code_digest
from slipstream.errors import DataError, ModelError
from slipstream.frameworks.base import ONNX, Schedule, read_manifest, toolchain
from slipstream.onnx import graph as onnx_graph
from slipstream.onnx.agreement.bounds import QUANTIZED, explain_mismatch, measure
from slipstream.onnx.quantize import Request, scheme_for
from slipstream.onnx.quantize.coverage import require_quantized
from slipstream.onnx.session import Session
from slipstream.plugins import FRAMEWORKS
from slipstream.runner.context import Context
from slipstream.spec import Quantize, Spec
from slipstream.techniques import candidates

log = logging.getLogger(__name__)

CALIBRATION = "calibration.npz"
"""The samples themselves (array `inputs`), for engines that do their own quantization."""


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return what determines the result, in addition to the candidate and the data."""
    assert inputs.cell is not None, "quantize needs a cell"
    section: Quantize = spec.section("quantize", inputs.cell.recipe)
    trained = {"loss": user_code_digest(spec.model.loss), **toolchain(spec.model.framework)} if section.epochs else {}
    return {
        "quantize": section.model_dump(mode="json"),
        "seed": spec.seed,
        "versions": digests.versions("nncf", "onnx", "onnxruntime"),
    } | ({"trained": trained} if trained else {})


def run(context: Context) -> StepOutput:
    """Quantize the recipe's latest candidate."""
    spec, section = context.spec, cast(Quantize, context.section)
    source = candidates.source_of(context)
    assert source.artifact is not None
    candidate, metrics = _trained(context, context.fetch(source))
    require_unquantized(candidate)
    samples, calibration = draw(context)

    def on_sample(done: int) -> None:
        context.run.progress(min(done, len(samples)), len(samples), "samples")

    model = onnx_graph.read(candidate / ONNX)
    quantized = scheme_for(section.scheme).quantize(model, Request(section, samples, on_sample))
    metrics |= require_quantized(quantized, section.scheme)
    folder = candidates.write_onnx(context, candidate, quantized, quantized=True, quantization=section)
    if FRAMEWORKS[spec.model.framework].keeps:
        np.savez(folder / CALIBRATION, inputs=samples)
    metrics |= compare(model, quantized, samples)
    log.info("quantized; relative error of the answers: %.2g", metrics["calibration_relative_error"])
    context.run.params({"calibration": calibration.sha256, **section.model_dump()})
    context.run.metrics(metrics)
    name = f"{context.cell.recipe}-quantized"
    artifact = candidates.log(context, folder, name, parents=[source.artifact.model_id])
    return context.output(artifact=artifact, metrics=metrics, details=Quantized(calibration=calibration))


def _trained(context: Context, candidate: Path) -> tuple[Path, dict[str, float]]:
    """Return the candidate, trained for INT8 if the spec requests it, and figures of the training."""
    section: Quantize = context.section
    if not section.epochs:
        return candidate, {}
    constrained, figures = candidates.train_constrained(
        context, candidate, section, Schedule(section.epochs, section.learning_rate)
    )
    folder = candidates.fresh_folder(context, "trained")
    constrained.save(folder, context.data.test)
    return folder, figures


def require_unquantized(candidate: Path) -> None:
    """Raise ModelError if the candidate is already quantized."""
    if read_manifest(candidate).quantized:
        raise ModelError("the model is quantized already; leave `quantize` out, or start from the FP32 model")


def draw(context: Context) -> tuple[Array, Calibration]:
    """Return the calibration samples (N, …), and their identity; the full list is logged as calibration.json.

    Raise DataError if there are too few, if all are equal, or if the test split has one of them too.
    """
    data, spec = context.data, context.spec
    indices = data.calibration(context.section.samples, spec.seed)
    chosen = data.train.take(indices)
    names = [d.hex() for d in chosen.sample_digests()]
    require_unseen(names, data)
    if len(set(names)) == 1:
        raise DataError(
            f"calibration: all {len(names)} samples are equal, so they say nothing of the ranges of others; give more "
            "training data"
        )
    identity = digest({"indices": indices.tolist(), "samples": names})
    path = context.workdir / "calibration.json"
    path.write_text(json.dumps({"sha256": identity, "split": "train", "indices": indices.tolist(), "samples": names}))
    context.run.artifact(path)
    return chosen.inputs, Calibration(sha256=identity, samples=len(names), seed=spec.seed, split="train")


def require_unseen(samples: list[str], data: Data) -> None:
    """Raise DataError if a calibration sample, by digest, is in the test split, which would bias the gates."""
    shared = set(samples) & {d.hex() for d in data.test.sample_digests()}
    if shared:
        raise DataError(f"calibration: {len(shared)} samples are also in the test split, such as {min(shared)}")


def compare(before: onnx.ModelProto, after: onnx.ModelProto, samples: Array) -> dict[str, float]:
    """Return how far two models' answers to the samples are apart. Raise ModelError if the second is broken."""
    expected, actual = Session(before).answers(samples), Session(after).answers(samples)
    if (problem := explain_mismatch(expected, actual, QUANTIZED)) is not None:
        raise ModelError(
            f"the quantized model, on its own calibration samples, {problem}; if it has attention, or normalization "
            "written out as sums and products, set quantize.model_type to transformer, which leaves those in FP32, or "
            "choose another scheme, such as int8-weights"
        )
    distances = measure(expected, actual).metrics()
    return {f"calibration_{name}": figure for name, figure in distances.items()}
