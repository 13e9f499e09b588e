"""PyTorch as an engine: the contract for the modes that need no compiler, and each compiled mode once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engines.candidates import network, quantized, write
from tests.engines.contract import EngineContract
from tests.engines.images import samples

from slipstream.data.splits import Split
from slipstream.engines.base import build_engine, load_engine
from slipstream.engines.torch import ENGINE, PACKAGE, SCRIPT
from slipstream.errors import EngineError
from slipstream.frameworks.base import ONNX, WEIGHTS
from slipstream.frameworks.torch import FRAMEWORK
from slipstream.onnx.agreement.reference import reference
from slipstream.spec import Call, Target

torch.set_num_threads(1)


def made(folder: Path, name: str) -> Path:
    """A candidate folder of a network in torch_networks.py."""
    call = Call(function=f"tests.engines.torch_networks:{name}")
    FRAMEWORK.save(FRAMEWORK.build(call, 0), call, Split(samples(8), np.zeros(8, np.int64)), folder)
    return folder


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("fp32") / "candidate", "small")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("dense") / "candidate", "dense")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("int8") / "candidate", quantized(network()), is_quantized=True)


class TorchContract(EngineContract):
    @pytest.fixture
    def broken(self, tmp_path: Path) -> Path:
        folder = made(tmp_path / "broken", "small")
        (folder / WEIGHTS).write_bytes(b"not weights")
        return folder

    def test_int8_is_close_to_fp32_but_not_equal(self, engine, int8, target, tmp_path) -> None:
        """It is refused instead: there are no weights that PyTorch could load."""
        with pytest.raises(EngineError, match="needs the candidate before quantization"):
            build_engine(int8, target, tmp_path / "int8")


class TestEager(TorchContract):
    @pytest.fixture
    def target(self) -> Target:
        return Target(engine="torch", threads=1, options={"mode": "eager"})


class TestTorchScript(TorchContract):
    @pytest.fixture
    def target(self) -> Target:
        return Target(engine="torch", threads=1, options={"mode": "torchscript"})

    def test_weights_are_frozen_into_the_script(self, engine: Path) -> None:
        assert {p.name for p in engine.iterdir()} == {SCRIPT, "candidate.json", "engine.json"}
        assert list(torch.jit.load(engine / SCRIPT).parameters()) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compile", "aotinductor"])
def test_a_compiled_network_answers_as_its_onnx(dense: Path, tmp_path: Path, mode: str) -> None:
    target = Target(engine="torch", threads=1, options={"mode": mode})
    manifest = build_engine(dense, target, tmp_path / "engine")
    assert (PACKAGE in manifest.files) == (mode == "aotinductor")
    assert manifest.fingerprint["compiler"].split()[1][0].isdigit()
    runner = load_engine(tmp_path / "engine")
    for size in (1, 3):
        x = samples(6)[::2][:size]
        np.testing.assert_allclose(runner.run(x), reference(dense / ONNX, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["compile", "aotinductor"])
def test_without_a_compiler_the_modes_that_need_one_are_refused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EngineError, match=rf"options\.mode {mode} needs a C\+\+ compiler.*torchscript"):
        ENGINE.check(Target(engine="torch", options={"mode": mode}))
    ENGINE.check(Target(engine="torch", options={"mode": "torchscript"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "bf16"}, "computes in f32"),
        ({"device": "GPU"}, "runs on CPU only"),
        ({"options": {"mode": "fast"}}, r"options\.mode: must be 'eager'.*not 'fast'"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        ENGINE.check(Target.model_validate({"engine": "torch", "options": {"mode": "eager"}} | changes))


def test_a_network_that_cannot_be_traced_is_an_engine_error(dense: Path, tmp_path: Path, monkeypatch) -> None:
    def broken(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not for tracing")

    monkeypatch.setattr(torch.nn.Flatten, "forward", broken)
    target = Target(engine="torch", threads=1, options={"mode": "torchscript"})
    with pytest.raises(EngineError, match="cannot build candidate by torchscript: ValueError: not for tracing"):
        build_engine(dense, target, tmp_path / "engine")
