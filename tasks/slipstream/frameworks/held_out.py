"""The part of the training split that is only ever evaluated on while a network trains."""

import numpy as np
import numpy.typing as npt

from slipstream.errors import DataError

HELD_OUT = 0.05
"""Share of the training split that is only ever evaluated on, so that the test split stays unseen."""


def hold_out(samples: int, seed: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices to train on and indices to validate on. Raises DataError below two samples."""
    if samples < 2:
        raise DataError(f"data: the training split has {samples} samples; training needs at least 2")
    order = np.random.default_rng(seed).permutation(samples)
    held = max(int(samples * HELD_OUT), 1)
    return order[held:], order[:held]
