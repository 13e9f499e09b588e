"""Shows a run: past events stay above as lines, running tasks are updated below them. Plain lines without a
terminal."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from slipstream.orchestrate.watch.journal import Kind, Line, UnderWay, duration, seconds_between

MARKS: dict[Kind, tuple[str, str, int]] = {
    "stage": ("", "bold", 0),
    "done": ("✓", "green", 2),
    "rejected": ("✗", "red", 2),
    "undecided": ("?", "yellow", 2),
    "failed": ("✗", "bold red", 2),
    "skipped": ("·", "dim", 2),
    "retry": ("↻", "yellow", 2),
    "pass": ("✓", "green", 6),
    "fail": ("✗", "red", 6),
    "inconclusive": ("?", "yellow", 6),
    "detail": ("", "dim", 6),
}
"""Mark, its style, and the indent."""

PROGRESS_EVERY_S = 15
"""Interval between two progress lines of the same task in a log."""


class View(Protocol):
    """Output of a watched run."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, lines: Sequence[Line], now: Sequence[UnderWay], footer: str) -> None:
        """Add lines, and replace the current state."""
        ...


def view(console: Console) -> View:
    """Return the view that fits the console."""
    return LiveView(console) if console.is_terminal else PlainView(console)


class LiveView:
    """A view for a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, lines: Sequence[Line], now: Sequence[UnderWay], footer: str) -> None:
        """See View."""
        for line in lines:
            self._console.print(rendered(line, self._console.width))
        self._live.update(Group(Text(), *self._bars(now), Text(f"  {footer}", style="dim")))

    def _bars(self, now: Sequence[UnderWay]) -> list[RenderableType]:
        table = Table.grid(padding=(0, 1))
        for width in (1, 1, 9):
            table.add_column(min_width=width, no_wrap=True)
        for task in now[: max(self._console.height - 6, 1)]:
            table.add_row(
                "",
                Spinner("dots", style="cyan"),
                Text(task.task, style="bold"),
                Text(task.name),
                _bar(task),
                Text(_figures(task), style="cyan"),
                Text(duration(seconds_between(task.started)), style="dim"),
            )
        return [table] if now else []


class PlainView:
    """A view for a log file or a pipe: a line for each change, progress from time to time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[tuple[str, str], tuple[float, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._last.clear()

    def show(self, lines: Sequence[Line], now: Sequence[UnderWay], footer: str) -> None:
        """See View."""
        for line in lines:
            mark, _, indent = MARKS[line.kind]
            right = f"  ({line.right})" if line.right else ""
            self._say(" " * indent + f"{mark} {line.text}{right}".strip())
        for task in now:
            last_s, last_text = self._last.get((task.task, task.name), (float("-inf"), ""))
            waits = "waits for an answer in Airflow" if task.waits_for_answer else _figures(task)
            text = f"  … {task.task:<9} {task.name}  {waits}".rstrip()
            if text != last_text and time.monotonic() - last_s >= PROGRESS_EVERY_S:
                self._last[task.task, task.name] = (time.monotonic(), text)
                self._say(text)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def rendered(line: Line, width: int) -> RenderableType:
    """Return a line for the terminal: mark, wrapped text, and the time at the right."""
    mark, style, indent = MARKS[line.kind]
    if line.kind == "stage":
        return Padding(Text(line.text, style=style), (1, 0, 0, 0))
    row = Table.grid(padding=(0, 1), expand=False)
    row.width = min(width, 110)
    row.add_column(width=max(indent - 1, 0))
    row.add_column(width=1)
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    quiet = line.kind in ("skipped", "detail")
    row.add_row("", Text(mark, style=style), Text(line.text, style="dim" if quiet else ""), Text(line.right, "dim"))
    return row


def _bar(task: UnderWay) -> RenderableType:
    progress = task.note.progress if task.note and task.note.status == "RUNNING" else None
    if progress is None:
        return Text("waits for an answer in Airflow" if task.waits_for_answer else "", style="yellow")
    return ProgressBar(total=1.0, completed=progress.share, width=24, complete_style="cyan", finished_style="cyan")


def _figures(task: UnderWay) -> str:
    """`3/5 rounds  loss 0.412`."""
    progress = task.note.progress if task.note and task.note.status == "RUNNING" else None
    if task.waits_for_answer or progress is None:
        return ""
    figures = "  ".join(f"{name} {value:.4g}" for name, value in progress.figures.items())
    return f"{progress.done}/{progress.total} {progress.unit}".rstrip() + (f"  {figures}" if figures else "")
