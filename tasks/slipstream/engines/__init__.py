"""Engines, which turn a candidate into the bytes that are deployed. One module each, found by its name in
plugins/."""
