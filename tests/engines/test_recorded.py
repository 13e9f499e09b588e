"""Recorded answers: bounded, one sample at a time, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from slipstream.engines import recorded
from slipstream.errors import EngineError
from slipstream.onnx.agreement.bounds import repeated


class Doubling:
    """Answers twice its input, and remembers the sizes of its batches."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor
        self.batches: list[int] = []

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self.batches.append(len(batch))
        return (batch * self.factor).reshape(len(batch), -1).astype(np.float32)


def images(n: int, side: int = 4) -> npt.NDArray[Any]:
    return np.random.default_rng(0).normal(size=(n, 1, side, side)).astype(np.float32)


@pytest.mark.parametrize(("given", "kept"), [(64, recorded.SAMPLES), (3, 3)])
def test_a_few_samples_are_asked_alone_and_kept(tmp_path: Path, given: int, kept: int) -> None:
    runner = Doubling()
    recorded.record(tmp_path, runner, images(given))
    samples, answers = recorded.read(tmp_path)
    assert runner.batches == [1] * kept
    np.testing.assert_array_equal(samples, images(given)[:kept])
    np.testing.assert_array_equal(answers, 2 * samples.reshape(kept, -1))


@pytest.mark.parametrize(("side", "most"), [(200, 6), (2000, 1)])
def test_the_file_is_bounded_but_never_empty(tmp_path: Path, side: int, most: int) -> None:
    path = recorded.record(tmp_path, Doubling(), images(8, side))
    assert len(recorded.read(tmp_path)[0]) == most
    assert most == 1 or path.stat().st_size < recorded.MOST_BYTES + 2000


def test_the_same_answers_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = (recorded.record(tmp_path, Doubling(), images(4)).read_bytes() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("precision", "quantized", "factor", "accepted"),
    [
        ("f32", False, 2.0, True),
        ("f32", False, 2.01, False),
        ("f16", False, 2.01, True),
        ("f16", False, 2.05, False),
        ("bf16", False, 2.05, True),
        ("bf16", False, 2.2, False),
        ("f32", True, 2.05, True),
        ("f32", True, 2.2, False),
    ],
)
def test_other_answers_are_refused_beyond_what_the_precision_explains(
    tmp_path: Path, precision: str, quantized: bool, factor: float, accepted: bool
) -> None:
    recorded.record(tmp_path, Doubling(), images(8))
    bound = repeated(precision, quantized=quantized)
    if accepted:
        recorded.require_repeated(tmp_path, Doubling(factor), bound, ("library: built with '1', here '2'",))
        return
    with pytest.raises(EngineError, match=r"its own answers to 8 samples.*library: built with.*slipstream rebuild"):
        recorded.require_repeated(tmp_path, Doubling(factor), bound, ("library: built with '1', here '2'",))


def test_token_ids_are_recorded_as_they_are(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.int64).reshape(3, 4)
    recorded.record(tmp_path, Doubling(), ids)
    assert recorded.read(tmp_path)[0].dtype == np.int64


def test_an_engine_without_recorded_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no recorded answers"):
        recorded.read(tmp_path)
