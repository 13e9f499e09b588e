"""Losses: cross entropy of classes and maps, the user's own, and a teacher's answers in either."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the environment torch")

import torch
from torch.nn import functional

from slipstream.data.splits import Data, Split
from slipstream.frameworks.base import Job, Schedule, SoftTargets
from slipstream.frameworks.torch_losses import cross_entropy, distillation_loss, loss_of, regression_loss
from slipstream.frameworks.torch_training import fit
from slipstream.spec import Call

CODE = """
def absolute(outputs, labels, factor=1.0):
    return factor * (outputs - labels).abs().mean()

def near(outputs, labels):
    return (abs(outputs - labels) < 0.2).mean(axis=1)
"""


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def job(folder: Path, **changes: Any) -> Job:
    split = Split(np.zeros((4, 2), np.float32), np.zeros(4, np.int64))
    return Job(Data(split, split), 0, folder, Silent(), **changes)


class Silent:
    def metrics(self, values: object, step: int = 0) -> None:
        self.last = values

    def progress(self, done: int, total: int, unit: str = "", **figures: float) -> None: ...


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    (tmp_path / "user_loss_case.py").write_text(CODE)
    monkeypatch.setenv("SLIPSTREAM_CODE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_loss_case", raising=False)  # that of the test before
    return Call(function="user_loss_case:absolute", params={"factor": 3.0})


def test_maps_are_distilled_like_as_many_samples() -> None:
    """(N, classes, H, W) gives what the same places give as N·H·W samples."""
    student, teacher = (torch.tensor(rng().normal(size=(2, 3, 4, 5)) * k) for k in (1, 2))
    labels = torch.tensor(rng().integers(0, 3, (2, 4, 5)))
    whole = distillation_loss(4.0, 0.7)(student, labels, teacher)
    places = [x.movedim(1, 3).reshape(-1, 3) for x in (student, teacher)]
    assert float(whole) == pytest.approx(float(distillation_loss(4.0, 0.7)(places[0], labels.ravel(), places[1])))


def test_places_labelled_minus_one_do_not_count() -> None:
    logits, labels = torch.tensor(rng().normal(size=(1, 3, 2, 2))), torch.tensor([[[0, 1], [-1, -1]]])
    judged = functional.cross_entropy(logits[:, :, :1], labels[:, :1])
    assert float(cross_entropy(logits, labels)) == pytest.approx(float(judged))


def test_each_column_of_answers_counts_the_same_in_a_regression() -> None:
    """Pixels and probabilities: being off by one deviation costs the same in both."""
    teacher = (rng().normal(size=(200, 6, 2)) * [30.0, 0.01]).astype(np.float32)
    loss = regression_loss(lambda outputs, labels: 0.0, teacher, 1.0)
    answers = torch.from_numpy(teacher)
    off = [answers + torch.tensor(shift) for shift in ([30.0, 0.0], [0.0, 0.01])]
    costs = [float(loss(outputs, None, answers)) for outputs in off]
    assert costs == pytest.approx([0.25, 0.25], rel=0.1)
    assert float(loss(answers, None, answers)) == 0


def test_answers_that_never_vary_are_regressed_too() -> None:
    loss = regression_loss(lambda outputs, labels: 2.0, np.ones((5, 3), np.float32), 0.5)
    assert float(loss(torch.zeros(5, 3), None, torch.ones(5, 3))) == pytest.approx(0.5 * 0.5 + 0.5 * 2)


def test_the_users_loss_is_taken_with_its_parameters(tmp_path: Path, code: Call) -> None:
    outputs, labels = torch.ones(4, 2), torch.zeros(4, 2)
    soft = SoftTargets(np.full((4, 2), 0.5, np.float32), 4.0, 0.25)
    assert float(loss_of(job(tmp_path, loss=code), None, None)(outputs, labels)) == 3
    mixed = loss_of(job(tmp_path, loss=code), None, soft)
    assert float(mixed(outputs, labels, torch.ones(4, 2))) == pytest.approx(0.75 * 3)
    assert loss_of(job(tmp_path, loss=code), cross_entropy, None) is cross_entropy
    assert loss_of(job(tmp_path), None, None) is cross_entropy


def test_a_network_that_is_no_classifier_is_trained_and_scored_by_its_own(tmp_path: Path, code: Call) -> None:
    """A regression: the loss falls, and the user's metric of the held-out part is recorded under its name."""
    inputs = rng().normal(size=(400, 3)).astype(np.float32)
    split = Split(inputs, (inputs @ np.array([[1.0, 2], [0, 1], [3, 0]])).astype(np.float32))
    progress = Silent()
    work = Job(Data(split, split), 0, tmp_path, progress, loss=code, metric="user_loss_case:near")
    fit(torch.nn.Linear(3, 2), work, Schedule(20, 0.05, batch_size=16), "fit")
    assert isinstance(progress.last, dict)
    assert progress.last["near"] > 90
