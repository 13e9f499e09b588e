"""An engine is built in one place and loaded in another: versions of ONNX Runtime, processors with and without VNNI."""

import platform
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from tests.engines import elsewhere
from tests.engines.candidates import network, projections, quantized, write
from tests.engines.contract import edit_manifest
from tests.engines.images import samples

from slipstream import hardware
from slipstream.engines import onnxruntime
from slipstream.engines.base import load_engine, read_manifest
from slipstream.engines.onnxruntime import OPTIMISED
from slipstream.errors import EngineError
from slipstream.frameworks.base import ONNX
from slipstream.spec import Target
from slipstream.steps.build import reference

TARGET = Target(engine="onnxruntime", threads=1)
OLDER = "1.31.0"
NO_VNNI = "Haswell"
FLAGS = {elsewhere.FLAGS: "avx avx2 fma"}
ON_X86 = pytest.mark.skipif(platform.machine() not in hardware.X86, reason="other CPUs have other integer kernels")


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Candidate folders: convolutions in FP32 and INT8, and an attention's projections in INT8."""
    folder = tmp_path_factory.mktemp("candidates")
    return {
        "fp32": write(folder / "fp32", network()),
        "int8": write(folder / "int8", quantized(network()), is_quantized=True),
        "projections": write(folder / "projections", quantized(projections()), is_quantized=True),
    }


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A file of samples."""
    np.save(tmp_path / "samples.npy", samples(8))
    return tmp_path / "samples.npy"


KINDS = ("fp32", "int8", "projections")


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_of_an_older_onnxruntime_loads_and_answers_the_same(
    candidates: dict[str, Path], asked: Path, tmp_path: Path, kind: str
) -> None:
    older = elsewhere.library("onnxruntime", OLDER)
    engine = tmp_path / "engine"
    assert elsewhere.run("build", candidates[kind], TARGET.model_dump_json(), engine, asked, variables=older) == ""
    assert read_manifest(engine).fingerprint["onnxruntime"] == OLDER
    assert elsewhere.run("answer", engine, asked, tmp_path / "there.npy", variables=older) == ""
    here = load_engine(engine).run(samples(8))
    np.testing.assert_allclose(here, np.load(tmp_path / "there.npy"), rtol=1e-4, atol=1e-4)


def test_an_engine_of_a_later_onnxruntime_is_refused_with_both_versions(
    candidates: dict[str, Path], asked: Path, tmp_path: Path
) -> None:
    older = elsewhere.library("onnxruntime", OLDER)
    elsewhere.build(candidates["fp32"], TARGET, tmp_path / "engine", samples(8))
    version = read_manifest(tmp_path / "engine").fingerprint["onnxruntime"]
    said = elsewhere.run("answer", tmp_path / "engine", asked, tmp_path / "none.npy", variables=older)
    assert f"onnxruntime: built with '{version}', here '{OLDER}'" in said
    assert "slipstream rebuild" in said


@ON_X86
@pytest.mark.parametrize("kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[:2]), KINDS[2]])
def test_a_processor_without_vnni_answers_the_same(
    candidates: dict[str, Path], asked: Path, tmp_path: Path, kind: str
) -> None:
    """Built there and here, loaded there and here; the kernels of AVX2 are the real ones."""
    without = elsewhere.emulated(NO_VNNI)
    elsewhere.build(candidates[kind], TARGET, tmp_path / "here", samples(8))
    target = TARGET.model_dump_json()
    assert (
        elsewhere.run("build", candidates[kind], target, tmp_path / "there", asked, variables=FLAGS, before=without)
        == ""
    )
    assert read_manifest(tmp_path / "there").fingerprint["cpu_features"] == "avx2"
    assert (tmp_path / "here" / OPTIMISED).read_bytes() == (tmp_path / "there" / OPTIMISED).read_bytes()
    assert (
        elsewhere.run("answer", tmp_path / "here", asked, tmp_path / "there.npy", variables=FLAGS, before=without) == ""
    )
    expected = load_engine(tmp_path / "there").run(samples(8))
    np.testing.assert_allclose(np.load(tmp_path / "there.npy"), expected, rtol=1e-4, atol=1e-4)
    largest = np.abs(expected).max()
    exact = reference(candidates[kind] / ONNX, samples(8))
    np.testing.assert_allclose(expected, exact, atol=0.005 * largest)


@ON_X86
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_the_stored_graph_is_bound_to_a_processor(
    candidates: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Layouts are: `com.microsoft.nchwc` has blocks of 8 or 16 channels, and NHWC convolutions keep int8 weights."""
    elsewhere.build(candidates[kind], TARGET, tmp_path / "engine", samples(8))
    nodes = Counter((n.domain, n.op_type) for n in onnx.load(tmp_path / "engine" / OPTIMISED).graph.node)
    assert {domain for domain, _ in nodes} <= {"", "com.microsoft"}
    assert not nodes["com.microsoft", "QLinearConv"] and not nodes["", "Transpose"]


