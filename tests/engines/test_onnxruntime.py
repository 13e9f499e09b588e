import onnx
import pytest
from onnx import TensorProto, helper
from tests.engines.contract import EngineContract
from tests.engines.images import samples

from slipstream.data.splits import INPUT_DTYPES
from slipstream.engines.base import build_engine
from slipstream.engines.onnxruntime import DTYPES, ENGINE, OPTIMISED
from slipstream.engines.peak import peak_memory_mib
from slipstream.errors import EngineError
from slipstream.frameworks.base import INPUT, OUTPUT
from slipstream.spec import Target


@pytest.fixture
def target() -> Target:
    return Target(engine="onnxruntime", threads=1)


class TestOnnxRuntime(EngineContract):
    pass


def test_int8_is_fused_into_integer_operators(int8, target, tmp_path):
    build_engine(int8, target, tmp_path / "engine")
    operators = [n.op_type for n in onnx.load(tmp_path / "engine" / OPTIMISED).graph.node]
    assert operators.count("QLinearConv") == 2
    assert "Conv" not in operators


def test_an_engine_that_does_not_load_has_no_peak_but_a_reason(fp32, target, tmp_path):
    build_engine(fp32, target, tmp_path / "engine")
    (tmp_path / "engine" / OPTIMISED).write_bytes(b"not a model")
    with pytest.raises(EngineError, match=r"cannot be run: .*model\.onnx") as raised:
        peak_memory_mib(tmp_path / "engine", samples(1))
    assert "Traceback" not in str(raised.value)


def test_each_type_that_data_may_have_is_known_and_no_other():
    assert set(DTYPES.values()) == set(INPUT_DTYPES)


def test_a_model_that_takes_another_type_is_refused_when_it_is_loaded(target, tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Cast", [INPUT], [OUTPUT], to=TensorProto.FLOAT)],
        "double",
        [helper.make_tensor_value_info(INPUT, TensorProto.DOUBLE, ["batch", 3])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / OPTIMISED)
    with pytest.raises(EngineError, match=r"input is tensor\(double\); .*float32, int64, int32, uint8"):
        ENGINE.load(tmp_path, target)


def test_bf16_is_refused():
    with pytest.raises(EngineError, match=r"bf16.*openvino"):
        ENGINE.check(Target(engine="onnxruntime", precision="bf16"))


def test_it_has_no_options_and_no_half_precision():
    with pytest.raises(EngineError, match=r"options\.streams: no such option.*\nonnxruntime has no options"):
        ENGINE.check(Target(engine="onnxruntime", options={"streams": 2}))
    with pytest.raises(EngineError, match=r"f16.*openvino"):
        ENGINE.check(Target(engine="onnxruntime", precision="f16"))
