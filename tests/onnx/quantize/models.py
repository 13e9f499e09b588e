"""A small attention network in ONNX: token ids (N, T) int64, padded with 0, to five classes."""

import io
import warnings
from functools import cache

import numpy as np
import onnx
import torch
from torch import nn

from slipstream.frameworks.base import INPUT, OUTPUT

WORDS, WIDTH, CLASSES = 50, 32, 5


class Attention(nn.Module):
    """One layer; what is padding gets `mask` added to its score."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.mask = mask
        self.words = nn.Embedding(WORDS, WIDTH)
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        real = ids != 0
        states = self.words(ids)
        scores = self.query(states) @ self.key(states).transpose(1, 2) / WIDTH**0.5
        weights = (scores + torch.where(real, 0.0, self.mask)[:, None, :]).softmax(-1)
        states = self.norm(states + self.mix(weights @ self.value(states))) * real[..., None]
        answers: torch.Tensor = self.classifier(states.sum(1) / real.sum(1, keepdim=True))
        return answers


@cache
def attention(mask: float = -1e4) -> onnx.ModelProto:
    """Batch and length are dynamic."""
    torch.manual_seed(0)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Attention(mask).eval(),
            (torch.ones(2, 7, dtype=torch.int64),),
            file,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch", 1: "length"}, OUTPUT: {0: "batch"}},
            opset_version=20,
            dynamo=False,
        )
    return onnx.load_from_string(file.getvalue())


def ids(samples: int, seed: int = 0, length: int = 9) -> np.ndarray:
    """(samples, length) texts of different lengths."""
    rng = np.random.default_rng(seed)
    found = rng.integers(1, WORDS, (samples, length))
    for text, end in zip(found, rng.integers(3, length + 1, samples), strict=True):
        text[end:] = 0
    return found
