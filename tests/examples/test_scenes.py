"""The scenes and their networks: labels fit the pixels, answers fit the metric, and channels can be removed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the environment torch")

import torch
from examples import scenes

from slipstream.data.splits import Data
from slipstream.frameworks import torch_pruner, torch_training
from slipstream.frameworks.base import framework_for, read_manifest
from slipstream.measure.metrics.base import metric_for, value
from slipstream.spec import Call

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def detection() -> Data:
    return scenes.detection(train=60, test=40)


@pytest.fixture(scope="module")
def segmentation() -> Data:
    return scenes.segmentation(train=60, test=40)


def test_the_same_scenes_come_again_and_boxes_are_those_of_the_masks(detection: Data, segmentation: Data) -> None:
    assert detection.train.digest == scenes.detection(train=60, test=40).train.digest
    np.testing.assert_array_equal(detection.test.inputs, segmentation.test.inputs)
    lone = [i for i, boxes in enumerate(detection.train.labels) if (boxes[:, 0] >= 0).sum() == 1]
    assert len(lone) > 5
    for i in lone:
        kind, *box = detection.train.labels[i, 0].tolist()
        y, x = np.nonzero(segmentation.train.labels[i])
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert set(segmentation.train.labels[i][y, x]) == {kind + 1}
    assert len({d.hex() for d in detection.train.sample_digests() + detection.test.sample_digests()}) == 100


@pytest.mark.parametrize(
    ("name", "metric"),
    [("detector", "map"), ("small_detector", "map"), ("segmenter", "miou"), ("small_segmenter", "miou")],
)
def test_answers_fit_the_metric_and_the_network_can_be_saved_and_pruned(
    name: str, metric: str, detection: Data, segmentation: Data, tmp_path: Path
) -> None:
    data = detection if metric == "map" else segmentation
    framework, call = framework_for("torch"), Call(function=f"examples.scenes:{name}")
    network = framework.build(call, seed=0)  # type: ignore[attr-defined]
    answers = framework.logits(network, data.test.inputs)
    judge = metric_for(metric)
    judge.check(answers, data.test.labels, "the network")
    assert judge.classes(answers.shape) == len(data.classes)
    framework.save(network, call, data.test, tmp_path / "whole")
    pruner = framework.pruner(tmp_path / "whole")  # type: ignore[attr-defined]
    pruner.prune(0.5, 4)
    pruner.save(tmp_path / "pruned", data.test)
    smaller, whole = (read_manifest(tmp_path / folder) for folder in ("pruned", "whole"))
    assert smaller.parameters < 0.5 * whole.parameters
    assert smaller.output_shape == whole.output_shape
    assert torch_pruner.read_history(tmp_path / "pruned")
    assert framework.load_eager(tmp_path / "pruned").run(data.test.inputs[:3]).shape == (3, *whole.output_shape)


def test_the_loss_of_right_boxes_is_least(detection: Data) -> None:
    labels = torch.from_numpy(detection.test.labels)
    kinds, boxes, positive = scenes._assigned(labels, torch)
    assert (positive.sum(1) >= (labels[..., 0] >= 0).sum(1)).all(), "every item has an anchor point"
    right = torch.zeros(*positive.shape, 4 + len(scenes.KINDS))
    right[..., :4] = boxes
    right[(*positive.nonzero(as_tuple=True), 4 + kinds[positive])] = 1.0
    shifted, silent = right.clone(), right.clone()
    shifted[..., :4] += 3
    silent[..., 4:] = 0
    least = float(scenes.detection_loss(right, labels))
    assert least == pytest.approx(0, abs=1e-4)
    assert min(float(scenes.detection_loss(worse, labels)) for worse in (shifted, silent)) > 0.3
    metric = metric_for("map")
    assert value(metric, metric.evaluate(right.numpy(), detection.test.labels)) > 0.99


def test_it_learns(detection: Data, tmp_path: Path) -> None:
    """Eight scenes, memorized: their boxes are found again."""
    few = detection.train.take(np.arange(40) % 8)
    progress = SimpleNamespace(metrics=lambda values, step=0: None, progress=lambda done, total, unit, **figures: None)
    job = torch_training.Job(Data(few, few), 0, tmp_path, progress, metric="map")
    torch_training.seed_everything(0)
    network = scenes.train_detector(torch_training.Training(job), epochs=60)
    metric = metric_for("map")
    answers = torch_training.logits(network, few.inputs[:8])
    assert value(metric, metric.evaluate(answers, few.labels[:8])) > 0.6
