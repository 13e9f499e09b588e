"""retrain: trained and registered, from a file, or taken from the registry; killed and resumed."""

from pathlib import Path
from typing import Any

import mlflow
import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient
from tests.engines.candidates import network
from tests.engines.images import samples
from tests.s3_gateway import Gateway
from tests.steps.killed import Attempts
from tests.steps.pipeline import small_spec
from tests.steps.training import RUN_KEY, document, spec_of, step
from tests.user_code import use

from slipstream import digests
from slipstream.errors import InputError, ModelError
from slipstream.frameworks.base import WEIGHTS, framework_for
from slipstream.spec import Spec
from slipstream.steps.retrain import register_checkpoint
from slipstream.store.tracking import fetch

pytestmark = pytest.mark.usefixtures("mlflow_server", "home")
torch.set_num_threads(1)


def test_training_registers_a_tagged_version_and_moves_the_alias() -> None:
    output = step("retrain", spec_of(document("trained")))
    client = MlflowClient()
    version = client.get_model_version_by_alias("trained", "source")
    assert output.details == {"version": version.version, "origin": "trained"}
    assert output.artifact is not None
    expected = {
        "slipstream.kind": "checkpoint",
        "slipstream.sha256": output.artifact.sha256,
        "slipstream.pipeline_run": RUN_KEY,
    }
    assert version.tags.items() >= expected.items()
    assert 0 <= output.metrics["test_top1"] <= 100
    assert len(client.get_metric_history(output.run_id, "train_loss")) == 1
    framework_for("torch").load_eager(fetch(output.artifact))


def test_same_weights_are_registered_once() -> None:
    """After a crash between registration and the end of the step, the retry finds its own version."""
    spec, client = spec_of(document("once")), MlflowClient()
    output = step("retrain", spec)
    assert output.artifact is not None
    client.delete_registered_model_alias("once", "source")  # as after a crash between the two writes
    assert register_checkpoint(client, spec.model, output.artifact, RUN_KEY) == output.details["version"]
    assert len(client.search_model_versions("name = 'once'")) == 1
    assert client.get_model_version_by_alias("once", "source").version == output.details["version"]


def test_unchanged_training_is_reused_and_another_seed_is_not() -> None:
    written = document("reused")
    first, second = step("retrain", spec_of(written)), step("retrain", spec_of(written))
    assert second.reused and second.run_id == first.run_id
    again = step("retrain", spec_of(written))  # as after a kill before Airflow had the output
    assert again == second
    other = step("retrain", spec_of({**written, "seed": 1}))
    assert first.artifact is not None and other.artifact is not None
    assert not other.reused and other.artifact.sha256 != first.artifact.sha256


LOSS = """
from torch.nn import functional

def loss(outputs, labels):
    return {factor} * functional.cross_entropy(outputs, labels)
"""


def test_training_with_another_loss_is_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A train function that gives `fit` no loss trains with the spec's."""
    (tmp_path / "loss_case.py").write_text(LOSS.format(factor=1))
    use(tmp_path, monkeypatch)
    written = document("with-loss", limit=60)
    plain = step("retrain", spec_of(written))
    written["model"]["loss"] = "loss_case:loss"
    first = step("retrain", spec_of(written))
    assert not first.reused and step("retrain", spec_of(written)).reused
    version = step("retrain", spec_of(written), source_version=plain.details["version"])
    (tmp_path / "loss_case.py").write_text(LOSS.format(factor=2))
    assert not step("retrain", spec_of(written)).reused
    again = step("retrain", spec_of(written), source_version=plain.details["version"])
    assert again.reused and again.run_id == version.run_id  # nothing is trained


def test_a_version_is_taken_from_the_registry_without_training() -> None:
    trained = step("retrain", spec_of(document("taken")))
    asked = step("retrain", spec_of(document("taken")), source_version="1")
    without_train = document("taken")
    del without_train["model"]["train"]
    by_alias = step("retrain", spec_of(without_train))
    for output in (asked, by_alias):
        assert output.details == {"version": "1", "origin": "registry"}
        assert output.artifact is not None and trained.artifact is not None
        assert output.artifact.sha256 == trained.artifact.sha256


