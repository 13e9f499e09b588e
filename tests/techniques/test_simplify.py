"""simplify: fewer nodes, the same answers, and what each pass did."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from mlflow.artifacts import load_dict
from onnx import helper, numpy_helper
from tests.engines.candidates import network, write
from tests.engines.images import samples
from tests.onnx.quantize.models import attention, ids
from tests.steps.pipeline import inputs, logged, small_spec
from tests.techniques.contract import Case, Make, TechniqueContract

from slipstream.contract import Cell, StepOutput
from slipstream.errors import ModelError
from slipstream.frameworks.base import ONNX, read_manifest
from slipstream.onnx.session import Session
from slipstream.runner.run import run_step
from slipstream.store.tracking import CELL as CELL_TAG
from slipstream.store.tracking import STEP, Tracking, fetch
from slipstream.techniques import simplify

CELL = Cell(recipe="simple")


def wasteful() -> onnx.ModelProto:
    """The small network with a constant computed twice, a sum of two equal terms, and an unused node."""
    model = network()
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.ones((1, 5), np.float32), "one"))
    graph.node[-1].output[0] = "scores"
    graph.node.extend(
        [
            helper.make_node("Add", ["one", "one"], ["two"], "folds"),
            helper.make_node("Mul", ["two", "one"], ["also_two"], "folds_too"),
            helper.make_node("Tanh", ["scores"], ["first"], "same"),
            helper.make_node("Tanh", ["scores"], ["second"], "same_again"),
            helper.make_node("Sigmoid", ["scores"], ["unread"], "dead"),
            helper.make_node("Add", ["first", "second"], ["sum"], "sum"),
            helper.make_node("Mul", ["sum", "also_two"], ["output"], "doubled"),
        ]
    )
    return model


class TestSimplify(TechniqueContract):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        def case(name: str) -> Case:
            spec = small_spec(tmp_path / "data", f"simplify-{name}", recipes={"simple": ["simplify"]})
            folder = tmp_path / "candidate"
            source = logged(spec, folder if folder.exists() else write(folder, wasteful()))
            measured = frozenset({"nodes_before", "nodes_after", "bytes_after"})
            return Case("simplify", spec, "simple", source, measured, {})

        return case


def test_each_pass_does_what_its_name_says() -> None:
    model = wasteful()
    made, rows = simplify.simplify(model)
    nodes = {row.after: row.nodes for row in rows}
    names = {node.name for node in made.graph.node}
    assert nodes["before"] == 13
    assert nodes["before"] - nodes["constant_folding"] >= 2 and not {"folds", "folds_too"} & names
    assert "dead" not in names and sum(n.op_type == "Tanh" for n in made.graph.node) == 1
    assert nodes["subexpression_elimination"] < nodes["constant_folding"]
    assert rows[-1].nodes == 9
    assert model == wasteful()
    simplify.require_same_answers(model, made, samples(16))


def test_nothing_to_do_is_told_as_such() -> None:
    made, rows = simplify.simplify(network())
    assert [row.nodes for row in rows] == [6] * len(rows)
    simplify.require_same_answers(network(), made, samples(4))


def test_varying_length_stays_varying() -> None:
    made, rows = simplify.simplify(attention())
    assert rows[-1].nodes < rows[0].nodes
    for length in (4, 9, 12):
        simplify.require_same_answers(attention(), made, ids(16, length=length))


def test_other_answers_are_refused() -> None:
    other = network(seed=1)
    with pytest.raises(ModelError, match="the simplified model, in batches of 8: differs by up to"):
        simplify.require_same_answers(network(), other, samples(8))


def test_a_batch_that_got_frozen_is_refused() -> None:
    frozen = network()
    flatten = next(n for n in frozen.graph.node if n.op_type == "Flatten")
    frozen.graph.initializer.append(numpy_helper.from_array(np.array([8, 256]), "shape"))
    flatten.CopyFrom(helper.make_node("Reshape", ["r2", "shape"], ["f"]))
    with pytest.raises(ModelError, match="cannot run the model on"):
        simplify.require_same_answers(network(), frozen, samples(8))


def test_an_operator_that_onnxslim_does_not_know_is_refused() -> None:
    model = network()
    model.graph.node[1].op_type = "Sorcery"
    model.graph.node[1].domain = "example"
    model.opset_import.append(helper.make_opsetid("example", 1))
    with pytest.raises(ModelError, match="leave `simplify` out"):
        simplify.simplify(model)


def test_the_step_hands_on_onnx_and_records_the_passes(mlflow_server, home, tmp_path) -> None:
    spec = small_spec(tmp_path / "data", "simplified", recipes={"simple": ["simplify"]})
    source = logged(spec, write(tmp_path / "candidate", wasteful()))
    output = run_step("simplify", spec, inputs(spec, CELL, source))
    assert (output.metrics["nodes_before"], output.metrics["nodes_after"]) == (13, 9)
    assert output.metrics["bytes_after"] < output.metrics["bytes_before"]
    table = load_dict(f"runs:/{output.run_id}/passes.json")
    assert table["columns"] == ["pass", "nodes", "bytes"]
    assert table["data"][0][:2] == ["before", 13]
    folder = fetch(output.artifact)
    manifest = read_manifest(folder)
    assert (manifest.architecture, manifest.quantized) == (None, False)
    assert Session(folder / ONNX).run(samples(2)).shape == (2, 5)
    assert run_step("simplify", spec, inputs(spec, CELL, source)).reused


def test_recipes_that_begin_alike_share_the_work(mlflow_server, home, tmp_path) -> None:
    recipes = {"one": ["simplify"], "two": ["simplify"], "three": ["simplify", "quantize"]}
    spec = small_spec(tmp_path / "data", "alike", recipes=recipes)
    source = logged(spec, write(tmp_path / "candidate", wasteful()))

    def simplified(recipe: str) -> StepOutput:
        output = run_step("simplify", spec, inputs(spec, Cell(recipe=recipe), source))
        assert output is not None and output.cell == Cell(recipe=recipe)
        return output

    with ThreadPoolExecutor(2) as pool:  # at the same time: the second waits for the first
        outputs = {output.cell.recipe: output for output in pool.map(simplified, ("one", "two"))}
    outputs["three"] = simplified("three")
    assert sorted(output.reused for output in outputs.values()) == [False, True, True]
    assert len({output.artifact.sha256 for output in outputs.values()}) == 1
    for recipe in recipes:  # each with a run of its own, where people look for it
        assert len(Tracking(spec).search({STEP: "simplify", CELL_TAG: recipe})) == 1
    quantized = run_step("quantize", spec, inputs(spec, Cell(recipe="three"), source, outputs["three"]))
    assert not quantized.reused and read_manifest(fetch(quantized.artifact)).quantized
    assert list(home.glob("work/*")) == []
