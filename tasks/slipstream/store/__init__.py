"""MLflow: the runs that are tracked, the registry, and the signatures by which both are believed."""
