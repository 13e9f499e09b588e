"""Techniques: each makes one candidate from another. docs/extending.md adds one."""
