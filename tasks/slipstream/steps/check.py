"""check: can this run succeed? Asked before anything is trained, and answered with all problems at once."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
from mlflow import MlflowClient

from slipstream import hardware
from slipstream.contract import Json, StepInput, StepOutput
from slipstream.contract.arrays import Array
from slipstream.contract.handover import Checked
from slipstream.data.splits import Data
from slipstream.data.user_code import told, user_function
from slipstream.engines.inquiry import Finding, inquire
from slipstream.errors import (
    CodeError,
    DataError,
    EngineError,
    InputError,
    ModelError,
    SlipstreamError,
    SpecError,
    Unavailable,
)
from slipstream.frameworks.base import Framework, Network, framework_for, prunes, trainer_for
from slipstream.measure.metrics.base import BATCH, metric_for
from slipstream.plugins import METRICS, TECHNIQUES
from slipstream.runner.context import Context
from slipstream.spec import Call, Spec, Target
from slipstream.steps import sample_size, second_load, split_checks, text_checks
from slipstream.steps.rehearsal import rehearse
from slipstream.steps.retrain import from_file, require_version, version_to_load

log = logging.getLogger(__name__)


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return what determines the result: the whole spec. The result is never reused."""
    return {"spec": spec.model_dump(mode="json"), "run": inputs.run_key}


def run(context: Context) -> StepOutput:
    """Check functions, targets, registry, data, networks and builds. Raise one error with a line for each problem."""
    spec = context.spec
    findings = {name: inquire(context.home, target) for name, target in spec.targets.items()}
    problems = [
        *_functions(spec),
        *_targets(spec, findings),
        *_registry(spec, context.inputs, context.tracking.client),
    ]
    if not any(isinstance(p, SpecError) for p in problems):  # what cannot be imported cannot be tried either
        buildable = {
            name: spec.targets[name] for name, finding in findings.items() if finding.asked and not finding.problem
        }
        problems += _networks_and_data(spec, context, buildable)
    if problems:
        raise _joined(problems)
    loaded = context.data
    source = spec.data
    sources = dict.fromkeys(("train", "test"), source.function) if isinstance(source, Call) else source.splits
    context.run.dataset(loaded, spec.name, sources)
    log.info("%d training and %d test samples; %s", len(loaded.train), len(loaded.test), hardware.sentence())
    size, enough = sample_size.sentence(spec, len(loaded.test), sample_size.observed_percent(context.tracking))
    log.log(logging.INFO if enough else logging.WARNING, "%s", size)
    build_only = {name: finding.not_loadable for name, finding in findings.items() if finding.not_loadable is not None}
    for name, reason in build_only.items():
        log.warning("targets.%s: its engines are built, but neither measured nor released: %s", name, reason)
    return context.output(
        details=Checked(
            data=loaded.digests(),
            classes=tuple(loaded.classes),
            samples={"train": len(loaded.train), "test": len(loaded.test)},
            hardware=hardware.describe(),
            build_only=build_only,
            sample_size=size,
        )
    )


def _functions(spec: Spec) -> Iterator[SlipstreamError]:
    """Yield an error for each function that cannot be imported."""
    metric = spec.objective.metric
    calls = spec.functions | ({} if metric in METRICS else {"objective.metric": Call(function=metric)})
    for field, call in calls.items():
        try:
            user_function(call)
        except CodeError as error:
            yield CodeError(f"{field}: {error}")
        except SpecError as error:
            yield SpecError(f"{field}: {error}; check the name, and that SLIPSTREAM_CODE is the folder above it")


def _targets(spec: Spec, findings: Mapping[str, Finding]) -> Iterator[SlipstreamError]:
    """Yield an error for each target whose engines cannot be built on this machine."""
    for name, finding in findings.items():
        if finding.problem is not None:
            yield EngineError(f"targets.{name}: {finding.problem}")
        if not finding.asked:
            log.warning("targets.%s: not checked: %s is in another environment", name, spec.targets[name].engine)


def _registry(spec: Spec, inputs: StepInput, client: MlflowClient) -> Iterator[SlipstreamError]:
    """Yield an error if the version to start from is missing."""
    try:
        version = version_to_load(spec, inputs, client)
        if version is not None:
            require_version(client, spec.model.name, version)
    except ModelError as error:
        yield ModelError(f"model.registry: {error}")


def _networks_and_data(spec: Spec, context: Context, buildable: Mapping[str, Target]) -> Iterator[SlipstreamError]:
    """Yield errors of loading the data, of networks that do not accept it, and of engines that reject the networks."""
    try:
        loaded = context.data
        framework = framework_for(spec.model.framework)
    except Unavailable:  # nothing is wrong with the data: the step is retried
        raise
    except SlipstreamError as error:
        yield error
        return
    except Exception as error:
        yield DataError(f"data: {type(error).__name__}: {error}")
        return
    data_problems = [*split_checks.problems(spec, loaded), *text_checks.data(spec, loaded), *_labels(spec, loaded)]
    yield from data_problems
    answers: list[Array] = []
    if any(isinstance(p, DataError) for p in data_problems):  # the networks' answers are meaningless then
        return
    yield from _networks(spec, context, framework, buildable, answers)
    yield from second_load.problems(context.home, spec, loaded, answers[0] if answers else None, context.workdir)


def _labels(spec: Spec, loaded: Data) -> Iterator[DataError]:
    """Yield an error for labels that the metric does not judge."""
    metric = metric_for(spec.objective.metric)
    for name, split in (("train", loaded.train), ("test", loaded.test)):
        try:
            metric.check_labels(split.labels)
        except DataError as error:
            yield DataError(f"data: split {name}: {error}")


