"""The peak of resident memory, measured on work that holds a known amount."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from slipstream.measure.memory import peak_added

MIB = 2**20
MUCH = 64
"""MiB: more than the C library ever takes from what was freed before (M_MMAP_THRESHOLD, at most 32 MiB)."""
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak")


def hold(mib: int) -> np.ndarray:
    """(mib * 2**20,) bytes, each page of them touched."""
    return np.ones(mib * MIB, dtype=np.uint8)


def test_memory_that_was_given_back_counts() -> None:
    held: list[int] = []
    peak = peak_added(lambda: held.append(int(hold(200)[0])))
    assert held == [1]
    assert peak is not None and 195 < peak < 260


def test_an_earlier_peak_does_not_count() -> None:
    hold(300)
    peak = peak_added(lambda: hold(MUCH)[0])
    assert peak is not None and MUCH - 5 < peak < MUCH + 60


def test_what_was_held_before_does_not_count() -> None:
    held = hold(150)
    peak = peak_added(lambda: hold(MUCH)[0])
    assert held[-1] == 1 and peak is not None and MUCH - 5 < peak < MUCH + 60


def test_nothing_is_said_where_the_kernel_does_not_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    asked: list[str] = []
    assert peak_added(lambda: asked.append("first"), proc=tmp_path / "none") is None
    assert "no peak of memory is measured" in caplog.text
    (tmp_path / "status").write_text("Name:\tpython\n")
    assert peak_added(lambda: asked.append("second"), proc=tmp_path) is None
    assert asked == ["first", "second"]


def test_memory_that_lay_free_counts_when_it_is_taken_again() -> None:
    pieces = [bytearray(b"1" * 50_000) for _ in range(600)]  # 30 MiB, too small each to be mapped on its own
    keep = pieces[-1:]
    del pieces
    peak = peak_added(lambda: len([bytearray(b"1" * 50_000) for _ in range(600)]))
    assert keep and peak is not None and 20 < peak < 60
