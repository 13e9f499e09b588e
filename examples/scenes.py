"""Scenes of Fashion-MNIST items for detection and segmentation: real pixels, boxes and masks that are known.

Each scene is 64×64 grey pixels with one to three items at random places and sizes; training scenes are made of training
items and test scenes of test items. The networks are made inside functions, since the model servers load the data where
there is no PyTorch.
"""

import numpy as np
from examples import fashion

from slipstream import Data, Split

SIZE, STRIDE, MOST = 64, 8, 3  # pixels; pixels between the detector's anchors; items in a scene
KINDS = ("top", "trouser", "dress", "shoe", "bag")
KIND_OF = np.array([0, 1, 0, 2, 0, 3, 0, 3, 4, 3])  # Fashion-MNIST class → kind
CLASSES = ("background", *KINDS)  # of a pixel


def detection(train=4000, test=1000):
    """Scenes with (N, 3, 5) float32 labels: kind and corners x1, y1, x2, y2 of each item; -1 where there is none."""
    splits = [Split(scenes, boxes) for scenes, boxes, _ in _scenes(train, test)]
    return Data(*splits, classes=KINDS)


def segmentation(train=3000, test=600):
    """Scenes with (N, 64, 64) int64 labels: the kind of item at each pixel, or 0 for background."""
    splits = [Split(scenes, masks) for scenes, _, masks in _scenes(train, test)]
    return Data(*splits, classes=CLASSES)


def detector(width=16):
    """A one-stage detector without anchor boxes (Tian et al. 2019): 64 anchor points, each says where the sides are.

    Answers (N, 64, 4 + kinds): corners in pixels and a score for each kind.
    """
    import torch
    from torch import nn

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                *_convolution(1, width, stride=2),
                *_convolution(width, 2 * width, stride=2),
                *_convolution(2 * width, 2 * width),
                *_convolution(2 * width, 4 * width, stride=2),
                *_convolution(4 * width, 4 * width),
                *_convolution(4 * width, 4 * width),
                *_convolution(4 * width, 4 * width),
            )
            self.sides = nn.Conv2d(4 * width, 4, 1)
            self.kinds = nn.Conv2d(4 * width, len(KINDS), 1)
            nn.init.constant_(self.kinds.bias, -3.0)  # most anchors see no item: start there (Lin et al. 2017)
            self.register_buffer("points", torch.from_numpy(_points()), persistent=False)

        def forward(self, scenes):
            features = self.body(scenes)
            near, far = (STRIDE * nn.functional.softplus(self.sides(features)).flatten(2)).split(2, dim=1)
            corners = torch.cat((self.points - near, self.points + far), dim=1)
            return torch.cat((corners, torch.sigmoid(self.kinds(features)).flatten(2)), dim=1).transpose(1, 2)

    return Detector()


def small_detector():
    """Half as wide."""
    return detector(width=8)


def train_detector(training, epochs=10):
    """Train the detector."""
    network = detector()
    training.fit(network, epochs=epochs, learning_rate=0.004, batch_size=32, optimizer="adamw", loss=detection_loss)
    return network


def detection_loss(outputs, labels):
    """Generalized IoU of the boxes (Rezatofighi et al. 2019) and quality focal loss of the scores (Li et al. 2020).

    An anchor point answers for the smallest item whose middle part it lies in; its score is to be its box's IoU.
    """
    import torch

    boxes, scores = outputs[..., :4], outputs[..., 4:].clamp(1e-6, 1 - 1e-6)
    kinds, wanted, positive = _assigned(labels, torch)
    overlap, generalized = _overlaps(boxes[positive], wanted[positive], torch)
    targets = torch.zeros_like(scores)
    targets[(*positive.nonzero(as_tuple=True), kinds[positive])] = overlap.detach()
    entropy = torch.nn.functional.binary_cross_entropy(scores, targets, reduction="none")
    found = positive.sum().clamp(min=1)
    return (entropy * (targets - scores.detach()).abs() ** 2).sum() / found + 2 * (1 - generalized).sum() / found


def segmenter(width=16):
    """A U-Net (Ronneberger et al. 2015) that begins at half the resolution; its last layer answers four pixels at each
    place (Shi et al. 2016). Answers (N, classes, 64, 64) logits."""
    import torch
    from torch import nn

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.top = nn.Sequential(*_convolution(1, width, stride=2), *_convolution(width, width))
            self.middle = nn.Sequential(*_convolution(width, 2 * width, stride=2), *_convolution(2 * width, 2 * width))
            self.bottom = nn.Sequential(
                *_convolution(2 * width, 4 * width, stride=2),
                *_convolution(4 * width, 4 * width),
                *_convolution(4 * width, 4 * width),
            )
            self.rise = nn.Sequential(*_convolution(6 * width, 2 * width))
            self.end = nn.Sequential(*_convolution(3 * width, 2 * width), nn.Conv2d(2 * width, 4 * len(CLASSES), 1))
            self.up, self.pixels = nn.Upsample(scale_factor=2), nn.PixelShuffle(2)

        def forward(self, scenes):
            top = self.top(scenes)
            middle = self.middle(top)
            rise = self.rise(torch.cat((middle, self.up(self.bottom(middle))), dim=1))
            return self.pixels(self.end(torch.cat((top, self.up(rise)), dim=1)))

    return Segmenter()


