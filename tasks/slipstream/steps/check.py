"""check: can this run end well? Asked before anything is trained, and answered with all problems at once.

Details: `data` (digest of each split), `classes`, `samples` (of each split), `hardware`.
"""

import logging
from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient

from slipstream import hardware
from slipstream.contract import StepInput, StepOutput
from slipstream.data import Data, user_function
from slipstream.engines.base import engine_for
from slipstream.errors import DataError, EngineError, ModelError, SlipstreamError, SpecError
from slipstream.frameworks.base import Framework, framework_for
from slipstream.spec import Call, Spec
from slipstream.steps.base import Context
from slipstream.steps.retrain import require_version, version_to_load

log = logging.getLogger(__name__)


def settings(spec: Spec, inputs: StepInput) -> dict[str, Any]:
    """What decides the result: everything that a spec says. It is never taken from an earlier run."""
    return {"spec": spec.model_dump(mode="json"), "run": inputs.run_key}


def run(context: Context) -> StepOutput:
    """Check functions, targets, registry, data and networks. Raises one error with a line for each problem."""
    spec = context.spec
    problems = [
        *_functions(spec),
        *_targets(spec),
        *_registry(spec, context.inputs, context.tracking.client),
    ]
    if not any(isinstance(p, SpecError) for p in problems):  # what cannot be imported cannot be tried either
        problems += _networks_and_data(spec, context)
    if problems:
        raise _joined(problems)
    loaded = context.data
    source = spec.data
    sources = dict.fromkeys(("train", "test"), source.function) if isinstance(source, Call) else source.model_dump()
    context.run.dataset(loaded, spec.name, sources)
    log.info("%d training and %d test samples; %s", len(loaded.train), len(loaded.test), hardware.sentence())
    return context.output(
        details={
            "data": loaded.digests(),
            "classes": list(loaded.classes),
            "samples": {"train": len(loaded.train), "test": len(loaded.test)},
            "hardware": hardware.describe(),
        }
    )


def _functions(spec: Spec) -> Iterator[SlipstreamError]:
    """Functions that cannot be imported."""
    calls = {
        "model.architecture": spec.model.architecture,
        "model.train": spec.model.train,
        "data": spec.data if isinstance(spec.data, Call) else None,
        "distill.student": spec.distill.student if spec.distill else None,
    }
    for field, call in calls.items():
        if call is not None:
            try:
                user_function(call)
            except SpecError as error:
                yield SpecError(f"{field}: {error}; check the name, and that SLIPSTREAM_CODE is the folder above it")


def _targets(spec: Spec) -> Iterator[SlipstreamError]:
    """Targets that this machine cannot serve."""
    for name, target in spec.targets.items():
        try:
            engine_for(target.engine).check(target)
        except EngineError as error:
            yield EngineError(f"targets.{name}: {error}")


def _registry(spec: Spec, inputs: StepInput, client: MlflowClient) -> Iterator[SlipstreamError]:
    """A version to start from that is not there."""
    try:
        version = version_to_load(spec, inputs, client)
        if version is not None:
            require_version(client, spec.model.name, version)
    except ModelError as error:
        yield ModelError(f"model.registry: {error}")


def _networks_and_data(spec: Spec, context: Context) -> Iterator[SlipstreamError]:
    """Data that cannot be loaded, and networks that do not take it."""
    try:
        loaded = context.data
        framework = framework_for(spec.model.framework)
    except (DataError, ModelError) as error:
        yield error
        return
    except Exception as error:
        yield DataError(f"data: the loader failed: {type(error).__name__}: {error}")
        return
    if spec.model.architecture is not None:
        yield from _network(framework, "model.architecture", spec.model.architecture, loaded, spec.seed)
    if spec.distill is not None:
        yield from _network(framework, "distill.student", spec.distill.student, loaded, spec.seed)


def _network(framework: Framework, field: str, call: Call, loaded: Data, seed: int) -> Iterator[SlipstreamError]:
    """What is wrong with a network: it cannot be built, does not take the data, or knows too few classes."""
    try:
        outputs = framework.logits(framework.build(call, seed), loaded.train.inputs[:2])
    except ModelError as error:
        yield ModelError(f"{field}: {error}")
        return
    except Exception as error:
        shape, dtype = loaded.train.inputs.shape[1:], loaded.train.inputs.dtype
        yield ModelError(
            f"{field}: {call.function} does not take a batch of the data ({shape} {dtype}): "
            f"{type(error).__name__}: {error}"
        )
        return
    if outputs.ndim != 2:
        yield ModelError(f"{field}: {call.function} must answer (N, classes), not {outputs.shape}")
        return
    highest = int(max(loaded.train.labels.max(), loaded.test.labels.max()))
    if highest >= outputs.shape[1]:
        yield ModelError(
            f"{field}: {call.function} answers with {outputs.shape[1]} classes, but the labels go up to {highest}"
        )
    if loaded.classes and len(loaded.classes) != outputs.shape[1]:
        yield ModelError(
            f"{field}: {call.function} answers with {outputs.shape[1]} classes, but the data names "
            f"{len(loaded.classes)}"
        )


def _joined(problems: list[SlipstreamError]) -> SlipstreamError:
    """One error for all: of the problems' own class when they share one, else a SpecError."""
    classes = {type(p) for p in problems}
    kind = classes.pop() if len(classes) == 1 else SpecError
    return kind("\n".join(str(p) for p in problems))
