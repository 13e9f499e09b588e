"""distill: a small student learns the baseline's soft answers (Hinton, Vinyals and Dean 2015).

The teacher answers each training image once; its logits are kept under the digests of teacher and training split.
They belong to the images as they are, so the student trains without augmentation.
Details: `student` and `teacher_sha256`. Metrics: `test_top1` of the student, `teacher_top1`, `parameters`.
"""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipstream import candidates
from slipstream.contract import StepInput, StepOutput
from slipstream.data import user_code_digest
from slipstream.digests import versions
from slipstream.errors import ModelError
from slipstream.frameworks.base import Framework, Job, Schedule, SoftTargets, framework_for
from slipstream.spec import Distill, Spec
from slipstream.steps.base import Context

log = logging.getLogger(__name__)


def settings(spec: Spec, inputs: StepInput) -> dict[str, Any]:
    """What decides the result, beside the teacher and the data."""
    section = _section(spec)
    return {
        "distill": section.model_dump(mode="json"),
        "student": user_code_digest(section.student),
        "seed": spec.seed,
        "versions": versions(*framework_for(spec.model.framework).distributions),
    }


def run(context: Context) -> StepOutput:
    """Train the student and log it as a candidate."""
    spec, data, section = context.spec, context.data, _section(context.spec)
    framework = framework_for(spec.model.framework)
    teacher = context.upstream("retrain")
    assert teacher.artifact is not None
    context.run.params(section.model_dump(mode="json"))
    logits = _teacher_logits(context, framework, context.fetch(teacher), teacher.artifact.sha256)
    student = framework.build(section.student, spec.seed)
    _require_same_classes(framework.logits(student, data.train.inputs[:2]), logits, section)
    framework.fit(
        student,
        Job(data, spec.seed, context.workdir, context.run),
        Schedule(section.epochs, section.learning_rate),
        "student",
        SoftTargets(logits, section.temperature, section.soft_weight),
    )
    folder = candidates.fresh_folder(context)
    manifest = framework.save(student, section.student, data.test, folder)
    artifact = candidates.log(context, folder, "distilled", parents=[teacher.artifact.model_id])
    metrics = candidates.quality(framework.logits(student, data.test.inputs), data.test)
    metrics |= {
        "teacher_top1": teacher.metrics.get("test_top1", float("nan")),
        "parameters": float(manifest.parameters),
    }
    details = {"student": section.student.function, "teacher_sha256": teacher.artifact.sha256}
    return context.output(artifact=artifact, metrics=metrics, details=details)


def _section(spec: Spec) -> Distill:
    assert spec.distill is not None, "spec.py refuses a recipe that distills without a distill section"
    return spec.distill


def _teacher_logits(context: Context, framework: Framework, teacher: Path, sha256: str) -> npt.NDArray[np.float32]:
    """(N, classes) answers of the teacher for the training split, from the cache or computed once."""
    split = context.data.train
    path = context.home.cache / "teacher-logits" / f"{sha256}-{split.digest}.npy"
    if path.exists():
        log.info("teacher: answers for %d images found in the cache", len(split))
        cached: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
        return cached
    log.info("teacher: answering %d images", len(split))
    logits = framework.logits(framework.load(teacher), split.inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        np.save(file, logits)
    aside.replace(path)
    return logits


def _require_same_classes(student: npt.NDArray[Any], teacher: npt.NDArray[Any], section: Distill) -> None:
    if student.shape[1:] != teacher.shape[1:]:
        raise ModelError(
            f"distill.student: {section.student.function} answers with {student.shape[1:]} values, but the teacher "
            f"with {teacher.shape[1:]}; both must know the same classes"
        )
