"""Converts the repeated answers of Airflow and MLflow into lines that each appear once. Independent of any screen."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from slipstream.contract import Answer
from slipstream.errors import EXIT_GATE, EXIT_INPUT, EXIT_RETRY
from slipstream.orchestrate.watch.achievements import achieved
from slipstream.orchestrate.watch.notes import Key, Note
from slipstream.plan import flow
from slipstream.platform.airflow_api import TaskInstance

Kind = Literal[
    "stage", "done", "rejected", "undecided", "failed", "skipped", "retry", "pass", "fail", "inconclusive", "detail"
]
OVER = ("success", "failed", "upstream_failed", "skipped", "removed")
UNDER_WAY = ("running", "awaiting_input", "deferred")
VERDICTS: dict[Answer, Kind] = {"pass": "pass", "fail": "fail", "inconclusive": "inconclusive"}


Try = tuple[str, int]
"""Task id and number of the try."""


@dataclass(frozen=True)
class Line:
    """An event."""

    kind: Kind
    text: str
    """Without mark or color."""
    right: str = ""
    """Text at the end of the line: its duration."""


@dataclass(frozen=True)
class UnderWay:
    """A running task, with its step's own progress."""

    task: str
    name: str
    started: str | None
    note: Note | None
    waits_for_answer: bool = False


class Journal:
    """Remembers which lines of one run have been shown."""

    def __init__(self) -> None:
        self._said: set[tuple[str, int, str]] = set()
        self._stage = ""

    def lines(self, tasks: Sequence[TaskInstance], notes: Mapping[Key, Note], reasons: Mapping[Try, str]) -> list[Line]:
        """Return what happened since the last call, in the order of the flow. `reasons` are the errors in Airflow's
        logs."""
        new: list[Line] = []
        for task in sorted(tasks, key=_place):
            state = "retry" if task.state == "up_for_retry" else task.state or ""
            key = (task.id, task.tries, state)
            if key in self._said or (state not in OVER and state != "retry"):
                continue
            self._said.add(key)
            note, reason = notes.get((task.step, task.cell)), reasons.get((task.id, task.tries), "")
            task_lines = list(_told(task, note, state, reason))
            stage = flow.stage_of(task.step)
            if task_lines and stage != self._stage:
                self._stage = stage
                new.append(Line("stage", stage.replace("_", " ").capitalize()))
            new += task_lines
        return new


def under_way(tasks: Sequence[TaskInstance], notes: Mapping[Key, Note]) -> list[UnderWay]:
    """Return the tasks that are running or waiting for a person, in the order of the flow."""
    return [
        UnderWay(
            task.step,
            task.cell,
            task.started,
            notes.get((task.step, task.cell)),
            waits_for_answer=task.state == "awaiting_input",
        )
        for task in sorted(tasks, key=_place)
        if task.state in UNDER_WAY
    ]


def not_reached(tasks: Sequence[TaskInstance]) -> list[Line]:
    """Return one line that names the tasks that a failure prevented; it comes last, when that is certain."""
    steps = dict.fromkeys(task.step for task in sorted(tasks, key=_place) if task.state == "upstream_failed")
    return [Line("skipped", f"not reached: {', '.join(steps)}")] if steps else []


def exit_code(state: str, notes: Mapping[Key, Note]) -> int:
    """Return 0 for a successful run; else 3 if a gate failed, 2 if the input is wrong, 1 for other errors."""
    if state == "success":
        return 0
    codes = {n.exit_code for n in notes.values() if n.status == "FAILED"}
    return next((code for code in (EXIT_GATE, EXIT_INPUT) if code in codes), EXIT_RETRY)


def duration(seconds: float | None) -> str:
    """Return `0.4 s`, `12 s`, `3:05` or `1:02:11`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds_between(began: str | None, ended: str | None = None) -> float | None:
    """Return seconds from one ISO 8601 time to another, or to now; None without a beginning."""
    if began is None:
        return None
    end = datetime.datetime.fromisoformat(ended) if ended else datetime.datetime.now(datetime.UTC)
    return (end - datetime.datetime.fromisoformat(began)).total_seconds()


def _place(task: TaskInstance) -> tuple[tuple[int, int], str]:
    return flow.place(task.step), task.cell


def _told(task: TaskInstance, note: Note | None, state: str, reason: str) -> Iterable[Line]:
    """Yield a task's line and the lines below it."""
    text, took = f"{task.step:<9} {task.cell}".rstrip(), duration(task.seconds)
    if state == "skipped":
        if not task.cell:  # a recipe that was not chosen is no news
            yield Line("skipped", f"{text}  skipped")
    elif state == "retry":
        yield Line("retry", f"{text}  try {task.tries} failed, will be tried again", took)
        yield from _verdicts(note, with_passed=False)
        yield from _error(note, reason)
    elif state == "success":
        if task.step != "outcome":
            reused = ("unchanged, reused",) if note and note.reused else ()
            parts = (text, *reused, *achieved(task.step, note.metrics if note else {}))
            yield Line(_outcome(note), "  ".join(parts), took)
            yield from _verdicts(note, with_passed=not task.cell)
    elif state == "failed" and task.step != "outcome":  # its message repeats what was shown
        yield Line("failed", text, took)
        yield from _verdicts(note, with_passed=True)
        yield from _error(note, reason)


def _outcome(note: Note | None) -> Kind:
    """Return a task's outcome; `done` is for passed tasks and those without a gate."""
    answers = {answer for _, answer, _ in note.verdicts} if note else set()
    return "rejected" if "fail" in answers else "undecided" if "inconclusive" in answers else "done"


def _verdicts(note: Note | None, *, with_passed: bool) -> Iterable[Line]:
    for gate, answer, reason in note.verdicts if note else ():
        if with_passed or answer != "pass":
            yield Line(VERDICTS[answer], f"{gate}: {reason}")


def _error(note: Note | None, reason: str) -> Iterable[Line]:
    """Yield the first lines of a step's error, from MLflow or else Airflow, unless its verdicts contained it."""
    if note and any(answer != "pass" for _, answer, _ in note.verdicts):
        return
    message = note.error if note and note.status == "FAILED" else ""
    for line in (message or reason).splitlines()[:12]:
        yield Line("detail", line)
