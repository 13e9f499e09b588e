"""prune: fewer channels after each round, the history travels with the weights."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.steps.training import document, spec_of, step
from tests.techniques.contract import Case, Make, TechniqueContract

from slipstream.errors import ModelError
from slipstream.frameworks.base import framework_for, read_manifest
from slipstream.frameworks.torch_training import Checkpoint
from slipstream.spec import Prune
from slipstream.store.tracking import fetch
from slipstream.techniques.prune import sparsity_schedule

torch.set_num_threads(1)


def pruning(model: str) -> dict[str, Any]:
    """A spec whose recipe prunes the trained model itself."""
    return document(model) | {"recipes": {"small": ["prune"]}}


class TestPrune(TechniqueContract):
    checkpoint = "*.pt"

    @pytest.fixture
    def make(self) -> Make:
        def case(name: str) -> Case:
            spec = spec_of(pruning(f"prune-{name}"))
            changes = {
                "sparsity": (0.2, 0.5),
                "rounds": 3,
                "epochs": 2,
                "learning_rate": 0.05,
                "optimizer": {"optimizer": "adamw", "learning_rate": 0.0005},
                "soft_weight": 0.5,
                "temperature": 2.0,
                "round_to": 4,
                "begin_step": 1,
                "end_step": 900,
                "frequency": 50,
            }
            measured = frozenset({"sparsity", "macs", "macs_before", "parameters", "test_top1"})
            return Case("prune", spec, "small", step("retrain", spec), measured, changes, frozenset({"method"}))

        return case


def test_rounds_shrink_the_network_and_the_candidate_loads_again(mlflow_server: str, home: Path) -> None:
    spec = spec_of(pruning("pruned"))
    baseline = step("retrain", spec)
    output = step("prune", spec, baseline, recipe="small")
    first, last = output.details["rounds"]
    assert 0 < first["sparsity"] < last["sparsity"]
    assert last["macs"] < first["macs"] < output.metrics["macs_before"]
    assert output.metrics["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert output.artifact is not None
    candidate = fetch(output.artifact)
    assert read_manifest(candidate).sparsity == output.metrics["sparsity"]
    eager = framework_for("torch").load_eager(candidate)
    assert eager.run(np.zeros((3, 1, 28, 28), np.float32)).shape == (3, 10)


def test_killed_after_a_round_it_ends_with_the_same_weights(
    mlflow_server: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second round's first checkpoint fails to be written; the retry starts in the second round."""
    whole, killed = (spec_of(pruning(name)) for name in ("whole-prune", "killed-prune"))
    expected = step("prune", whole, step("retrain", whole), recipe="small")
    baseline = step("retrain", killed)
    save = Checkpoint.save

    def save_or_die(self: Checkpoint, state: dict) -> None:
        if self.path.stem == "round-2":
            raise OSError("disk gone")
        save(self, state)

    # The data differ in nothing but the model's name, so that the first run's result is not simply reused.
    monkeypatch.setenv("SLIPSTREAM_HOME", os.environ["SLIPSTREAM_HOME"] + "-killed")
    monkeypatch.setattr(Checkpoint, "save", save_or_die)
    with pytest.raises(OSError, match="disk gone"):
        step("prune", killed, baseline, recipe="small")
    monkeypatch.setattr(Checkpoint, "save", save)
    loaded = []
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self: loaded.append((self.path.stem, load(self))) or loaded[-1][1])
    output = step("prune", killed, baseline, recipe="small")
    assert [(name, state is not None) for name, state in loaded] == [("round-1", True), ("round-2", False)]
    assert output.artifact is not None and expected.artifact is not None
    assert output.artifact.sha256 == expected.artifact.sha256


def test_nothing_to_remove_is_an_error_not_a_result(mlflow_server: str, home: Path) -> None:
    written = pruning("unprunable")
    written["prune"] |= {"round_to": 128}
    spec = spec_of(written)
    with pytest.raises(ModelError, match=r"lower prune\.round_to"):
        step("prune", spec, step("retrain", spec), recipe="small")


def test_schedule_is_cubic_from_first_to_last() -> None:
    """Equation 1 of Zhu and Gupta (2017) by hand: 0.5 − 0.2 · (1 − t/4)³."""
    found = sparsity_schedule(Prune(sparsity=(0.3, 0.5), rounds=5))
    assert found == pytest.approx([0.3, 0.415625, 0.475, 0.496875, 0.5])
    assert sparsity_schedule(Prune(sparsity=(0.3, 0.5), rounds=1)) == [0.5]


def test_a_text_network_is_pruned_on_token_ids(mlflow_server: str, home: Path) -> None:
    """Training, two rounds, and the candidate again: a float sample in place of ids ended it after the training."""
    written = {
        "name": "text",
        "model": {
            "registry": "models:/pruned-text@source",
            "architecture": "tests.engines.text_networks:transformer",
            "train": "tests.engines.text_networks:train_transformer",
        },
        "data": "tests.engines.texts:data",
        "recipes": {"small": ["prune"]},
        "prune": {"sparsity": [0.25, 0.5], "rounds": 2, "epochs": 1, "round_to": 4}
        | {"optimizer": "adamw", "learning_rate": 0.001},
        "targets": {"portable": {"engine": "onnxruntime", "lengths": [8, 12]}},
    }
    spec = spec_of(written)
    output = step("prune", spec, step("retrain", spec), recipe="small")
    first, last = output.details["rounds"]
    assert 0 < first["sparsity"] < last["sparsity"] < 0.5
    assert output.metrics["parameters"] < output.metrics["parameters_before"]
    assert output.artifact is not None
    candidate = fetch(output.artifact)
    eager = framework_for("torch").load_eager(candidate)
    assert [eager.run(np.ones((3, length), np.int64)).shape for length in (4, 12)] == [(3, 2), (3, 2)]
    assert framework_for("torch").load(candidate).blocks[0].widen.out_features == 16
