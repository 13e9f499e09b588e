"""Runs a step: what it works with, whether it was run before, and in how many processes."""
