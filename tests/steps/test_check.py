"""check: every problem at once, before anything is trained."""

from pathlib import Path

import pytest
import torch
from tests.steps.training import document, spec_of, step

from slipstream.errors import EngineError, ModelError, SpecError
from slipstream.spec import Target

pytestmark = pytest.mark.usefixtures("mlflow_server", "home")
torch.set_num_threads(1)


def test_details_say_what_the_run_starts_with() -> None:
    output = step("check", spec_of(document("checked")))
    assert output.details["samples"] == {"train": 200, "test": 40}
    assert output.details["classes"][0] == "t-shirt"
    assert set(output.details["data"]) == {"train", "test"}
    assert "cpu" in output.details["hardware"]


def test_it_is_never_answered_from_an_earlier_run() -> None:
    spec = spec_of(document("again"))
    step("check", spec)
    assert not step("check", spec).reused


def test_all_missing_functions_are_named_with_their_fields() -> None:
    written = document("functions")
    written["model"] |= {"architecture": "examples.fashion:resnet15", "train": "examples.nowhere:train"}
    with pytest.raises(SpecError) as raised:
        step("check", spec_of(written))
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("model.architecture: examples.fashion:resnet15: ") and "no function" in lines[0]
    assert lines[1].startswith("model.train: examples.nowhere:train: cannot import")


def test_a_target_that_this_machine_cannot_serve_is_an_engine_error_that_names_it() -> None:
    written = document("gpu")
    written["targets"]["fast"] = Target(engine="openvino", device="GPU").model_dump()
    with pytest.raises(EngineError, match=r"^targets\.fast: "):
        step("check", spec_of(written))


def test_problems_of_several_kinds_are_one_error() -> None:
    written = document("several")
    written["targets"]["fast"] = Target(engine="openvino", device="GPU").model_dump()
    del written["model"]["train"]
    with pytest.raises(SpecError) as raised:
        step("check", spec_of(written))
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == ["targets.fast", "model.registry"]


def test_a_missing_version_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="no version 3"):
        step("check", spec_of(document("versions")), source_version="3")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("nn.Sequential(nn.Flatten(), nn.Linear(100, 10))", "does not take a batch of the data"),
        ("nn.Sequential(nn.Flatten(), nn.Linear(784, 3))", "3 classes, but the labels go up to 9"),
        ("nn.Conv2d(1, 10, 3)", r"must answer \(N, classes\)"),
        ("'a string'", "returned str, not a torch.nn.Module"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_found(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"misfit_{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(f"from torch import nn\ndef network():\n    return {body}\n")
    monkeypatch.setenv("SLIPSTREAM_CODE", str(tmp_path))
    written = document("misfits")
    written["model"]["architecture"] = f"{module}:network"
    with pytest.raises(ModelError, match=f"^model.architecture: .*{said}"):
        step("check", spec_of(written))


def test_a_loader_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_loader.py").write_text("def data():\n    return [][1]\n")
    monkeypatch.setenv("SLIPSTREAM_CODE", str(tmp_path))
    written = document("loader")
    written["data"] = "broken_loader:data"
    with pytest.raises(Exception, match="data: the loader failed: IndexError"):
        step("check", spec_of(written))
