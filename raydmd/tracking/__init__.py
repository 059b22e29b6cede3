"""MLflow, written from one process per run."""
