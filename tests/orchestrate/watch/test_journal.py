"""What is said of a run: each thing once, in the order of the flow, with its reason."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from slipstream.contract import Answer
from slipstream.errors import InputError
from slipstream.orchestrate.watch.journal import Journal, Line, duration, exit_code, not_reached, under_way
from slipstream.orchestrate.watch.notes import Note, Progress
from slipstream.orchestrate.watch.start import choices
from slipstream.orchestrate.watch.view import PlainView, view
from slipstream.plan import flow
from slipstream.platform.airflow_api import TaskInstance


def task(step: str, state: str | None, cell: str | None = None, tries: int = 1) -> TaskInstance:
    name = flow.Task(step, flow.cell_of(cell) if cell else None).id
    return TaskInstance(name, state, "2026-01-01T00:00:00+00:00", 3.2, tries)


def passed_by(done: int, total: int) -> Note:
    return Note("RUNNING", progress=Progress(done, total, "batches", {"loss": 0.5}))


def said(lines: list[Line]) -> list[str]:
    return [f"{line.kind}|{line.text}" for line in lines]


def test_each_thing_is_said_once_in_the_order_of_the_flow() -> None:
    journal = Journal()
    tasks = [
        task("build", "success", "int8@server"),
        task("check", "success"),
        task("distill", "skipped", "int8"),
    ]
    notes = {("build", "int8@server"): Note("FINISHED", reused=True, metrics={"size_bytes": 46_100})}
    assert said(journal.lines(tasks, notes, {})) == [
        "stage|Optimize",
        "done|check",
        "done|build     int8@server  unchanged, reused  46 kB",
    ]
    assert journal.lines(tasks, notes, {}) == []


def test_a_cell_that_passed_is_one_line_and_one_that_did_not_says_why() -> None:
    metrics = {"drop_pp": 0.02, "drop_pp_high": 0.26, "p50_ms": 0.127, "speedup_eager": 12.04, "speedup_reference": 1.7}
    verdicts = (("accuracy", "pass", "drop 0.1"), ("speedup", "fail", "0.9×"), ("tail", "inconclusive", "too few"))

    def lines(*chosen: tuple[str, Answer, str]) -> list[str]:
        note = Note("FINISHED", verdicts=chosen, metrics=metrics)
        return said(Journal().lines([task("validate", "success", "int8@a")], {("validate", "int8@a"): note}, {}))[1:]

    told = "validate  int8@a  drop +0.02 (at most +0.26)  0.127 ms  12.0× eager  1.70× FP32"
    assert lines(*verdicts[:1]) == [f"done|{told}"]
    assert lines(*verdicts) == [f"rejected|{told}", "fail|speedup: 0.9×", "inconclusive|tail: too few"]
    assert lines(verdicts[2]) == [f"undecided|{told}", "inconclusive|tail: too few"]


def test_the_verdicts_of_the_whole_run_are_all_told() -> None:
    note = Note("FINISHED", verdicts=(("select", "pass", "int8@a is the best of 2"),))
    assert said(Journal().lines([task("select", "success")], {("select", ""): note}, {}))[1:] == [
        "done|select",
        "pass|select: int8@a is the best of 2",
    ]


def test_a_candidate_says_how_good_it_is_and_how_much_was_pruned() -> None:
    metrics = {"test_top1": 91.256, "parameters": 40_000.0, "parameters_before": 160_000.0, "macs": 1.0}
    note = Note("FINISHED", metrics=metrics)
    assert said(Journal().lines([task("prune", "success", "p")], {("prune", "p"): note}, {}))[1:] == [
        "done|prune     p  top1 91.26 %  75 % fewer weights"
    ]


def test_a_retry_and_a_failure_give_their_reason_from_mlflow_or_from_airflow() -> None:
    journal = Journal()
    first = task("retrain", "up_for_retry")
    assert said(journal.lines([first], {}, {("retrain", 1): "ended by signal 9"}))[1:] == [
        "retry|retrain  try 1 failed, will be tried again",
        "detail|ended by signal 9",
    ]
    second = replace(first, state="failed", tries=2)
    note = {("retrain", ""): Note("FAILED", error="no data", exit_code=2)}
    assert said(journal.lines([second], note, {("retrain", 2): "Bad data: no data"})) == [
        "failed|retrain",
        "detail|no data",
    ]


def test_a_try_that_stayed_open_says_what_could_not_be_judged() -> None:
    verdicts = (("errors", "pass", "0 of 900"), ("p99_cap", "inconclusive", "the processors were waited for"))
    note = Note("FAILED", verdicts=verdicts, error="Not decided")
    new = Journal().lines([task("rollout", "up_for_retry")], {("rollout", ""): note}, {})
    assert said(new)[1:] == [
        "retry|rollout  try 1 failed, will be tried again",
        "inconclusive|p99_cap: the processors were waited for",
    ]


def test_what_a_failure_kept_from_running_is_named_once() -> None:
    tasks = [task("trial", "upstream_failed"), *(task("build", "upstream_failed", c) for c in ("a@s", "b@s"))]
    assert said(not_reached(tasks)) == ["skipped|not reached: build, trial"]


def test_only_what_runs_now_is_under_way() -> None:
    tasks = [task("prune", "running", "p"), task("check", "success"), task("approval", "awaiting_input")]
    now = under_way(tasks, {("prune", "p"): passed_by(2, 5)})
    assert [(u.task, u.name, u.waits_for_answer) for u in now] == [("prune", "p", False), ("approval", "", True)]
    assert now[0].note is not None and now[0].note.progress is not None
    assert now[0].note.progress.share == 0.4


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
    notes = {(f"s{i}", ""): Note("FAILED", exit_code=code) for i, code in enumerate(codes)}
    assert exit_code(state, notes) == expected


def test_off_a_terminal_progress_is_a_line_now_and_then() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80)
    shown = view(console)
    assert isinstance(shown, PlainView)
    with shown:
        for done in (1, 2, 3):
            note = {("prune", "p"): passed_by(done, 4)}
            shown.show([], under_way([task("prune", "running", "p")], note), "")
    assert text.getvalue() == "  … prune     p  1/4 batches  loss 0.5\n"


def test_on_a_terminal_everything_can_be_drawn() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, height=24, force_terminal=True)
    tasks = [task("check", "success"), task("validate", "failed", "int8@a"), task("prune", "running", "p")]
    notes = {("prune", "p"): passed_by(2, 4)}
    with view(console) as shown:
        shown.show(Journal().lines(tasks, notes, {}), under_way(tasks, notes), "run-1  2 of 3 tasks")
    for expected in ("Optimize", "check", "int8@a", "2/4 batches", "loss 0.5", "2 of 3 tasks"):
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
