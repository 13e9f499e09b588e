"""Fixtures of the tests of stages 2 and 3."""

from tests.steps.stages import fake, quiet, world, world_maker

__all__ = ["fake", "quiet", "world", "world_maker"]
