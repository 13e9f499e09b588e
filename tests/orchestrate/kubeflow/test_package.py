"""The Kubeflow package of a spec: what the SDK says of it, and whether it is the same flow as the DAG's."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import components

from slipstream import spec
from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.orchestrate import kubeflow
from slipstream.plan import flow

ROOT = Path(__file__).parents[3]
FASHION = ROOT / "examples/fashion.yaml"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("kfp") / "out.yaml"
    kubeflow.package(FASHION, out)
    components.load_component_from_file(str(out))  # the SDK's own validation
    return dict(next(yaml.safe_load_all(out.read_text())))


def steps(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name → task, of all stages."""
    found: dict[str, dict[str, Any]] = {}
    for stage in document["root"]["dag"]["tasks"].values():
        found |= document["components"][stage["componentRef"]["name"]]["dag"]["tasks"]
    return found


def commands(document: dict[str, Any]) -> dict[str, list[str]]:
    """Step and cell → the arguments of its container."""
    containers = (e["container"] for e in document["deploymentSpec"]["executors"].values())
    found = {}
    for container in containers:
        assert container["command"] == ["slipstream"]
        arguments = container["args"]
        cell = arguments[arguments.index("--cell") + 1] if "--cell" in arguments else ""
        found[f"{arguments[1]} {cell}".strip()] = arguments
    return found


def test_the_stages_are_the_top_level(document: dict[str, Any]) -> None:
    tasks = document["root"]["dag"]["tasks"].values()
    assert [t["taskInfo"]["name"] for t in tasks] == sorted(flow.STAGES)


def test_every_cell_is_built_and_judged(document: dict[str, Any]) -> None:
    wanted = {f"{step} {cell}" for step in ("build", "validate") for cell in flow.cells(spec.load(FASHION))}
    assert wanted <= set(commands(document))
    assert {"distill distilled-int8", "prune pruned-int8", "quantize int8", "rollout", "report"} <= set(
        commands(document)
    )
    assert "distill int8" not in commands(document)


def test_images_are_those_of_the_environments(document: dict[str, Any]) -> None:
    containers = [e["container"] for e in document["deploymentSpec"]["executors"].values()]
    images = {c["args"][1]: c["image"].partition(":")[0] for c in containers}
    assert images["distill"] == images["validate"] == "slipstream-torch"
    assert images["trial"] == images["report"] == "slipstream-serve"


def test_a_step_is_given_what_the_flow_says(document: dict[str, Any]) -> None:
    named = {t["taskInfo"]["name"]: t for t in steps(document).values()}
    given = set(named["validate int8@server"]["inputs"]["artifacts"])
    assert given == {"check", "retrain", "build_int8__server", "build_baseline__server"}
    assert set(named["build distilled-int8@portable"]["inputs"]["artifacts"]) == {"check", "quantize_distilled_int8"}
    assert len(named["report"]["inputs"]["artifacts"]) == len(named) - 1


def test_who_judges_is_not_asked_again(document: dict[str, Any]) -> None:
    named = {t["taskInfo"]["name"]: t for t in steps(document).values()}
    assert not any("retryPolicy" in named[step] for step in ("check", "select", "trial", "rollout"))
    assert named["retrain"]["retryPolicy"]["maxRetryCount"] == 2


def test_a_run_can_end_early(tmp_path: Path) -> None:
    kubeflow.package(FASHION, tmp_path / "out.yaml", "accuracy_validation")
    found = commands(dict(next(yaml.safe_load_all((tmp_path / "out.yaml").read_text()))))
    assert "select" in found and "report" in found and "trial" not in found and "rollout" not in found


def test_a_release_that_a_person_must_approve_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "asks.yaml"
    path.write_text(FASHION.read_text().replace("approval: false", "approval: true"))
    with pytest.raises(InputError, match="approval"):
        kubeflow.package(path, tmp_path / "out.yaml")
    kubeflow.package(path, tmp_path / "out.yaml", "small_scale_test")


def test_resources_secrets_and_config_come_from_the_settings(tmp_path: Path, home: Path) -> None:
    (home / "settings.yaml").write_text(
        "kubernetes: {env_from_secrets: [store], env_from_config_maps: [addresses]}\n"
        "resources: {distill: {cpu: 2, memory: 4Gi, gpu: 1, node_selector: {pool: gpu}, tolerations: [{key: gpu}]}}\n"
    )
    assert Home.from_environment().root == home
    kubeflow.package(FASHION, tmp_path / "out.yaml")
    document, platform = yaml.safe_load_all((tmp_path / "out.yaml").read_text())
    asked = document["deploymentSpec"]["executors"]["exec-distill-distilled-int8"]["container"]["resources"]
    assert asked["accelerator"] == {
        "count": "1", "resourceCount": "1", "resourceType": "nvidia.com/gpu", "type": "nvidia.com/gpu",
    }  # fmt: skip
    assert asked["resourceMemoryLimit"] == "4Gi" and asked["resourceCpuRequest"] == "2.0"
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-distill-distilled-int8"]
    assert placed["nodeSelector"] == {"labels": {"pool": "gpu"}}
    assert placed["tolerations"][0]["key"] == "gpu"
    assert placed["secretAsEnv"][0]["secretName"] == "store"
    assert placed["configMapAsEnv"][0]["configMapName"] == "addresses"
