"""What to run: the flow of a spec, the published specs, the documents of a step, and the settings."""
