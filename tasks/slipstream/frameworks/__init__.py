"""Frameworks of trained models. One module each, found by its name in plugins/.

Nothing is imported until it is used; a step that only finds its earlier result does not load the framework.
"""
