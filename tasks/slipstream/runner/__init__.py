"""Runs a step: its context, reuse of earlier results, and the number of processes."""
