"""User code that the tests name in specs."""

import torch
from torch import nn


def squares() -> nn.Module:
    """A small convolutional network with dropout and batch norm: both have state that a resume must restore."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


class Branches(nn.Module):
    """Goes one way for bright batches and another for dark ones: what an ONNX trace cannot carry."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        return self.layer(flat) if len(images) > 1 else self.layer(flat) * 2


def branches() -> nn.Module:
    return Branches()


def tied() -> nn.Module:
    """Two layers that share one weight."""
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.Linear(64, 4))


class Causal(nn.Module):
    """Rows of an image as a sequence, in which each attends to itself and to those before, as a GPT's tokens do."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Linear(8, 24)
        self.normalize = nn.BatchNorm1d(8)
        self.answer = nn.Linear(64, 4)
        self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        query, key, value = self.parts(images[:, 0]).chunk(3, dim=2)
        weights = (query @ key.transpose(1, 2) / 8**0.5 + self.mask).softmax(dim=2)
        answers: torch.Tensor = self.answer(self.normalize(weights @ value).flatten(1))
        return answers


def causal() -> nn.Module:
    return Causal()


def not_a_network() -> str:
    return "a string"


class Idle(nn.Module):
    """No batch norm and no dropout, so that it learns the same however a batch is shared out; one layer is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
        self.unused = nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.used(images)
        return answers


def idle() -> nn.Module:
    return Idle()
