"""A sweep in MLflow: the run above its trials' runs."""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Any

from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from raydmd.errors import InputError
from raydmd.tracking.reader import OBJECTIVES, SWEEP, patience
from raydmd.tracking.tracker import WRITING, experiment_of, flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from raydmd.recipe import Recipe


class Group:
    """The MLflow run of a sweep, one for all its clusters.

    Args:
        client: of the tracking server.
        run_id: of the run.
        name: of the sweep.
    """

    def __init__(self, client: MlflowClient, run_id: str, name: str) -> None:
        self._client, self.run_id, self._name = client, run_id, name

    @classmethod
    def open(
        cls, base: Recipe, name: str, keep: Callable[[str, Callable[[], str]], str], tags: Mapping[str, str]
    ) -> Group:
        """The sweep's run, made by whoever comes first.

        Args:
            base: the recipe of the sweep, whose tracking counts.
            name: of the sweep.
            keep: gives what all clusters share by name, from a function that the first one calls.
            tags: of the run.

        Raises:
            InputError: if the tracking server can't be used.
        """
        uri = base.tracking.uri
        try:
            with patience(WRITING):
                client = MlflowClient(tracking_uri=uri)

                def make() -> str:
                    run = client.create_run(experiment_of(client, base), run_name=name, tags={**tags, SWEEP: name})
                    made: str = run.info.run_id
                    for key, value in flatten(base.model_dump(mode="json", exclude={"tracking"})):
                        client.log_param(made, key, value[:6000])
                    return made

                # Of this tracking server: clusters may each have their own.
                group = cls(
                    client, keep(f"mlflow {hashlib.blake2b(str(uri).encode(), digest_size=5).hexdigest()}", make), name
                )
                client.set_terminated(group.run_id, status="RUNNING")
        except (MlflowException, OSError) as error:
            raise InputError(f"tracking.uri {uri}: {error}") from error
        return group

    def tags(self) -> dict[str, str]:
        """Of the runs below it."""
        return {MLFLOW_PARENT_RUN_ID: self.run_id, SWEEP: self._name}

    def close(self, rows: Sequence[Any], objectives: Mapping[str, str], files: Sequence[Path] = ()) -> None:
        """Write the best of each objective so far, and end the run; a server that is away does not undo a sweep.

        Args:
            rows: the trials.
            objectives: with their goals.
            files: that belong to the sweep.
        """
        try:
            with patience(WRITING):
                self._write(rows, objectives, files)
        except Exception as error:  # whatever the client raises, the study has it all
            print(f"tracking: the sweep's results did not reach MLflow ({type(error).__name__}: {error})", flush=True)

    def _write(self, rows: Sequence[Any], objectives: Mapping[str, str], files: Sequence[Path]) -> None:
        now = int(time.time() * 1000)
        done = [row for row in rows if row.values]
        self._client.set_tag(self.run_id, OBJECTIVES, json.dumps(dict(objectives)))
        if done:
            best = {k: (min if goal == "min" else max)(row.values[k] for row in done) for k, goal in objectives.items()}
            metrics = [Metric(f"best/{k}", v, now, len(done)) for k, v in best.items()]
            self._client.log_batch(self.run_id, metrics=metrics, tags=[RunTag("raydmd.finished", str(len(done)))])
        for file in files:
            self._client.log_artifact(self.run_id, str(file))
        self._client.set_terminated(self.run_id, status="FINISHED")
