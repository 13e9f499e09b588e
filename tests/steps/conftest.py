"""Fixtures of the tests of stages 2 and 3, and of those that build engines."""

from importlib.util import find_spec

from tests.steps.stages import fake, quiet, world, world_maker

__all__ = ["fake", "quiet", "world", "world_maker"]

if find_spec("onnx"):  # not in the environment that serves, whose tests build none
    from tests.engines.conftest import fp32, int8

    __all__ += ["fp32", "int8"]
