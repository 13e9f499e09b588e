"""The first layer that departs is found in real engines with a wrong operator in the middle."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tests.engines.candidates import network, write
from tests.engines.images import samples
from tests.onnx import broken_engine

from slipstream.engines.base import build_engine
from slipstream.errors import EngineError, ModelError
from slipstream.frameworks.base import ONNX, OUTPUT
from slipstream.onnx.agreement import layers
from slipstream.onnx.agreement.bounds import EXACT
from slipstream.onnx.agreement.reference import reference, tensors
from slipstream.plugins import ENGINES, EngineInfo
from slipstream.spec import Target
from slipstream.steps import build


@pytest.fixture
def broken(monkeypatch):
    """A target of an engine that is broken at the tensors that the test adds."""
    monkeypatch.setitem(ENGINES, "broken", EngineInfo("tests.onnx.broken_engine"))
    at: set[str] = set()
    monkeypatch.setattr(broken_engine, "BROKEN", at)
    return Target(engine="broken", threads=1), at


def test_a_sound_engine_passes(fp32, broken, tmp_path):
    target, _ = broken
    build_engine(fp32, target, tmp_path / "engine")
    assert build.check(fp32, tmp_path / "engine", samples(64))["agreement"] == 1


@pytest.mark.parametrize(("tensor", "node"), [("r1", "Relu 'relu1'"), ("r2", "Relu 'relu2'")])
def test_the_wrong_operator_is_named(fp32, broken, tmp_path, tensor, node):
    target, at = broken
    at.add(tensor)
    build_engine(fp32, target, tmp_path / "engine")
    with pytest.raises(EngineError, match=rf"first to depart is the {node} \(tensor '{tensor}'\)"):
        build.check(fp32, tmp_path / "engine", samples(64))


def test_of_two_faults_the_first_is_named(fp32, broken, tmp_path):
    target, at = broken
    at |= {"r1", "r2"}
    build_engine(fp32, target, tmp_path / "engine")
    with pytest.raises(EngineError, match="depart is the Relu 'relu1'"):
        build.check(fp32, tmp_path / "engine", samples(64))


def test_it_is_named_in_a_quantized_engine(int8, broken, tmp_path):
    target, at = broken
    at.add("r2")
    build_engine(int8, target, tmp_path / "engine")
    with pytest.raises(EngineError, match=r"broken, not imprecise.*depart is the Relu 'relu2'"):
        build.check(int8, tmp_path / "engine", samples(64))


def branched() -> onnx.ModelProto:
    """The network with a second branch from r1 to the answer; the first branch's nodes lie between those of it."""
    model = network()
    nodes = list(model.graph.node)
    nodes[-1].output[0] = "scores"
    pool = helper.make_node("GlobalAveragePool", ["r1"], ["pooled"], "pool")
    rest = [
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten2"),
        helper.make_node("Slice", ["flat", "from", "to", "axis"], ["part"], "part"),
        helper.make_node("Add", ["scores", "part"], [OUTPUT], "add"),
    ]
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:2], pool, *nodes[2:], *rest])
    for name, value in (("from", 0), ("to", 5), ("axis", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize(("tensor", "node"), [("pooled", "GlobalAveragePool 'pool'"), ("r2", "Relu 'relu2'")])
def test_a_fault_in_one_of_two_branches_is_named(broken, tmp_path, tensor, node):
    """Tensors of the sound branch lie after those of the broken one: a plain bisection could end in the wrong one."""
    target, at = broken
    candidate = write(tmp_path / "candidate", branched())
    at.add(tensor)
    build_engine(candidate, target, tmp_path / "engine")
    with pytest.raises(EngineError, match=f"depart is the {node}"):
        build.check(candidate, tmp_path / "engine", samples(16))


def test_where_no_tensor_departs_it_says_so(fp32):
    told = layers.first_departure(fp32, Target(engine="onnxruntime", threads=1), samples(4), EXACT)
    assert told == "where it departs cannot be told from the first 4 samples"


def test_the_reference_has_every_tensor_in_order(fp32):
    found = tensors(fp32 / ONNX, samples(3))
    assert list(found) == ["c1", "r1", "c2", "r2", "f", OUTPUT]
    assert [v.shape for v in found.values()][-2:] == [(3, 256), (3, 5)]
    np.testing.assert_array_equal(found[OUTPUT], reference(fp32 / ONNX, samples(3)))


def test_a_candidate_that_answers_nan_is_refused(tmp_path):
    model = network()
    model.graph.node.append(helper.make_node("Log", ["scores"], [OUTPUT], "log"))
    model.graph.node[-2].output[0] = "scores"
    candidate = write(tmp_path / "candidate", model)
    with pytest.raises(ModelError, match="NaN or infinity"):
        reference(candidate / ONNX, samples(8))


def test_a_file_that_is_none_is_a_model_error(tmp_path):
    (tmp_path / ONNX).write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot run it"):
        reference(tmp_path / ONNX, samples(1))
