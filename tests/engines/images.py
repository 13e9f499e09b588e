"""Images for tests of small candidates: 1×16×16 float32, 5 classes."""

import numpy as np

SHAPE = (1, 16, 16)
CLASSES = 5


def samples(n: int, seed: int = 1) -> np.ndarray:
    """(n, 1, 16, 16) float32 images: each has a bright quadrant, so that answers differ from image to image."""
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 0.3, (n, *SHAPE)).astype(np.float32)
    for i in range(n):
        y, x = (8 * ((i // 2) % 2), 8 * (i % 2))
        images[i, :, y : y + 8, x : x + 8] += 1.5
    return images
