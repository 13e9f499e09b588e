"""What is written and read, without any server: names, predictors, and what a status means for releases."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from slipstream.contract import Release
from slipstream.engines.base import EngineManifest
from slipstream.errors import InputError
from slipstream.plan.settings import Settings
from slipstream.spec import Target
from slipstream.traffic import kserve_objects as objects
from slipstream.traffic.base import Observation
from slipstream.traffic.kserve import counters
from slipstream.traffic.kserve_objects import Service

V1, V2 = Release(model="net", name="v1"), Release(model="net", name="v2")


def settings(**changes: Any) -> Settings:
    return Settings.model_validate({"image": "registry.test/slipstream-{environment}:1", **changes})


def predictor(release: Release, **changes: Any) -> dict[str, Any]:
    return objects.predictor(release, f"s3://b/{release.name}", f"sha-{release.name}", settings(**changes))


def body(release: Release = V1, **status: Any) -> dict[str, Any]:
    """An InferenceService with the status of its predictor."""
    made = objects.new("net", "models", "net", predictor(release))
    return {**made, "status": {"components": {"predictor": status}}}


def target(revision: int, percent: int, latest: bool = True) -> dict[str, Any]:
    return {"revisionName": name(revision), "percent": percent, "latestRevision": latest}


def name(revision: int) -> str:
    return f"net-predictor-{revision:05d}"


@pytest.mark.parametrize(
    ("model", "safe"),
    [("fashion-resnet", "fashion-resnet"), ("Net_2", "m-net-2-"), ("7b", "m-7b-"), ("x" * 50, "m-xxx")],
)
def test_names_are_dns_safe_and_distinct(model: str, safe: str) -> None:
    found = objects.object_name(model)
    assert found.startswith(safe)
    assert len(f"latest-{found}-predictor-00001") <= 63
    assert found != objects.object_name(f"{model}.")
    assert objects.object_name("Net_2") != objects.object_name("net-2")


def test_an_engine_with_servers_of_its_own_is_served_from_their_image() -> None:
    found = objects.predictor(V1, "s3://b/v1", "sha-v1", settings(), "tensorrt")
    assert found["containers"][0]["image"] == "registry.test/slipstream-tensorrt:1"
    chosen = objects.predictor(
        V1, "s3://b/v1", "sha-v1", settings(resources={"serving": {"image": "mine:2"}}), "tensorrt"
    )
    assert chosen["containers"][0]["image"] == "mine:2"


def test_the_predictor_is_confined_and_says_what_it_is() -> None:
    found = predictor(
        V1,
        resources={"default": {"memory": "1Gi"}, "serving": {"cpu": 2, "gpu": 1, "node_selector": {"gpu": "yes"}}},
        kubernetes={"pull_secrets": ["registry"], "serving": {"service_account": "models", "min_replicas": 2}},
    )
    [container] = found["containers"]
    assert found["labels"] == {"slipstream/release": "v1"}
    assert found["annotations"] == {"slipstream/engine-sha256": "sha-v1"}
    assert (found["minReplicas"], found["serviceAccountName"], found["nodeSelector"]) == (2, "models", {"gpu": "yes"})
    assert found["imagePullSecrets"] == [{"name": "registry"}]
    assert container["image"] == "registry.test/slipstream-serve:1"
    assert container["env"] == [{"name": "STORAGE_URI", "value": "s3://b/v1"}]
    assert container["args"][:4] == ["--model", "net", "--release", "v1"]
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "1Gi"},
        "limits": {"memory": "1Gi", "nvidia.com/gpu": "1"},
    }
    security = container["securityContext"]
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_a_share_changes_nothing_that_would_make_a_revision() -> None:
    before = body(V1, latestCreatedRevision=name(1), latestReadyRevision=name(1), traffic=[target(1, 100)])
    after = objects.shared(before, 25)
    assert after["metadata"] == before["metadata"]
    assert Service(after).predictor == Service(before).predictor
    assert Service(after).percent == 25


def rolling(percent: int, created: int = 2, ready: int = 2, rolled: int = 1, previous: int | None = None) -> Service:
    """v2 has replaced v1, whose revision was the first."""
    first = body(V1, latestCreatedRevision=name(1), latestReadyRevision=name(1), traffic=[target(1, 100)])
    written = objects.replaced(first, predictor(V2))
    status = {
        "latestCreatedRevision": name(created),
        "latestReadyRevision": name(ready),
        "latestRolledoutRevision": name(rolled),
        **({"previousRolledoutRevision": name(previous)} if previous else {}),
        "traffic": [t for t in (target(ready, percent), target(rolled, 100 - percent, False)) if t["percent"]],
    }
    return Service({**written, "status": {"components": {"predictor": status}}})


def test_the_status_is_read_as_releases() -> None:
    starting = rolling(0, created=2, ready=1)
    assert (starting.created, starting.ready, starting.weights, starting.base) == (True, False, {"v1": 100}, "v1")
    split = rolling(30)
    assert (split.ready, split.weights, split.serving, split.base) == (True, {"v2": 30, "v1": 70}, None, "v1")
    promoted = rolling(100, rolled=2, previous=1)
    assert (promoted.weights, promoted.serving, promoted.base) == ({"v2": 100}, "v2", "v1")
    assert promoted.engines == {"v1": "sha-v1", "v2": "sha-v2"}


def test_before_kserve_has_seen_a_predictor_nothing_is_taken_for_it() -> None:
    unseen = rolling(0, created=1, ready=1)
    assert (unseen.created, unseen.ready, unseen.weights) == (False, False, {"v1": 100})


def test_a_revision_that_kserve_made_anew_is_still_the_release() -> None:
    assert rolling(100, created=3, ready=3, rolled=3, previous=2).weights == {"v2": 100}
    assert rolling(40, created=3, ready=3, rolled=2).weights == {"v2": 100}


def test_what_served_is_remembered_until_it_does_not() -> None:
    refused = objects.replaced(rolling(0).body, predictor(Release(model="net", name="v3")))
    assert objects.release_of(Service(refused).history.former or {}) == "v1"
    assert Service(refused).percent == 0
    kept = objects.replaced(rolling(100, rolled=2, previous=1).body, predictor(Release(model="net", name="v3")))
    assert objects.release_of(Service(kept).history.former or {}) == "v2"


def test_history_stays_small() -> None:
    current = rolling(100, rolled=2, previous=1).body
    for number in range(3, 40):
        status = {"latestCreatedRevision": name(number), "latestReadyRevision": name(number)}
        current = objects.replaced(
            {**current, "status": {"components": {"predictor": {**status, "traffic": [target(number, 100)]}}}},
            predictor(Release(model="net", name=f"v{number}")),
        )
    assert len(Service(current).history.revisions) == objects.KEPT
    assert len(str(current["metadata"])) < 10_000


def manifest(engine: str, *files: str) -> EngineManifest:
    return EngineManifest(
        engine=engine,
        target=Target(engine="openvino"),
        fingerprint={},
        candidate_sha256="0",
        input_shape=(1,),
        input_dtype="float32",
        output_shape=(1,),
        files=dict.fromkeys(files, "0"),
    )


@pytest.mark.parametrize(
    ("engine", "files", "layout", "form"),
    [
        ("onnxruntime", ("model.onnx",), {"model.onnx": "net/1/model.onnx"}, "onnx"),
        ("tensorrt", ("model.plan",), {"model.plan": "net/1/model.plan"}, "tensorrt"),
        (
            "openvino",
            ("model.xml", "model.bin"),
            {"model.xml": "1/model.xml", "model.bin": "1/model.bin"},
            "openvino",
        ),
    ],
)
def test_stock_runtimes_get_the_layout_that_they_want(
    engine: str, files: tuple[str, ...], layout: dict[str, str], form: str
) -> None:
    assert objects.stock_layout("net", manifest(engine, *files)) == layout
    found = objects.stock_predictor(V1, "s3://b/v1", "sha-v1", engine, settings())
    assert found["model"]["modelFormat"] == {"name": form}
    assert found["model"]["storageUri"] == "s3://b/v1"
    assert found["labels"] == {"slipstream/release": "v1"}


def test_what_no_stock_runtime_serves_is_refused() -> None:
    with pytest.raises(InputError, match="no runtime of KServe serves an engine of litert"):
        objects.stock_layout("net", manifest("litert", "model.tflite"))
    with pytest.raises(InputError, match="rename the registered model"):
        objects.stock_layout("Net_2", manifest("openvino", "model.xml", "model.bin"))


def test_metrics_are_read_by_name_of_slipstreams_server_and_of_triton() -> None:
    ours = """# TYPE slipstream_requests counter
slipstream_requests_total{status="2xx"} 7.0
slipstream_requests_total{status="5xx"} 2.0
# TYPE slipstream_requests_created gauge
slipstream_requests_created{status="5xx"} 1.795538518e+09
process_resident_memory_bytes 2.097152e+06
"""
    triton = """nv_inference_request_success{model="net",version="1"} 5
nv_inference_request_failure{model="net",version="1"} 1
"""
    assert counters(ours) == Observation(9, 2, 2.0)
    assert counters(triton) == Observation(6, 1, 0.0)
    assert counters("") == Observation(0, 0, 0.0)


def test_the_definition_for_test_clusters_fits_what_is_written() -> None:
    definition = yaml.safe_load(Path(__file__).with_name("inferenceservices.crd.yaml").read_text())
    [version] = definition["spec"]["versions"]
    written = body()
    assert written["apiVersion"] == f"{definition['spec']['group']}/{version['name']}"
    assert written["kind"] == definition["spec"]["names"]["kind"]
    assert version["subresources"] == {"status": {}}
