"""Losses for Keras: cross entropy or the user's, and the part of a teacher's answers."""

from collections.abc import Callable
from functools import partial

import numpy as np

from slipstream.contract.arrays import Float32Array
from slipstream.data.user_code import user_function
from slipstream.frameworks.base import Job, SoftTargets
from slipstream.frameworks.keras_runtime import keras, tf

Loss = Callable[..., tf.Tensor]
"""(outputs, labels) → mean loss; with soft targets (outputs, labels, teacher's outputs) → mean loss."""

SMALLEST = 1e-7
"""Lower limit of probabilities before the logarithm, as in Keras's own losses."""


def loss_of(network: keras.Model, job: Job, given: Loss | None, soft: SoftTargets | None) -> Loss:
    """Return a training's loss: the given one, the user's `model.loss`, or cross entropy; with soft targets, if any."""
    call = job.loss
    own: Loss | None = given if given is not None or call is None else partial(user_function(call), **call.params)
    if own is not None:
        return own if soft is None else regression_loss(own, soft.logits, soft.weight)
    to_logits = logarithm if ends_in_softmax(network) else tf.identity
    if soft is None:
        return lambda outputs, labels: cross_entropy(to_logits(outputs), labels)
    distill = distillation_loss(soft.temperature, soft.weight)
    return lambda outputs, labels, teacher: distill(to_logits(outputs), labels, teacher)


def distillation_loss(temperature: float, weight: float) -> Loss:
    """Hinton et al. 2015: weight · T² · KL(teacher ‖ student at temperature T) + (1 − weight) · cross entropy.

    T² keeps the gradient of the soft part in proportion when T changes (their section 2). Logits are (N, classes), or
    (N, classes, …) for maps of classes, where both parts are means over all positions.
    """

    def loss(logits: tf.Tensor, labels: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        student, target = (tf.nn.log_softmax(classes_last(x) / temperature) for x in (logits, teacher))
        divergence = tf.reduce_mean(tf.reduce_sum(tf.exp(target) * (target - student), axis=-1))
        return weight * temperature**2 * divergence + (1 - weight) * cross_entropy(logits, labels)

    return loss


def regression_loss(own: Loss, teacher: Float32Array, weight: float) -> Loss:
    """Return weight · smooth L1 (outputs, teacher's outputs) + (1 − weight) · the user's loss of outputs and labels.

    All numbers along the last axis have equal weight: each is divided by its standard deviation over the teacher's
    answers (Ba and Caruana 2014; Girshick 2015, equation 3).
    """
    spread = teacher.std(axis=tuple(range(teacher.ndim - 1)), dtype=np.float64)
    scale = np.where(spread > 0, spread, 1.0).astype(np.float32)

    def loss(outputs: tf.Tensor, labels: tf.Tensor, answers: tf.Tensor) -> tf.Tensor:
        off = tf.abs(outputs - answers) / scale
        smooth = tf.where(off < 1, 0.5 * tf.square(off), off - 0.5)
        return weight * tf.reduce_mean(smooth) + (1 - weight) * own(outputs, labels)

    return loss


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Return the mean over samples of logits (N, classes), or over positions of maps (N, classes, …); -1 is ignored."""
    logits, labels = classes_last(logits), tf.cast(labels, tf.int64)
    judged = tf.cast(labels >= 0, logits.dtype)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), logits)
    return tf.reduce_sum(losses * judged) / tf.maximum(tf.reduce_sum(judged), 1)


def classes_last(logits: tf.Tensor) -> tf.Tensor:
    """Return logits (N, classes, …), the metrics' form, as (N, …, classes), TensorFlow's form; (N, classes) is
    unchanged."""
    return tf.transpose(logits, [0, *range(2, len(logits.shape)), 1])


def logarithm(probabilities: tf.Tensor) -> tf.Tensor:
    """Return logits that softmax maps to these probabilities."""
    return tf.math.log(tf.clip_by_value(probabilities, SMALLEST, 1.0))


def ends_in_softmax(network: keras.Model) -> bool:
    """Return whether a network answers probabilities: its last layer is a softmax, or ends in one.

    Most Keras classifiers do, and losses here take logits.
    """
    layers = getattr(network, "layers", [])
    if not layers:
        return False
    last = layers[-1]
    if isinstance(last, keras.Model):
        return ends_in_softmax(last)
    while hasattr(last, "layer"):  # the wrapper of pruning, clustering and quantization
        last = last.layer
    activation = getattr(last, "activation", None)
    # Quantization-aware training wraps the activation as well.
    wrapped = getattr(activation, "activation", activation)
    return isinstance(last, keras.layers.Softmax) or wrapped is keras.activations.softmax
