"""Engines: what turns a candidate into bytes that are deployed. One module each, found by its name in plugins.py."""
