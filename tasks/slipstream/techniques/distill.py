"""distill: a small student learns the baseline's soft answers (Hinton, Vinyals and Dean 2015).

The teacher answers each training image once; its logits are kept under the digests of teacher and training split. They
belong to the unmodified images, so the student trains without augmentation. Details: `student` and `teacher_sha256`.
Metrics: `test_NAME` of the student and `teacher_NAME`, where NAME is the metric, `parameters`.
"""

from typing import cast

from slipstream.contract import Json, StepInput, StepOutput
from slipstream.contract.arrays import Array
from slipstream.contract.handover import Distilled
from slipstream.data.user_code import user_code_digest
from slipstream.errors import ModelError
from slipstream.frameworks.base import Network, Schedule, SoftTargets, toolchain, trainer_for
from slipstream.plugins import RETRAIN
from slipstream.runner.context import Context, workers
from slipstream.spec import Distill, Spec
from slipstream.techniques import candidates


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return what determines the result, in addition to the teacher and the data."""
    assert inputs.cell is not None, "distill needs a cell"
    section: Distill = spec.section("distill", inputs.cell.recipe)
    return {
        "distill": section.model_dump(mode="json"),
        "student": user_code_digest(section.student),
        "loss": user_code_digest(spec.model.loss),
        "seed": spec.seed,
        "versions": toolchain(spec.model.framework),
    } | workers(spec)


def run(context: Context) -> StepOutput:
    """Train the student and log it as a candidate."""
    spec, data, section = context.spec, context.data, cast(Distill, context.section)
    framework = trainer_for(spec.model.framework)
    teacher = context.upstream(RETRAIN)
    assert teacher.artifact is not None
    context.run.params(section.model_dump(mode="json"))
    student = context.train_on_all(train)
    folder = candidates.fresh_folder(context)
    manifest = framework.save(student, section.student, data.test, folder)
    artifact = candidates.log(context, folder, "distilled", parents=[teacher.artifact.model_id])
    metrics = candidates.quality(spec, framework.logits(student, data.test.inputs), data.test)
    shared = [name for name in metrics if name in teacher.metrics]
    metrics |= {name.replace("test_", "teacher_", 1): teacher.metrics[name] for name in shared}
    metrics["parameters"] = float(manifest.parameters)
    details = Distilled(student=section.student.function, teacher_sha256=teacher.artifact.sha256)
    return context.output(artifact=artifact, metrics=metrics, details=details)


def train(context: Context) -> Network:
    """Return the trained student; every process of the group calls it. The teacher answers in the first one."""
    spec, section = context.spec, cast(Distill, context.section)
    framework = trainer_for(spec.model.framework)
    teacher = context.upstream(RETRAIN)
    assert teacher.artifact is not None
    logits = candidates.soft_answers(context, framework, teacher.artifact)
    student = framework.build(section.student, spec.seed)
    _require_same_classes(framework.logits(student, context.data.train.inputs[:2]), logits, section)
    schedule = Schedule(section.epochs, section.learning_rate, optimizer=section.optimizer)
    soft = SoftTargets(logits, section.temperature, section.soft_weight)
    framework.fit(student, context.job, schedule, "student", soft)
    return student


def _require_same_classes(student: Array, teacher: Array, section: Distill) -> None:
    if student.shape[1:] != teacher.shape[1:]:
        raise ModelError(
            f"distill.student: {section.student.function} answers with {student.shape[1:]} values, but the teacher "
            f"with {teacher.shape[1:]}; both must answer alike"
        )
