"""What is said of a run: each thing once, in the order of the flow, with its reason."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from slipstream.airflow_api import TaskInstance
from slipstream.errors import InputError
from slipstream.watch.journal import Journal, Line, duration, exit_code, not_reached, under_way
from slipstream.watch.notes import Note
from slipstream.watch.start import choices
from slipstream.watch.view import PlainView, view


def task(name: str, state: str | None, cell: str | None = None, index: int = -1, tries: int = 1) -> TaskInstance:
    return TaskInstance(name, cell, state, "2026-01-01T00:00:00+00:00", 3.2, tries, index)


def said(lines: list[Line]) -> list[str]:
    return [f"{line.kind}|{line.text}" for line in lines]


def test_each_thing_is_said_once_in_the_order_of_the_flow() -> None:
    journal = Journal()
    tasks = [
        task("build", "success", "int8@server", 0),
        task("check", "success"),
        task("distill", "skipped", "int8", 0),
    ]
    notes = {("build", "int8@server"): Note("FINISHED", reused=True)}
    assert said(journal.lines(tasks, notes, {})) == [
        "stage|Optimize",
        "done|check",
        "done|build     int8@server  unchanged, reused",
    ]
    assert journal.lines(tasks, notes, {}) == []


def test_verdicts_follow_their_task_with_the_reason() -> None:
    verdicts = (("accuracy", "pass", "drop 0.1"), ("speed", "fail", "0.9×"), ("tail", "inconclusive", "too few"))
    lines = Journal().lines(
        [task("validate", "success", "int8@a", 0)], {("validate", "int8@a"): Note("FINISHED", verdicts=verdicts)}, {}
    )
    assert said(lines)[2:] == ["pass|accuracy: drop 0.1", "fail|speed: 0.9×", "inconclusive|tail: too few"]


def test_a_retry_and_a_failure_give_their_reason_from_mlflow_or_from_airflow() -> None:
    journal = Journal()
    first = task("retrain", "up_for_retry")
    assert said(journal.lines([first], {}, {("retrain", -1, 1): "ended by signal 9"}))[1:] == [
        "retry|retrain  try 1 failed, will be tried again",
        "detail|ended by signal 9",
    ]
    second = replace(first, state="failed", tries=2)
    note = {("retrain", None): Note("FAILED", error="no data", exit_code=2)}
    assert said(journal.lines([second], note, {("retrain", -1, 2): "Bad data: no data"})) == [
        "failed|retrain",
        "detail|no data",
    ]


def test_a_cell_that_never_ran_is_named_by_its_sibling() -> None:
    tasks = [task("distill", "success", "small", 1), task("prune", "failed", "1", 1)]
    assert "failed|prune     small" in said(Journal().lines(tasks, {}, {}))
    assert said(not_reached([task("trial", "upstream_failed"), task("build", "upstream_failed", "0", 0)])) == [
        "skipped|not reached: build, trial"
    ]


def test_only_what_runs_now_is_under_way() -> None:
    tasks = [task("prune", "running", "p", 0), task("check", "success"), task("approval", "awaiting_input")]
    now = under_way(tasks, {("prune", "p"): Note("RUNNING", share=0.4, done=2)})
    assert [(u.task, u.name, u.waits_for_answer) for u in now] == [("prune", "p", False), ("approval", "", True)]
    assert now[0].note is not None
    assert now[0].note.total == 5


def test_a_mapped_task_is_under_way_from_when_it_has_a_name() -> None:
    assert under_way([task("prune", "running", "0", 0)], {}) == []
    sibling = task("distill", "success", "p", 0)
    assert [u.name for u in under_way([sibling, task("prune", "running", "0", 0)], {})] == ["p"]


@pytest.mark.parametrize(
    ("state", "codes", "expected"),
    [
        ("success", [3], 0),
        ("failed", [], 1),
        ("failed", [1], 1),
        ("failed", [1, 2], 2),
        ("failed", [2, 3], 3),
    ],
)
def test_the_exit_code_says_why(state: str, codes: list[int], expected: int) -> None:
    notes = {(f"s{i}", None): Note("FAILED", exit_code=code) for i, code in enumerate(codes)}
    assert exit_code(state, notes) == expected


def test_off_a_terminal_progress_is_a_line_now_and_then() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80)
    shown = view(console)
    assert isinstance(shown, PlainView)
    with shown:
        for done in (1, 2, 3):
            note = {("prune", "p"): Note("RUNNING", share=done / 4, done=done, figures={"loss": 0.5})}
            shown.show([], under_way([task("prune", "running", "p", 0)], note), "")
    assert text.getvalue() == "  … prune     p  1/4  loss 0.5\n"


def test_on_a_terminal_everything_can_be_drawn() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, height=24, force_terminal=True)
    tasks = [task("check", "success"), task("validate", "failed", "int8@a", 0), task("prune", "running", "p", 0)]
    notes = {("prune", "p"): Note("RUNNING", share=0.5, done=2, figures={"loss": 0.5})}
    with view(console) as shown:
        shown.show(Journal().lines(tasks, notes, {}), under_way(tasks, notes), "run-1  2 of 3 tasks")
    for expected in ("Optimize", "check", "int8@a", "2/4", "loss 0.5", "2 of 3 tasks"):
        assert expected in text.getvalue()


def test_durations_are_short() -> None:
    assert [duration(s) for s in (None, 0.44, 12.3, 185, 3731)] == ["", "0.4 s", "12 s", "3:05", "1:02:11"]


def test_choices_are_the_trigger_forms() -> None:
    assert choices(["max_drop=0.5", "recipes=a, b", "source_version=7", "stop_after=none"]) == {
        "max_drop": 0.5,
        "recipes": ["a", "b"],
        "source_version": "7",
        "stop_after": "none",
    }
    for text in ('["a","b"]', "a,b", "[a, b]", '["a", "b" ]', "'a','b'"):
        assert choices([f"recipes={text}"]) == {"recipes": ["a", "b"]}
    assert choices(['recipes=["int8"]']) == {"recipes": ["int8"]}
    with pytest.raises(InputError, match="as a,b or as a JSON list"):
        choices(["recipes=[]"])
    for wrong in ("max_drop", "speed=3"):
        with pytest.raises(InputError, match="KEY=VALUE"):
            choices([wrong])
