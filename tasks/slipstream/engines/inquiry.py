"""Asks an engine, in its own environment if it has one, whether a target can be built and loaded.

A step in the framework's environment cannot import every engine's libraries. On one machine, which has all
environments, the question goes to a process in the engine's environment.
"""

import logging
import sys
from pathlib import Path

from slipstream.contract import Document
from slipstream.contract.ask import Unanswered, answer, ask
from slipstream.engines.base import engine_for, why_not_loadable
from slipstream.errors import EngineError
from slipstream.home import Home
from slipstream.measure import profiles
from slipstream.plugins import ENGINES
from slipstream.spec import Target

log = logging.getLogger(__name__)

WITHIN_S = 120


class Finding(Document):
    """What an engine reports about a target."""

    problem: str | None = None
    """Why it cannot be built."""
    not_loadable: str | None = None
    """Why it cannot be loaded on the machine that was asked; None if it can."""
    asked: bool = True
    """Whether the engine could be asked; otherwise only its build will show."""


def inquire(home: Home, target: Target) -> Finding:
    """Return what the target's engine reports about it."""
    environment = ENGINES[target.engine].environment
    python = own_python(home, target.engine)
    if python is not None:
        if not python.exists():
            how = f"`scripts/setup {environment}` makes it (docs/engines.md)"
            return Finding(problem=f"{target.engine}: its environment {python.parent.parent} is not there; {how}")
        return _elsewhere(python, target)
    finding = find(target)
    if finding.problem is not None and environment is not None and not _libraries_here(target.engine):
        return Finding(asked=False)
    return finding


def own_python(home: Home, engine: str) -> Path | None:
    """Return the Python of the engine's own environment, if it exists here and this process is in another."""
    environment = ENGINES[engine].environment
    if environment is None or not home.envs.is_dir():  # an image contains only one environment
        return None
    python = home.python(environment)
    return python if Path(sys.prefix) != python.parent.parent else None


def find(target: Target) -> Finding:
    """Return what the target's engine reports about it, in this process."""
    try:
        engine_for(target.engine).check(target)
        profiles.require_tool(target)
        return Finding(not_loadable=why_not_loadable(target))
    except EngineError as error:
        return Finding(problem=str(error))


def _libraries_here(engine: str) -> bool:
    try:
        engine_for(engine)
    except EngineError:
        return False
    return True


def _elsewhere(python: Path, target: Target) -> Finding:
    try:
        return ask("slipstream.engines.inquiry", target, Finding, python=python, timeout_s=WITHIN_S)
    except Unanswered as error:
        return Finding(problem=f"{target.engine}: cannot be asked: {error}")


if __name__ == "__main__":
    answer(Target, find)
