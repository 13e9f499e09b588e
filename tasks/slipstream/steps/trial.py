"""trial (stage 2): champion and challenger side by side, first in shadow, then with a small share of the traffic.

Whatever happens, the traffic ends where it was: all of it on the champion, no mirror. Also after a SIGTERM; and
after a SIGKILL as soon as the step is tried again.

Details: `timeline` (a point for each window of requests), `champion` (version or None), `champion_release`,
`challenger` (version), `figures`, `notes`; or `skipped` with the reason.
"""

from typing import Any

from slipstream import traffic
from slipstream.contract import StepInput, StepOutput, combine
from slipstream.registry import CHALLENGER, Registry
from slipstream.spec import Spec
from slipstream.steps.base import Context, require_pass
from slipstream.tracking import fetch
from slipstream.traffic import small_scale
from slipstream.traffic.base import TrafficController
from slipstream.traffic.guarded import Stage
from slipstream.traffic.releases import incumbent, moving_alone, selected, serve, sweep
from slipstream.traffic.termination import terminable


def settings(spec: Spec, inputs: StepInput) -> dict[str, Any]:
    """What decides the result."""
    return {
        "small_scale_test": spec.small_scale_test.model_dump(mode="json"),
        "guardrails": spec.guardrails.model_dump(mode="json"),
        "objective": spec.objective.model_dump(mode="json"),
        "run": inputs.run_key,
        "version": selected(inputs)["version"],
    }


def run(context: Context) -> StepOutput:
    """Run the small-scale test. Raises GateFailed when it fails or stays inconclusive."""
    with moving_alone(context.home, context.spec.model.name):
        return small_scale_test(context, traffic.controller(context.home))


def small_scale_test(context: Context, controller: TrafficController) -> StepOutput:
    """The same, with the controller given."""
    chosen = selected(context.inputs)
    registry = Registry(context.spec.model.name, context.tracking.client)
    registry.expect_champion(chosen["champion"])
    champion = incumbent(registry, context.inputs, chosen["winner"])
    if chosen["already_champion"]:
        serve(controller, champion)
        return context.output(details={"skipped": f"version {chosen['version']} is this engine and serves already"})
    stage = Stage(
        spec=context.spec,
        controller=controller,
        split=context.data.test,
        champion=champion.release,
        challenger=registry.release(chosen["version"]),
        run_key=context.inputs.run_key,
        progress=context.run.progress,
    )
    facts = {"champion": champion.version, "champion_release": champion.release.name, "challenger": chosen["version"]}
    with terminable():
        serve(controller, champion)  # also puts right what a killed attempt left
        artifact = registry.artifact(chosen["version"])
        controller.deploy(stage.challenger, fetch(artifact), artifact.sha256)
        sweep(controller, registry, stage.champion, stage.challenger)
        try:
            verdicts, found = small_scale.measure(stage)
        except BaseException:
            stage.put_back()
            raise
        output = context.output(verdicts=verdicts, details={"timeline": stage.timeline, **facts, **found})
        try:
            stage.put_back()
            if combine(verdicts) != "pass":
                context.tracking.record(context.run, output)
                registry.set_alias(CHALLENGER, None)
                controller.retire(stage.challenger)
        finally:  # a no stays a no, also where cleaning up fails: the next run does that
            require_pass("small-scale test", verdicts)
    return output
