"""How often a watched run is asked after: what is asked takes processor time from what is measured."""

from typing import Any, cast

import pytest

from slipstream.orchestrate.watch.follow import MEASURING_POLL_S, POLL_S, _Watch
from slipstream.orchestrate.watch.notes import Notes
from slipstream.orchestrate.watch.start import Started
from slipstream.platform.airflow_api import AirflowApi, TaskInstance


@pytest.fixture
def watch() -> _Watch:
    return _Watch(cast(AirflowApi, None), cast(Notes, None), cast(Started, None))


def looks(watch: _Watch, task: str, state: str, seconds: int = 60) -> int:
    """How many looks a minute holds, asked for every half second."""
    running: Any = TaskInstance(task, state, None, None, 1)
    watch.tasks = [running]
    return sum(watch.due(1000 + half / 2) for half in range(2 * seconds))


def test_the_first_look_is_at_once(watch: _Watch) -> None:
    assert watch.due(0.0) and not watch.due(POLL_S / 2) and watch.due(POLL_S)


def test_while_a_step_measures_looks_are_rare(watch: _Watch) -> None:
    assert looks(watch, "validate.int8.server", "running") == 60 / MEASURING_POLL_S


@pytest.mark.parametrize(("task", "state"), [("validate.int8.server", "queued"), ("retrain", "running")])
def test_otherwise_a_look_a_second(watch: _Watch, task: str, state: str) -> None:
    assert looks(watch, task, state) == 60 / POLL_S