def test_weights_that_a_person_logged_are_taken(tmp_path: Path) -> None:
    register("by-hand", weights_file(tmp_path, {}))
    written = document("by-hand")
    del written["model"]["train"]
    assert step("retrain", spec_of(written)).details == {"version": "1", "origin": "registry"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"11.bias": torch.full((10,), float("nan"))}, "NaN or infinity in 11.bias"),
        ({"11.bias": torch.zeros(7)}, r"11.bias is \(7,\), not \(10,\)"),
        ({"extra": torch.zeros(1)}, r"1 unexpected \(extra\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    name = f"misfit-{abs(hash(said))}"
    register(name, weights_file(tmp_path, change))
    written = document(name)
    del written["model"]["train"]
    with pytest.raises(ModelError, match=said):
        step("retrain", spec_of(written))


def test_a_pickle_is_refused_with_the_mend(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(1)}, path)
    register("pickled", path)
    written = document("pickled")
    del written["model"]["train"]
    with pytest.raises(ModelError, match=r"pickled models are never loaded.*safetensors\.torch\.save_file"):
        step("retrain", spec_of(written))


def test_a_file_is_registered_once_and_every_run_goes_on_from_it(tmp_path: Path) -> None:
    given = onnx_file(tmp_path / "model.onnx")
    spec, client = onnx_spec(tmp_path, "from-file", str(given)), MlflowClient()
    first = step("retrain", spec)
    assert first.details == {"version": "1", "origin": "file"}
    version = client.get_model_version_by_alias("from-file", "source")
    assert first.artifact is not None and first.metrics["test_top1"] > 0
    assert version.tags["slipstream.sha256"] == first.artifact.sha256
    assert version.tags["slipstream.file_sha256"] == digests.file(given)
    client.set_registered_model_alias("from-file", "other", "1")
    client.delete_registered_model_alias("from-file", "source")
    again = step("retrain", spec.model_copy(update={"seed": 1}))  # not found unchanged, so it runs again
    assert again.details == first.details and not again.reused
    assert again.artifact is not None and again.artifact.sha256 == first.artifact.sha256
    assert len(client.search_model_versions("name = 'from-file'")) == 1
    assert client.get_model_version_by_alias("from-file", "source").version == "1"


def test_other_bytes_are_another_version_and_a_person_may_ask_for_the_old_one(tmp_path: Path) -> None:
    given = onnx_file(tmp_path / "model.onnx")
    spec = onnx_spec(tmp_path, "changed-file", str(given))
    step("retrain", spec)
    onnx_file(given, seed=1)
    assert step("retrain", spec).details == {"version": "2", "origin": "file"}
    asked = step("retrain", spec, source_version="1")
    assert asked.details == {"version": "1", "origin": "registry"}


def test_a_path_begins_at_the_users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_file(tmp_path / "code" / "models" / "model.onnx")
    monkeypatch.setenv("SLIPSTREAM_CODE", str(tmp_path / "code"))
    for number, path in enumerate(["models/model.onnx", "models"]):
        spec = onnx_spec(tmp_path, f"relative-{number}", path)
        assert step("retrain", spec).details["origin"] == "file"


def test_a_file_may_lie_in_a_bucket(tmp_path: Path, gateway: Gateway, bucket: str) -> None:
    given, name = onnx_file(tmp_path / "model.onnx"), bucket.removeprefix("s3://")
    gateway.client.upload_file(str(given), name, "models/model.onnx")
    spec = onnx_spec(tmp_path, "in-a-bucket", f"{bucket}/models/model.onnx")
    step("check", spec)
    assert step("retrain", spec).details == {"version": "1", "origin": "file"}
    version = MlflowClient().get_model_version_by_alias("in-a-bucket", "source")
    assert version.tags["slipstream.file_sha256"] == digests.file(given)
    absent = onnx_spec(tmp_path, "in-a-bucket", f"{bucket}/models/none.onnx")
    with pytest.raises(ModelError, match=rf"model\.file: .*{bucket}/models/none\.onnx"):
        step("check", absent)


def test_a_file_that_is_not_there_is_a_model_error_before_anything_starts(tmp_path: Path) -> None:
    spec = onnx_spec(tmp_path, "no-file", "nowhere/model.onnx")
    for name in ("check", "retrain"):
        with pytest.raises(ModelError, match=r"model\.file: .*nowhere/model\.onnx: no such file"):
            step(name, spec)


