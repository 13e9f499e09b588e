"""Programs under supervisord: the one place that starts and stops long-lived processes."""

from dataclasses import dataclass, field
from pathlib import Path

from slipstream.home import Home


@dataclass(frozen=True)
class Program:
    """A process that supervisord keeps running, also after a restart of the machine (`slipstream up`)."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None
    stop_wait_s: int = 15


@dataclass(frozen=True)
class ProcessState:
    """What supervisord says of a program."""

    state: str
    """`RUNNING`, `STARTING`, `STOPPED`, `BACKOFF`, `EXITED`, `FATAL`, or `ABSENT`."""
    pid: int | None


def start(home: Home, program: Program) -> None:
    """Write the program's file and start it; nothing changes when it already runs as given. Raises Unavailable."""
    raise NotImplementedError


def stop(home: Home, name: str) -> None:
    """Stop a program and remove its file; fine when it is not there."""
    raise NotImplementedError


def state(home: Home, name: str) -> ProcessState:
    """A program's state; `ABSENT` when it is unknown or supervisord is down."""
    raise NotImplementedError


def log_file(home: Home, name: str) -> Path:
    """Where a program's output goes."""
    return home.root / "logs" / f"{name}.log"
