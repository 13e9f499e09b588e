"""Quality metrics, by sample or for a set. One module for each kind, found by its name in plugins/."""
