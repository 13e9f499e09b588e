"""The candidates that engines are built from, in FP32 and in INT8."""

from pathlib import Path

import pytest
from tests.engines.candidates import network, quantized, write


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fp32") / "candidate", network())


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("int8") / "candidate", quantized(network()), is_quantized=True)
