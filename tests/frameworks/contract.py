"""What every framework that trains must do. A new one subclasses `FrameworkContract` and supplies `framework` and
`call`; one that removes channels subclasses `ChannelPruningContract`."""

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from slipstream.data.splits import Data, Split
from slipstream.errors import ModelError
from slipstream.frameworks.base import INPUT, ONNX, OUTPUT, WEIGHTS, Job, Schedule, Trainer, read_manifest
from slipstream.spec import Call


class Recorder:
    """Keeps what training reports."""

    def __init__(self) -> None:
        self.epochs: dict[int, dict[str, float]] = {}
        self.done: list[tuple[int, int]] = []

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.epochs[step] = dict(values)

    def progress(self, done: int, total: int, unit: str = "", **figures: float) -> None:
        self.done.append((done, total))


def squares(samples: int, seed: int) -> Split:
    """1×8×8 images with one bright quadrant, which is the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, samples)
    images = rng.normal(0, 0.5, (samples, 1, 8, 8)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        y, x = divmod(int(label), 2)
        image[0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 1
    return Split(images, labels.astype(np.int64))


def channels_last(split: Split) -> Split:
    """The same images as 8×8×1."""
    return Split(np.ascontiguousarray(split.inputs.transpose(0, 2, 3, 1)), split.labels)


class FrameworkContract:
    """Tests against the seam in frameworks/base.py."""

    framework: Trainer
    call: Call
    """An architecture for 1×8×8 images in four classes."""
    weights = WEIGHTS
    """The file of a candidate that the network is loaded from."""
    channels_last = False
    """Whether the architecture takes them as 8×8×1."""

    @pytest.fixture
    def job(self, tmp_path: Path) -> Job:
        splits = [squares(400, 1), squares(100, 2)]
        train, test = map(channels_last, splits) if self.channels_last else splits
        return Job(Data(train, test), seed=5, folder=tmp_path, progress=Recorder())

    @pytest.fixture
    def candidate(self, job: Job, tmp_path: Path) -> Path:
        network = self.framework.build(self.call, job.seed)
        self.framework.fit(network, job, Schedule(3, 0.05, batch_size=32), "fixture")
        self.framework.save(network, self.call, job.data.test, tmp_path / "candidate")
        return tmp_path / "candidate"

    def test_seed_decides_the_untrained_network(self, job: Job) -> None:
        a, b, c = (
            self.framework.logits(self.framework.build(self.call, seed), job.data.test.inputs) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)

    def test_training_learns_and_reports_each_epoch(self, job: Job) -> None:
        network = self.framework.build(self.call, job.seed)
        self.framework.fit(network, job, Schedule(3, 0.05, batch_size=32), "fit")
        top1 = (self.framework.logits(network, job.data.test.inputs).argmax(1) == job.data.test.labels).mean()
        assert top1 > 0.9
        recorder = job.progress
        assert isinstance(recorder, Recorder)
        assert set(recorder.epochs) == {0, 1, 2}
        assert recorder.epochs[2]["train_loss"] < recorder.epochs[0]["train_loss"]
        assert {"train_loss", "top1", "lr"} <= recorder.epochs[0].keys()
        assert recorder.done[-1][0] == recorder.done[-1][1]

    def test_training_again_repeats_nothing_and_changes_nothing(self, job: Job) -> None:
        first, second = (self.framework.build(self.call, job.seed) for _ in range(2))
        self.framework.fit(first, job, Schedule(2, 0.05, batch_size=32), "same")
        recorder = job.progress
        assert isinstance(recorder, Recorder)
        recorder.done.clear()
        self.framework.fit(second, job, Schedule(2, 0.05, batch_size=32), "same")
        assert recorder.done == []
        inputs = job.data.test.inputs
        np.testing.assert_array_equal(self.framework.logits(first, inputs), self.framework.logits(second, inputs))

    def test_a_training_interrupted_at_any_epoch_ends_the_same(self, job: Job, tmp_path: Path) -> None:
        schedule = Schedule(3, 0.05, batch_size=32)
        whole = self.framework.build(self.call, job.seed)
        self.framework.fit(whole, job, schedule, "whole")
        for last in range(3):
            stopping = Stopping(after=last)
            interrupted = Job(job.data, job.seed, tmp_path, stopping)
            with pytest.raises(Stopped):
                network = self.framework.build(self.call, job.seed)
                self.framework.fit(network, interrupted, schedule, f"stopped-{last}")
            resumed = self.framework.build(self.call, job.seed)
            self.framework.fit(resumed, job, schedule, f"stopped-{last}")
            np.testing.assert_array_equal(
                self.framework.logits(whole, job.data.test.inputs),
                self.framework.logits(resumed, job.data.test.inputs),
            )

    def test_candidate_loads_back_to_the_same_answers_in_all_forms(self, candidate: Path, job: Job) -> None:
        inputs = job.data.test.inputs
        loaded = self.framework.logits(self.framework.load(candidate), inputs)
        weights = self.framework.logits(self.framework.load_weights(candidate / self.weights, self.call), inputs)
        np.testing.assert_array_equal(loaded, weights)
        eager = self.framework.load_eager(candidate, threads=1)
        for size in (1, 3, len(inputs)):
            session = onnxruntime.InferenceSession(candidate / ONNX, providers=["CPUExecutionProvider"])
            np.testing.assert_allclose(eager.run(inputs[:size]), loaded[:size], rtol=1e-4, atol=1e-4)
            onnx = session.run([OUTPUT], {INPUT: inputs[:size]})[0]
            np.testing.assert_allclose(onnx, loaded[:size], rtol=1e-3, atol=1e-3)
        assert eager.run(inputs[:2]).dtype == np.float32

    def test_manifest_tells_shapes_without_the_batch(self, candidate: Path) -> None:
        manifest = read_manifest(candidate)
        shape = (8, 8, 1) if self.channels_last else (1, 8, 8)
        assert (manifest.input_shape, manifest.output_shape, manifest.input_dtype) == (shape, (4,), "float32")
        assert manifest.sparsity == 0 and not manifest.quantized

    def test_eager_does_not_depend_on_the_thread_that_calls_it(self, candidate: Path, job: Job) -> None:
        eager, inputs = self.framework.load_eager(candidate, threads=1), job.data.test.inputs[:4]
        answers: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: answers.append(eager.run(inputs)))
        thread.start()
        thread.join()
        np.testing.assert_array_equal(answers[0], eager.run(inputs))

    def test_damaged_weights_are_refused(self, candidate: Path) -> None:
        (candidate / self.weights).write_bytes(b"not weights")
        with pytest.raises(ModelError, match="cannot be read"):
            self.framework.load(candidate)


class ChannelPruningContract(FrameworkContract):
    """For frameworks with a Pruner."""

    def test_pruning_keeps_classes_and_multiples_and_loads_back(
        self, candidate: Path, job: Job, tmp_path: Path
    ) -> None:
        pruner = self.framework.pruner(candidate)
        before = pruner.figures()
        pruner.prune(0.25, round_to=4)
        first = pruner.figures()
        pruner.prune(0.5, round_to=4)
        last = pruner.figures()
        assert before["sparsity"] == 0 < first["sparsity"] < last["sparsity"] == pytest.approx(0.5)
        assert before["macs"] > first["macs"] > last["macs"]
        manifest = pruner.save(tmp_path / "pruned", job.data.test)
        assert manifest.sparsity == last["sparsity"] and manifest.parameters == last["parameters"]
        inputs = job.data.test.inputs
        np.testing.assert_array_equal(
            self.framework.logits(self.framework.load(tmp_path / "pruned"), inputs),
            self.framework.logits(pruner.network, inputs),
        )

    def test_a_pruned_candidate_can_be_pruned_again(self, candidate: Path, job: Job, tmp_path: Path) -> None:
        pruner = self.framework.pruner(candidate)
        pruner.prune(0.25, round_to=4)
        pruner.save(tmp_path / "once", job.data.test)
        again = self.framework.pruner(tmp_path / "once")
        again.prune(0.34, round_to=4)
        again.save(tmp_path / "twice", job.data.test)
        assert read_manifest(tmp_path / "twice").sparsity == pytest.approx(0.5)
        self.framework.load(tmp_path / "twice")


class Stopped(Exception):
    """Stands for a kill."""


class Stopping(Recorder):
    """Dies as the epoch after `after` ends, before its checkpoint is written."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        if step == self.after:
            raise Stopped
