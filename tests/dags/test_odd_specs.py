"""An odd file among the published specs takes no other DAG away: parsed as Airflow's DAG processor does."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.odd_specs import GOOD, ODD

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(home: Path, airflow_home: Path) -> Path:
    """The published specs: a good one."""
    (home / "specs").mkdir()
    (home / "specs" / "fashion.yaml").write_text(GOOD)
    return home / "specs"


def parsed() -> tuple[dict[str, Any], dict[str, str]]:
    """DAGs and import errors of the folder dags/, by Airflow's own DagBag."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=str(ROOT / "dags"), bundle_name="dags", load_op_links=False)
    return dict(bag.dags), dict(bag.import_errors)


@pytest.mark.parametrize("odd", ODD)
def test_a_good_spec_and_the_rollback_stay(folder: Path, odd: str) -> None:
    put, reason = ODD[odd]
    put(folder)
    began = time.process_time()
    dags, errors = parsed()
    print(f"{odd}: {time.process_time() - began:.2f} s, {sorted(dags)}")
    assert errors == {}
    assert {"optimize-fashion", "rollback"} <= set(dags)
    assert "broken spec" not in dags["optimize-fashion"].tags
    [*others] = set(dags) - {"optimize-fashion", "rollback"}
    assert len(others) == (reason is not None)
    for name in others:
        assert "broken spec" in dags[name].tags
        assert reason in dags[name].doc_md
        assert len(dags[name].doc_md) < 12_000


def test_all_of_them_at_once(folder: Path) -> None:
    for put, _ in ODD.values():
        put(folder)
    dags, errors = parsed()
    assert errors == {}
    assert len(dags) == 2 + sum(reason is not None for _, reason in ODD.values())


def test_the_stored_form_of_a_stand_in_is_what_airflow_keeps(folder: Path) -> None:
    """Airflow stores DAGs as JSON in a database: ids of at most 250 characters, text that is UTF-8."""
    from airflow.serialization.serialized_objects import DagSerialization

    for put, _ in ODD.values():
        put(folder)
    import json

    for name, dag in parsed()[0].items():
        json.dumps(DagSerialization.to_dict(dag), ensure_ascii=False).encode()
        assert len(name) <= 250


def test_a_spec_that_airflow_takes_no_dag_of_is_shown_as_broken(
    folder: Path, dags: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "other.yaml").write_text(GOOD.replace("fashion\n", "other\n", 1))
    found = dags()
    pipeline = found["optimize-other"]
    assert "broken spec" not in pipeline.tags
    from airflow.sdk import DAG

    def refuses(dag: DAG) -> None:
        if dag.dag_id == "optimize-other" and "broken spec" not in dag.tags:
            raise ValueError("refused")

    monkeypatch.setattr(DAG, "validate", refuses)
    found = dags()
    assert "refused" in found["optimize-other"].description
    assert "broken spec" not in found["optimize-fashion"].tags