def test_a_file_that_does_not_fit_the_data_is_found_by_check(tmp_path: Path) -> None:
    spec = onnx_spec(tmp_path, "misfit-file", str(onnx_file(tmp_path / "model.onnx")), images=samples(96)[:, :, :8])
    with pytest.raises(ModelError, match=r"^model\.file: the model takes N×1×16×16 float32"):
        step("check", spec)


def test_a_torch_models_file_is_taken_too(tmp_path: Path) -> None:
    written = document("torch-file")
    del written["model"]["train"]
    written["model"]["file"] = str(weights_file(tmp_path, {}))
    step("check", spec_of(written))
    assert step("retrain", spec_of(written)).details == {"version": "1", "origin": "file"}


@pytest.mark.parametrize("how", ["mlflow.onnx", "folder"])
def test_an_onnx_version_that_a_person_registered_is_taken(how: str, tmp_path: Path) -> None:
    import onnx

    name = f"by-hand-{how.replace('.', '-')}"
    given = onnx_file(tmp_path / "model" / "anything.onnx")
    with mlflow.start_run() as run:
        if how == "folder":
            mlflow.log_artifacts(str(given.parent), "model")
            MlflowClient().create_registered_model(name)
            MlflowClient().create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
        else:
            mlflow.onnx.log_model(onnx.load(given), name="model", registered_model_name=name)
    MlflowClient().set_registered_model_alias(name, "source", "1")
    output = step("retrain", onnx_spec(tmp_path, name))
    assert output.details == {"version": "1", "origin": "registry"}


def onnx_file(path: Path, seed: int = 0) -> Path:
    """A small exported classifier of 1×16×16 images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(network(seed).SerializeToString())
    return path


def onnx_spec(folder: Path, name: str, file: str | None = None, images: Any = None) -> Spec:
    """A spec for an ONNX model, from a file or from the registry."""
    given = small_spec(folder / "data", name, train=images, recipes={"int8": ["quantize"]}).model_dump(mode="json")
    del given["targets"]["far"]
    return Spec.model_validate(
        given | {"model": {"registry": f"models:/{name}@source", "framework": "onnx", "file": file}}
    )


def test_neither_version_nor_train_function_is_a_model_error() -> None:
    written = document("nothing")
    del written["model"]["train"]
    with pytest.raises(ModelError, match="no such alias or model"):
        step("retrain", spec_of(written))
    with pytest.raises(InputError, match="no version 7"):
        step("retrain", spec_of(document("nothing")), source_version="7")


def test_killed_in_the_middle_it_resumes_to_the_same_weights(home: Path, tmp_path: Path) -> None:
    """kill -9 after the first epoch; the second attempt goes on there and ends as if nothing had happened."""
    killed = Attempts("retrain", document("killed", limit=600, epochs=4), tmp_path / "killed")
    killed.kill_at(home, "fit-1.pt")
    resumed, said = killed.finish()
    assert "resuming fit-1 after " in said
    whole, said = Attempts("retrain", document("not-killed", limit=600, epochs=4), tmp_path / "whole").finish()
    assert "resuming" not in said

    assert resumed.artifact is not None and whole.artifact is not None
    assert resumed.artifact.sha256 == whole.artifact.sha256
    history = MlflowClient().get_metric_history(resumed.run_id, "train_loss")
    assert {m.step for m in history} == {0, 1, 2, 3}
    assert len(history) <= 5  # at most the epoch whose checkpoint the kill prevented is there twice


def weights_file(folder: Path, change: dict[str, Any]) -> Path:
    """Weights of an untrained network, with some replaced."""
    from slipstream.spec import Call

    network = framework_for("torch").build(Call(function="examples.fashion:resnet"), seed=3)
    path = folder / WEIGHTS
    safetensors.torch.save_file({**network.state_dict(), **change}, path)
    return path


def register(name: str, path: Path) -> None:
    """Log a file as a model, as a user would, and set the alias."""
    client = MlflowClient()
    with mlflow.start_run() as run:
        mlflow.log_artifact(str(path), "model")
    client.create_registered_model(name)
    source = f"{run.info.artifact_uri}/model"
    client.create_model_version(name, source, run_id=run.info.run_id)
    client.set_registered_model_alias(name, "source", "1")
