"""Hypothesis without deadlines: these tests compute, and a busy machine must not fail them."""

from hypothesis import settings

settings.register_profile("measure", deadline=None)
settings.load_profile("measure")
