"""Training with Keras: one loop that resumes after a kill, for train functions, distillation and fine-tuning."""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipstream.contract.arrays import Array, Float32Array
from slipstream.errors import ModelError
from slipstream.frameworks import training
from slipstream.frameworks.base import Job, Schedule, SoftTargets
from slipstream.frameworks.keras_losses import Loss, ends_in_softmax, logarithm, loss_of
from slipstream.frameworks.keras_runtime import keras, tf
from slipstream.frameworks.training import DECOUPLED_WEIGHT_DECAY, MOMENTUM, WEIGHT_DECAY, hold_out
from slipstream.home import replacing
from slipstream.measure.metrics.base import metric_for, value

log = logging.getLogger(__name__)

RISE, START, END = 0.3, 25.0, 25e4
"""Share of the steps in which the rate rises, and the peak as a multiple of the first and of the last rate, as in
PyTorch's OneCycleLR."""
BATCH = 512
TFMOT = "tensorflow_model_optimization"


class Checkpoint:
    """State of a training in progress: arrays by name, in one file that is always complete (written aside, renamed)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, Array] | None:
        """Return the last saved state, or None at the first attempt. Nothing is unpickled."""
        if not self.path.exists():
            return None
        with np.load(self.path, allow_pickle=False) as arrays:
            return dict(arrays)

    def save(self, state: Mapping[str, npt.ArrayLike]) -> None:
        """Replace the state."""
        with replacing(self.path) as file:
            np.savez(file, **{name: np.asarray(value) for name, value in state.items()})  # type: ignore[arg-type]


class Training(training.Training):
    """Input of a train function: `def train(training, **params) -> tf.keras.Model`.

    Most call `fit` once and return the network:

        network = cnn()
        training.fit(network, epochs=4, learning_rate=0.1)
        return network

    A function that calls Keras's own `network.fit` survives a kill with `BackupAndRestore(training.folder / "backup")`
    among its callbacks. Random numbers are seeded before the function is called.
    """

    @property
    def folder(self) -> Path:
        """Folder for checkpoints: the same again when a killed step is retried, and removed when the step is done."""
        return self._job.folder

    def checkpoint(self, name: str = "own") -> Checkpoint:
        """Return a checkpoint for a custom loop."""
        return Checkpoint(self._job.folder / f"{name}.npz")

    def _fit(self, network: keras.Model, schedule: Schedule, name: str, loss: Loss | None) -> None:
        fit(network, self._job, schedule, name, loss=loss)


class OneCycle(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc] # Keras has no types
    """One cycle of the learning rate over all steps (Smith and Topin 2018), with cosines up and down."""

    def __init__(self, peak: float, steps: int) -> None:
        self.peak, self.steps = peak, steps

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """Return the rate of a step, from 0."""
        rise, position = RISE * self.steps - 1, tf.cast(step, tf.float32)
        up = _cosine(self.peak / START, self.peak, position / max(rise, 1))
        down = _cosine(self.peak, self.peak / END, (position - rise) / max(self.steps - 1 - rise, 1))
        return tf.where(position < rise, up, down)

    def get_config(self) -> dict[str, float]:
        """Return the settings, for Keras."""
        return {"peak": self.peak, "steps": self.steps}


def _cosine(first: float, last: float, share: tf.Tensor) -> tf.Tensor:
    return last + (first - last) / 2 * (1 + tf.cos(math.pi * tf.clip_by_value(share, 0.0, 1.0)))


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and TensorFlow's generators, and choose deterministic kernels."""
    keras.utils.set_random_seed(seed % 2**32)
    tf.config.experimental.enable_op_determinism()


def steps_per_epoch(samples: int, schedule: Schedule, seed: int) -> int:
    """Return the batches of an epoch over a training split: only whole ones, without the held-out part."""
    own = len(hold_out(samples, seed)[0])
    return own // min(schedule.batch_size, own)


def fit(
    network: keras.Model,
    job: Job,
    schedule: Schedule,
    name: str,
    *,
    loss: Loss | None = None,
    soft: SoftTargets | None = None,
) -> None:
    """Train in place as training.run describes. Raise ModelError if the loss becomes NaN or infinite."""
    require_keras(network)
    loop = _Loop(network, job, schedule, loss_of(network, job, loss, soft), soft)
    training.run(loop, Checkpoint(job.folder / f"{name}.npz"))


