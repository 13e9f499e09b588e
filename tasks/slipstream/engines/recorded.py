"""An engine's own answers to a few real samples, recorded in its folder when it was built.

The same bytes can give other answers under another version of a library or on another processor. Such an engine must
reproduce these answers when it is loaded, within what its precision explains; otherwise the served engine is not the
one that was judged. The file is bounded, and not counted as part of the engine's size.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from slipstream.contract.arrays import Array
from slipstream.errors import EngineError
from slipstream.onnx.agreement.bounds import Agreement, Bound, explain_mismatch, measure

log = logging.getLogger(__name__)

FILE = "recorded.npz"
SAMPLES = 16
MOST_BYTES = 2 * 2**20
"""Limit for samples and answers together; a model with large ones gets fewer than SAMPLES, but at least one."""


class Runs(Protocol):
    """A loaded engine (engines.base.Runner)."""

    def run(self, batch: Array) -> Array:
        """Return (N, …) outputs for inputs (N, …)."""
        ...


def record(folder: Path, runner: Runs, samples: Array) -> Path:
    """Write the first of the samples (N, …) and the engine's answers. Return the file.

    Each sample is run alone, as most requests are: an engine may have another form for a batch of one.
    """
    answers: list[Array] = []
    for i in range(min(SAMPLES, len(samples))):
        answers.append(runner.run(np.ascontiguousarray(samples[i : i + 1])))
        if (i + 2) * (samples[:1].nbytes + answers[0].nbytes) > MOST_BYTES:
            break
    path = folder / FILE
    np.savez(path, samples=samples[: len(answers)], answers=np.concatenate(answers))
    return path


def read(folder: Path) -> tuple[Array, Array]:
    """Return samples (N, …) and answers (N, …). Raise EngineError if there are none."""
    try:
        with np.load(folder / FILE, allow_pickle=False) as stored:
            return stored["samples"], stored["answers"]
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(
            f"{folder.name}: it has no recorded answers ({error}), so that nothing shows whether it answers here as it "
            "did where it was judged; build it again"
        ) from error


def answer(runner: Runs, samples: Array) -> Array:
    """Return (N, …) answers, with each sample run alone."""
    return np.concatenate([runner.run(samples[i : i + 1]) for i in range(len(samples))])


def require_repeated(folder: Path, runner: Runs, bound: Bound, changes: Sequence[str]) -> Agreement:
    """Return how far the engine's answers are from the recorded ones.

    Raise EngineError if that is more than `bound` explains. `changes` describe the differences here, for the message.
    """
    samples, expected = read(folder)
    answers = answer(runner, samples)
    problem = explain_mismatch(expected, answers, bound)
    if problem is not None:
        raise EngineError(
            f"{folder.name}: compared with its own answers to {len(samples)} samples, recorded where it was built, it "
            f"{problem} ({'; '.join(changes)}); `slipstream rebuild MODEL` builds a champion again for this machine"
        )
    agreement = measure(expected, answers)
    log.info(
        "%s: repeats its answers to %d recorded samples, largest difference %.2g (%s)",
        folder.name,
        len(samples),
        agreement.max_abs_diff,
        "; ".join(changes),
    )
    return agreement
