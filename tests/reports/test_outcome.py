"""What became of a run is read from its outputs alone."""

import re
from pathlib import Path

import pytest
from tests.reports import sample

from slipstream import spec as specs
from slipstream.contract import StepOutput, Verdict
from slipstream.contract.evidence import Row, row_of
from slipstream.reports import outcome
from slipstream.reports.document import Failure

SPEC = specs.load(Path("examples/fashion.yaml"))


def rows(*missing: str) -> list[Row]:
    return [row_of(o.cell.key, None if o.cell.key in missing else o) for o in sample.validate_outputs() if o.cell]


def by_step(*outputs: StepOutput) -> dict[str, StepOutput]:
    return {o.step: o for o in outputs}


def failure(step: str) -> Failure:
    return Failure(step=step, cell=None, reason="the server died", run_id="0" * 32)


SELECTED = sample.select_output()
CASES = [
    ("released", by_step(SELECTED, sample.trial_output(), sample.rollout_output()), []),
    ("rolled_back", by_step(SELECTED, sample.trial_output(), sample.rollout_output(released=False)), []),
    ("rolled_back", by_step(SELECTED, sample.trial_output()), [failure("rollout")]),
    ("stopped", by_step(SELECTED, sample.trial_output("inconclusive")), []),
    ("stopped", by_step(SELECTED), [failure("trial")]),
    ("unchanged", by_step(sample.select_output(already_champion=True)), []),
    ("held", by_step(SELECTED, sample.trial_output()), []),
    ("failed", {}, [failure("select")]),
]


@pytest.mark.parametrize(("expected", "outputs", "failures"), CASES)
def test_outcome(expected: str, outputs: dict[str, StepOutput], failures: list[Failure]) -> None:
    assert outcome.decide(outputs, failures, rows()) == expected


def test_rejected_when_engines_were_judged_and_none_passed() -> None:
    distilled = [r for r in rows() if "distilled" in r.cell]
    assert outcome.decide({}, [], distilled) == "rejected"
    assert outcome.decide({}, [], [*distilled, row_of("int8@server", None)]) == "rejected"
    assert outcome.decide({}, [], [row_of("int8@server", None)]) == "failed"
    assert outcome.decide({}, [], []) == "failed"


@pytest.mark.parametrize("name", ["rejected", "stopped", "rolled_back", "failed", "held"])
def test_nothing_released_is_not_ok(name: outcome.Outcome) -> None:
    assert not outcome.is_ok(name, skipped=(), missing=())


def test_a_release_with_a_missing_cell_is_not_ok() -> None:
    assert outcome.is_ok("released", (), ())
    assert not outcome.is_ok("released", (), ("int8@server",))
    assert outcome.is_ok("held", ("full_rollout",), ())


def test_the_headline_says_the_gain_and_the_drop() -> None:
    winner = next(r for r in rows() if r.cell == "pruned-int8@server")
    said = outcome.headline(SPEC, "released", winner, "2", rows())
    assert re.fullmatch(
        r"fashion-resnet v2 \(pruned-int8@server\) is live: 7\.65× the speed of torch eager, "
        r"0\.44 points below the baseline's top1",
        said,
    )


def test_a_test_without_an_answer_is_not_told_as_a_refusal() -> None:
    open_, broken = (
        StepOutput(
            step="trial", identity="t", run_id="r", verdicts=(Verdict(gate="p99_cap", answer=answer, reason="x"),)
        )
        for answer in ("inconclusive", "fail")
    )
    assert outcome.without_answer(open_, None) and not outcome.without_answer(broken, None)
    winner = next(r for r in rows() if r.cell == "pruned-int8@server")
    headline = outcome.headline(SPEC, "stopped", winner, "2", rows(), undecided=True)
    assert headline.endswith("the small-scale test of fashion-resnet v2 (pruned-int8@server) came to no answer")


def test_the_explanation_counts_gates_and_names_failed_steps() -> None:
    said = outcome.explanation("rejected", {}, [failure("build")], rows())
    assert said == "2 engines failed the gate accuracy; 1 engine failed the gate speed; build: the server died."
