"""A sound detector whose answers to blank pages are all close to 0 is exported, as one with text on its pages is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slipstream.data.splits import Split
from slipstream.frameworks.base import ONNX
from slipstream.frameworks.torch import FRAMEWORK
from slipstream.onnx.session import Session
from slipstream.spec import Call


def detector(bias: float) -> nn.Module:
    """A map of probabilities that there is text; `bias` is the logit of an empty place."""
    torch.manual_seed(0)
    last = nn.Conv2d(8, 1, 3, padding=1)
    nn.init.constant_(last.bias, bias)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU(), last, nn.Sigmoid()).eval()


@pytest.mark.parametrize("bias", [-9.0, -14.0, -16.0, -18.0, -30.0])
def test_blank_pages(bias: float, tmp_path: Path) -> None:
    pages = np.zeros((8, 1, 32, 32), np.float32)
    network = detector(bias)
    FRAMEWORK.save(network, Call(function="m:detector"), Split(pages, np.zeros(8, np.int64)), tmp_path / "candidate")
    answers = Session(tmp_path / "candidate" / ONNX).run(pages)
    with torch.inference_mode():
        print(f"bias {bias}: {answers.max():.3g} in ONNX Runtime, {network(torch.tensor(pages)).max():.3g} in PyTorch")
