"""check: every problem at once, before anything is trained."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tests.steps.training import document, spec_of, step
from tests.user_code import use

from slipstream.errors import CodeError, DataError, EngineError, InputError, ModelError, SpecError, Unavailable
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
    with pytest.raises(InputError) as raised:
        step("check", spec_of(written))
    assert type(raised.value) is InputError, "neither the spec's fault alone, nor the engine's"
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == ["targets.fast", "model.registry"]


def test_a_missing_version_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="no version 3"):
        step("check", spec_of(document("versions")), source_version="3")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("nn.Sequential(nn.Flatten(), nn.Linear(100, 10))", "does not take a batch of the data"),
        ("nn.Sequential(nn.Flatten(), nn.Linear(784, 3))", "3 outputs, but labels run from 0 to 9"),
        ("nn.Conv2d(1, 10, 3)", r"outputs have shape .*, not \(200, classes\)"),
        ("'a string'", "returned str, not a torch.nn.Module"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_found(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"misfit_{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(f"from torch import nn\ndef network():\n    return {body}\n")
    use(tmp_path, monkeypatch)
    written = document("misfits")
    written["model"]["architecture"] = f"{module}:network"
    with pytest.raises(ModelError, match=f"^model.architecture: .*{said}"):
        step("check", spec_of(written))


def test_an_operator_that_cannot_be_exported_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "operator_case.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Network(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.dense = nn.Linear(784, 10)\n"
        "    def forward(self, images):\n"
        "        return self.dense(images.flatten(1)) + torch.linalg.svdvals(images[:, 0])[:, :1]\n"
    )
    use(tmp_path, monkeypatch)
    written = document("operators")
    written["model"]["architecture"] = "operator_case:Network"
    with pytest.raises(ModelError, match=r"^model.architecture: operator_case:Network cannot be exported to ONNX"):
        step("check", spec_of(written))


def test_an_operator_that_an_engine_lacks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime has MaxUnpool, OpenVINO has not."""
    images = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, 28, 28])
    scores = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 10])
    weights = numpy_helper.from_array(np.random.default_rng(0).normal(0, 0.1, (784, 10)).astype(np.float32), "weights")
    nodes = [
        helper.make_node("MaxPool", ["input"], ["most", "where"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("MaxUnpool", ["most", "where"], ["spread"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["spread"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["output"]),
    ]
    graph = helper.make_graph(nodes, "unpooled", [images], [scores], [weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "it.onnx")
    monkeypatch.setenv("SLIPSTREAM_CODE", f"{Path.cwd()}")
    written = document("operators") | {"recipes": {"int8": ["quantize"]}, "distill": None, "quantize": {"samples": 64}}
    written["model"] = {
        "registry": written["model"]["registry"],
        "framework": "onnx",
        "file": str(tmp_path / "it.onnx"),
    }
    written["targets"] = {
        "server": {"engine": "openvino", "threads": 1},
        "portable": {"engine": "onnxruntime", "threads": 1},
    }
    with pytest.raises(
        EngineError, match=r"^targets.server: model.file: .* cannot be built: openvino: .*MaxUnpool"
    ) as raised:
        step("check", spec_of(written))
    assert "portable" not in str(raised.value)


DETECTION = """
import numpy as np
from slipstream.data.splits import Data, Split

def data(kinds=3):
    labels = np.full((40, 2, 5), -1, np.float32)
    labels[:, 0] = (kinds - 1, 1, 1, 5, 6)
    split = Split(np.random.default_rng(0).random((40, 1, 8, 8), np.float32), labels)
    return Data(split, Split(split.inputs + 1, labels), classes=("a", "b", "c"))

def network(columns=7):
    from torch import nn
    hidden = nn.Linear(64, 64), nn.ReLU()  # channels to remove
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 5 * columns), nn.Sigmoid(), nn.Unflatten(1, (5, columns)))

def loss(outputs, labels):
    return outputs.mean()

def score(outputs, labels):
    return outputs.mean(axis=(1, 2))

def wrong(outputs, labels):
    return outputs
"""


def detection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **objective: str) -> dict[str, Any]:
    (tmp_path / "detection_case.py").write_text(DETECTION)
    use(tmp_path, monkeypatch)
    written = document("detection") | {"recipes": {"int8": ["quantize"]}, "data": "detection_case:data"}
    written["model"] |= {"architecture": "detection_case:network", "train": "detection_case:network"}
    quantize = {"samples": 16}
    return written | {"objective": {"metric": "map", "max_drop": 20} | objective, "distill": None, "quantize": quantize}


def test_boxes_and_their_metric_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step("check", spec_of(detection(tmp_path, monkeypatch))).details["classes"] == ["a", "b", "c"]
    assert step("check", spec_of(detection(tmp_path, monkeypatch, metric="detection_case:score")))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"objective": {"metric": "top1", "max_drop": 20}}, DataError,
         r"^data: split train: labels must be \(N,\) integers for top1, not \(N, 2, 5\) float32"),
        ({"objective": {"metric": "detection_case:wrong", "max_drop": 20}}, SpecError,
         r"wrong must return \(2,\) scores"),
        ({"objective": {"metric": "detection_case:none"}}, SpecError, "^objective.metric: .* has no function none"),
        ({"data": {"function": "detection_case:data", "params": {"kinds": 4}}}, ModelError, "classes go up to 3"),
        ({"model": {"architecture": {"function": "detection_case:network", "params": {"columns": 8}}}}, ModelError,
         "answers with 4 classes, but the data names 3"),
        ({"recipes": {"pruned": ["prune"]}}, SpecError, "^recipes.pruned: .* name a loss under model.loss"),
        ({"recipes": {"pruned": ["prune"]}, "model": {"loss": "detection_case:gone"}}, SpecError, "^model.loss: "),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_metric_is_found(
    change: dict[str, Any], error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = detection(tmp_path, monkeypatch)
    for section, values in change.items():
        written[section] = {**written[section], **values} if section == "model" else values
    with pytest.raises(error, match=said):
        step("check", spec_of(written))


def test_a_loss_makes_boxes_trainable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = detection(tmp_path, monkeypatch) | {"recipes": {"pruned": ["prune"]}}
    written["model"]["loss"] = "detection_case:loss"
    assert step("check", spec_of(written))


def test_a_loader_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_loader.py").write_text("def data():\n    return [][1]\n")
    use(tmp_path, monkeypatch)
    written = document("loader")
    written["data"] = "broken_loader:data"
    with pytest.raises(CodeError, match=r"data: broken_loader:data: .*broken_loader.py:2: IndexError"):
        step("check", spec_of(written))


AWAY = """
from slipstream.errors import Unavailable

def data():
    raise Unavailable("s3://bucket/train.npz: no answer")

def network():
    data()
"""


@pytest.mark.parametrize("field", ["data", "architecture"])
def test_a_service_that_is_away_is_no_fault_of_what_was_given(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the step is tried again: a DataError or a ModelError would end the run."""
    (tmp_path / "away_case.py").write_text(AWAY)
    use(tmp_path, monkeypatch)
    written = document("away")
    if field == "data":
        written["data"] = "away_case:data"
    else:
        written["model"]["architecture"] = "away_case:network"
    with pytest.raises(Unavailable, match=r"^s3://bucket/train\.npz: no answer$"):
        step("check", spec_of(written))
