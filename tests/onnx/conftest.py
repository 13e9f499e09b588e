"""The candidates of the engines' tests."""

from tests.engines.conftest import fp32, int8

__all__ = ["fp32", "int8"]
