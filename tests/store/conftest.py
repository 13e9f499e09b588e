"""Fixtures that the registry's tests share with those of the stages."""

from tests.steps.stages import fake, world, world_maker

__all__ = ["fake", "world", "world_maker"]
