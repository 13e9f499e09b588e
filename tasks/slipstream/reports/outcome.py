"""The outcome of a run and its sentence: pure functions of the steps' outputs."""

from collections import Counter
from collections.abc import Sequence

from slipstream.contract import StepOutput, Verdict, combine
from slipstream.contract.evidence import Row
from slipstream.contract.handover import Rollout, Selection
from slipstream.plugins import ROLLOUT, SELECT, TRIAL
from slipstream.reports import wording
from slipstream.reports.document import Failure, Outcome
from slipstream.spec import Spec

STAGES = {TRIAL: "small-scale test", ROLLOUT: "rollout"}


def decide(outputs: dict[str, StepOutput], failures: Sequence[Failure], rows: Sequence[Row]) -> Outcome:
    """Return the outcome, read from the last stage that left a result. `outputs` maps cell-less steps to their
    outputs."""
    failed = {f.step for f in failures}
    rollout, trial, select = (outputs.get(s) for s in (ROLLOUT, TRIAL, SELECT))
    if rollout and Rollout.of(rollout).released and all(v.passed for v in rollout.verdicts):
        return "released"
    if rollout or ROLLOUT in failed:
        return "rolled_back"
    if TRIAL in failed or (trial and not all(v.passed for v in trial.verdicts)):
        return "stopped"
    chosen = Selection.of(select) if select else None
    if chosen and chosen.already_champion:
        return "unchanged"
    if chosen and chosen.winner:
        return "held"
    judged = [r for r in rows if r.status not in ("reference", "missing")]
    return "rejected" if judged and all(r.status in ("rejected", "inconclusive") for r in judged) else "failed"


def is_ok(outcome: Outcome, skipped: Sequence[str], missing: Sequence[str]) -> bool:
    """Return whether the run counts as finished. It does not if a cell is missing or a required stage did not run."""
    if missing:
        return False
    return outcome in ("released", "unchanged") or (outcome == "held" and bool(skipped))


def without_answer(*stages: StepOutput | None) -> bool:
    """Return whether a test or rollout ended undecided, as on a busy machine."""
    return any(stage is not None and combine(stage.verdicts) == "inconclusive" for stage in stages)


def headline(
    spec: Spec,
    outcome: Outcome,
    winner: Row | None,
    version: str | None,
    rows: Sequence[Row],
    *,
    undecided: bool = False,
) -> str:
    """Return one sentence: what was released, or that nothing was."""
    name = f"{spec.model.name} v{version}" if version else spec.model.name
    engine = f" ({winner.cell})" if winner else ""
    judged = [r for r in rows if r.status != "reference"]
    absent = sum(r.status == "missing" for r in judged)
    return {
        "released": f"{name}{engine} is live{_gain(spec, winner)}",
        "unchanged": f"{name}{engine} already serves and is still the best",
        "held": f"{name}{engine} passed its gates, and was not rolled out",
        "rejected": f"Nothing was released: {_none_passed(len(judged))}",
        "stopped": f"Nothing was released: the small-scale test of {name}{engine} came to no answer"
        if undecided
        else f"Nothing was released: {name}{engine} did not pass the small-scale test",
        "rolled_back": f"Nothing was released: the rollout of {name}{engine} "
        + ("came to no answer" if undecided else "was aborted"),
        "failed": f"Nothing was released: {absent} of {wording.count(len(judged), 'engine')} left no evidence"
        if 0 < absent < len(judged)
        else "Nothing was released: the run failed before the gates could judge",
    }[outcome]


def explanation(
    outcome: Outcome, outputs: dict[str, StepOutput], failures: Sequence[Failure], rows: Sequence[Row]
) -> str:
    """Return the reason behind the headline, with its numbers."""
    if outcome in ("stopped", "rolled_back"):
        return _stage_reason(TRIAL if outcome == "stopped" else ROLLOUT, outputs, failures)
    if outcome in ("rejected", "failed"):
        gates = Counter(v.gate for r in rows if r.status == "rejected" for v in r.verdicts if v.answer == "fail")
        reasons = [f"{wording.count(n, 'engine')} failed the gate {gate}" for gate, n in gates.most_common()]
        unsure = sum(r.status == "inconclusive" for r in rows)
        reasons += [f"{wording.count(unsure, 'engine')} stayed inconclusive, which is not a pass"] if unsure else []
        reasons += [f"{f.where}: {f.reason}" for f in failures if f.step != SELECT]
        return _sentence("; ".join(reasons))
    if outcome == "held":
        return "Stages 2 or 3 were skipped, or not approved; the traffic is as it was."
    return ""


def _none_passed(engines: int) -> str:
    if engines <= 1:
        return "no engine passed the gates" if engines == 0 else "the only engine did not pass the gates"
    return f"none of {engines} engines passed the gates"


def _gain(spec: Spec, winner: Row | None) -> str:
    """Return `: 8.02× the speed of torch eager, 0.12 points below the baseline's top1`, as far as it was measured."""
    evidence = winner.evidence if winner else None
    if evidence is None:
        return ""
    points, metric = evidence.drop_pp.estimate, wording.metric(spec.objective.metric)
    drop = f"{abs(points):.2f} points {'below' if points >= 0 else 'above'} the baseline's {metric}"
    if evidence.speedup_eager is None:  # other processes took the cores
        gain = evidence.speedup_reference
        return f": {wording.ratio(gain.estimate)} the speed of its FP32 engine, {drop}" if gain else f": {drop}"
    return f": {wording.ratio(evidence.speedup_eager.estimate)} the speed of {spec.model.framework} eager, {drop}"


def _stage_reason(step: str, outputs: dict[str, StepOutput], failures: Sequence[Failure]) -> str:
    verdicts: tuple[Verdict, ...] = outputs[step].verdicts if step in outputs else ()
    reasons = [f"{v.gate} ({v.answer}): {v.reason}" for v in verdicts if not v.passed]
    reasons = reasons or [f.reason for f in failures if f.step == step]
    return _sentence("; ".join(reasons) or f"the {STAGES[step]} left no verdict")


def _sentence(text: str) -> str:
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
