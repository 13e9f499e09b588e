import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_dict
from onnx import helper, numpy_helper
from tests.engines.candidates import network, write
from tests.engines.images import samples
from tests.steps.pipeline import inputs, logged, small_spec

from slipstream import data
from slipstream.contract import Cell
from slipstream.errors import DataError, ModelError
from slipstream.frameworks.base import ONNX, read_manifest
from slipstream.steps import quantize
from slipstream.steps.base import run_step
from slipstream.tracking import fetch

CELL = Cell(recipe="int8")


def save(folder: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def quantized(model: onnx.ModelProto, *, per_channel: bool = True) -> onnx.ModelProto:
    return quantize.quantize_onnx(model, samples(32), per_channel=per_channel, on_sample=lambda done: None)


def test_the_step_makes_an_int8_candidate_and_records_its_calibration(mlflow_server, home, tmp_path, capfd):
    spec = small_spec(tmp_path / "data", "quantized")
    source = logged(spec, write(tmp_path / "candidate", network()))
    output = run_step("quantize", spec, inputs(spec, CELL, source))

    folder = fetch(output.artifact)
    manifest = read_manifest(folder)
    assert manifest.quantized
    assert manifest.architecture is None
    assert {p.name for p in folder.iterdir()} == {"candidate.json", "model.onnx"}
    assert output.metrics["quantized_share"] == 1
    assert output.metrics["calibration_agreement"] > 0.9
    assert output.artifact.size_bytes < source.artifact.size_bytes

    calibration = load_dict(f"runs:/{output.run_id}/calibration.json")
    splits = data.load(spec)
    drawn = splits.train.take(np.array(calibration["indices"]))
    assert calibration["samples"] == [d.hex() for d in drawn.sample_digests()]
    assert len(set(calibration["indices"])) == 32
    assert output.details["calibration"]["sha256"] == calibration["sha256"]
    run = MlflowClient().get_run(output.run_id)
    assert run.data.params["calibration"] == calibration["sha256"]
    assert source.artifact.model_id in [m.model_id for m in run.inputs.model_inputs]
    assert "━" not in "".join(capfd.readouterr())


def test_the_same_work_is_found_again_and_other_work_is_not(mlflow_server, home, tmp_path):
    spec = small_spec(tmp_path / "data", "found-again")
    source = logged(spec, write(tmp_path / "candidate", network()))
    first = run_step("quantize", spec, inputs(spec, CELL, source))
    again = run_step("quantize", spec, inputs(spec, CELL, source))
    assert (again.reused, again.artifact) == (True, first.artifact)
    other = spec.model_copy(update={"seed": 1})
    assert not run_step("quantize", other, inputs(other, CELL, source)).reused


def test_samples_that_are_also_in_the_test_split_never_calibrate(mlflow_server, home, tmp_path):
    shared = samples(64, seed=11)
    train = np.concatenate([shared, samples(32, seed=5)])
    spec = small_spec(tmp_path / "data", "overlap", train=train)
    source = logged(spec, write(tmp_path / "candidate", network()))
    output = run_step("quantize", spec, inputs(spec, CELL, source))
    assert load_dict(f"runs:/{output.run_id}/calibration.json")["indices"] == list(range(64, 96))

    greedy = spec.model_copy(update={"quantize": spec.quantize.model_copy(update={"samples": 33})})
    with pytest.raises(DataError, match="only 32"):
        run_step("quantize", greedy, inputs(greedy, CELL, source))


def test_a_leak_is_an_error_even_if_the_draw_lets_it_through(home, tmp_path):
    splits = data.load(small_spec(tmp_path, "leak"))
    leaked = [splits.test.sample_digests()[3].hex()]
    with pytest.raises(DataError, match=leaked[0]):
        quantize.require_unseen(leaked, splits)
    quantize.require_unseen([d.hex() for d in splits.train.sample_digests()], splits)


def test_the_candidate_of_the_technique_before_is_wanted_not_an_earlier_one(mlflow_server, home, tmp_path):
    spec = small_spec(tmp_path / "data", "order")
    source = logged(spec, write(tmp_path / "candidate", network()))
    with pytest.raises(DataError, match="no upstream output of prune"):
        run_step("quantize", spec, inputs(spec, Cell(recipe="pruned-int8"), source))


def test_quantization_is_deterministic():
    assert quantized(network()).SerializeToString() == quantized(network()).SerializeToString()


def test_progress_counts_every_sample_once():
    seen = []
    quantize.quantize_onnx(network(), samples(32), per_channel=True, on_sample=seen.append)
    assert seen == list(range(1, 33))


@pytest.mark.parametrize("per_channel", [True, False])
def test_per_channel_decides_the_number_of_weight_scales(per_channel):
    model = quantized(network(), per_channel=per_channel)
    sizes = {numpy_helper.to_array(t).size for t in model.graph.initializer if "scale" in t.name.lower()}
    assert (8 in sizes) == per_channel


def test_a_weight_that_is_nan_is_refused(tmp_path):
    model = network()
    weight = model.graph.initializer[0]
    values = numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(ModelError, match=f"weight {weight.name} holds NaN"):
        quantize.load_onnx(save(tmp_path, model))


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / ONNX).write_text(json.dumps({}))
    with pytest.raises(ModelError, match="not a valid ONNX model"):
        quantize.load_onnx(tmp_path / ONNX)


def test_a_model_without_layers_to_quantize_is_refused():
    model = network()
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.append(helper.make_node("Relu", ["input"], ["output"], "relu"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("output", 1, ["batch", 1, 16, 16]))
    with pytest.raises(ModelError, match="nothing to quantize"):
        quantized(model)


def test_an_operator_that_nobody_knows_is_refused():
    model = network()
    model.graph.node[1].op_type = "Sorcery"
    model.graph.node[1].domain = "example"
    model.opset_import.append(helper.make_opsetid("example", 1))
    with pytest.raises(ModelError, match="Sorcery"):
        quantized(model)
