"""PyTorch networks on token ids: trained by AdamW, exported with a length that varies."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tests.engines.text_networks import encoder, trained
from tests.engines.texts import LENGTH, data
from tests.frameworks.contract import Recorder

from slipstream.data import tokens
from slipstream.errors import ModelError
from slipstream.frameworks.base import ONNX, Job, Schedule
from slipstream.frameworks.torch import FRAMEWORK
from slipstream.onnx.agreement.reference import reference
from slipstream.spec import Call

torch.set_num_threads(1)
ENCODER = Call(function="tests.engines.text_networks:encoder")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(data(), seed=3, folder=tmp_path, progress=Recorder())


def test_adamw_teaches_a_transformer(job: Job) -> None:
    test = job.data.test
    assert (FRAMEWORK.logits(trained(job), test.inputs).argmax(1) == test.labels).mean() > 0.9


def test_training_goes_on_with_adamws_state_as_if_never_stopped(job: Job, tmp_path: Path) -> None:
    answers = []
    for name, stops in (("whole", (4,)), ("stopped", (2, 4))):
        (tmp_path / name).mkdir()
        for epochs in stops:
            network = FRAMEWORK.build(ENCODER, 0)
            # The schedule is that of four epochs; the first of two runs is killed after two of them.
            schedule = Schedule(4, 0.02, 16, optimizer="adamw")
            given = replace(job, folder=tmp_path / name, progress=_Killed(epochs))
            try:
                FRAMEWORK.fit(network, given, schedule, "fit")
            except _Kill:
                continue
            answers.append(FRAMEWORK.logits(network, job.data.test.inputs))
    np.testing.assert_array_equal(*answers)


def test_parameters_without_gradients_stay_as_they_are(job: Job) -> None:
    before = FRAMEWORK.build(ENCODER, job.seed).words.weight
    after = FRAMEWORK.train(Call(function="tests.engines.text_networks:frozen"), job)
    assert torch.equal(after.words.weight, before)
    assert not torch.equal(after.positions.weight, FRAMEWORK.build(ENCODER, job.seed).positions.weight)


def test_the_onnx_form_takes_any_batch_and_any_length(job: Job, tmp_path: Path) -> None:
    network = trained(job)
    manifest = FRAMEWORK.save(network, ENCODER, job.data.test, tmp_path / "candidate")
    assert (manifest.input_shape, manifest.input_dtype, manifest.output_shape) == ((-1,), "int64", (2,))
    dimensions = onnx.load(tmp_path / "candidate" / ONNX).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in dimensions] == ["batch", "length"]
    inputs = job.data.test.inputs
    for x in (inputs[:1, :3], inputs[:5], np.pad(inputs[:2], ((0, 0), (0, 30)))):
        np.testing.assert_allclose(
            reference(tmp_path / "candidate" / ONNX, x), FRAMEWORK.logits(network, x), rtol=1e-4, atol=1e-5
        )
    loaded = FRAMEWORK.load(tmp_path / "candidate")
    np.testing.assert_array_equal(FRAMEWORK.logits(loaded, inputs), FRAMEWORK.logits(network, inputs))


def test_a_network_that_does_not_leave_out_padding_is_refused(job: Job, tmp_path: Path) -> None:
    split = job.data.test
    short = np.argsort(tokens.lengths(split.inputs), kind="stable")[:8]
    assert tokens.length(split.take(short).inputs) < LENGTH
    with pytest.raises(ModelError, match="differ"):
        FRAMEWORK.save(encoder(masks=False).eval(), ENCODER, split.take(short), tmp_path / "candidate")


class Frozen(torch.nn.Module):
    """Asks for the length in Python, which the export takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.inner(ids) + float(len(ids[0]) < LENGTH)
        return answers


def test_a_length_that_was_frozen_at_export_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="differ on 1 real samples"):
        FRAMEWORK.save(Frozen().eval(), ENCODER, job.data.test, tmp_path / "candidate")


class _Kill(Exception):
    pass


class _Killed(Recorder):
    """Kills the training when an epoch after so many begins."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs_to_do = epochs

    def progress(self, done: int, total: int, unit: str = "", **figures: float) -> None:
        if done > self.epochs_to_do * total / 4:
            raise _Kill
