"""What `slipstream init` wrote is run: first without data, then with it; then from the registry."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.engines.candidates import network
from tests.engines.images import CLASSES, samples

from slipstream import spec as specs
from slipstream.contract import StepInput, StepOutput
from slipstream.errors import ModelError, SlipstreamError
from slipstream.home import Home
from slipstream.runner.run import run_step
from slipstream.tools.init import command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mlflow_server", "home")]


def step(name: str, spec: specs.Spec, *upstream: StepOutput) -> StepOutput:
    done = run_step(name, spec, StepInput(run_key="written", upstream=upstream))
    assert done is not None
    return done


def test_an_onnx_file_from_init_to_its_baseline_and_again_from_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIPSTREAM_CODE", str(tmp_path))
    home = Home.from_environment()
    onnx.save(network(), tmp_path / "written-net.onnx")
    out = tmp_path / "written.yaml"
    command.init(home, str(tmp_path / "written-net.onnx"), out, data=None, architecture=None, force=False)
    spec = specs.load(out)
    assert spec.model.file == "written-net.onnx"
    with pytest.raises(SlipstreamError, match=r"written-train\.npz: not there yet; write it by numpy\.savez"):
        step("check", spec)
    for seed, (name, n) in enumerate({"train": 320, "test": 640}.items()):
        np.savez(tmp_path / f"written-{name}.npz", inputs=samples(n, seed=seed), labels=np.arange(n) % CLASSES)
    checked = step("check", spec)
    assert checked.details["samples"] == {"train": 320, "test": 640}
    baseline = step("retrain", spec, checked)
    assert baseline.details["origin"] == "file"

    capsys.readouterr()
    again = tmp_path / "again.yaml"
    command.init(home, "models:/written-net@source", again, data="written_data:data", architecture=None, force=False)
    registered = specs.load(again)
    assert (registered.model.registry, registered.model.file) == ("models:/written-net@source", None)
    assert "1×16×16 float32 → 5; 2,533 weights" in capsys.readouterr().out
    assert step("check", registered).details["data"] == checked.details["data"]
    number = baseline.details["version"]
    command.init(home, f"models:/written-net/{number}", again, data="written_data:data", architecture=None, force=True)
    assert f"set written-net's alias source to version {number}" in capsys.readouterr().out


def test_a_registered_model_that_is_only_a_pickle_is_refused(tmp_path: Path) -> None:
    import mlflow

    (tmp_path / "model.pkl").write_bytes(b"a pickle")
    with mlflow.start_run():
        logged = mlflow.pyfunc.log_model(
            name="pickled", loader_module="slipstream.pyfunc", data_path=str(tmp_path / "model.pkl")
        )
    client = mlflow.MlflowClient()
    client.create_registered_model("pickled-net")
    client.create_model_version("pickled-net", logged.model_uri, model_id=logged.model_id)
    with pytest.raises(ModelError, match=r"neither ONNX, nor a Keras model, nor weights\.safetensors"):
        command.init(
            Home.from_environment(),
            "models:/pickled-net/1",
            tmp_path / "net.yaml",
            data=None,
            architecture=None,
            force=False,
        )
    assert not (tmp_path / "net.yaml").exists()
