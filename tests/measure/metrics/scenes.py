"""Made-up answers of a detector: boxes that are off by some pixels, some of another class, and false ones."""

import numpy as np

CLASSES, ANCHORS, OBJECTS = 4, 40, 4


def made(n: int, seed: int = 0, noise: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """(n, 40, 8) answers and (n, 4, 5) labels; class 3 is rare."""
    rng = np.random.default_rng(seed)
    labels = np.full((n, OBJECTS, 5), -1, np.float32)
    outputs = np.zeros((n, ANCHORS, 4 + CLASSES), np.float32)
    outputs[..., :2] = rng.uniform(0, 40, (n, ANCHORS, 2))
    outputs[..., 2:4] = outputs[..., :2] + rng.uniform(8, 24, (n, ANCHORS, 2))
    outputs[..., 4:] = rng.beta(0.2, 12, (n, ANCHORS, CLASSES))
    for i in range(n):
        for k in range(rng.integers(0, OBJECTS + 1)):
            kind = min(int(rng.geometric(0.45)) - 1, CLASSES - 1)
            corner = rng.uniform(0, 6, 2) + 26 * np.array((k % 2, k // 2))  # a quarter for each, so that none is hidden
            labels[i, k] = (kind, *corner, *(corner + rng.uniform(12, 24, 2)))
            for anchor in rng.choice(ANCHORS, 2, replace=False):
                outputs[i, anchor, :4] = labels[i, k, 1:] + rng.normal(0, noise, 4)
                outputs[i, anchor, 4:] = 0
                outputs[i, anchor, 4 + (kind if rng.random() < 0.9 else rng.integers(CLASSES))] = rng.beta(5, 2)
    return outputs, labels


def perfect(labels: np.ndarray) -> np.ndarray:
    """Answers that are right: one sure box for each object."""
    outputs = np.zeros((len(labels), ANCHORS, 4 + CLASSES), np.float32)
    outputs[..., 2:4] = 1
    for i, sample in enumerate(labels):
        for k, (kind, *box) in enumerate(sample[sample[:, 0] >= 0]):
            outputs[i, k, :4], outputs[i, k, 4 + int(kind)] = box, 0.9
    return outputs
