"""Fixtures that the registry's tests share with those of the stages; the store's other tests need neither."""

from importlib.util import find_spec

if find_spec("pandas"):  # as in the environment that the registry's tests run in
    from tests.steps.stages import fake, world, world_maker

    __all__ = ["fake", "world", "world_maker"]
