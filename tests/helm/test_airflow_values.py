"""helm/airflow-values.yaml against what the official chart knows, and against the image that it runs.

The official chart is not fetched here: airflow-chart-keys.yaml lists its keys.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from slipstream.home import Home
from slipstream.platform import airflow as platform
from slipstream.platform.addresses import Addresses, Secrets

from .chart import ROOT

VALUES: dict[str, Any] = yaml.safe_load((ROOT / "helm/airflow-values.yaml").read_text(encoding="utf-8"))
KEYS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "airflow-chart-keys.yaml").read_text(encoding="utf-8"))
COMPONENTS = tuple(KEYS["more"])


def known(found: dict[str, Any], keys: str) -> bool:
    """Whether the chart knows all keys of a part."""
    return set(found) <= set(KEYS[keys])


def test_top_level_keys_exist() -> None:
    assert known(VALUES, "top")


@pytest.mark.parametrize("component", COMPONENTS)
def test_component_keys_exist(component: str) -> None:
    found = VALUES[component]
    assert set(found) <= {*KEYS["component"], *KEYS["more"][component]} - set(KEYS["less"][component])
    for probe in ("livenessProbe", "startupProbe"):
        assert known(found.get(probe, {}), "probe")
    assert known(found.get("serviceAccount", {}), "serviceAccount")


def test_other_keys_exist() -> None:
    assert known(VALUES["securityContexts"], "securityContexts")
    assert known(VALUES["data"], "data")
    assert known(VALUES["images"]["airflow"], "image")
    assert (list(VALUES["workers"]), list(VALUES["workers"]["celery"])) == (["celery"], ["persistence"])
    assert known(VALUES["workers"]["celery"]["persistence"], "persistence")


def test_the_image_has_what_the_chart_assumes() -> None:
    """Its entry point for the probes, its log groomer, its user, its home; and no user job, which would take the
    password from the values."""
    dockerfile = (ROOT / "containers/airflow/Dockerfile").read_text(encoding="utf-8")
    for needed in (" /entrypoint\n", " /clean-logs\n", "AIRFLOW_HOME=/opt/airflow", "/opt/slipstream/dags"):
        assert needed in dockerfile
    pod = VALUES["securityContexts"]["pod"]
    assert f"USER {pod['runAsUser']}:{pod['runAsGroup']}\n" in dockerfile
    assert VALUES["config"]["core"]["dags_folder"] == "/opt/slipstream/dags"
    assert VALUES["createUserJob"] == {"enabled": False}
    entrypoint = (ROOT / "containers/airflow/entrypoint").read_text(encoding="utf-8")
    assert VALUES["migrateDatabaseJob"]["args"][:2] == ["bash", "-c"] and "| bash |" in entrypoint


def test_people_log_in_with_a_user_of_airflows_database() -> None:
    """By the manager that the image holds; the first user's password is in no argument."""
    manager = VALUES["config"]["core"]["auth_manager"]
    module, _, name = manager.rpartition(".")
    [file] = (ROOT / ".envs/airflow").glob(f"lib/python3*/site-packages/{module.replace('.', '/')}.py")
    assert f"class {name}(" in file.read_text(encoding="utf-8")
    pins = (ROOT / "containers/airflow/constraints.txt").read_text(encoding="utf-8")
    assert "apache-airflow-providers-fab==" in pins
    job = VALUES["migrateDatabaseJob"]
    assert "--password" not in job["args"][2]
    assert {v["name"]: v["valueFrom"]["secretKeyRef"]["name"] for v in job["env"]} == {
        "SLIPSTREAM_AIRFLOW_USER": "slipstream-airflow-login",
        "SLIPSTREAM_AIRFLOW_PASSWORD": "slipstream-airflow-login",
    }
    assert "SIMPLE_AUTH_MANAGER" not in str(VALUES)


def test_pods_pass_the_restricted_profile() -> None:
    pod, container = VALUES["securityContexts"]["pod"], VALUES["securityContexts"]["containers"]
    assert pod["runAsNonRoot"] is True and pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["allowPrivilegeEscalation"] is False and container["capabilities"] == {"drop": ["ALL"]}
    assert container["readOnlyRootFilesystem"] is True


def test_rights_come_from_this_repositorys_chart_alone() -> None:
    assert VALUES["allowPodLaunching"] is False
    assert VALUES["apiServer"]["allowPodLogReading"] is False


def test_secrets_are_only_named() -> None:
    text = (ROOT / "helm/airflow-values.yaml").read_text(encoding="utf-8")
    for key in ("fernetKey:", "jwtSecret:", "apiSecretKey:", "metadataConnection", "password:"):
        assert f"\n{key}" not in text and f" {key}" not in text.replace("key: password", "")


def test_pools_are_made_that_the_dags_name() -> None:
    *_, script = VALUES["migrateDatabaseJob"]["args"]
    for name, (slots, _) in platform.POOLS.items():
        given = int(script.partition(f"pools set {name} ")[2].split()[0])
        assert given == slots if name == "release" else given >= slots


def test_airflow_is_configured_as_on_one_machine() -> None:
    """What the DAGs rely on is set in both places."""
    here = "http://127.0.0.1:1"
    places = Addresses(airflow=here, mlflow=here, envoy=here, triggers=here)
    secrets = Secrets(**dict.fromkeys(Secrets.model_fields, "x"))
    local = platform.settings(Home(Path("/h"), Path("/e"), Path("/c")), places, secrets)
    for section, options in VALUES["config"].items():
        for option, value in options.items():
            name = f"AIRFLOW__{section}__{option}".upper()
            if option in ("dags_are_paused_at_creation", "min_serialized_dag_update_interval",
                          "min_file_process_interval", "refresh_interval", "task_instance_heartbeat_timeout",
                          "orphaned_tasks_check_interval"):  # fmt: skip
                assert local[name] == value, name


def test_the_version_is_the_one_that_the_image_holds() -> None:
    pins = (ROOT / "containers/airflow/constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"apache-airflow=={VALUES['airflowVersion']}" in pins
