"""One MLflow run per raydmd run: keyed by cycle, idempotent over restarts, written by the driver alone.

The rows come from the run's ``metrics.jsonl``, which is complete; a tracking server that is away for a
while therefore costs nothing but time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from raydmd.errors import InputError

if TYPE_CHECKING:
    from raydmd.recipe import Recipe

STEP = "cycle"
ATTEMPT = "monitor/attempt"


class Tracker:
    """A run in MLflow.

    Args:
        client: of the tracking server.
        run_id: of the run.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self.run_id = run_id
        # After a rollback the same cycles come again, as another attempt.
        attempts = [(int(m.value), m.step) for m in client.get_metric_history(run_id, ATTEMPT)]
        cycles = [(0, m.step) for m in client.get_metric_history(run_id, STEP)]
        self._logged = max([*attempts, *cycles], default=(0, -1))

    @classmethod
    def open(cls, recipe: Recipe, tags: Mapping[str, str]) -> Tracker:
        """Find the run that this raydmd run had before, or make it.

        Raises:
            InputError: if the tracking server cannot be used.
        """
        folder = recipe.folder
        file = folder / "mlflow_run_id"
        uri = recipe.tracking.uri or f"sqlite:///{recipe.output.expanduser().absolute() / 'mlflow.db'}"
        try:
            client = MlflowClient(tracking_uri=uri)
            if file.is_file():
                run_id = file.read_text().strip()
                client.set_terminated(run_id, status="RUNNING")
                known = cls(client, run_id)
                known.tag(tags)  # of this attempt: its versions, and what a population has made of its settings
                return known
            run = client.create_run(experiment_of(client, recipe), run_name=recipe.name, tags=dict(tags))
        except (MlflowException, OSError) as error:
            raise InputError(f"tracking.uri {uri}: {error}") from error
        run_id = run.info.run_id
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(run_id)
        partial.replace(file)
        tracker = cls(client, run_id)
        params = [Param(k, v[:6000]) for k, v in flatten(recipe.model_dump(mode="json", exclude={"tracking"}))]
        for i in range(0, len(params), 100):
            client.log_batch(run_id, params=params[i : i + 100])
        client.log_dict(run_id, recipe.model_dump(mode="json", exclude={"tracking"}), "recipe.yaml")
        return tracker

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows of metrics, each with its ``cycle``; those already written are left out."""
        now = int(time.time() * 1000)
        for row in rows:
            step = int(row[STEP])
            place = (int(row.get(ATTEMPT, self._logged[0])), step)
            if place <= self._logged:
                continue
            metrics = [Metric(_key(k), float(v), now, step) for k, v in row.items() if isinstance(v, int | float)]
            self._client.log_batch(self.run_id, metrics=metrics)
            self._logged = place

    def figures(self, figures: Mapping[str, float], *, step: int) -> None:
        """Write the figures of an evaluation after so many cycles, unless they are there."""
        first = next(iter(figures))
        if any(m.step == step for m in self._client.get_metric_history(self.run_id, _key(first))):
            return
        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(_key(k), v, now, step) for k, v in figures.items()])

    def results(self, figures: Mapping[str, float], artifacts: Sequence[Path], *, step: int) -> None:
        """Write the last evaluation's figures and the files that belong to the run."""
        self.figures(figures, step=step)
        for path in artifacts:
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), path.name)
            elif path.exists():
                self._client.log_artifact(self.run_id, str(path))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def end(self, status: str) -> None:
        """Close the run as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._client.set_terminated(self.run_id, status=status)


def experiment_of(client: MlflowClient, recipe: Recipe) -> str:
    """The id of a recipe's experiment, made if it is not there."""
    name, uri = recipe.tracking.experiment, recipe.tracking.uri
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    # An embedded database has no server to take files: they lie beside it.
    beside = None if uri and not uri.startswith("sqlite:") else recipe.output.expanduser().absolute()
    if beside and uri:
        beside = Path(uri.removeprefix("sqlite:///")).parent.absolute()
    try:
        made = client.create_experiment(name, artifact_location=(beside / "mlartifacts").as_uri() if beside else None)
    except MlflowException:  # another run has just made it
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)
    return str(made)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted keys with text values."""
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += flatten(value, f"{prefix}{key}.")
        else:
            found.append(
                (
                    f"{prefix}{key}",
                    yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip(),
                )
            )
    return found


def _key(name: str) -> str:
    """MLflow allows letters, digits and ``_-. /`` in a metric's name."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
