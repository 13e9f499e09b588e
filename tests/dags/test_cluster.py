"""The chart and the runtime `kubernetes` in the cluster that KUBECONFIG names: `make test-k8s`.

Airflow itself runs in this process, with the rights of its own service account and no more; its steps are pods. MLflow
and the store run on this machine, so that the node must be this machine too (`scripts/test-cluster`), and the images
must be there. KServe's controller is played by tests/kserve/kserve_stand_in.py, with real model servers.
"""

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from tests.helm.chart import CHART, tools

ROOT = Path(__file__).parents[2]
ADMIN = os.environ.get("KUBECONFIG", "")

if sys.prefix == str(ROOT / ".envs/airflow"):
    import kubernetes
    from kubernetes.client import ApiException

SPEC = """\
name: cluster
model:
  registry: models:/cluster-resnet@source
  architecture: fashion:student
  train: {function: training:train, params: {epochs: 2}}
data: {train: DATA/train.npz, test: DATA/test.npz}
objective: {max_drop: 20, confidence: 0.6}
recipes: {int8: [quantize]}
quantize: {samples: 64}
targets: {server: {engine: openvino, threads: 1}}
small_scale_test: {shadow: 500, share: 20%, requests: 300, rate_per_s: 60}
rollout: {steps: [50, 100], requests: 300, rate_per_s: 60}
guardrails: {max_p99_ms: 5000, max_p99_ratio: 10, max_disagreement: 40, max_accuracy_drop: 30, max_error_rate: 3}
"""
TRAINING = """\
from fashion import student


def train(training, epochs):
    network = student()
    training.fit(network, epochs=epochs, learning_rate=0.1, batch_size=64)
    return network
"""
pytestmark = pytest.mark.timeout(1500)


