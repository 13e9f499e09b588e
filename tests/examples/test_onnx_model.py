"""What the ONNX example gives its model; the packages themselves are fetched when it is run."""

import numpy as np
from examples import onnx_model


def numbers(text: bytes) -> list[int]:
    return list(text)


def test_a_short_file_is_at_both_ends_without_the_white_space_outside() -> None:
    given = onnx_model.features(b" \n import numpy \n")
    assert (given.shape, given.dtype) == ((2048,), np.int32)
    first, last = numbers(b"import numpy \n"), numbers(b" \n import numpy")
    assert given[: len(first)].tolist() == first
    assert given[-len(last) :].tolist() == last
    assert set(given[len(first) : -len(last)].tolist()) == {onnx_model.PADDING}


def test_a_long_file_is_its_first_and_its_last_bytes() -> None:
    given = onnx_model.features(b"a" * 5000 + b"b" * 5000)
    assert given.tolist() == numbers(b"a" * 1024 + b"b" * 1024)
