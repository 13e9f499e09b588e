"""Quality metrics: how good answers are, sample by sample or as a set. One module for each kind, found by its name in
plugins.py.
"""
