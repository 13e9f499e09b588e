import shutil

import mlflow
import numpy as np
import pytest
from tests.engines.candidates import network, quantized, write
from tests.engines.images import CLASSES, samples
from tests.steps.pipeline import inputs, logged, small_spec

from slipstream import digests
from slipstream.contract import Cell
from slipstream.engines import recorded
from slipstream.engines.base import build_engine, load_engine, read_manifest
from slipstream.errors import DataError, EngineError
from slipstream.frameworks.base import ONNX
from slipstream.runner.run import identity, run_step
from slipstream.spec import Target
from slipstream.steps import build
from slipstream.store.tracking import fetch


@pytest.mark.parametrize("target", ["server", "portable"])
def test_the_baseline_is_built_from_the_retrained_model(mlflow_server, home, tmp_path, fp32, target):
    spec = small_spec(tmp_path / "data", f"built-{target}")
    cell = Cell(recipe="baseline", target=target)
    output = run_step("build", spec, inputs(spec, cell, logged(spec, fp32)))

    folder = fetch(output.artifact)
    x = samples(5)
    np.testing.assert_allclose(load_engine(folder).run(x), build.reference(fp32 / ONNX, x), rtol=1e-4, atol=1e-4)
    assert output.metrics["agreement"] == 1
    assert output.metrics["max_abs_diff"] < 1e-3
    assert output.artifact.size_bytes == sum(p.stat().st_size for p in folder.iterdir())
    evidence = (folder / recorded.FILE).stat().st_size
    assert output.metrics["size_bytes"] == output.artifact.size_bytes - evidence
    assert output.details["fingerprint"] == read_manifest(folder).fingerprint
    assert not read_manifest(folder).quantized


def test_mlflow_knows_the_engine_its_parent_and_how_to_run_it(mlflow_server, home, tmp_path, fp32):
    spec = small_spec(tmp_path / "data", "known")
    source = logged(spec, fp32)
    output = run_step("build", spec, inputs(spec, Cell(recipe="baseline", target="server"), source))

    model = mlflow.MlflowClient().get_logged_model(output.artifact.model_id)
    assert model.name == "baseline@server"
    assert model.tags["slipstream.parent"] == source.artifact.model_id
    info = mlflow.models.get_model_info(f"models:/{output.artifact.model_id}")
    assert info.metadata["fingerprint"] == output.details["fingerprint"]
    assert info.signature.inputs.input_names() == ["input"]
    got = mlflow.pyfunc.load_model(f"models:/{output.artifact.model_id}").predict(samples(2))
    assert got.shape == (2, CLASSES)


def test_an_int8_recipe_is_built_from_the_quantized_candidate(mlflow_server, home, tmp_path, fp32, int8):
    spec = small_spec(tmp_path / "data", "built-int8")
    cell = Cell(recipe="int8", target="server")
    upstream = [logged(spec, fp32), logged(spec, int8, "quantize", Cell(recipe="int8"))]
    output = run_step("build", spec, inputs(spec, cell, *upstream))
    assert read_manifest(fetch(output.artifact)).quantized
    assert output.metrics["agreement"] > 0.9
    with pytest.raises(DataError, match="no upstream output of quantize"):
        run_step("build", spec, inputs(spec, cell, upstream[0]))


def test_an_impossible_target_is_refused_and_nothing_is_found_again(mlflow_server, home, tmp_path, fp32):
    spec = small_spec(tmp_path / "data", "impossible")
    given = inputs(spec, Cell(recipe="baseline", target="far"), logged(spec, fp32))
    for _ in range(2):
        with pytest.raises(EngineError, match=r"'GPU'.*CPU"):
            run_step("build", spec, given)


def test_settings_tell_targets_apart(tmp_path):
    spec = small_spec(tmp_path, "settings")
    threads = spec.model_copy(update={"targets": {**spec.targets, "server": Target(engine="openvino", threads=2)}})
    cells = [Cell(recipe="int8", target=t) for t in ("server", "portable")]
    seen = [build.settings(s, inputs_of(c)) for s in (spec, threads) for c in cells]
    assert seen[0] != seen[1]
    assert seen[0] != seen[2]
    assert seen[1] == seen[3]
    assert all("cpu_features" in s["fingerprint"] for s in seen)


def inputs_of(cell: Cell):
    from slipstream.contract import StepInput

    return StepInput(run_key="r", pipeline_run_id="p", cell=cell)


@pytest.mark.parametrize("step", ["build", "validate"])
@pytest.mark.parametrize("module", ["onnx/graph.py", "frameworks/torch.py", "engines/onnxruntime_graph.py"])
def test_other_code_behind_an_engine_or_its_baseline_is_another_result(step, module, tmp_path, monkeypatch):
    """Engines are built by way of the frameworks' modules, and the baseline runs in its own."""
    shutil.copytree(digests.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(digests, "PACKAGE", tmp_path / "package")
    found = set()
    for text in ("", "# changed"):
        with (tmp_path / "package" / module).open("a") as file:
            file.write(text)
        digests.source.cache_clear()
        found.add(identity(step, {}, inputs_of(Cell(recipe="int8", target="server"))))
    digests.source.cache_clear()
    assert len(found) == 2


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_fp32_engine_that_answers_otherwise_is_broken(engine, fp32, tmp_path):
    almost = network()
    almost.graph.initializer[5].CopyFrom(nudged(almost.graph.initializer[5], 0.05))
    other = write(tmp_path / "other", almost)
    build_engine(other, Target(engine=engine, threads=1), tmp_path / "engine")
    with pytest.raises(EngineError, match="compared with ONNX Runtime on 32 samples, differs by up to"):
        build.check(fp32, tmp_path / "engine", samples(32))


def nudged(tensor, by: float):
    from onnx import numpy_helper

    return numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(by), tensor.name)


def test_an_int8_engine_that_agrees_with_nothing_is_broken(int8, tmp_path):
    other = write(tmp_path / "other", quantized(network(seed=3)), is_quantized=True)
    build_engine(other, Target(engine="openvino", threads=1), tmp_path / "engine")
    with pytest.raises(EngineError, match="broken, not imprecise"):
        build.check(int8, tmp_path / "engine", samples(64))
