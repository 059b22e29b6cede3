"""MLflow, written from one process per run."""

RUN_ID = "mlflow_run_id"
"""File of a run with MLflow's name for it; here, where no MLflow has to be imported for it."""
