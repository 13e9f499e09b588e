"""The small network of `candidates.py` in PyTorch, as a user would write it."""

from tests.engines.images import CLASSES
from torch import nn


def small() -> nn.Module:
    """Two convolutions, a flatten, a dense layer: 1×16×16 images to 5 scores."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, CLASSES),
    )


def dense() -> nn.Module:
    """Quick to compile."""
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, CLASSES))
