"""The steps: one module for each row of `plugins.STEPS`, which is the flow as data."""