class _Loop:
    """Network, optimizer and data of one `fit`."""

    def __init__(
        self, network: keras.Model, job: Job, schedule: Schedule, loss: Loss, soft: SoftTargets | None
    ) -> None:
        self.network, self.job, self.schedule, self.loss = network, job, schedule, loss
        split = job.data.train
        self.metric = metric_for(job.metric)
        self.arrays = [split.inputs, split.labels, *([soft.logits] if soft is not None else [])]
        self.indices, self.held_out = hold_out(len(split), job.seed)
        self.batch_size = min(schedule.batch_size, len(self.indices))
        self.batches = len(self.indices) // self.batch_size
        network(split.inputs[:1], training=False)  # clustering's wrappers hold all their variables only after a call
        self.variables = list(network.variables)
        self.optimizer = _optimizer(schedule, self.batches * schedule.epochs)
        self.optimizer.build(network.trainable_variables)
        self.step = tf.function(self._step, reduce_retracing=True)

    def _step(self, inputs: tf.Tensor, *targets: tf.Tensor) -> tf.Tensor:
        """Do one step on a batch; return its loss."""
        with tf.GradientTape() as tape:
            loss = self.loss(self.network(inputs, training=True), *targets)
            total = tf.add_n([loss, *self.network.losses])  # with the layers' own regularizers
        variables = self.network.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(total, variables), variables, strict=True))
        return loss

    def epoch(self, epoch: int) -> float:
        """Do one pass; return the mean loss."""
        self._seed(epoch)
        pruning = _pruning(self.network)
        # The order depends only on seed and epoch, so that a resumed training sees the same one.
        order = np.random.default_rng((self.job.seed, self.schedule.epochs_before + epoch))
        shuffled, total = order.permutation(self.indices), 0.0
        for number in range(self.batches):
            chosen = shuffled[number * self.batch_size :][: self.batch_size]
            loss = float(self.step(*(tf.constant(array[chosen]) for array in self.arrays)))
            if not math.isfinite(loss):
                raise ModelError(f"training: the loss is {loss} in epoch {epoch + 1}; lower the learning rate")
            total += loss
            training.report(self, epoch, number + 1, total / (number + 1))
        pruning.on_epoch_end(epoch)  # zeros the weights that the last step moved
        return total / self.batches

    def _seed(self, epoch: int) -> None:
        """Seed the random numbers of layers such as dropout from seed and epoch only, so a resumed training repeats
        them."""
        for number, generator in enumerate(_generators(self.network)):
            sequence = np.random.SeedSequence((self.job.seed, self.schedule.epochs_before + epoch, number))
            generator.reset_from_seed(int(sequence.generate_state(1)[0]))

    def validate(self) -> float:
        """Return the metric on the held-out part of the training split, in percent."""
        split = self.job.data.train
        answers, labels = logits(self.network, split.inputs[self.held_out]), split.labels[self.held_out]
        self.metric.check(answers, labels, "the network", ModelError)
        return 100 * value(self.metric, self.metric.evaluate(answers, labels))

    def learning_rate(self) -> float:
        """Return the rate after the last batch."""
        return float(self.optimizer.learning_rate)

    def state(self, epochs_done: int) -> dict[str, npt.ArrayLike]:
        """Return everything that determines how training continues."""
        parts = {"network": self.variables, "optimizer": list(self.optimizer.variables)}
        arrays = {f"{part}-{i}": v.numpy() for part, variables in parts.items() for i, v in enumerate(variables)}
        return {"epochs_done": np.int64(epochs_done), **arrays}

    def restore(self, state: Mapping[str, Array]) -> int:
        """Continue from a state; return the number of completed epochs."""
        for part, variables in (("network", self.variables), ("optimizer", list(self.optimizer.variables))):
            for i, variable in enumerate(variables):
                variable.assign(state[f"{part}-{i}"])
        return int(state["epochs_done"])


def _optimizer(schedule: Schedule, steps: int) -> keras.optimizers.Optimizer:
    rate = OneCycle(schedule.learning_rate, steps)
    if schedule.optimizer == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=DECOUPLED_WEIGHT_DECAY)
    # Keras multiplies the decay by the rate, as PyTorch's SGD does.
    return keras.optimizers.SGD(rate, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)


def _pruning(network: keras.Model) -> keras.callbacks.Callback:
    """Return the callback that counts the steps of pruning's schedule; no effect if the network is not being pruned."""
    if TFMOT not in sys.modules:  # takes seconds to import, and has been where a network is wrapped for pruning
        return keras.callbacks.Callback()
    import tensorflow_model_optimization as tfmot

    callback = tfmot.sparsity.keras.UpdatePruningStep()
    callback.set_model(network)
    callback.on_train_begin()
    return callback


def _generators(network: keras.Model) -> list[tf.random.Generator]:
    """Return the random generators of a network's layers, in order.

    Keras does not include them in the variables, and has no public access to them.
    """
    held = [getattr(layer, "_random_generator", None) for layer in network.submodules]
    generators = [getattr(h, "_generator", None) for h in held]
    return [generator for generator in generators if generator is not None]


def logits(network: keras.Model, inputs: Array) -> Float32Array:
    """Return (N, …) float32 outputs for inputs (N, …); the logarithm if the network answers probabilities.

    Class scores can then be used as logits: their order is the same, and softmax gives the probabilities.
    """
    answer = outputs(network, inputs)
    return np.asarray(logarithm(answer)) if ends_in_softmax(network) else answer


def outputs(network: Callable[..., tf.Tensor], inputs: Array) -> Float32Array:
    """Return (N, …) float32 outputs for inputs (N, …) in inference mode."""
    batches = (tf.constant(inputs[i : i + BATCH]) for i in range(0, len(inputs), BATCH))
    return np.concatenate([np.asarray(network(batch, training=False), np.float32) for batch in batches])


def require_keras(network: object) -> None:
    """Raise ModelError for a SavedModel without Keras's description, which can only answer."""
    if not isinstance(network, keras.Model):
        raise ModelError(
            "the model is a SavedModel without Keras's own description of its layers: it can be quantized and built, "
            "but neither trained nor pruned; register the .keras or .h5 file"
        )
