"""A compiled package, run by the SDK's own Docker runner: real containers of the images built here, to the report.

Part of the tier `docker`. The runner is for one machine, so the traffic stages, which a cluster has, are left out.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.containers.conftest import docker as container_host
from tests.containers.conftest import images
from tests.containers.docker import Docker

from slipstream import spec
from slipstream.orchestrate import kubeflow
from slipstream.plan import flow

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tests/e2e/tiny.yaml"
CODE = "/opt/slipstream/code"
DATA = "/usr/share/datasets/fashion-mnist"

__all__ = ["container_host", "images"]


@pytest.fixture(scope="session")
def docker(container_host: Docker) -> Docker:
    """What the fixture `images` asks for, under its own name."""
    return container_host


def artifacts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the local runner hand on the artifacts of container components, as the launcher in a cluster does.

    It knows only those that a component of the SDK's own writes into its executor output, and says "has no outputs"
    (kfp 2.17).
    """
    from kfp.local import executor_output_utils as utils

    found = utils.get_outputs_for_task

    def get(executor_input: Any, component_spec: Any) -> dict[str, Any]:
        declared = executor_input.outputs.artifacts
        artifacts = {k: utils.artifact_list_to_dsl_artifact(v, is_artifact_list=False) for k, v in declared.items()}
        return artifacts | found(executor_input=executor_input, component_spec=component_spec)

    monkeypatch.setattr(utils, "get_outputs_for_task", get)


@pytest.fixture
def runner(container_host: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The SDK set to run containers; yields the folder of its artifacts."""
    from docker.types import Mount
    from kfp import local

    monkeypatch.setenv("DOCKER_HOST", container_host.host)
    artifacts_too(monkeypatch)
    root = tmp_path / "artifacts"
    root.mkdir()
    local.init(
        runner=local.DockerRunner(
            entrypoint="env",  # the runner puts a component's command behind the image's entry point, not in its place
            network_mode="host",
            user=f"{os.getuid()}:0",
            read_only=True,
            cap_drop=["ALL"],
            tmpfs={"/tmp": ""},
            mounts=[
                Mount(CODE, str(ROOT), "bind", read_only=True),
                Mount(DATA, DATA, "bind", read_only=True),
                Mount("/var/lib/slipstream", str(home_of(tmp_path)), "bind"),
            ],
        ),
        pipeline_root=str(root),
    )
    yield root


def home_of(folder: Path) -> Path:
    made = folder / "container-home"
    made.mkdir(exist_ok=True)
    return made


@pytest.mark.timeout(1200)
def test_the_package_runs_in_containers(
    images: dict[str, str], mlflow_server: str, home: Path, runner: Path, tmp_path: Path
) -> None:
    from kfp import components
    from mlflow import MlflowClient

    environment = {"MLFLOW_TRACKING_URI": mlflow_server, "SLIPSTREAM_SIGNING_KEY": os.urandom(32).hex()}
    (home / "settings.yaml").write_text(yaml.safe_dump({"environment": environment}))
    out = tmp_path / "package.yaml"
    kubeflow.package(TINY, out, "accuracy_validation")

    ran = components.load_component_from_file(str(out))()

    assert ran is not None
    found = runs(MlflowClient())
    chosen = spec.load(TINY)
    wanted = {f"{step} {cell}" for step in ("build", "validate") for cell in flow.cells(chosen)}
    wanted |= {"check", "retrain", "quantize int8", "select", "report"}
    assert wanted <= found.keys()
    assert {found[name] for name in wanted} == {"FINISHED"}


def runs(client: Any) -> dict[str, str]:
    """Step and cell → state of its MLflow run."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    return {r.info.run_name: r.info.status for r in client.search_runs(experiments)}
