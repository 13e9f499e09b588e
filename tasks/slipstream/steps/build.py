"""build: a recipe's candidate becomes the engine of a target, and is checked against ONNX Runtime on real samples.

Metrics: `size_bytes`, `size_gzip_bytes` (compressed), `build_s`, `max_abs_diff`, `relative_error`, and `agreement`
(share of samples with the same label) if answers are class scores; and the engine's own measurements during the build.
Details: `fingerprint`; `not_loadable`, the reason, if the engine was built for hardware in other machines and could not
be compared; `layers`, how many rows the engine's table of layers has (artifact `layers.json`), if it has one.
"""

import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np

from slipstream import digests
from slipstream.contract import Json, StepInput, StepOutput
from slipstream.contract.arrays import Array
from slipstream.contract.handover import Built
from slipstream.data.splits import Data
from slipstream.data.tokens import Tokenizer
from slipstream.engines.base import (
    LAYERS,
    build_engine,
    cache_file,
    engine_for,
    load_engine,
    read_manifest,
    record_answers,
    size_bytes,
    why_not_loadable,
)
from slipstream.errors import EngineError
from slipstream.frameworks.base import ONNX
from slipstream.onnx.agreement.bounds import bound_for, explain_mismatch, measure
from slipstream.onnx.agreement.layers import first_departure
from slipstream.onnx.agreement.reference import reference
from slipstream.plugins import ENGINES, RETRAIN
from slipstream.runner.context import Context
from slipstream.spec import Spec, Target
from slipstream.store import engine_cache
from slipstream.store.signature import signature

log = logging.getLogger(__name__)

SAMPLES = 64
"""Samples of the training split on which the engine is compared; the test split is reserved for the gates."""


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return the target, and what its engine's bytes depend on: versions and hardware. Raise EngineError."""
    target = _target(spec, inputs)
    engine = engine_for(target.engine)
    engine.check(target)  # a missing device has no fingerprint
    return {
        "target": target.model_dump(mode="json"),
        "versions": digests.versions(*engine.distributions),
        "fingerprint": engine.fingerprint(target),
    } | digests.plugin(ENGINES[target.engine].module)


def run(context: Context) -> StepOutput:
    """Build, load, compare, log."""
    techniques = context.spec.techniques(context.cell.recipe)
    source = context.upstream(techniques[-1] if techniques else RETRAIN)
    candidate = context.fetch(source)
    folder = context.workdir / "engine"
    shutil.rmtree(folder, ignore_errors=True)
    target = _target(context.spec, context.inputs)
    reason = why_not_loadable(target)
    with engine_cache.shared(context.tracking, context.run, cache_file(target)):
        started = time.monotonic()
        manifest = build_engine(candidate, target, folder, _tokenizer(context.data, target))
        build_s = time.monotonic() - started
        gzip_bytes = digests.folder_gzip_size(folder)  # before answers are recorded, which are not part of the engine
        metrics = check(candidate, folder, context.data.train.inputs[:SAMPLES]) if reason is None else {}
    metrics |= {"size_bytes": float(size_bytes(folder)), "size_gzip_bytes": float(gzip_bytes), "build_s": build_s}
    metrics |= manifest.figures
    _log_result(context.cell.key, metrics, reason)
    details = Built(fingerprint=manifest.fingerprint, not_loadable=reason, layers=_log_layers(context, folder))
    artifact = context.run.log_model(
        folder,
        context.cell.key,
        signature(manifest.input_shape, manifest.input_dtype, manifest.output_shape),
        parents=[source.artifact.model_id] if source.artifact and source.artifact.model_id else [],
        metadata={"fingerprint": manifest.fingerprint, "candidate_sha256": manifest.candidate_sha256},
    )
    return context.output(artifact=artifact, metrics=metrics, details=details)


def _log_result(key: str, metrics: dict[str, float], reason: str | None) -> None:
    size_kb = metrics["size_bytes"] / 1e3
    if reason is None:
        log.info("%s: %.0f kB, largest difference %.2g", key, size_kb, metrics["max_abs_diff"])
    else:
        log.warning("%s: %.0f kB, built but not compared with its candidate: %s", key, size_kb, reason)


def _log_layers(context: Context, folder: Path) -> int:
    """Log the engine's table of layers, if it wrote one, where MLflow shows tables; return its number of rows."""
    path = folder / LAYERS
    if not path.exists():
        return 0
    context.run.table(path)
    return len(json.loads(path.read_text())["data"])


def check(candidate: Path, folder: Path, samples: Array) -> dict[str, float]:
    """Load the engine as the server will, and compare its answers to samples (N, …) with ONNX Runtime's.

    Its answers to some of them are recorded in its folder. Raise EngineError, naming the first layer that diverges, if
    they are further apart than the engine's precision explains (a quantized ONNX can be correct and the engine built
    from it broken: NVIDIA/Model-Optimizer#126).
    """
    expected = reference(candidate / ONNX, samples)
    runner = load_engine(folder)
    actual = runner.run(np.ascontiguousarray(samples))
    manifest = read_manifest(folder)
    bound = bound_for(manifest.target.precision, quantized=manifest.quantized)
    problem = explain_mismatch(expected, actual, bound)
    if problem is not None:
        where = first_departure(candidate, manifest.target, samples, bound)
        raise EngineError(
            f"the {manifest.engine} engine, compared with ONNX Runtime on {len(samples)} samples, {problem}; {where}"
        )
    record_answers(folder, runner, samples)
    return measure(expected, actual).metrics()


def _tokenizer(data: Data, target: Target) -> str | None:
    """Return the data's tokenizer, if any, set to cut texts at the engine's maximum length."""
    if data.tokenizer is None:
        return None
    return Tokenizer(data.tokenizer).limited(max(target.lengths, default=data.train.inputs.shape[1]))


def _target(spec: Spec, inputs: StepInput) -> Target:
    cell = inputs.cell
    assert cell is not None and cell.target is not None, "build needs a cell with a target"
    return spec.targets[cell.target]