def small_segmenter():
    """Half as wide."""
    return segmenter(width=8)


def train_segmenter(training, epochs=8):
    """Train the segmenter."""
    network = segmenter()
    training.fit(network, epochs=epochs, learning_rate=0.004, batch_size=32, optimizer="adamw")
    return network


def _convolution(inputs, outputs, stride=1):
    from torch import nn

    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def _points():
    """(2, 64) float32 x and y of the anchor points, row by row."""
    along = np.arange(SIZE // STRIDE, dtype=np.float32) * STRIDE + STRIDE / 2
    y, x = np.meshgrid(along, along, indexing="ij")
    return np.stack((x.ravel(), y.ravel()))


def _assigned(labels, torch):
    """(N, 64) kind, (N, 64, 4) box and (N, 64) whether there is one, for each anchor point."""
    points = torch.from_numpy(_points()).to(labels.device).T[None, :, None]  # (1, 64, 1, 2)
    low, high = labels[:, None, :, 1:3], labels[:, None, :, 3:5]
    reach = ((high - low) / 4).clamp(min=STRIDE / 2 + 0.5)  # so that at least one point is in reach of each middle
    within = ((points - (low + high) / 2).abs() <= reach).all(-1) & (labels[:, None, :, 0] >= 0)
    area = (high - low).prod(-1).expand(within.shape).masked_fill(~within, float("inf"))
    least, item = area.min(-1)
    chosen = torch.gather(labels, 1, item[..., None].expand(-1, -1, 5))
    return chosen[..., 0].long(), chosen[..., 1:], torch.isfinite(least)


def _overlaps(boxes, wanted, torch):
    """(P,) IoU and generalized IoU of (P, 4) boxes."""
    size = (torch.minimum(boxes[:, 2:], wanted[:, 2:]) - torch.maximum(boxes[:, :2], wanted[:, :2])).clamp(min=0)
    shared = size.prod(1)
    union = sum((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, wanted)) - shared
    hull = (torch.maximum(boxes[:, 2:], wanted[:, 2:]) - torch.minimum(boxes[:, :2], wanted[:, :2])).prod(1)
    overlap = shared / union.clamp(min=1e-6)
    return overlap, overlap - (hull - union) / hull.clamp(min=1e-6)


def _scenes(train, test):
    """For both splits: (N, 1, 64, 64) float32 scenes, (N, 3, 5) boxes, (N, 64, 64) masks."""
    items = fashion.data()
    for split, samples, seed in ((items.train, train, 1), (items.test, test, 2)):
        images = split.inputs[:, 0] * fashion.DEVIATION + fashion.MEAN
        yield _compose(images, KIND_OF[split.labels], samples, np.random.default_rng(seed))


def _compose(images, kinds, samples, rng):
    scenes = np.zeros((samples, 1, SIZE, SIZE), np.float32)
    boxes = np.full((samples, MOST, 5), -1, np.float32)
    masks = np.zeros((samples, SIZE, SIZE), np.int64)
    for scene, within, mask in zip(scenes[:, 0], boxes, masks, strict=True):
        for k in range(rng.integers(1, MOST + 1)):
            chosen = rng.integers(len(images))
            item = _resized(images[chosen], rng.integers(20, 37))
            item = item[np.ix_((item > 0).any(1), (item > 0).any(0))]  # so that its box is tight
            box = _room(item.shape, within[:, 1:][within[:, 0] >= 0], rng)
            if box is not None:
                within[k] = (kinds[chosen], *box)
                area = np.s_[box[1] : box[3], box[0] : box[2]]
                scene[area] = np.where(item > 0, item, scene[area])
                mask[area] = np.where(item > 0, kinds[chosen] + 1, mask[area])
    return (scenes - fashion.MEAN) / fashion.DEVIATION, boxes, masks


def _room(shape, others, rng):
    """Corners x1, y1, x2, y2 where an item of this shape hides little of the others; None where there is no room."""
    height, width = shape
    for _ in range(20):
        y, x = rng.integers(SIZE - height + 1), rng.integers(SIZE - width + 1)
        box = np.array([x, y, x + width, y + height])
        shared = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None).prod(1)
        if (shared <= 0.15 * height * width).all():
            return box
    return None


def _resized(image, size):
    """(size, size) of an image, bilinear; what is faint is background."""
    along = np.clip((np.arange(size) + 0.5) * len(image) / size - 0.5, 0, len(image) - 1)
    low = np.minimum(along.astype(int), len(image) - 2)
    part = (along - low).astype(np.float32)
    rows = image[low] * (1 - part)[:, None] + image[low + 1] * part[:, None]
    found = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return np.where(found > 0.05, found, 0)
