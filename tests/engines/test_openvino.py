import openvino as ov
import pytest
from tests.engines.contract import EngineContract, fp32, int8  # noqa: F401 (fixtures)
from tests.engines.images import samples

from slipstream import hardware
from slipstream.engines.base import build_engine, load_engine
from slipstream.engines.openvino import BF16_FEATURES, ENGINE, IR, OpenVINORunner
from slipstream.errors import EngineError
from slipstream.spec import Target

HAS_BF16 = bool(BF16_FEATURES & set(hardware.describe()["cpu_features"].split()))


@pytest.fixture
def target() -> Target:
    return Target(engine="openvino", threads=1)


class TestOpenVINO(EngineContract):
    pass


def test_weights_stay_in_fp32(fp32, target, tmp_path):  # noqa: F811
    build_engine(fp32, target, tmp_path / "engine")
    constants = [o for o in ov.Core().read_model(tmp_path / "engine" / IR).get_ops() if o.get_type_name() == "Constant"]
    assert "f16" not in {c.get_element_type().get_type_name() for c in constants}


def test_fp32_is_pinned_and_int8_really_runs_in_int8(fp32, int8, target, tmp_path):  # noqa: F811
    precisions = {}
    for name, candidate in (("fp32", fp32), ("int8", int8)):
        build_engine(candidate, target, tmp_path / name)
        runner = load_engine(tmp_path / name)
        assert isinstance(runner, OpenVINORunner)
        operations = runner.compiled.get_runtime_model().get_ops()
        facts = [o.get_rt_info() for o in operations]
        precisions[name] = {str(f["runtimePrecision"].value) for f in facts if f["layerType"].value == "Convolution"}
    assert precisions["fp32"] == {"f32"}
    assert precisions["int8"] <= {"i8", "u8"}


@pytest.mark.skipif(HAS_BF16, reason="this CPU computes in BF16")
def test_bf16_is_refused_on_a_cpu_without_it():
    with pytest.raises(EngineError, match=r"avx512_bf16.*f32"):
        ENGINE.check(Target(engine="openvino", precision="bf16"))


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has neither avx512_bf16 nor amx_bf16")
def test_bf16_is_near_fp32_but_not_equal(fp32, target, tmp_path):  # noqa: F811
    x = samples(8)
    answers = []
    for precision in ("f32", "bf16"):
        build_engine(fp32, target.model_copy(update={"precision": precision}), tmp_path / precision)
        answers.append(load_engine(tmp_path / precision).run(x))
    difference = abs(answers[0] - answers[1]).max()
    assert 0 < difference < 0.05 * abs(answers[0]).max()
