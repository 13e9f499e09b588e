"""TensorRT: real ahead-of-time builds by TensorRT for RTX, which needs no GPU; running needs one (`pytest -m gpu`)."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT for RTX: the extra tensorrt-rtx")

from onnx import helper, numpy_helper
from tests.engines.ahead import ahead, has_gpu, port, text
from tests.engines.candidates import network, quantized, write
from tests.engines.contract import EngineContract
from tests.engines.images import CLASSES, SHAPE

from slipstream.engines.base import build_engine, engine_for, load_engine, read_manifest, why_not_loadable
from slipstream.engines.tensorrt import ENGINE, PLAN
from slipstream.engines.tensorrt_api import MESSAGES, trt
from slipstream.engines.tensorrt_build import Profile, _config, _timing_cache, profile
from slipstream.engines.tensorrt_layers import from_json
from slipstream.engines.tensorrt_options import options_of
from slipstream.errors import EngineError
from slipstream.frameworks.base import INPUT, ONNX, OUTPUT
from slipstream.measure import gpu
from slipstream.spec import Target

no_gpu = pytest.mark.skipif(has_gpu(), reason="this machine has an NVIDIA GPU")


def layers_of(folder: Path) -> list[dict[str, str]]:
    table = json.loads((folder / "layers.json").read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def precisions(folder: Path, *nodes: str) -> set[str]:
    """Precision of the kernels that hold the convolutions and the dense layer."""
    kernels = [r for r in layers_of(folder) if r["type"] in ("correlation", "gemm", "runtime_fusion")]
    assert kernels
    return {r["precision"] for r in kernels if not nodes or set(nodes) & set(r["onnx"].split(", "))}


# Ahead-of-time builds


@pytest.mark.parametrize(
    ("capability", "precision", "kernels"),
    [
        (8.0, "f32", "FP32"),
        (8.6, "f32", "FP32"),
        (8.9, "f32", "FP32"),
        (12.0, "f32", "FP32"),
        (7.5, "f16", "FP16"),
        (8.6, "f16", "FP16"),
        (12.0, "f16", "FP16"),
        (8.6, "bf16", "BF16"),
        ("8.0, 8.6, 8.9, 12.0", "f32", "FP32"),
        ("12.0,7.5", "f16", "FP16"),
    ],
)
def test_an_engine_is_built_for_gpus_that_are_elsewhere_in_the_precision_that_was_asked_for(
    fp32: Path,
    tmp_path: Path,
    capability: float | str,
    precision: str,
    kernels: str,
) -> None:
    manifest = build_engine(fp32, ahead(capability, precision), tmp_path / "engine")
    assert (tmp_path / "engine" / PLAN).stat().st_size > 10_000
    assert set(manifest.files) == {PLAN, "layers.json"}
    assert precisions(tmp_path / "engine") == {kernels}
    assert manifest.figures["layers"] == len(layers_of(tmp_path / "engine")) > 3
    assert manifest.figures[f"layers_{kernels.lower()}"] >= 3


def test_fp16_halves_the_weights(tmp_path: Path) -> None:
    wide = network()
    rng = np.random.default_rng(0)
    shapes = {"w2": (512, 8, 3, 3), "b2": (512,), "w3": (CLASSES, 512 * 16)}
    for tensor in wide.graph.initializer:
        if tensor.name in shapes:
            values = rng.normal(0, 0.1, shapes[tensor.name]).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    candidate = write(tmp_path / "wide", wide)
    sizes = {}
    for precision in ("f32", "f16"):
        build_engine(candidate, ahead(precision=precision), tmp_path / precision)
        sizes[precision] = (tmp_path / precision / PLAN).stat().st_size
    weights = 4 * (512 * 8 * 9 + CLASSES * 512 * 16)
    assert sizes["f32"] - sizes["f16"] > 0.4 * weights


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16"])
def test_qdq_nodes_become_int8_kernels_whatever_the_rest_computes_in(
    int8: Path,
    tmp_path: Path,
    precision: str,
) -> None:
    manifest = build_engine(int8, ahead(8.6, precision), tmp_path / "engine")
    assert precisions(tmp_path / "engine", "conv1", "conv2") == {"INT8"}
    assert manifest.quantized
    assert manifest.figures["layers_int8"] >= 3


def test_the_layers_say_what_was_fused(fp32: Path, tmp_path: Path) -> None:
    build_engine(fp32, ahead(), tmp_path / "engine")
    fused = [set(row["onnx"].split(", ")) for row in layers_of(tmp_path / "engine")]
    assert {"conv1", "relu1"} in fused
    assert {"conv2", "relu2"} in fused


def test_a_model_with_a_fixed_batch_is_built_without_a_profile(tmp_path: Path) -> None:
    fixed = network()
    for end in (*fixed.graph.input, *fixed.graph.output):
        end.type.tensor_type.shape.dim[0].dim_value = 1
    build_engine(write(tmp_path / "candidate", fixed), ahead(), tmp_path / "engine")
    assert (tmp_path / "engine" / PLAN).exists()


def test_text_of_varying_length_is_built_for_the_targets_lengths(tmp_path: Path) -> None:
    build_engine(text(tmp_path / "text"), with_lengths(16, 32, 64), tmp_path / "engine")
    assert read_manifest(tmp_path / "engine").input_shape == (-1,)
    assert (tmp_path / "engine" / PLAN).exists()


def test_options_reach_the_builder() -> None:
    target = ahead("7.5, 12.0", level=1, tf32=True, sparse=True, workspace_mib=64)
    builder = trt.Builder(MESSAGES)
    given = _config(builder, target, options_of(target))
    assert given.builder_optimization_level == 1
    assert given.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 * 2**20
    assert given.get_flag(trt.BuilderFlag.TF32) and given.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    assert [given.get_compute_capability(i) for i in range(given.num_compute_capabilities)] == [
        trt.ComputeCapability.SM75,
        trt.ComputeCapability.SM120,
    ]
    plain = _config(builder, ahead(), options_of(ahead()))
    assert not plain.get_flag(trt.BuilderFlag.TF32), "f32 means FP32"


@pytest.mark.parametrize("is_quantized", [False, True])
def test_weights_with_the_pattern_2_4_are_counted(tmp_path: Path, is_quantized: bool) -> None:
    pruned = network()
    for tensor in pruned.graph.initializer:
        if tensor.name in ("w2", "w3"):  # 8 and 256 input channels; the first convolution has one
            values = numpy_helper.to_array(tensor).copy()
            values[:, 0::4] = values[:, 3::4] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    model = quantized(pruned) if is_quantized else pruned
    candidate = write(tmp_path / "candidate", model, is_quantized=is_quantized)
    manifest = build_engine(candidate, ahead(8.6, "f16", sparse=True), tmp_path / "engine")
    assert manifest.figures["sparse_layers"] == 2


# Profiles


@pytest.mark.parametrize(
    ("shape", "batch", "lengths", "expected"),
    [
        (SHAPE, (1, 4, 16), (), Profile((1, 1, 16, 16), (4, 1, 16, 16), (16, 1, 16, 16))),
        ((-1,), (1, 2, 8), (16, 32, 64), Profile((1, 16), (2, 32), (8, 64))),
        ((-1, 8), (2, 2, 2), (10,), Profile((2, 10, 8), (2, 10, 8), (2, 10, 8))),
    ],
)
def test_the_profile_is_that_of_batch_and_lengths(
    shape: tuple[int, ...], batch: tuple[int, ...], lengths: tuple[int, ...], expected: Profile
) -> None:
    assert profile(shape, Target(engine="tensorrt", batch=batch, lengths=lengths)) == expected


def test_a_varying_axis_without_a_profile_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    candidate = text(tmp_path / "text")
    (candidate / ONNX).write_bytes(b"is not looked at")
    with pytest.raises(EngineError, match=r"axis 1 of the input varies.*`lengths`"):
        build_engine(candidate, ahead(), tmp_path / "engine")


def test_two_varying_axes_are_refused() -> None:
    with pytest.raises(EngineError, match="axes 1, 2 of the input vary"):
        profile((-1, -1), Target(engine="tensorrt", lengths=(16,)))


# The timing cache: TensorRT for RTX has the functions, but times nothing, so that this shows the file's way only


def test_a_timing_cache_is_written_read_again_and_replaced_when_it_is_none(tmp_path: Path) -> None:
    builder, path = trt.Builder(MESSAGES), tmp_path / "cache" / "gpu.timing-cache"

    def use() -> bytes:
        with _timing_cache(builder.create_builder_config(), path):
            pass
        return path.read_bytes()

    written = use()
    assert written
    assert use() == written
    path.write_bytes(b"of another version")
    assert use() == written


def test_without_a_file_there_is_no_timing_cache() -> None:
    with _timing_cache(object(), None):
        pass


# Where it runs


@no_gpu
def test_an_engine_for_a_gpu_is_not_loaded_without_one(fp32: Path, tmp_path: Path) -> None:
    build_engine(fp32, ahead(), tmp_path / "engine")
    with pytest.raises(EngineError, match=r"compute capability 8\.6, and not to be loaded here: no NVIDIA GPU"):
        load_engine(tmp_path / "engine")
    assert "no NVIDIA GPU" in (why_not_loadable(ahead()) or "")


def test_the_wrong_gpu_is_refused(fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_engine(fp32, ahead("8.6, 8.9"), tmp_path / "engine")
    turing = gpu.Gpu(0, "NVIDIA T4", "7.5", "580.95.05", "0000:00:1e.0")
    monkeypatch.setattr(gpu, "find", lambda ordinal: turing)
    with pytest.raises(EngineError, match=r"8\.6, 8\.9, but this NVIDIA T4 has 7\.5; add that"):
        load_engine(tmp_path / "engine")


def test_the_fingerprint_binds_as_much_as_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ada = gpu.Gpu(1, "NVIDIA L4", "8.9", "580.95.05", "0000:00:1e.0")
    monkeypatch.setattr(gpu, "find", lambda ordinal: ada)
    here = ENGINE.fingerprint(Target(engine="tensorrt", device="GPU.1"))
    assert here["flavour"] == "tensorrt-rtx"
    assert (here["compute_capability"], here["device_name"], here["driver"]) == ("8.9", "NVIDIA L4", "580.95.05")
    elsewhere = ENGINE.fingerprint(ahead("12.0, 8.6"))
    assert elsewhere["compute_capability"] == "8.6, 12.0"
    assert not {"device_name", "driver"} & set(elsewhere)


def test_the_cache_is_one_for_each_gpu_and_driver(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for name, driver in (("NVIDIA L4", "580"), ("NVIDIA L4", "590"), ("NVIDIA T4", "580"), ("NVIDIA L4", "580")):
        monkeypatch.setattr(gpu, "find", lambda ordinal, n=name, d=driver: gpu.Gpu(0, n, "8.9", d, ""))
        path = ENGINE.cache_file(ahead(8.9))
        assert path is not None and path.parent == home / "cache" / "tensorrt"
        assert path == ENGINE.cache_file(ahead(8.9, "f16"))
        names.add(path.name)
    assert len(names) == 3
    assert ENGINE.cache_file(ahead(timing_cache=False)) is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"device": "CPU"}, r"no device 'CPU'.*set the target's `device` to GPU"),
        ({"device": "GPU", "options": {"workspace": 3}}, r"options\.workspace: no such option(.|\n)*`workspace_mib`"),
        ({"device": "GPU", "options": {"level": 6}}, r"options\.level: must be less than or equal to 5, not 6"),
        ({"device": "GPU", "options": {"sparse": 1}}, r"options\.sparse: must be a valid boolean, not 1"),
        ({"device": "GPU", "options": {"profile": "top"}}, r"options\.profile: must be 'nsys' or 'perf'"),
        ({"device": "GPU", "options": {"compute_capability": "86"}}, r"'86' is not one or more compute capabilities"),
        (
            {"device": "GPU", "options": {"compute_capability": 9.0}},
            r"does not build for 9\.0; it has 7\.5, 8\.0, 8\.6",
        ),
        (
            {"device": "GPU", "precision": "bf16", "options": {"compute_capability": 7.5}},
            r"`precision: bf16` need.* 8\.0 or more, and 7\.5 is less",
        ),
        (
            {"device": "GPU", "options": {"compute_capability": 8.6, "hardware_compatibility": "ampere_plus"}},
            r"list the GPUs' compute capabilities instead",
        ),
        ({"device": "GPU", "options": {"compute_capability": 8.6, "version_compatible": True}}, r"lean runtime"),
    ],
)
def test_a_target_that_cannot_be_built_is_refused_with_what_to_do(target: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        ENGINE.check(Target.model_validate({"engine": "tensorrt", **target}))


@no_gpu
def test_without_a_gpu_and_without_a_compute_capability_it_says_how_to_build_ahead_of_time() -> None:
    with pytest.raises(EngineError, match=r"no NVIDIA GPU.*set options\.compute_capability"):
        ENGINE.check(Target(engine="tensorrt", device="GPU"))


# What it does not take


def test_an_operator_that_it_lacks_is_named_with_its_node(tmp_path: Path) -> None:
    odd = network()
    odd.graph.node[1].op_type = "Bernoulli"
    with pytest.raises(EngineError, match=r"node relu1 \(Bernoulli\): TensorRT for RTX does not have this operator"):
        build_engine(write(tmp_path / "candidate", odd), ahead(), tmp_path / "engine")


def test_dynamic_quantization_is_refused_with_its_node_and_what_to_use(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", [INPUT], ["q", "scale", "zero"], "dynamic"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "back"),
        helper.make_node("Flatten", ["dq"], [OUTPUT], "flatten"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "dynamic", list(network().graph.input), [port(OUTPUT, "batch", 256)]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    with pytest.raises(EngineError, match=r"DequantizeLinear back: .*must be constants.*quantize\.scheme: int8"):
        build_engine(write(tmp_path / "candidate", model), ahead(), tmp_path / "engine")


def test_what_the_builder_refuses_is_an_engine_error_with_its_reason(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot build candidate: .*'dense' for Turing \(SM75\)"):
        build_engine(fp32, ahead(7.5), tmp_path / "engine")


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    broken = write(tmp_path / "broken", network())
    (broken / ONNX).write_bytes(b"not a model")
    with pytest.raises(EngineError, match="cannot read"):
        build_engine(broken, ahead(), tmp_path / "engine")


# The inspector's JSON, as NVIDIA documents it for 10 and 11


@pytest.mark.parametrize(
    "tensor", [{"Format/Datatype": "Row major linear FP16 format"}, {"Datatype": "Half", "Format": "Row major linear"}]
)
def test_the_inspectors_json_is_read_in_the_form_of_each_version(tensor: dict[str, str]) -> None:
    layer = {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "input", "Dimensions": [1, 3, 8, 8], **tensor}],
        "Outputs": [{"Name": "r1", "Dimensions": [1, 8, 4, 4], **tensor}],
        "TacticName": "sm80_xmma_fprop",
        "Metadata": "[ONNX Layer: conv1]\u001e[ONNX Layer: relu1]",
    }
    (read,) = from_json(json.dumps({"Layers": [layer, "a name, without details"], "Bindings": ["input", "r1"]}))
    assert (read.onnx, read.precision, read.outputs) == (("conv1", "relu1"), "FP16", ("FP16",))


@pytest.mark.gpu
class TestOnAGpu(EngineContract):
    """The whole contract, with an engine for the GPU that is here."""

    @pytest.fixture
    def target(self) -> Target:
        return Target(engine="tensorrt", device="GPU", batch=(1, 1, 8))

    def test_manifest_names_everything_that_was_built(self, engine: Path, fp32: Path, target: Target) -> None:
        manifest = read_manifest(engine)
        assert set(manifest.files) == {PLAN, "layers.json"}
        assert manifest.fingerprint == engine_for("tensorrt").fingerprint(target)
        assert {"device_name", "driver", "compute_capability"} <= set(manifest.fingerprint)

    def test_an_unknown_device_is_refused_before_anything_is_written(
        self,
        fp32: Path,
        target: Target,
        tmp_path: Path,
    ) -> None:
        with pytest.raises(EngineError, match="no GPU number 97"):
            build_engine(fp32, target.model_copy(update={"device": "GPU.97"}), tmp_path / "none")
        assert not (tmp_path / "none").exists()

    def test_batches_beyond_the_profile_are_run_in_parts(self, engine: Path, fp32: Path) -> None:
        runner = load_engine(engine)
        x = np.random.default_rng(0).normal(size=(19, *SHAPE)).astype(np.float32)
        one_by_one = np.concatenate([runner.run(x[i : i + 1]) for i in range(len(x))])
        np.testing.assert_allclose(runner.run(x), one_by_one, rtol=1e-4, atol=1e-4)

    def test_gpu_memory_and_utilisation_are_seen(self, engine: Path, target: Target) -> None:
        with gpu.watch(ENGINE.gpu(target)) as usage:
            runner = load_engine(engine)
            for _ in range(2000):
                runner.run(np.zeros((8, *SHAPE), np.float32))
        assert usage.metrics()["gpu_memory_mib"] > 0


def with_lengths(*lengths: int) -> Target:
    return ahead().model_copy(update={"lengths": lengths})
