"""One Airflow for all DAG tests: its own AIRFLOW_HOME on SQLite, and DAG runs in this process."""

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

if sys.prefix != str(ROOT / ".envs/airflow"):
    collect_ignore_glob = ["test_*.py"]  # these run in the airflow environment

SPEC = """\
name: {name}
model: {{registry: models:/tiny@source, architecture: examples.fashion:resnet}}
data: examples.fashion:data
recipes: {{int8: [quantize], pruned: [prune]}}
targets: {{server: {{engine: openvino}}}}
"""


@pytest.fixture(scope="session")
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A metadata database, made before anything imports Airflow's settings."""
    assert "airflow.settings" not in sys.modules, "Airflow was imported before its home was set"
    folder = tmp_path_factory.mktemp("airflow")
    os.environ |= {
        "AIRFLOW_HOME": str(folder),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    sys.path.insert(0, str(ROOT / "dags"))
    from airflow.utils.db import initdb

    initdb()
    yield folder
    sys.path.remove(str(ROOT / "dags"))


@pytest.fixture
def dags(home: Path, airflow_home: Path) -> Callable[[], dict[str, Any]]:
    """Parses dags/optimize.py against what is published now; returns the DAGs by id."""

    def parse(file: str = "optimize.py") -> dict[str, Any]:
        from airflow.sdk import DAG

        found = runpy.run_path(str(ROOT / "dags" / file)).values()
        return {dag.dag_id: dag for dag in found if isinstance(dag, DAG)}

    return parse


@pytest.fixture
def publish(home: Path) -> Callable[..., Path]:
    """Publishes a small spec: two recipes, one target."""
    (home / "specs").mkdir()

    def write(name: str = "tiny", more: str = "") -> Path:
        path = home / "specs" / f"{name}.yaml"
        path.write_text(SPEC.format(name=name) + more)
        return path

    return write
