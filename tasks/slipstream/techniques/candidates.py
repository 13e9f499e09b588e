"""Common parts of the steps that make candidates: the folder, the log entry in MLflow, the quality."""

import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slipstream.contract import Artifact, Json, StepInput, StepOutput
from slipstream.contract.arrays import Array, Float32Array
from slipstream.data.splits import Split
from slipstream.errors import ModelError
from slipstream.frameworks.base import (
    MANIFEST,
    ONNX,
    Constrained,
    Framework,
    Schedule,
    SoftTargets,
    constrains,
    read_manifest,
    require_own_architecture,
)
from slipstream.home import replacing
from slipstream.measure.metrics.base import metric_for, value
from slipstream.plugins import FRAMEWORKS, RETRAIN
from slipstream.runner.context import Context
from slipstream.spec import Cluster, Prune, Quantize, Spec
from slipstream.store.signature import signature
from slipstream.store.tracking import fetch

if TYPE_CHECKING:  # techniques load it where they need it
    import onnx

_log = logging.getLogger(__name__)


def fresh_folder(context: Context, name: str = "candidate") -> Path:
    """Return the folder for a candidate, without the remains of a killed attempt."""
    folder = context.workdir / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def settings_of(technique: str, spec: Spec, inputs: StepInput) -> Json:
    """Return the settings of a technique in the recipe of a step, as JSON."""
    assert inputs.cell is not None, f"{technique} needs a cell"
    settings: Json = spec.section(technique, inputs.cell.recipe).model_dump(mode="json")
    return settings


def source_of(context: Context) -> StepOutput:
    """Return the output that a technique works on: of the recipe's previous technique, or of retrain."""
    techniques: Sequence[str] = context.spec.techniques(context.cell.recipe)
    before = techniques[: techniques.index(context.step)]
    return context.upstream(before[-1] if before else RETRAIN)


def write_onnx(context: Context, source: Path, model: "onnx.ModelProto", **changes: object) -> Path:
    """Return a candidate folder with another ONNX form of the candidate in `source`; `changes` are of its manifest.

    The framework can no longer load it, so its files are dropped, except for those that engines convert from.
    """
    folder, manifest = fresh_folder(context), read_manifest(source)
    folder.mkdir(parents=True)
    (folder / ONNX).write_bytes(model.SerializeToString())
    for name in FRAMEWORKS[manifest.framework].keeps:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).is_file():
            shutil.copy(source / name, folder / name)
    changed = manifest.model_copy(update={"architecture": None, **changes})
    (folder / MANIFEST).write_text(changed.model_dump_json(indent=2))
    return folder


def log(context: Context, folder: Path, name: str, parents: Iterable[str | None] = ()) -> Artifact:
    """Log a candidate folder as an MLflow model, linked to the logged models that it was made from."""
    manifest = read_manifest(folder)
    shapes = signature(manifest.input_shape, manifest.input_dtype, manifest.output_shape)
    return context.run.log_model(
        folder,
        name,
        shapes,
        parents=[p for p in parents if p is not None],
        metadata={"candidate": manifest.model_dump(mode="json")},
    )


def quality(spec: Spec, answers: Array, split: Split) -> dict[str, float]:
    """Return the spec's metric of answers (N, …) in percent, such as `test_top1`, for information: gates judge engines.

    Raise ModelError for invalid answers.
    """
    metric = metric_for(spec.objective.metric)
    metric.check(answers, split.labels, "the network", ModelError)
    return {f"test_{metric.name}": 100 * value(metric, metric.evaluate(answers, split.labels))}


def train_constrained(
    context: Context,
    candidate: Path,
    section: Prune | Cluster | Quantize,
    schedule: Schedule,
    soft: SoftTargets | None = None,
) -> tuple[Constrained, dict[str, float]]:
    """Return a candidate's network, trained as the section says and finished, with its figures and quality.

    The checkpoint is named after the step.
    """
    framework = constrains(context.spec.model.framework)
    constrained = framework.constrain(candidate, section, context.job, schedule)
    framework.fit(constrained.network, context.job, schedule, context.step, soft)
    figures, test = constrained.finish(), context.data.test
    figures |= quality(context.spec, framework.logits(constrained.network, test.inputs), test)
    _log.info("%s: %s", context.step, "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return constrained, figures


def soft_answers(context: Context, framework: Framework, teacher: Artifact) -> Float32Array:
    """Return (N, …) answers of a candidate for the training split, from the cache or computed once.

    They belong to the unmodified images, so a network that learns from them is trained without augmentation. In a
    group, process 0 computes them, and all read its file.
    """
    split = context.data.train
    path = context.home.cache / "soft-answers" / f"{teacher.sha256}-{split.digest}.npy"
    if context.group.leads:
        if path.exists():
            _log.info("teacher: answers for %d images found in the cache", len(split))
        else:
            _log.info("teacher: answering %d images", len(split))
            folder = fetch(teacher)
            require_own_architecture(folder, context.spec)
            with replacing(path) as file:
                np.save(file, framework.logits(framework.load(folder), split.inputs))
    context.group.broadcast_file(path)
    answers: Float32Array = np.load(path, allow_pickle=False)
    return answers
