"""Losses for PyTorch: cross entropy or the user's, and the part of a teacher's answers."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from slipstream.contract.arrays import Float32Array
from slipstream.data.user_code import user_function
from slipstream.frameworks.base import Job, SoftTargets

Loss = Callable[..., torch.Tensor]
"""(outputs, labels) → mean loss; with soft targets (outputs, labels, teacher's outputs) → mean loss."""


def distillation_loss(temperature: float, weight: float) -> Loss:
    """Hinton et al. 2015: weight · T² · KL(teacher ‖ student at temperature T) + (1 − weight) · cross entropy.

    T² keeps the gradient of the soft part in proportion when T changes (their section 2). Outputs are (N, classes), or
    (N, classes, …) for maps of classes, where both parts are means over all positions.
    """

    def loss(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        soft = functional.kl_div(
            functional.log_softmax(logits / temperature, dim=1),
            functional.log_softmax(teacher / temperature, dim=1),
            reduction="none",
            log_target=True,
        )
        return weight * temperature**2 * soft.sum(1).mean() + (1 - weight) * cross_entropy(logits, labels)

    return loss


def regression_loss(own: Loss, teacher: Float32Array, weight: float) -> Loss:
    """Return weight · smooth L1 (outputs, teacher's outputs) + (1 − weight) · the user's loss of outputs and labels.

    Without knowing what outputs mean, a student can still regress on the teacher's (Ba and Caruana 2014). All numbers
    along the last axis, such as coordinates and scores of a box, have equal weight: each is divided by its standard
    deviation over the teacher's answers (N, …, last), and large differences count linearly (Girshick 2015, equation 3).
    """
    spread = teacher.std(axis=tuple(range(teacher.ndim - 1)), dtype=np.float64)
    scale = torch.from_numpy(np.where(spread > 0, spread, 1.0).astype(np.float32))

    def loss(outputs: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        unit = scale.to(outputs.device)
        return weight * functional.smooth_l1_loss(outputs / unit, teacher / unit) + (1 - weight) * own(outputs, labels)

    return loss


def cross_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean over samples, or over the positions of maps; the label -1 is ignored."""
    return functional.cross_entropy(outputs, labels, ignore_index=-1)


def loss_of(job: Job, given: Loss | None, soft: SoftTargets | None) -> Loss:
    """Return a training's loss: the given one, the user's `model.loss`, or cross entropy; with soft targets, if any."""
    call = job.loss
    own: Loss | None = given if given is not None or call is None else partial(user_function(call), **call.params)
    if soft is None:
        return own or cross_entropy
    if own is None:
        return distillation_loss(soft.temperature, soft.weight)
    return regression_loss(own, soft.logits, soft.weight)
