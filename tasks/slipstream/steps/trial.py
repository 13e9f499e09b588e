"""trial (stage 2): champion and challenger in parallel, first in shadow, then with a small share of the traffic.

Whatever happens, the traffic ends where it was: all of it on the champion, no mirror. This also holds after a SIGTERM;
after a SIGKILL, the watchdog (release/watchdog.py) or the next step ensures it. Unfinished work of an earlier step is
settled first; a rejected engine is not tested again.

Details: `handover.Trial`.
"""

from slipstream import traffic
from slipstream.contract import Json, StepInput, StepOutput, combine
from slipstream.contract.handover import Trial
from slipstream.errors import Superseded
from slipstream.release import moves, rejections, settle
from slipstream.release.moves import Move
from slipstream.release.releases import Incumbent, incumbent, keep_serving, selected, serve, sweep, traffic_lock
from slipstream.runner.context import Context, require_pass
from slipstream.spec import Spec
from slipstream.store.registry import Registry
from slipstream.store.tracking import fetch
from slipstream.traffic import small_scale
from slipstream.traffic.base import TrafficController
from slipstream.traffic.guarded import Stage, put_back_if_possible
from slipstream.traffic.termination import sigterm_as_exit


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return what determines the result."""
    return {
        "small_scale_test": spec.small_scale_test.model_dump(mode="json"),
        "guardrails": spec.guardrails.model_dump(mode="json"),
        "objective": spec.objective.model_dump(mode="json"),
        "run": inputs.run_key,
        "version": selected(inputs).version,
    }


def run(context: Context) -> StepOutput:
    """Run the small-scale test. Raise GateFailed if it fails or stays inconclusive, Undecided under overload."""
    with traffic_lock(context.home, context.spec.model.name):
        return small_scale_test(context, traffic.controller(context.home))


def small_scale_test(context: Context, controller: TrafficController) -> StepOutput:
    """Do the same with the given controller."""
    chosen, inputs = selected(context.inputs), context.inputs
    version, registry = str(chosen.version), Registry(context.spec.model.name, context.tracking.client)
    settle.settle(registry, lambda: controller)
    registry.expect_champion(chosen.champion)
    champion = incumbent(registry, inputs, str(chosen.winner))
    if chosen.already_champion:
        keep_serving(registry, controller, champion, inputs.run_key)
        return context.output(details=Trial(skipped=f"version {version} is this engine and serves already"))
    rejections.require_allowed(registry, version)
    facts = {"to": version, "run_id": context.run.run_id}
    with (
        sigterm_as_exit(),
        moves.begin(registry, controller, "trial", inputs.run_key, champion.release.name, **facts) as move,
    ):
        return _guarded_test(context, move, champion)


def _guarded_test(context: Context, move: Move, champion: Incumbent) -> StepOutput:
    """Deploy, test and restore the traffic, as the owner of the traffic."""
    registry, challenger = move.registry, move.registry.release(str(move.entry.to))
    stage = Stage(
        spec=context.spec,
        controller=move.controller,
        split=context.data.test,
        champion=champion.release,
        challenger=challenger,
        run_key=context.inputs.run_key,
        progress=context.run.progress,
    )
    try:
        registry.expect_champion(champion.version)
        serve(move.controller, champion)
        artifact = registry.artifact(str(move.entry.to))
        move.controller.deploy(challenger, fetch(artifact), artifact.sha256)
        sweep(move.controller, registry, champion.release, challenger)
        verdicts, figures = small_scale.measure(stage)
    except Superseded:
        raise  # the traffic belongs to another move now
    except BaseException:
        settle.abort(move, stage)
        raise
    details = Trial(
        timeline=tuple(stage.timeline),
        notes=tuple(stage.notes),
        champion=champion.version,
        champion_release=champion.release.name,
        challenger=move.entry.to,
        figures=figures,
    )
    output = context.output(verdicts=verdicts, details=details)
    put_back_if_possible(stage)
    if combine(verdicts) == "inconclusive" and (transient := stage.transient()) is not None:
        context.tracking.record(context.run, output)
        settle.put_back(move)  # nothing is rejected: the step is retried, with the same challenger
        require_pass("small-scale test", verdicts, transient)
    if combine(verdicts) != "pass":
        settle.refuse(move, verdicts, lambda: context.tracking.record(context.run, output))
        require_pass("small-scale test", verdicts)
    settle.put_back(move)
    registry.expect_champion(champion.version)
    return output
