"""MLflow: tracked runs, the registry, and the signatures that protect both."""
