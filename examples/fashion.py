"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): what a user writes besides the spec.

The networks are made inside functions, since the model servers load `data` where there is no PyTorch.
"""

import gzip
from pathlib import Path

import numpy as np

from slipstream import Data, Home, Split

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist; the same arrays, other gzip bytes
ADDRESS = "https://fashion-mnist.s3.eu-central-1.amazonaws.com/"
SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels, scaled to 0…1


def data(limit=None):
    """60,000 training and 10,000 test images; with `limit`, the first `limit` and `limit` / 5 of them."""
    test_limit = None if limit is None else max(limit // 5, 1)
    return Data(train=_split("train", limit), test=_split("t10k", test_limit), classes=CLASSES)


def resnet():
    """ResNet-14 for grey images (He et al. 2015): 16 to 64 channels, half the resolution from the first layer on."""
    return _resnet(width=16, blocks=2)


def student():
    """ResNet-8: as wide, but half as deep."""
    return _resnet(width=16, blocks=1)


def train(training, epochs=4):
    """Train the baseline."""
    network = resnet()
    training.fit(network, epochs=epochs, learning_rate=0.1, batch_size=128)
    return network


def _resnet(width, blocks):
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.body = nn.Sequential(*convolution(inputs, outputs, stride), nn.ReLU(), *convolution(outputs, outputs))
            same = inputs == outputs and stride == 1
            self.skip = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, stride, size=1))

        def forward(self, images):
            return nn.functional.relu(self.body(images) + self.skip(images))

    def convolution(inputs, outputs, stride=1, size=3):
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)

    layers, channels = [*convolution(1, width, stride=2), nn.ReLU()], width
    for stage in range(3):
        for block in range(blocks):
            outputs = width * 2**stage
            layers.append(Residual(channels, outputs, stride=2 if stage and block == 0 else 1))
            channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, len(CLASSES)))


def _split(name, limit):
    images = _read(f"{name}-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28)[:limit]
    labels = _read(f"{name}-labels-idx1-ubyte.gz", header=8)[:limit]
    return Split(((images / np.float32(255) - MEAN) / DEVIATION).astype(np.float32), labels.astype(np.int64))


def _read(name, header):
    path = DEBIAN / name
    if not path.exists():
        import pooch

        folder = Home.from_environment().cache / "fashion-mnist"
        path = Path(pooch.retrieve(ADDRESS + name, f"sha256:{SHA256[name]}", name, folder))
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
