"""PyTorch: the contract, and what is special about it."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tests.frameworks.contract import ChannelPruningContract, Recorder, squares

from slipstream.errors import DataError, ModelError
from slipstream.frameworks import torch_training
from slipstream.frameworks.base import ONNX, WEIGHTS, Job, Schedule
from slipstream.frameworks.torch import FRAMEWORK
from slipstream.frameworks.torch_training import Checkpoint, Training
from slipstream.onnx.agreement.reference import reference
from slipstream.spec import Call

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("home")


def call(name: str) -> Call:
    return Call(function=f"tests.frameworks.networks:{name}")


class TestTorch(ChannelPruningContract):
    framework = FRAMEWORK
    call = call("squares")

    def test_untold_control_flow_is_found_at_export(self, tmp_path: Path) -> None:
        network = FRAMEWORK.build(call("branches"), 0)
        with pytest.raises(ModelError, match="ONNX Runtime and PyTorch differ"):
            FRAMEWORK.save(network, call("branches"), squares(8, 0), tmp_path / "candidate")

    def test_diverged_weights_are_not_saved(self, tmp_path: Path) -> None:
        network = FRAMEWORK.build(self.call, 0)
        with torch.no_grad():
            network[0].weight[0, 0, 0, 0] = float("inf")
        with pytest.raises(ModelError, match=r"NaN or infinity in 0\.weight"):
            FRAMEWORK.save(network, self.call, squares(8, 0), tmp_path / "candidate")

    def test_a_mask_of_infinity_is_no_divergence(self, job: Job, tmp_path: Path) -> None:
        network, data = FRAMEWORK.build(call("causal"), 0), job.data
        FRAMEWORK.fit(network, job, Schedule(1, 0.01), "causal")
        FRAMEWORK.save(network, call("causal"), data.test, tmp_path / "candidate")
        loaded = FRAMEWORK.load(tmp_path / "candidate")
        assert torch.equal(loaded.mask, network.mask) and loaded.mask.isinf().any()
        inputs = data.test.inputs
        np.testing.assert_array_equal(FRAMEWORK.logits(network, inputs), FRAMEWORK.logits(loaded, inputs))
        np.testing.assert_allclose(
            reference(tmp_path / "candidate" / ONNX, inputs), FRAMEWORK.logits(network, inputs), rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize(
        ("name", "value"), [("mask", "nan"), ("normalize.running_var", "inf"), ("answer.bias", "-inf")]
    )
    def test_weights_that_diverged_are_neither_saved_nor_loaded(self, name: str, value: str, tmp_path: Path) -> None:
        network = FRAMEWORK.build(call("causal"), 0)
        network.state_dict()[name].view(-1)[0] = float(value)
        with pytest.raises(ModelError, match=f"NaN or infinity in {name};"):
            FRAMEWORK.save(network, call("causal"), squares(8, 0), tmp_path / "candidate")
        safetensors.torch.save_file(network.state_dict(), tmp_path / WEIGHTS)
        with pytest.raises(ModelError, match=f"NaN or infinity in {name};"):
            FRAMEWORK.load_weights(tmp_path / WEIGHTS, call("causal"))

    def test_shared_weights_survive(self, tmp_path: Path) -> None:
        network, data = FRAMEWORK.build(call("tied"), 0), squares(8, 0)
        FRAMEWORK.save(network, call("tied"), data, tmp_path / "candidate")
        loaded = FRAMEWORK.load(tmp_path / "candidate")
        np.testing.assert_array_equal(FRAMEWORK.logits(network, data.inputs), FRAMEWORK.logits(loaded, data.inputs))

    def test_same_weights_make_the_same_bytes(self, job: Job, candidate: Path, tmp_path: Path) -> None:
        from slipstream import digests

        FRAMEWORK.save(FRAMEWORK.load(candidate), self.call, job.data.test, tmp_path / "again")
        assert digests.folder(tmp_path / "again") == digests.folder(candidate)

    def test_architecture_must_return_a_module(self) -> None:
        with pytest.raises(ModelError, match="returned str, not a torch"):
            FRAMEWORK.build(call("not_a_network"), 0)

    def test_a_diverging_training_is_not_retried(self, job: Job) -> None:
        with pytest.raises(ModelError, match="lower the learning rate"):
            FRAMEWORK.fit(FRAMEWORK.build(self.call, 0), job, Schedule(2, 1e9, batch_size=32), "diverge")


def test_held_out_samples_are_not_trained_on() -> None:
    training, held = torch_training.hold_out(100, seed=3)
    assert len(held) == 5 and sorted([*training, *held]) == list(range(100))
    with pytest.raises(DataError, match="at least 2"):
        torch_training.hold_out(1, seed=3)


def test_checkpoint_is_whole_or_absent(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "own.pt")
    assert checkpoint.load() is None
    checkpoint.save({"epoch": 1, "weights": torch.ones(2)})
    with pytest.raises(AttributeError):  # cannot be pickled: the earlier state stays
        checkpoint.save({"epoch": 2, "function": lambda: None})
    state = checkpoint.load()
    assert state is not None and state["epoch"] == 1


def test_training_counts_its_fits(tmp_path: Path) -> None:
    from slipstream.data.splits import Data

    recorder = Recorder()
    training = Training(Job(Data(squares(64, 1), squares(8, 2)), 0, tmp_path, recorder))
    network = FRAMEWORK.build(call("squares"), 0)
    training.fit(network, epochs=1, batch_size=16)
    training.fit(network, epochs=1, batch_size=16, learning_rate=0.01)
    assert {p.name for p in tmp_path.glob("*.pt")} == {"fit-1.pt", "fit-2.pt"}
    training.log(7, train_loss=0.5)
    assert recorder.epochs[7] == {"train_loss": 0.5}
