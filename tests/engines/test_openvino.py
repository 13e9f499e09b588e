import openvino as ov
import pytest
from tests.engines.contract import EngineContract
from tests.engines.images import samples

from slipstream import hardware
from slipstream.engines.base import build_engine, load_engine, record_answers
from slipstream.engines.openvino import BF16_FEATURES, ENGINE, IR, OpenVINORunner
from slipstream.errors import EngineError
from slipstream.spec import Target

HAS_BF16 = bool(BF16_FEATURES & set(hardware.describe()["cpu_features"].split()))


@pytest.fixture
def target() -> Target:
    return Target(engine="openvino", threads=1)


class TestOpenVINO(EngineContract):
    pass


def test_weights_stay_in_fp32(fp32, target, tmp_path):
    build_engine(fp32, target, tmp_path / "engine")
    constants = [o for o in ov.Core().read_model(tmp_path / "engine" / IR).get_ops() if o.get_type_name() == "Constant"]
    assert "f16" not in {c.get_element_type().get_type_name() for c in constants}


def test_fp32_is_pinned_and_int8_really_runs_in_int8(fp32, int8, target, tmp_path):
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
def test_bf16_is_near_fp32_but_not_equal(fp32, target, tmp_path):
    x = samples(8)
    answers = []
    for precision in ("f32", "bf16"):
        build_engine(fp32, target.model_copy(update={"precision": precision}), tmp_path / precision)
        answers.append(load_engine(tmp_path / precision).run(x))
    difference = abs(answers[0] - answers[1]).max()
    assert 0 < difference < 0.05 * abs(answers[0]).max()


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "HETERO:CPU", "MULTI:CPU"])
def test_joined_devices_answer_as_the_device_itself(fp32, target, tmp_path, device):
    joined = target.model_copy(update={"device": device})
    manifest = build_engine(fp32, joined, tmp_path / "joined")
    build_engine(fp32, target, tmp_path / "alone")
    assert manifest.fingerprint["device"] == device
    assert manifest.fingerprint["execution_devices"] == "CPU"
    assert manifest.fingerprint["device_name"] == ENGINE.fingerprint(target)["device_name"]
    for size in (1, 5):
        joined_answers, alone = (load_engine(tmp_path / name).run(samples(size)) for name in ("joined", "alone"))
        assert joined_answers.tobytes() == alone.tobytes()


def test_every_joined_device_that_is_not_here_is_named():
    with pytest.raises(EngineError, match=r"no device 'GPU\.7', 'NPU' on this machine; it has .*CPU"):
        ENGINE.check(Target(engine="openvino", device="HETERO:GPU.7,NPU,CPU"))
    with pytest.raises(EngineError, match="leaves no device"):
        ENGINE.check(Target(engine="openvino", device="AUTO:-CPU,-GPU,-NPU"))


def test_a_precision_that_the_device_would_silently_change_is_refused():
    if "FP16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU computes in FP16")
    for device in ("CPU", "AUTO:CPU"):
        with pytest.raises(EngineError, match=r"CPU does not compute in f16.*f32"):
            ENGINE.check(Target(engine="openvino", device=device, precision="f16"))


def test_options_reach_the_compiled_model(fp32, target, tmp_path):
    found = {}
    for name, options in {"default": {}, "own": {"hint": "throughput", "num_streams": 2}}.items():
        build_engine(fp32, target.model_copy(update={"options": options, "threads": 2}), tmp_path / name)
        compiled = load_engine(tmp_path / name).compiled
        found[name] = [str(compiled.get_property(k)).rpartition(".")[2] for k in ("PERFORMANCE_HINT", "NUM_STREAMS")]
    assert found == {"default": ["LATENCY", "1"], "own": ["THROUGHPUT", "2"]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"streams": 2}, "options.streams: no such option"),
        ({"num_streams": 0}, "options.num_streams: must be greater than or equal to 1, not 0"),
        ({"num_streams": True}, "options.num_streams: must be a valid integer, not True"),
        ({"hint": "speed"}, "options.hint: must be 'latency' or 'throughput', not 'speed'"),
    ],
)
def test_wrong_options_are_refused_with_all_that_there_are(options, said):
    with pytest.raises(EngineError) as refused:
        ENGINE.check(Target(engine="openvino", options=options))
    first, last = str(refused.value).splitlines()
    assert first.startswith(f"openvino: {said}")
    assert last.startswith("openvino has `hint`: ") and "`num_streams`: " in last


def test_int8_that_was_judged_with_exact_sums_is_refused_where_they_saturate(
    fp32,
    int8,
    target,
    tmp_path,
    monkeypatch,
):
    """Elsewhere OpenVINO compiles the IR for the processor: fewer or more instruction sets, and FP32 anywhere."""
    for built, here, loads in (
        ("exact", "saturating", {"fp32"}),
        ("saturating", "exact", {"fp32", "int8"}),
    ):
        for name, candidate in (("fp32", fp32), ("int8", int8)):
            folder = tmp_path / f"{name}-{built}"
            monkeypatch.setattr(hardware, "int8_sums", lambda built=built: built)
            build_engine(candidate, target, folder)
            record_answers(folder, load_engine(folder), samples(4))
            monkeypatch.setattr(hardware, "int8_sums", lambda here=here: here)
            if name in loads:
                load_engine(folder)
                continue
            with pytest.raises(EngineError, match="int8_sums: built with 'exact', here 'saturating'"):
                load_engine(folder)


def test_an_engine_for_another_kind_of_gpu_is_refused(fp32, target, tmp_path):
    manifest = build_engine(fp32, target, tmp_path / "engine")
    gpu = manifest.model_copy(update={"target": target.model_copy(update={"device": "GPU"})})
    assert "device_name" in ENGINE.relations(manifest)
    assert "device_name" not in ENGINE.relations(gpu)
