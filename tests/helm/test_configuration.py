"""What the chart writes is what the code reads: settings, specs, environment; and MLflow really starts with it."""

import base64
import os
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.conftest import free_port, wait_for

from slipstream import spec
from slipstream.home import Home
from slipstream.plan import settings
from slipstream.plan.settings import Settings

from .chart import ROOT, Json, matrix, pick, render

GPU_POOL: Json = {
    "steps": ["retrain", "distill", "build"],
    "gpu": 1,
    "cpu": 8,
    "memory": "32Gi",
    "node_selector": {"cloud/gpu": "l4"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "image": "slipstream-torch:0.1.0-cuda",
}

PASSWORD = "a-password-of-a-test"


def loaded(objects: list[Json], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings as the code reads them."""
    path = folder / "settings.yaml"
    path.write_text(pick(objects, "ConfigMap", "slipstream-settings")["data"]["settings.yaml"])
    monkeypatch.setenv("SLIPSTREAM_SETTINGS", str(path))
    monkeypatch.delenv("SLIPSTREAM_RUNTIME", raising=False)
    return settings.load(Home.from_environment())


def test_settings_are_read_for_every_set_of_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for values, objects in matrix():
        found = loaded(objects, tmp_path, monkeypatch)
        assert found.runtime == "kubernetes"
        assert found.kubernetes.namespace == "ml"
        assert found.kubernetes.env_from_config_maps == ("slipstream-environment",)
        accounts = {o["metadata"]["name"] for o in objects if o["kind"] == "ServiceAccount"}
        assert {found.kubernetes.service_account, found.kubernetes.release_service_account} <= accounts
        claims = {o["metadata"]["name"] for o in objects if o["kind"] == "PersistentVolumeClaim"}
        assert found.kubernetes.cache_claim in {*claims, values.get("cache.existingClaim"), None}
        assert (found.kubernetes.cache_claim is not None) == values.get("cache.enabled", False)


def test_each_value_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "images.registry": "registry.example.org/team", "images.tag": "1.2.3", "images.pullPolicy": "Always",
        "images.pullSecrets": ["pull"], "storage.secret": "s3", "steps.secrets": ["data"],
        "steps.environment": {"A": "b"}, "steps.codeConfigMap": "code", "steps.keepFailedHours": 0.5,
        "steps.startTimeoutSeconds": 1200, "steps.hostNetwork": True, "cache.enabled": True,
        "kserve.runtime": "stock", "kserve.namespace": "serving", "kserve.minReplicas": 2, "kserve.maxReplicas": 4,
        "kserve.readyTimeoutSeconds": 900, "steps.resources": {"serving": {"cpu": 3.5, "memory": "1Gi"}},
    }  # fmt: skip
    found = loaded(render(values), tmp_path, monkeypatch)
    assert found.image == "registry.example.org/team/slipstream-{environment}:1.2.3"
    assert found.environment == {"A": "b"}
    assert found.resources_of_servers().cpu == 3.5
    kubernetes = found.kubernetes.model_dump()
    serving = kubernetes.pop("serving")
    assert kubernetes == {
        "namespace": "ml", "service_account": "slipstream-step", "release_service_account": "slipstream-release",
        "pull_policy": "Always", "pull_secrets": ("pull",), "env_from_config_maps": ("slipstream-environment",),
        "env_from_secrets": ("s3", "slipstream-mlflow-login", "slipstream-signing", "data"),
        "cache_claim": "slipstream-cache", "code_config_map": "code",
        "settings_config_map": "slipstream-settings", "keep_failed_hours": 0.5, "start_timeout_s": 1200,
        "host_network": True,
    }  # fmt: skip
    assert serving == {
        "runtime": "stock", "namespace": "serving", "service_account": "slipstream-serving",
        "min_replicas": 2, "max_replicas": 4, "ready_timeout_s": 900,
    }  # fmt: skip


def test_node_pools_give_their_steps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "steps.nodePools": [GPU_POOL, {"steps": ["validate"], "node_selector": {"quiet": "true"}}],
        "steps.resources": {"default": {"cpu": 2, "memory": "4Gi"}, "build": {"memory": "8Gi"}},
    }
    found = loaded(render(values), tmp_path, monkeypatch)
    example = spec.load(ROOT / "examples/fashion.yaml")
    retrain, build, validate, select = (
        found.resources_of(s, example) for s in ("retrain", "build", "validate", "select")
    )
    assert (retrain.gpu, retrain.cpu, retrain.memory, retrain.image) == (1, 8, "32Gi", "slipstream-torch:0.1.0-cuda")
    assert retrain.tolerations is not None and retrain.tolerations[0].key == "nvidia.com/gpu"
    assert (build.gpu, build.memory) == (1, "8Gi")
    assert (validate.node_selector, validate.gpu, validate.cpu) == ({"quiet": "true"}, None, 2)
    assert (select.node_selector, select.memory) == (None, "4Gi")


@pytest.mark.parametrize("values", [{}, {"storage.secret": "", "steps.secrets": ["data"], "images.registry": "r/ml"}])
def test_the_training_runtime_is_the_one_that_jobs_refer_to(values: Json) -> None:
    trainjob = runpy.run_path(str(ROOT / "dags/runtimes/trainjob.py"))
    made = pick(render({"trainer.enabled": True, **values}), "TrainingRuntime", "slipstream-training")
    expected = trainjob["training_runtime"](
        "slipstream-training",
        "ml",
        f"{'r/ml/' if values else ''}slipstream-torch:0.1.0",
        made["metadata"]["labels"],
        config_maps=["slipstream-environment"],
        secrets=["slipstream-mlflow-login", "slipstream-signing", "data"]
        if values
        else ["slipstream-storage", "slipstream-mlflow-login", "slipstream-signing"],
    )
    expected["metadata"].pop("namespace")  # the release's
    assert made == expected
    assert f'"{made["metadata"]["name"]}", "TrainingRuntime"' in (ROOT / "dags/runtimes/training.py").read_text()


def test_specs_are_kept_to_the_letter() -> None:
    texts = {p.stem: p.read_text(encoding="utf-8") for p in sorted((ROOT / "examples").glob("*.yaml"))}
    given = {spec.parse(text, name).name: text for name, text in texts.items()}
    data = pick(render({"specs.files": given}), "ConfigMap", "slipstream-specs")["data"]
    assert data == {f"{name}.yaml": text for name, text in given.items()}
    for name, text in data.items():
        assert f"{spec.parse(text, name).name}.yaml" == name


def test_specs_in_the_store_need_no_config_map() -> None:
    objects = render({"specs.location": "s3://bucket/specs"})
    assert pick(objects, "ConfigMap", "slipstream-environment")["data"]["SLIPSTREAM_SPECS"] == "s3://bucket/specs"
    webhook = pick(objects, "Deployment", "slipstream-webhook")["spec"]["template"]["spec"]
    assert "slipstream-specs" not in str(webhook) and "/etc/slipstream/specs" not in str(webhook)


def test_mounts_are_where_the_variables_say() -> None:
    objects = render({})
    variables = pick(objects, "ConfigMap", "slipstream-environment")["data"]
    webhook = pick(objects, "Deployment", "slipstream-webhook")["spec"]["template"]["spec"]
    volumes = {v["name"]: v for v in webhook["volumes"]}
    maps = {m["mountPath"]: volumes[m["name"]].get("configMap") for m in webhook["containers"][0]["volumeMounts"]}
    assert maps[variables["SLIPSTREAM_SPECS"]] == {"name": "slipstream-specs"}
    folder, _, file = variables["SLIPSTREAM_SETTINGS"].rpartition("/")
    assert maps[folder] == {"name": "slipstream-settings"}
    assert file in pick(objects, "ConfigMap", "slipstream-settings")["data"]


def test_every_variable_is_read_somewhere() -> None:
    """By slipstream, by MLflow, by boto3 or by GitPython: a misspelled one would be ignored silently."""
    code = "".join(p.read_text(encoding="utf-8") for f in ("tasks", "dags") for p in (ROOT / f).rglob("*.py"))
    mlflow = _installed("mlflow/environment_variables.py") + _installed("mlflow/utils/cli_args.py")
    mlflow += _installed("mlflow/cli/__init__.py")
    known = {"AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "GIT_PYTHON_REFRESH"}
    for values, objects in matrix():
        names = set(pick(objects, "ConfigMap", "slipstream-environment")["data"])
        for deployment in (o for o in objects if o["kind"] == "Deployment"):
            for container in deployment["spec"]["template"]["spec"]["containers"]:
                names |= {v["name"] for v in container["env"]}
        unread = {n for n in names - known if f'"{n}"' not in (code if n.startswith("SLIPSTREAM_") else mlflow)}
        assert not unread, values


def _installed(path: str) -> str:
    found = sorted((ROOT / ".envs/airflow").glob(f"lib/python3*/site-packages/{path}"))
    return found[-1].read_text(encoding="utf-8")


def test_the_receiver_is_told_everything(home: Path) -> None:
    """The variables of its Deployment are all that it asks for (orchestrate/triggers/configuration.py)."""
    from slipstream.orchestrate.triggers import configuration
    from slipstream.store import signing

    objects = render({"airflow.url": "https://airflow.example.org", "webhook.url": "https://hooks.example.org"})
    [container] = pick(objects, "Deployment", "slipstream-webhook")["spec"]["template"]["spec"]["containers"]
    variables = {v["name"]: v.get("value", "from a Secret") for v in container["env"]}
    variables |= pick(objects, "ConfigMap", "slipstream-environment")["data"]
    found = configuration.load(Home.from_environment(), variables)
    assert (found.airflow, found.url) == ("https://airflow.example.org", "https://hooks.example.org")
    assert [found.port] == [p["containerPort"] for p in container["ports"]]
    assert variables[signing.VARIABLE] == "from a Secret", "the watchdog believes only signed records of a move"
    assert found.mlflow == "http://slipstream-mlflow.ml.svc:5000"


@pytest.mark.slow
def test_mlflow_starts_as_the_chart_says_and_knows_its_names(tmp_path: Path) -> None:
    """The rendered command and environment, with a database and a store on this machine in place of the cluster's."""
    objects = render({"mlflow.hosts": ["mlflow.example.org"], "mlflow.workers": 1})
    [container] = pick(objects, "Deployment", "slipstream-mlflow")["spec"]["template"]["spec"]["containers"]
    variables = {v["name"]: v["value"] for v in container["env"] if "value" in v}
    port = free_port()
    shell, option, script = container["args"]
    for there, here in {
        "exec mlflow": f"exec {ROOT}/.envs/airflow/bin/mlflow", "0.0.0.0": "127.0.0.1", "5000": str(port),
        "/tmp/login.ini": f"{tmp_path}/login.ini",
    }.items():  # fmt: skip
        assert there in script
        script = script.replace(there, here)
    command = [shell, option, script]
    variables |= dict.fromkeys((v["name"] for v in container["env"] if "valueFrom" in v), PASSWORD)
    variables |= {
        "MLFLOW_AUTH_CONFIG_PATH": f"{tmp_path}/login.ini",
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": base64.urlsafe_b64encode(bytes(32)).decode(),
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/ml%40flow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": str(tmp_path / "artifacts"),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log, cwd=tmp_path)
    address = f"http://127.0.0.1:{port}"
    try:
        probe = container["readinessProbe"]["httpGet"]["path"]
        wait_for(f"{address}{probe}", process)
        answers = {host: _search(address, host) for host in ("slipstream-mlflow:5000", "slipstream-mlflow.ml.svc:5000",
                   "mlflow.example.org", "evil.example.org")}  # fmt: skip
        assert answers == {**dict.fromkeys(answers, 200), "evil.example.org": 403}
        assert _search(address, "slipstream-mlflow:5000", password="wrong") == 401
        assert (tmp_path / "login.ini").stat().st_mode & 0o777 == 0o600
    finally:
        process.terminate()
        process.wait(timeout=20)


def _search(address: str, host: str, password: str = PASSWORD) -> int:
    body = {"max_results": 1}
    url = f"{address}/api/2.0/mlflow/experiments/search"
    return httpx.post(url, json=body, headers={"Host": host}, auth=("admin", password), timeout=60).status_code


def test_airflow_values_fit_the_chart() -> None:
    """Names in helm/airflow-values.yaml are those that this chart makes by default."""
    values: Any = yaml.safe_load((ROOT / "helm/airflow-values.yaml").read_text(encoding="utf-8"))
    objects = render({})
    assert values["scheduler"]["serviceAccount"] == {"create": False, "name": "slipstream-airflow"}
    assert pick(objects, "ServiceAccount", values["scheduler"]["serviceAccount"]["name"])
    image = pick(objects, "Deployment", "slipstream-mlflow")["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"{values['defaultAirflowRepository']}:{values['defaultAirflowTag']}"
    sources = yaml.safe_load(values["extraEnvFrom"])
    assert pick(objects, "ConfigMap", sources[0]["configMapRef"]["name"])
    assert sources[1]["secretRef"]["name"] == "slipstream-storage"
    volumes = {v["name"]: v.get("configMap", {}).get("name") for v in values["volumes"]}
    mounts = {m["mountPath"]: volumes[m["name"]] for m in values["volumeMounts"]}
    variables = pick(objects, "ConfigMap", "slipstream-environment")["data"]
    assert mounts[variables["SLIPSTREAM_SPECS"]] == "slipstream-specs"
    assert mounts[variables["SLIPSTREAM_SETTINGS"].rpartition("/")[0]] == "slipstream-settings"
    secrets = set(
        re.findall(r"airflow-\w+|slipstream-\w+(?:-login)?", str(values["data"]) + str(values["migrateDatabaseJob"]))
    )
    assert {"airflow-database", "slipstream-airflow-login"} <= secrets
