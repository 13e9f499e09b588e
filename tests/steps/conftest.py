"""Fixtures of the tests of stages 2 and 3."""

from tests.steps.stages import fake, world, world_maker

__all__ = ["fake", "world", "world_maker"]