def product(activations: np.ndarray, weights: np.ndarray, *, saturating: bool) -> np.ndarray:
    """(N, K) uint8 × (K, M) int8 → (N, M) sums; `saturating` as AVX2's vpmaddubsw: pairs of products in int16."""
    products = activations.astype(np.int64)[:, :, None] * weights.astype(np.int64)[None]
    pairs = products.reshape(len(activations), -1, 2, weights.shape[1]).sum(2)
    return (np.clip(pairs, -(2**15), 2**15 - 1) if saturating else pairs).sum(1)


@ON_X86
def test_the_products_of_the_stored_graph_would_saturate_and_in_uint8_do_not(
    candidates: dict[str, Path], tmp_path: Path
) -> None:
    """The stored form depends on `session.x64quantprecision` where VNNI lacks: full int8 weights, uint8 activations.

    As that option does it, weights and zero points move by 128. The correction for a zero point is a sum that no kernel
    saturates; uint8 products are widened to 16 bits before they are added in 32.
    """
    elsewhere.build(candidates["projections"], TARGET, tmp_path / "engine", samples(8))
    model = onnx.load(tmp_path / "engine" / OPTIMISED)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type == "QLinearMatMul")
    weights, zero = constants[node.input[3]], constants[node.input[2]]
    assert (weights.dtype, zero.dtype) == (np.int8, np.uint8)
    assert np.abs(weights.astype(int)).max() > 64, "7 bits would not saturate"
    x = np.clip(np.rint(samples(8).reshape(8, -1) / 0.02) + zero, 0, 255).astype(np.uint8)
    exact = product(x, weights, saturating=False)
    assert (product(x, weights, saturating=True) != exact).any()
    moved = (weights.astype(np.int16) + 128).astype(np.uint8)
    in_uint8 = x.astype(np.int64) @ moved.astype(np.int64) - 128 * x.astype(np.int64).sum(1, keepdims=True)
    np.testing.assert_array_equal(in_uint8, exact)


@ON_X86
@pytest.mark.parametrize(("sums", "expected"), [("exact", np.int8), ("saturating", np.uint8)])
def test_weights_become_uint8_only_where_sums_saturate(
    candidates: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sums: str, expected: type
) -> None:
    """With VNNI, int8 weights are exact as well, and 1.8 times as fast."""
    elsewhere.build(candidates["projections"], TARGET, tmp_path / "engine", samples(8))
    monkeypatch.setattr(hardware, "int8_sums", lambda: sums)

    def open_and_save(path: Path, target: Target, options: ort.SessionOptions) -> ort.InferenceSession:
        options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        return session(path, target, options)

    session = onnxruntime._session
    monkeypatch.setattr(onnxruntime, "_session", open_and_save)
    load_engine(tmp_path / "engine")
    model = onnx.load(tmp_path / "loaded.onnx")
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = [constants[n.input[3]] for n in model.graph.node if n.op_type == "QLinearMatMul"]
    assert {w.dtype for w in weights} == {np.dtype(expected)}


def test_a_graph_of_an_earlier_form_is_bound_to_its_processor_and_version(
    candidates: dict[str, Path], tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    elsewhere.build(candidates["fp32"], TARGET, engine, samples(8))
    earlier = {k: v for k, v in read_manifest(engine).fingerprint.items() if k not in ("graph", "machine")}
    edit_manifest(engine, fingerprint=earlier)
    load_engine(engine)
    edit_manifest(engine, fingerprint={**earlier, "cpu_features": "avx2"})
    with pytest.raises(EngineError, match="cpu_features: built with 'avx2'"):
        load_engine(engine)
