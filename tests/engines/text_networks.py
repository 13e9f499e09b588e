"""Transformers as small as they get, on the ids of tests.engines.texts.

`python -m tests.engines.text_networks FOLDER LENGTHS` writes a candidate and its engine by ONNX Runtime, with the
tokenizer, from an environment that has PyTorch.
"""

import sys
from pathlib import Path

import torch
from tests.engines.texts import WORDS, document, samples
from torch import nn

from slipstream.data.tokens import Tokenizer
from slipstream.engines.base import build_engine
from slipstream.frameworks.base import Job
from slipstream.frameworks.torch import FRAMEWORK
from slipstream.frameworks.torch_training import Training
from slipstream.spec import Call, Target

WIDTH = 16


class Encoder(nn.Module):
    """One layer of attention with one head, and the mean of its states."""

    def __init__(self, rows: int, masks: bool) -> None:
        super().__init__()
        self.masks = masks
        self.words, self.positions = nn.Embedding(rows, WIDTH), nn.Embedding(64, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        real = (ids != 0).float() if self.masks else torch.ones_like(ids).float()
        states = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        weights = self.query(states) @ self.key(states).transpose(-1, -2) / WIDTH**0.5 + ((1 - real) * -1e4)[:, None]
        states = self.norm(states + weights.softmax(-1) @ self.value(states))
        mean = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        answers: torch.Tensor = self.classifier(mean)
        return answers


HEADS, INNER = 2, 32


class Block(nn.Module):
    """An encoder's layer as people write them: heads of a fixed number, and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.widen, self.narrow = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.mixed_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        parts = (self.query(states), self.key(states), self.value(states))
        query, key, value = (p.unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2) for p in parts)
        weights = (query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5 + mask).softmax(-1)
        states = self.mixed_norm(states + self.mix((weights @ value).transpose(1, 2).flatten(2)))
        answer: torch.Tensor = self.norm(states + self.narrow(nn.functional.gelu(self.widen(states))))
        return answer


class Transformer(nn.Module):
    """Two blocks. `fixed` repeats the width of the states as a number, as much code does."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.fixed = fixed
        self.words, self.positions = nn.Embedding(len(WORDS), WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        real = (ids != 0).float()
        states = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            states = block(states, ((1 - real) * -1e4)[:, None, None, :])
        if self.fixed:
            states = states.reshape(-1, ids.shape[1], WIDTH)
        answers: torch.Tensor = self.classifier((states * real[..., None]).sum(1) / real.sum(1, keepdim=True))
        return answers


def transformer(fixed: bool = False) -> nn.Module:
    return Transformer(fixed)


def train_transformer(training: Training) -> nn.Module:
    network = transformer()
    training.fit(network, epochs=2, learning_rate=0.01, batch_size=16, optimizer="adamw")
    return network


def encoder(rows: int = len(WORDS), masks: bool = True) -> nn.Module:
    return Encoder(rows, masks)


def train(training: Training) -> nn.Module:
    network = encoder()
    training.fit(network, epochs=6, learning_rate=0.02, batch_size=16, optimizer="adamw")
    return network


def frozen(training: Training) -> nn.Module:
    network = encoder()
    network.words.requires_grad_(False)
    training.fit(network, epochs=1, learning_rate=0.02, batch_size=16, optimizer="adamw")
    return network


def trained(job: Job) -> nn.Module:
    """The network that `train` makes in a job."""
    network: nn.Module = FRAMEWORK.train(Call(function="tests.engines.text_networks:train"), job)
    return network


def write(folder: Path) -> Path:
    """A candidate folder with an untrained network."""
    architecture = Call(function="tests.engines.text_networks:encoder")
    FRAMEWORK.save(FRAMEWORK.build(architecture, 0), architecture, samples(8), folder)
    return folder


if __name__ == "__main__":
    candidate, lengths = write(Path(sys.argv[1]) / "candidate"), tuple(map(int, sys.argv[2].split(",")))
    target = Target(engine="onnxruntime", threads=1, lengths=lengths)
    build_engine(candidate, target, candidate.with_name("engine"), Tokenizer(document()).limited(lengths[-1]))
