"""Turns what Airflow and MLflow say, again and again, into lines that are each said once. Knows no screen."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from slipstream import flow
from slipstream.airflow_api import TaskInstance
from slipstream.contract import Answer
from slipstream.errors import EXIT_GATE, EXIT_INPUT, EXIT_RETRY
from slipstream.spec import TECHNIQUES
from slipstream.watch.notes import Key, Note

Kind = Literal["stage", "done", "failed", "skipped", "retry", "pass", "fail", "inconclusive", "detail"]
OVER = ("success", "failed", "upstream_failed", "skipped", "removed")
UNDER_WAY = ("running", "awaiting_input", "deferred")
UNNAMED = "#"
VERDICTS: dict[Answer, Kind] = {"pass": "pass", "fail": "fail", "inconclusive": "inconclusive"}


Try = tuple[str, int, int]
"""Task, map index, number of the try."""


@dataclass(frozen=True)
class Line:
    """Something that happened."""

    kind: Kind
    text: str
    """Without mark or colour."""
    right: str = ""
    """What stands at the end of the line: how long it took."""


@dataclass(frozen=True)
class UnderWay:
    """A task that runs now, with what its step says of itself."""

    task: str
    name: str
    started: str | None
    note: Note | None
    waits_for_answer: bool = False


class Journal:
    """Remembers what has been said of one run."""

    def __init__(self) -> None:
        self._said: set[tuple[str, int, int, str]] = set()
        self._stage = ""

    def lines(self, tasks: Sequence[TaskInstance], notes: Mapping[Key, Note], reasons: Mapping[Try, str]) -> list[Line]:
        """What happened since the last call, in the order of the flow. `reasons` are the errors in Airflow's logs."""
        names = _names(tasks)
        found: list[Line] = []
        for task in sorted(tasks, key=_place):
            state = "retry" if task.state == "up_for_retry" else task.state or ""
            key = (task.task, task.index, task.tries, state)
            if key in self._said or (state not in OVER and state != "retry"):
                continue
            self._said.add(key)
            name, reason = names.get((task.task, task.index), ""), reasons.get((task.task, task.index, task.tries), "")
            told = list(_told(task, name, notes.get((task.task, name or None)), state, reason))
            stage = flow.stage_of(task.task)
            if told and stage != self._stage:
                self._stage = stage
                found.append(Line("stage", stage.replace("_", " ").capitalize()))
            found += told
        return found


def under_way(tasks: Sequence[TaskInstance], notes: Mapping[Key, Note]) -> list[UnderWay]:
    """The tasks that run or wait for a person now, in the order of the flow.

    Mapped ones from when they have their names, which Airflow renders seconds after it starts them.
    """
    names = _names(tasks)
    return [
        UnderWay(
            t.task,
            names.get((t.task, t.index), ""),
            t.started,
            notes.get((t.task, names.get((t.task, t.index)))),
            waits_for_answer=t.state == "awaiting_input",
        )
        for t in sorted(tasks, key=_place)
        if t.state in UNDER_WAY and not names.get((t.task, t.index), "").startswith(UNNAMED)
    ]


def not_reached(tasks: Sequence[TaskInstance]) -> list[Line]:
    """One line that names the tasks that a failure kept from running; it comes last, when that is certain."""
    names = dict.fromkeys(t.task for t in sorted(tasks, key=_place) if t.state == "upstream_failed")
    return [Line("skipped", f"not reached: {', '.join(names)}")] if names else []


def exit_code(state: str, notes: Mapping[Key, Note]) -> int:
    """0 for a green run; else 3 when a gate said no, 2 when what was given is wrong, 1 for all else."""
    if state == "success":
        return 0
    codes = {n.exit_code for n in notes.values() if n.status == "FAILED"}
    return next((code for code in (EXIT_GATE, EXIT_INPUT) if code in codes), EXIT_RETRY)


def duration(seconds: float | None) -> str:
    """`0.4 s`, `12 s`, `3:05` or `1:02:11`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds_between(began: str | None, ended: str | None = None) -> float | None:
    """Seconds from one ISO 8601 time to another, or to now; None without a beginning."""
    if began is None:
        return None
    end = datetime.datetime.fromisoformat(ended) if ended else datetime.datetime.now(datetime.UTC)
    return (end - datetime.datetime.fromisoformat(began)).total_seconds()


def _place(task: TaskInstance) -> tuple[int, int]:
    order = [t for tasks in flow.STAGES.values() for t in tasks]
    return order.index(task.task) if task.task in order else len(order), task.index


def _names(tasks: Iterable[TaskInstance]) -> dict[tuple[str, int], str]:
    """Map names; a task that never ran has none, but a sibling of the same mapping has it."""
    families = dict.fromkeys(TECHNIQUES, TECHNIQUES) | dict.fromkeys(("build", "validate"), ("build", "validate"))
    mapped = [t for t in tasks if t.name is not None]
    found = {(t.task, t.index): t.name for t in mapped if t.name and not t.name.isdigit()}
    for task in mapped:
        siblings = (found.get((s, task.index)) for s in families.get(task.task, ()))
        found.setdefault((task.task, task.index), next((s for s in siblings if s), f"{UNNAMED}{task.index}"))
    return {k: v for k, v in found.items() if v}


def _told(task: TaskInstance, name: str, note: Note | None, state: str, reason: str) -> Iterable[Line]:
    """A task's line and the lines below it."""
    text, took = f"{task.task:<9} {name}".rstrip(), duration(task.seconds)
    if state == "skipped":
        if task.task not in TECHNIQUES:  # a recipe that lacks a technique is no news
            yield Line("skipped", f"{text}  skipped".rstrip())
    elif state == "retry":
        yield Line("retry", f"{text}  try {task.tries} failed, will be tried again", took)
        yield from _error(note, reason)
    elif state == "success":
        if task.task != "outcome":
            reused = "  unchanged, reused" if note and note.reused else ""
            yield Line("done", text + reused, took)
            yield from _verdicts(note)
    elif state == "failed" and task.task != "outcome":  # whose message repeats what was told
        yield Line("failed", text, took)
        yield from _verdicts(note)
        yield from _error(note, reason)


def _verdicts(note: Note | None) -> Iterable[Line]:
    for gate, answer, reason in note.verdicts if note else ():
        yield Line(VERDICTS[answer], f"{gate}: {reason}")


def _error(note: Note | None, reason: str) -> Iterable[Line]:
    """The first lines of a step's error, as MLflow has it or else Airflow, unless its verdicts said it."""
    if note and any(answer != "pass" for _, answer, _ in note.verdicts):
        return
    said = note.error if note and note.status == "FAILED" else ""
    for line in (said or reason).splitlines()[:12]:
        yield Line("detail", line)