def _networks(
    spec: Spec,
    context: Context,
    framework: Framework,
    buildable: Mapping[str, Target],
    answers: list[Array],
) -> Iterator[SlipstreamError]:
    """Yield errors of networks that do not accept the data, and of engines that do not support the networks.

    The answers of networks without a problem are added to `answers`.
    """
    loaded = context.data
    networks: dict[str, tuple[str, Call | None, Callable[[], Network]]] = {}
    for field, call in spec.functions.items():
        if field == "model.architecture" or field.endswith("distill.student"):
            build = partial(trainer_for(spec.model.framework).build, call, spec.seed)
            networks[field] = (call.function, call, build)
    if spec.model.file is not None:
        networks["model.file"] = (spec.model.file, spec.model.architecture, partial(from_file, spec, framework))
    for field, (name, architecture, make) in networks.items():
        network, problems = _network(spec, framework, (field, name), make, loaded)
        yield from problems
        if problems and field == "model.architecture":
            return  # a file of its weights has the same problems
        if not problems:
            if field != "model.file":
                yield from _pruning(spec, field, architecture, network, loaded)
            answers.append(framework.logits(network, loaded.train.inputs[:2]))
            save = partial(framework.save, network, architecture, loaded.test)
            yield from rehearse(context.home, f"{field}: {name}", save, buildable, context.workdir)


def _pruning(
    spec: Spec, field: str, architecture: Call | None, network: Network, loaded: Data
) -> Iterator[SlipstreamError]:
    """Yield why channels cannot be removed from a network that some recipe prunes, before it is trained."""
    for recipe in spec.recipes:
        prune, distill = spec.section("prune", recipe), spec.section("distill", recipe)
        begins_with = distill.student if distill else spec.model.architecture
        if prune is None or prune.method != "channels" or begins_with != architecture:
            continue
        try:
            prunes(spec.model.framework).require_prunable(network, loaded.train, prune)
        except ModelError as error:
            yield ModelError(f"recipes.{recipe}: {field}: {error}")
            return


def _network(
    spec: Spec, framework: Framework, where: tuple[str, str], make: Callable[[], Network], loaded: Data
) -> tuple[Network, list[SlipstreamError]]:
    """Return a network, and its problem: it cannot be built, does not accept the data, or its output is invalid.

    `where` is the field that names it, and its name there.
    """
    field, what = where
    network = None
    try:
        network = make()
        outputs = framework.logits(network, loaded.train.inputs[:2])
    except Unavailable:
        raise
    except SlipstreamError as error:
        message = str(error)
        return None, [type(error)(message if message.startswith(f"{field}: ") else f"{field}: {message}")]
    except Exception as error:
        shape, dtype = loaded.train.inputs.shape[1:], loaded.train.inputs.dtype
        reason = told(error)
        general = ModelError(f"{field}: {what} does not take a batch of the data ({shape} {dtype}): {reason}")
        ids = [] if network is None else [*text_checks.token_ids(framework, f"{field}: {what}", network, loaded)]
        return None, [*(ids or [general])]
    problems = [
        *_answers(spec, f"{field}: {what}", outputs, loaded),
        *text_checks.network(framework, f"{field}: {what}", network, loaded),
    ]
    return network, problems


def _answers(spec: Spec, what: str, outputs: Array, loaded: Data) -> Iterator[SlipstreamError]:
    """Yield what is wrong with a network's answers (2, …): they do not fit the data's labels, as the metric sees them,
    or no loss accepts both."""
    metric = metric_for(spec.objective.metric)
    try:
        for labels in (loaded.train.labels, loaded.test.labels):
            for start in range(0, len(labels), BATCH):  # the same answer for each label
                beside = labels[start : start + BATCH]
                repeated = np.broadcast_to(outputs[:1], (len(beside), *outputs.shape[1:]))
                metric.check(repeated, beside, what, ModelError)
        metric.evaluate(outputs, loaded.train.labels[: len(outputs)])
    except SlipstreamError as error:
        yield error
        return
    classes = metric.classes(outputs.shape)
    if loaded.classes and classes is not None and len(loaded.classes) != classes:
        yield ModelError(f"{what} answers with {classes} classes, but the data names {len(loaded.classes)}")
    labels = loaded.train.labels[: len(outputs)]
    training = {name for name, info in TECHNIQUES.items() if info.trains}
    tuned = [r for r in spec.recipes if training & set(spec.techniques(r)) or spec.trains_for_int8(r)]
    if tuned and spec.model.loss is None and not _are_classes(outputs, labels):
        yield SpecError(
            f"recipes.{tuned[0]}: trains on the labels, but cross entropy does not take outputs {outputs.shape} with "
            f"labels {labels.shape} {labels.dtype}; name a loss under model.loss, as module:function"
        )


def _are_classes(outputs: Array, labels: Array) -> bool:
    """Return whether labels are classes of outputs (N, classes), or maps of them for outputs (N, classes, …)."""
    fits = outputs.ndim >= 2 and labels.shape == (len(outputs), *outputs.shape[2:])
    return fits and bool(np.issubdtype(labels.dtype, np.integer))


def _joined(problems: list[SlipstreamError]) -> SlipstreamError:
    """Return one error for all: of the problems' own class if they share one, else an InputError."""
    classes = {type(p) for p in problems}
    kind = classes.pop() if len(classes) == 1 else InputError
    return kind("\n".join(dict.fromkeys(str(p) for p in problems)))
