"""The rollback DAG runs the step for the model that the form names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.dags.own_runtime import use_runtime

from slipstream import storage
from slipstream.contract import StepOutput


def test_it_rolls_back_the_model_that_the_form_names(
    dags: Callable[..., dict[str, Any]],
    publish: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    airflow_home: Path,
) -> None:
    ran: list[tuple[str, str]] = []

    class Recorded:
        def run(self, job: Any, context: Any) -> None:
            ran.append((job.step, job.spec.model.name))
            storage.write_text(job.made, StepOutput(step=job.step, identity="i", run_id="r").model_dump_json())

        def stop(self) -> None:
            pass

    use_runtime(monkeypatch, Recorded)
    publish()
    dag = dags("rollback.py")["rollback"]
    assert dag.get_task("rollback").pool == "release"
    assert str(dag.test(run_conf={"model": "tiny"}).state) == "success"
    assert ran == [("rollback", "tiny")]


def test_it_parses_before_anything_is_published(dags: Callable[..., dict[str, Any]]) -> None:
    assert dags("rollback.py")["rollback"].task_ids == ["rollback"]