class Cluster:
    """A namespace of its own in the cluster."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.server = yaml.safe_load(Path(ADMIN).read_text())["clusters"][0]["cluster"]["server"]

    def kubectl(self, *words: str, given: str | None = None) -> str:
        return self._run("kubectl", *words, given=given)

    def helm(self, *words: str) -> str:
        return self._run("helm", *words)

    def _run(self, program: str, *words: str, given: str | None = None) -> str:
        command = [str(tools() / program), "--kubeconfig", ADMIN, "--namespace", self.namespace, *words]
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, f"{program} {' '.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def configuration_of(self, account: str, folder: Path) -> Path:
        """A kubeconfig with the rights of a service account."""
        document = yaml.safe_load(Path(ADMIN).read_text())
        document["users"][0]["user"] = {"token": self.kubectl("create", "token", account).strip()}
        document["contexts"][0]["context"]["namespace"] = self.namespace
        path = folder / f"{account}.kubeconfig"
        path.write_text(yaml.safe_dump(document))
        return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    assert ADMIN, "set KUBECONFIG to the cluster to test with; scripts/test-cluster makes a small one"
    made = Cluster(f"slipstream-test-{uuid.uuid4().hex[:6]}")
    made.kubectl("create", "namespace", made.namespace)
    made.kubectl("apply", "-f", str(ROOT / "tests/kserve/inferenceservices.crd.yaml"))
    made.kubectl("apply", "-f", str(ROOT / "tests/dags/trainer.crd.yaml"))
    for kind in ("inferenceservices.serving.kserve.io", "trainjobs.trainer.kubeflow.org"):
        made.kubectl("wait", "--for=condition=Established", f"crd/{kind}")
    yield made
    made.kubectl("delete", "namespace", made.namespace, "--wait=false")


@pytest.fixture(scope="module")
def store(gateway: Any) -> Iterator[str]:
    """A bucket, which this process's environment names."""
    before = {name: os.environ.get(name) for name in gateway.environment}
    os.environ |= gateway.environment
    yield f"s3://{gateway.make_bucket(f'cluster-{uuid.uuid4().hex[:8]}')}"
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def ingress(cluster: Cluster, store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """KServe, played; yields the address at which models are reached."""
    folder = tmp_path_factory.mktemp("kserve")
    environment = os.environ | {"KUBECONFIG": ADMIN, "SLIPSTREAM_HOME": str(folder), "SLIPSTREAM_CODE": str(ROOT)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(ROOT / ".envs/serve/bin/python"), "-m", "tests.kserve.kserve_stand_in", cluster.namespace],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def installed(
    cluster: Cluster,
    store: str,
    ingress: str,
    mlflow_server: str,
    gateway: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Cluster:
    """The chart, installed as docs/kubernetes.md says for such clusters."""
    secret = [f"--from-literal={k}={v}" for k, v in gateway.environment.items() if k.startswith("AWS_") and "KEY" in k]
    cluster.kubectl("create", "secret", "generic", "slipstream-storage", *secret)
    signing_key = f"--from-literal=SLIPSTREAM_SIGNING_KEY={os.urandom(32).hex()}"
    cluster.kubectl("create", "secret", "generic", "slipstream-signing", signing_key)
    files = [f"--from-literal=training.py={TRAINING}", f"--from-file={ROOT / 'examples/fashion.py'}"]
    cluster.kubectl("create", "configmap", "code", *files)
    address = cluster.server.rpartition("/")[2]
    values = {
        "mlflow": {"enabled": False, "url": mlflow_server},
        "webhook": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "specs": {"location": f"{store}/specs"},
        "runs": f"{store}/runs",
        "storage": {"endpoint": gateway.environment["AWS_ENDPOINT_URL"]},
        "trainer": {"enabled": True},
        "kserve": {"releases": f"{store}/releases", "ingress": ingress},
        "steps": {
            "hostNetwork": True,
            "codeConfigMap": "code",
            "resources": {"default": {"cpu": 0.2, "memory": "4Gi"}},
            # Without kube-proxy the address of the API server that pods are told leads nowhere.
            "environment": {
                "KUBERNETES_SERVICE_HOST": address.partition(":")[0],
                "KUBERNETES_SERVICE_PORT": address.partition(":")[2],
            },
        },
    }
    path = tmp_path_factory.mktemp("chart") / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    cluster.helm("upgrade", "--install", "slipstream", str(CHART), "--values", str(path))
    return cluster


@pytest.fixture(scope="module")
def uploaded(store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The spec, with its data in the store."""
    from examples.fashion import data

    from slipstream import storage

    folder, loaded = tmp_path_factory.mktemp("data"), data(limit=5000)
    for name, split in (("train", loaded.train), ("test", loaded.test)):
        np.savez(folder / f"{name}.npz", inputs=split.inputs, labels=split.labels)
        storage.upload(folder / f"{name}.npz", f"{store}/data/{name}.npz")
    return SPEC.replace("DATA", f"{store}/data")


def can(cluster: Cluster, account: str) -> Callable[[str, str], bool]:
    """What a service account may do, asked of the cluster itself."""
    api = kubernetes.client.AuthorizationV1Api(kubernetes.config.new_client_from_config(ADMIN))
    user = f"system:serviceaccount:{cluster.namespace}:{account}"

    def ask(verb: str, resource: str) -> bool:
        name, _, group = resource.partition(".")
        resource_name, _, sub = name.partition("/")
        attributes = kubernetes.client.V1ResourceAttributes(
            namespace=cluster.namespace, verb=verb, resource=resource_name, subresource=sub or None, group=group
        )
        review = kubernetes.client.V1SubjectAccessReview(
            spec=kubernetes.client.V1SubjectAccessReviewSpec(user=user, resource_attributes=attributes)
        )
        return bool(api.create_subject_access_review(review).status.allowed)

    return ask


def test_each_account_may_do_its_part_and_no_more(installed: Cluster) -> None:
    airflow, step, release = (can(installed, f"slipstream-{name}") for name in ("airflow", "step", "release"))
    assert all(airflow(verb, "pods") for verb in ("get", "list", "create", "delete", "patch"))
    assert airflow("get", "pods/log")
    assert not airflow("get", "secrets") and not airflow("create", "pods/exec")
    assert not airflow("update", "inferenceservices.serving.kserve.io")
    assert not any(step(verb, "pods") for verb in ("get", "list", "create", "delete"))
    assert all(release(v, "inferenceservices.serving.kserve.io") for v in ("get", "create", "update", "delete"))
    assert not release("create", "pods") and not release("get", "secrets")


def test_a_forbidden_call_is_refused(installed: Cluster, tmp_path: Path) -> None:
    configuration = installed.configuration_of("slipstream-step", tmp_path)
    api = kubernetes.client.CoreV1Api(kubernetes.config.new_client_from_config(str(configuration)))
    with pytest.raises(ApiException) as raised:
        api.list_namespaced_pod(installed.namespace)
    assert raised.value.status == 403


def test_a_spec_goes_from_data_in_the_store_to_a_release(
    installed: Cluster,
    store: str,
    uploaded: str,
    ingress: str,
    home: Path,
    dags: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gateway: Any,
) -> None:
    import httpx

    from slipstream import storage

    storage.write_text(f"{store}/specs/cluster.yaml", uploaded)
    settings = yaml.safe_load(installed.kubectl("get", "configmap", "slipstream-settings", "-o", "yaml"))
    (home / "settings.yaml").write_text(settings["data"]["settings.yaml"])
    monkeypatch.setenv("SLIPSTREAM_SPECS", f"{store}/specs")
    monkeypatch.setenv("SLIPSTREAM_RUNS", f"{store}/runs")
    from runtimes import pods

    configuration = str(installed.configuration_of("slipstream-airflow", tmp_path))
    monkeypatch.setattr(pods, "CONFIGURATION", configuration)

    dag = dags()["optimize-cluster"]
    with upgraded_while(installed, "rollout") as seen:
        finished = dag.test()
    assert len(seen) == 3 and len(set(seen.values())) == 1, "upgrade and rollback leave a running rollout alone"
    states = {ti.task_id: str(ti.state) for ti in finished.get_task_instances()}
    assert str(finished.state) == "success", states

    services = yaml.safe_load(installed.kubectl("get", "inferenceservices", "-o", "yaml"))["items"]
    [service] = services
    traffic = service["status"]["components"]["predictor"]["traffic"]
    assert sum(t["percent"] for t in traffic if t.get("latestRevision")) == 100
    host = service["status"]["url"].removeprefix("http://")
    answer = httpx.get(f"{ingress}/v2/health/ready", headers={"Host": host})
    assert answer.status_code == 200
    pods_left = yaml.safe_load(
        installed.kubectl("get", "pods", "--selector=app.kubernetes.io/component=step", "-o", "yaml")
    )
    assert pods_left["items"] == [], "pods of steps that ended well are deleted"


@contextmanager
def upgraded_while(cluster: Cluster, step: str) -> Iterator[dict[str, str]]:
    """Upgrades the chart and rolls it back while the pod of a step runs; yields which pod ran before and after each."""
    seen: dict[str, str] = {}
    ended = threading.Event()

    def running() -> str:
        found = yaml.safe_load(cluster.kubectl("get", "pods", f"--selector=slipstream/step={step}", "-o", "yaml"))
        return "".join(p["metadata"]["uid"] for p in found["items"] if p["status"].get("phase") == "Running")

    def work() -> None:
        while not (uid := running()):
            if ended.wait(0.5):
                return
        seen["before"] = uid
        cluster.helm("upgrade", "slipstream", str(CHART), "--reuse-values", "--set", "steps.environment.ANOTHER=one")
        seen["upgraded"] = running()
        cluster.helm("rollback", "slipstream", "1")
        seen["rolled back"] = running()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        try:
            yield seen
        finally:
            ended.set()
            done.result()


def test_two_pods_train_together_and_a_bad_one_says_why(
    installed: Cluster, store: str, uploaded: str, home: Path, airflow_home: Path, tmp_path: Path
) -> None:
    from airflow.sdk.exceptions import AirflowFailException
    from tests.dags.trainer_stand_in import TrainerStandIn

    from runtimes.base import Job
    from runtimes.training import TrainJob
    from slipstream import storage
    from slipstream.contract import StepInput, StepOutput
    from slipstream.home import Home
    from slipstream.plan.settings import Settings

    found = yaml.safe_load(installed.kubectl("get", "configmap", "slipstream-settings", "-o", "yaml"))
    settings = Settings.model_validate(yaml.safe_load(found["data"]["settings.yaml"]))
    text = uploaded.replace("cluster-resnet", "together") + "training: {workers: 2}\n"
    client = kubernetes.config.new_client_from_config(str(installed.configuration_of("slipstream-airflow", tmp_path)))
    trainer = TrainerStandIn(kubernetes.config.new_client_from_config(ADMIN), installed.namespace)

    def train(name: str, spec_text: str) -> StepOutput:
        uri = f"{store}/runs/{name}/r/spec.yaml"
        storage.write_text(uri, spec_text)
        job = Job("retrain", uri, StepInput(run_key=name), settings, Home.from_environment())
        storage.write_text(job.given, job.inputs.model_dump_json())
        TrainJob(client, job, {"ti": SimpleNamespace(dag_id="optimize-cluster")}).run()
        return StepOutput.model_validate_json(storage.read_text(job.made))

    try:
        output = train("good", text)
        assert output.artifact is not None and output.metrics["test_top1"] > 50
        with pytest.raises(AirflowFailException, match="nowhere"):
            train("bad", text.replace("training:train", "nowhere:train"))
    finally:
        trainer.close()


def test_uninstalling_leaves_nothing_of_the_chart(installed: Cluster) -> None:
    installed.helm("uninstall", "slipstream", "--wait")
    kinds = "serviceaccounts,roles,rolebindings,configmaps,services,deployments,networkpolicies,persistentvolumeclaims"
    left = yaml.safe_load(installed.kubectl("get", kinds, "--selector=app.kubernetes.io/managed-by=Helm", "-o", "yaml"))
    assert left["items"] == []
