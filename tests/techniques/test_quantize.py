from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_dict
from tests.engines.candidates import network, quantized, write
from tests.engines.images import samples
from tests.onnx.quantize.models import CLASSES, attention, ids
from tests.steps.pipeline import inputs, logged, small_spec
from tests.techniques.contract import Case, Make, TechniqueContract

from slipstream.contract import Cell
from slipstream.data import splits
from slipstream.errors import DataError, ModelError
from slipstream.frameworks.base import MANIFEST, ONNX, CandidateManifest, read_manifest
from slipstream.plugins import FRAMEWORKS
from slipstream.runner.run import run_step
from slipstream.spec import Spec
from slipstream.spec.sections import DataFiles
from slipstream.store.tracking import fetch
from slipstream.techniques import quantize

CELL = Cell(recipe="int8")


class TestQuantize(TechniqueContract):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        def case(name: str) -> Case:
            spec = small_spec(tmp_path / "data", f"quantize-{name}")
            folder = tmp_path / "candidate"
            source = logged(spec, folder if folder.exists() else write(folder, network()))
            measured = frozenset({"quantized_share", "compressed_share", "calibration_relative_error"})
            changes = {
                "scheme": "int8-weights",
                "samples": 33,
                "per_channel": False,
                "block_size": 64,
                "model_type": "transformer",
                "learning_rate": 0.002,
            }
            fixed = frozenset({"epochs"})  # PyTorch's models are not trained for INT8
            return Case("quantize", spec, "int8", source, measured, changes, fixed)

        return case


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
    dataset = splits.load(spec)
    drawn = dataset.train.take(np.array(calibration["indices"]))
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
    dataset = splits.load(small_spec(tmp_path, "leak"))
    leaked = [dataset.test.sample_digests()[3].hex()]
    with pytest.raises(DataError, match=leaked[0]):
        quantize.require_unseen(leaked, dataset)
    quantize.require_unseen([d.hex() for d in dataset.train.sample_digests()], dataset)


def test_the_candidate_of_the_technique_before_is_wanted_not_an_earlier_one(mlflow_server, home, tmp_path):
    spec = small_spec(tmp_path / "data", "order")
    source = logged(spec, write(tmp_path / "candidate", network()))
    with pytest.raises(DataError, match="no upstream output of prune"):
        run_step("quantize", spec, inputs(spec, Cell(recipe="pruned-int8"), source))


@pytest.mark.parametrize("scheme", ["int8", "int4-weights"])
def test_a_scheme_takes_texts_of_varying_length(scheme, mlflow_server, home, tmp_path):
    spec = text_spec(tmp_path / "data", f"text-{scheme}", scheme)
    source = logged(spec, text_candidate(tmp_path / "candidate"))
    output = run_step("quantize", spec, inputs(spec, CELL, source))
    manifest = read_manifest(fetch(output.artifact))
    assert manifest.quantized and manifest.quantization == spec.quantize
    assert manifest.input_shape == (-1,)
    assert 0 < output.metrics["calibration_relative_error"] < 0.3
    assert output.metrics["compressed_share"] > 0.8
    assert output.artifact.size_bytes < 0.8 * source.artifact.size_bytes


def test_a_quantized_model_that_answers_otherwise_is_refused_with_the_mend():
    with pytest.raises(ModelError, match=r"on its own calibration samples, .*quantize\.model_type to transformer"):
        quantize.compare(network(), network(seed=1), samples(32))


def test_samples_that_are_all_equal_are_refused(mlflow_server, home, tmp_path):
    spec = small_spec(tmp_path / "data", "equal", train=np.repeat(samples(1, seed=3), 96, axis=0))
    source = logged(spec, write(tmp_path / "candidate", network()))
    with pytest.raises(DataError, match="split train has only 1 distinct sample that"):
        run_step("quantize", spec, inputs(spec, CELL, source))


def test_a_training_split_of_one_sample_is_refused(mlflow_server, home, tmp_path):
    spec = small_spec(tmp_path / "data", "single", train=samples(1, seed=3))
    source = logged(spec, write(tmp_path / "candidate", network()))
    with pytest.raises(DataError, match="split train has only 1 distinct sample that"):
        run_step("quantize", spec, inputs(spec, CELL, source))


def test_what_is_quantized_already_is_refused(mlflow_server, home, tmp_path):
    spec = small_spec(tmp_path / "data", "twice")
    source = logged(spec, write(tmp_path / "candidate", quantized(network()), is_quantized=True))
    with pytest.raises(ModelError, match="quantized already"):
        run_step("quantize", spec, inputs(spec, CELL, source))


def test_what_engines_convert_from_is_kept_with_the_samples(mlflow_server, home, tmp_path, monkeypatch):
    monkeypatch.setitem(FRAMEWORKS, "torch", replace(FRAMEWORKS["torch"], keeps=("original", "notes.txt")))
    spec = small_spec(tmp_path / "data", "kept")
    candidate = write(tmp_path / "candidate", network())
    (candidate / "original").mkdir()
    (candidate / "original" / "graph").write_text("as it was")
    (candidate / "notes.txt").write_text("kept")
    (candidate / "weights").write_text("left behind")
    output = run_step("quantize", spec, inputs(spec, CELL, logged(spec, candidate)))
    folder = fetch(output.artifact)
    assert {p.name for p in folder.iterdir()} == {MANIFEST, ONNX, "original", "notes.txt", "calibration.npz"}
    assert (folder / "original" / "graph").read_text() == "as it was"
    with np.load(folder / "calibration.npz") as arrays:
        drawn = load_dict(f"runs:/{output.run_id}/calibration.json")["indices"]
        np.testing.assert_array_equal(arrays["inputs"], splits.load(spec).train.inputs[drawn])


def text_spec(folder: Path, name: str, scheme: str) -> Spec:
    """A spec whose splits are texts: 96 to train with and 64 to test with."""
    folder.mkdir(parents=True)
    for split, (size, seed) in {"train": (96, 1), "test": (64, 2)}.items():
        np.savez(folder / f"{split}.npz", inputs=ids(size, seed), labels=np.arange(size) % CLASSES)
    written = {"samples": 64, "scheme": scheme, "model_type": "transformer"}
    targets = {"portable": {"engine": "onnxruntime", "threads": 1}}
    return small_spec(folder / "images", name, quantize=written, targets=targets).model_copy(
        update={"data": DataFiles(train=str(folder / "train.npz"), test=str(folder / "test.npz"))}
    )


def text_candidate(folder: Path) -> Path:
    """The attention network as a candidate."""
    folder.mkdir()
    (folder / ONNX).write_bytes(attention().SerializeToString())
    manifest = CandidateManifest(
        framework="torch",
        architecture=None,
        input_shape=(-1,),
        input_dtype="int64",
        output_shape=(CLASSES,),
        parameters=1,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder
