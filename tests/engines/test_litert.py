"""Runs in the tensorflow environment, whose converter makes LiteRT's files."""

import shutil
import subprocess

import httpx
import numpy as np
import pytest
import tests.engines.saved_models as saved
from tests.conftest import ROOT, free_port, wait_for
from tests.engines.candidates import network, write
from tests.engines.contract import EngineContract
from tests.engines.images import samples

from slipstream.engines.base import build_engine, load_engine
from slipstream.engines.litert import ENGINE, MODEL
from slipstream.engines.litert_file import open_interpreter
from slipstream.errors import EngineError
from slipstream.frameworks.keras_runtime import tf
from slipstream.serving import client
from slipstream.spec import Target

TARGET = Target(engine="litert", threads=1)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    return saved.candidate(tmp_path_factory.mktemp("fp32") / "candidate")


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return saved.candidate(tmp_path_factory.mktemp("int8") / "candidate", "int8")


@pytest.fixture
def target():
    return TARGET


class TestLiteRT(EngineContract):
    @pytest.fixture
    def broken(self, fp32, tmp_path):
        folder = shutil.copytree(fp32, tmp_path / "broken")
        (folder / saved.SAVED_MODEL / "saved_model.pb").write_bytes(b"not a model")
        return folder


def dtypes(model: bytes) -> dict[str, set[str]]:
    """Operator → types of its first two inputs, which are what it computes with."""
    interpreter = open_interpreter(model)
    tensors = {t["index"]: t["dtype"].__name__ for t in interpreter.get_tensor_details()}
    found: dict[str, set[str]] = {}
    for operator in interpreter._get_ops_details():
        found.setdefault(operator["op_name"], set()).update(tensors[i] for i in operator["inputs"][:2])
    return found


@pytest.mark.parametrize(
    ("scheme", "function", "convolution", "worst"),
    [
        ("int8", saved.answer, {"int8"}, 0.1),
        ("int8", saved.answer_with_ranges, {"int8"}, 0.1),
        ("int8-dynamic", saved.answer, {"float32", "int8"}, 0.05),
        ("int8-weights", saved.answer, {"float32"}, 0.05),
        ("int4-weights", saved.answer, {"float32"}, 0.25),
    ],
)
def test_each_scheme_computes_in_its_types_and_is_small(fp32, tmp_path, scheme, function, convolution, worst):
    build_engine(fp32, TARGET, tmp_path / "float")
    build_engine(saved.candidate(tmp_path / scheme, scheme, function), TARGET, tmp_path / "engine")
    model, x = (tmp_path / "engine" / MODEL).read_bytes(), samples(64)
    assert dtypes(model)["CONV_2D"] == convolution
    assert len(model) < 0.6 * (tmp_path / "float" / MODEL).stat().st_size
    exact, rounded = (load_engine(tmp_path / name).run(x) for name in ("float", "engine"))
    assert 0 < np.abs(exact - rounded).max() < worst * np.abs(exact).max()


def test_f16_halves_the_weights_and_bf16_is_refused(fp32, tmp_path):
    build_engine(fp32, TARGET, tmp_path / "f32")
    build_engine(fp32, TARGET.model_copy(update={"precision": "f16"}), tmp_path / "f16")
    exact, rounded = (load_engine(tmp_path / name).run(samples(8)) for name in ("f32", "f16"))
    assert 0 < np.abs(exact - rounded).max() < 1e-2
    assert dtypes((tmp_path / "f16" / MODEL).read_bytes())["DEQUANTIZE"] == {"float16"}
    with pytest.raises(EngineError, match=r"bf16.*f32 or f16"):
        ENGINE.check(TARGET.model_copy(update={"precision": "bf16"}))


def test_the_arena_is_what_lives_at_the_same_time_and_can_be_limited(tmp_path):
    chain = saved.candidate(tmp_path / "chain", function=lambda x: tf.exp(tf.sin(tf.abs(tf.reshape(x, [-1, 256])))))
    target = TARGET.model_copy(update={"options": {"xnnpack": False, "max_arena_kib": 3}})
    figures = build_engine(chain, target, tmp_path / "engine").figures
    assert figures == {"arena_bytes": 3 * 1024}  # five tensors of 1 KiB, of which three are needed at a time
    x = samples(3)
    built_in = load_engine(tmp_path / "engine").run(x)
    np.testing.assert_allclose(built_in, np.exp(np.sin(np.abs(x.reshape(3, 256)))), rtol=1e-5)
    with pytest.raises(EngineError, match=r"is 3\.0 KiB but options.max_arena_kib allows 2"):
        build_engine(
            chain, target.model_copy(update={"options": {"xnnpack": False, "max_arena_kib": 2}}), tmp_path / "no"
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"xnpack": False}, "xnpack.*`xnnpack`.*`max_arena_kib`"),
        ({"xnnpack": 1}, "xnnpack"),
        ({"max_arena_kib": 9}, "xnnpack: false"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(EngineError, match=f"(?s){words}"):
        ENGINE.check(TARGET.model_copy(update={"options": options}))


def test_what_litert_cannot_build_is_refused_with_what_to_do(tmp_path):
    uncalibrated = saved.candidate(tmp_path / "uncalibrated", "int8")
    (uncalibrated / saved.CALIBRATION).unlink()
    for candidate, words in (
        (write(tmp_path / "onnx", network()), r"no saved_model/.*keras"),
        (saved.candidate(tmp_path / "operator", function=tf.linalg.inv), "no operator for MatrixInverse"),
        (saved.candidate(tmp_path / "batch", batch=2), "fixed at 2"),
        (uncalibrated, "no calibration.npz"),
    ):
        with pytest.raises(EngineError, match=words):
            build_engine(candidate, TARGET, tmp_path / f"{candidate.name}-engine")


def test_the_model_server_answers_with_it(int8, tmp_path):
    build_engine(int8, TARGET, tmp_path / "engine")
    port, python = free_port(), ROOT / ".envs/serve/bin/python"  # which has no TensorFlow
    options = {"model": "small", "release": "small--v1", "engine": tmp_path / "engine", "port": port}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen([python, "-m", "slipstream.serving.server", *arguments], cwd=tmp_path)
    try:
        wait_for(f"http://127.0.0.1:{port}/v2/models/small/ready", process)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            for n in (1, 3):
                got = client.infer(http, "small", samples(n))
                np.testing.assert_allclose(got, load_engine(tmp_path / "engine").run(samples(n)), rtol=1e-6)
    finally:
        process.terminate()
        process.wait(timeout=20)
